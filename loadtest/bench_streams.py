"""What event streams cost one gateway process, and whether every one of them is whole.

    python loadtest/bench_streams.py [--idle 1000] [--streams 10000] [--at-once 64]
                                     [--broker-url amqp://...] [--store-url redis://...]

Starts `codeyard gateway` and a `codeyard worker` on the simulated engine, without URLs on a new embedded file.
First `--idle` readers of one job that never says a word: the gateway's memory (resident set, by difference, after a
few readers that came and went) and its CPU time while nothing happens. Then `--streams` jobs, `--at-once` of
them under way: each is submitted, followed while it runs, and its stream compared with the stored result: the same
text, sequence numbers 1, 2, 3 and so on, one `end`, at the end. Three of four readers hang up after one to three
events and resume with Last-Event-ID. Prints one JSON line; the exit status is 1 unless every stream was whole.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 60.0
RETRY_S = 1.0  # before a submission that was refused is sent again
PATIENCE_S = 300.0  # for one stream, on a machine that does other things too
WARM_UP_READERS = 20
IDLE_S = 10.0  # of watching readers to whom nothing is said
MAX_TOKENS = (1, 96)  # of a job, drawn evenly
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Told:
    """What one reader was told, connections joined."""

    text: str = ""
    last_seq: int = 0
    ended: str = ""  # the state in `end`
    fault: str = ""  # the first thing that was wrong

    def hear(self, event: dict[str, Any]) -> None:
        if self.ended:
            self.fault = self.fault or "an event after `end`"
        if event["seq"] != self.last_seq + 1:
            self.fault = self.fault or f"{event['seq']} after {self.last_seq}"
        self.last_seq = event["seq"]
        if event["kind"] == "restarted":
            self.text = ""
        elif event["kind"] == "end":
            self.ended = event["state"]
        else:
            self.text += event.get("text", "")


class Caller:
    """HTTP by hand, a connection for each request: a whole client would cost more than the gateway."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port

    async def submit(self, model: str, prompt: str, *, max_tokens: int) -> str:
        """The id of the new job."""
        body = {"model": model, "prompt": prompt, "stream": True, "sampling": {"max_tokens": max_tokens}}
        key = f"Idempotency-Key: {uuid.uuid4()}\r\n"
        return str((await self.ask("POST", "/v1/jobs", body, headers=key))["id"])

    async def ask(self, method: str, path: str, body: object = None, *, headers: str = "") -> Any:
        """The JSON document of a good answer. After a 503 or 429 it asks again, as callers do."""
        encoded = json.dumps(body).encode() if body is not None else b""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                reader, writer = await self._connect(method, path, encoded, headers)
                try:
                    head, _, document = (await reader.read()).partition(b"\r\n\r\n")
                finally:
                    writer.close()
                if head[9:10] == b"2":
                    return json.loads(document)
                if head[9:12] not in (b"429", b"503"):
                    raise RuntimeError(f"the gateway answered {head!r} {document!r}")
                await asyncio.sleep(RETRY_S)

    async def follow(self, job_id: str, told: Told, *, cut_after: int | None = None) -> None:
        """Hear what comes after `told`, to the end of the answer, or hang up after so many events."""
        headers = f"Last-Event-ID: {told.last_seq}\r\n" if told.last_seq else ""
        reader, writer = await self._connect("GET", f"/v1/jobs/{job_id}/events", b"", headers)
        try:
            await reader.readuntil(b"\r\n\r\n")
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    told.hear(json.loads(line[6:]))
                    cut_after = None if cut_after is None else cut_after - 1
                    if cut_after == 0:
                        return
        finally:
            writer.close()

    async def idle(self, job_id: str) -> asyncio.StreamWriter:
        """A reader of whom the answer has begun. Close what is returned to hang up."""
        reader, writer = await self._connect("GET", f"/v1/jobs/{job_id}/events", b"")
        await reader.readuntil(b"retry: 1000\n\n")
        return writer

    async def _connect(
        self, method: str, path: str, body: bytes, headers: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """HTTP/1.0: the answer is not in chunks and ends with the connection."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        if body:
            headers += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{method} {path} HTTP/1.0\r\nHost: {self._host}\r\n{headers}\r\n".encode() + body)
        return reader, writer


# Every stream whole --------------------------------------------------------------------------------


async def check_streams(caller: Caller, model: str, *, streams: int, at_once: int, seed: int = 1) -> Counter[str]:
    """How many streams were "whole", and how many had which fault."""
    choose = random.Random(seed)
    plans = [(choose.randint(*MAX_TOKENS), choose.choice((None, 1, 2, 3))) for _ in range(streams)]
    found: Counter[str] = Counter()
    left = iter(enumerate(plans))

    async def one_after_the_other() -> None:
        for number, (max_tokens, cut_after) in left:
            prompt = f"def stream_{number}(line: str) -> str:"
            found[await _checked(caller, model, prompt, max_tokens=max_tokens, cut_after=cut_after)] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(one_after_the_other())
    return found


async def _checked(caller: Caller, model: str, prompt: str, *, max_tokens: int, cut_after: int | None) -> str:
    job_id = await caller.submit(model, prompt, max_tokens=max_tokens)
    told = Told()
    await caller.follow(job_id, told, cut_after=cut_after)
    async with asyncio.timeout(PATIENCE_S):
        while not told.ended:
            before, job = told.last_seq, await caller.ask("GET", f"/v1/jobs/{job_id}")
            await caller.follow(job_id, told)
            if told.last_seq == before and job.get("finished_at"):
                return "no end"
    job = await caller.ask("GET", f"/v1/jobs/{job_id}")
    if told.fault:
        return told.fault
    if (told.ended, told.last_seq) != (job["state"], job["last_seq"]):
        return f"ended {told.ended} at {told.last_seq}, the job {job['state']} at {job['last_seq']}"
    if job["state"] != "succeeded":
        return f"the job {job['state']}"
    return "whole" if told.text == job["result"]["text"] else "another text"


# Readers to whom nothing is said -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Idle:
    bytes_each: int
    cpu_share: float  # of one core, while nothing happens


async def measure_idle(caller: Caller, job_id: str, pid: int, *, readers: int, watch_s: float = IDLE_S) -> Idle:
    """What `readers` cost a gateway that has served a few before, so that its code is loaded and nothing else."""
    async with open_readers(caller, job_id, WARM_UP_READERS):
        pass
    await asyncio.sleep(watch_s / 2)
    before = resident_bytes(pid)
    async with open_readers(caller, job_id, readers):
        cpu_s = cpu_seconds(pid)
        await asyncio.sleep(watch_s)
        return Idle((resident_bytes(pid) - before) // readers, (cpu_seconds(pid) - cpu_s) / watch_s)


@contextlib.asynccontextmanager
async def open_readers(caller: Caller, job_id: str, count: int) -> AsyncIterator[None]:
    writers: list[asyncio.StreamWriter] = []
    try:
        for start in range(0, count, 50):
            some = range(min(50, count - start))
            writers += await asyncio.gather(*(caller.idle(job_id) for _ in some))
        yield
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


def resident_bytes(pid: int) -> int:
    """proc(5), the second field of statm."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def cpu_seconds(pid: int) -> float:
    """User and system time so far (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


# The command ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=1_000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--broker-url")
    parser.add_argument("--store-url")
    arguments = parser.parse_args()
    figures = asyncio.run(_measure(arguments))
    print(json.dumps(figures))
    sys.exit(0 if figures["streams_whole"] == arguments.streams else 1)


async def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        embedded = f"sqlite:///{Path(folder) / 'yard.db'}"
        environment = {
            **os.environ,
            "CODEYARD_NAMESPACE": f"bench-{os.getpid()}",
            "CODEYARD_BROKER_URL": arguments.broker_url or embedded,
            "CODEYARD_STORE_URL": arguments.store_url or embedded,
            "CODEYARD_LOG_LEVEL": "WARNING",
            "CODEYARD_WORKER_ENGINE": "simulated",
            "CODEYARD_WORKER_MODEL": "bench=org/bench",
            "CODEYARD_ENGINE_TIME_SCALE": "1.0",
            "PYTHONUNBUFFERED": "1",
        }
        async with _process("gateway", environment, "--port", "0") as (gateway, line):
            caller = Caller("127.0.0.1", int(line.rsplit(":", 1)[1]))
            async with _process("worker", environment):
                pass  # the model is known now, and nobody works on what comes
            silent = await caller.submit("bench", "def never():", max_tokens=1)
            idle = await measure_idle(caller, silent, gateway, readers=arguments.idle) if arguments.idle else None
            await caller.ask("DELETE", f"/v1/jobs/{silent}")
            started_s = time.monotonic()
            async with _process("worker", environment):
                found = await check_streams(caller, "bench", streams=arguments.streams, at_once=arguments.at_once)
            took_s = time.monotonic() - started_s
    figures: dict[str, Any] = {"idle_readers": arguments.idle}
    if idle is not None:
        figures |= {"kib_each": round(idle.bytes_each / 1_024, 1), "idle_cores": round(idle.cpu_share, 2)}
    faults = {fault: count for fault, count in found.items() if fault != "whole"}
    whole = found["whole"]
    return figures | {"streams": arguments.streams, "streams_whole": whole, "faults": faults, "took_s": round(took_s)}


@contextlib.asynccontextmanager
async def _process(command: str, environment: dict[str, str], *more: str) -> AsyncIterator[tuple[int, str]]:
    """`codeyard COMMAND`, ready: its process id and the line that says so."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "codeyard.cli.main", command, *more), env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            line = (await process.stdout.readline()).decode()
        if not line:
            raise SystemExit(f"codeyard {command} ended at start")
        yield process.pid, line
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START_S):
            await process.wait()


if __name__ == "__main__":
    main()

"""How many submissions a second one gateway process accepts on the embedded file, and how fast it answers.

    python loadtest/bench_gateway.py [--seconds 10] [--concurrency 64] [--profile gateway.prof] [--get]

Starts `codeyard gateway` on a new file in a temporary folder and, from this process, keeps `--concurrency`
connections busy with one request each, by hand: a full HTTP client would cost more than the gateway.
Prints one JSON line: requests per second, latency, and CPU milliseconds of the gateway per request (the
number that holds on another machine). `--get` polls one job instead; `--profile` runs the gateway under cProfile.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from codeyard.shared.alias import Alias
from codeyard.shared.connect import open_broker, open_store
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.topology import Topology

REVISION = "bench-1"
PROMPT = "def parse(line: str) -> dict[str, str]:\n" * 10  # 400 bytes
WARM_UP_S = 1.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--get", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(_measure(arguments))))


async def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'yard.db'}"
        await _declare(url)
        async with _gateway(url, arguments.profile) as (port, pid):
            request = await _poll_of_one_job(port) if arguments.get else _submission()
            await _load(port, request, arguments.concurrency, WARM_UP_S)
            cpu_s, started_s = _cpu_s(pid), time.monotonic()
            latencies = sorted(await _load(port, request, arguments.concurrency, arguments.seconds))
            took_s, cpu_s = time.monotonic() - started_s, _cpu_s(pid) - cpu_s
    count = len(latencies)
    return {
        "concurrency": arguments.concurrency,
        "requests": count,
        "per_s": round(count / took_s),
        "p50_ms": round(latencies[count // 2] * 1_000, 1),
        "p99_ms": round(latencies[count * 99 // 100] * 1_000, 1),
        "gateway_cpu_ms_each": round(cpu_s / count * 1_000, 3),
        "gateway_cores": round(cpu_s / took_s, 2),
    }


async def _declare(url: str) -> None:
    topology = Topology()
    broker = await open_broker(BrokerSettings(url=url), topology)
    store = await open_store(StoreSettings(url=url), topology)
    await broker.declare([topology.job_queue(REVISION, lane) for lane in Lane])
    await store.swap_alias(None, Alias("bench", REVISION))
    await store.close()
    await broker.close()


@contextlib.asynccontextmanager
async def _gateway(url: str, profile: Path | None) -> AsyncIterator[tuple[int, int]]:
    """Its port and process id."""
    profiled = ["-m", "cProfile", "-o", str(profile)] if profile else []
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *profiled, "-m", "codeyard.cli.main", "gateway", "--port", "0"),
        env={**os.environ, "CODEYARD_BROKER_URL": url, "CODEYARD_STORE_URL": url, "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        yield int(line.rsplit(":", 1)[1]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await process.wait()


def _submission() -> bytes:
    body = json.dumps({"model": "bench", "prompt": PROMPT, "lane": "bulk", "sampling": {"max_tokens": 64}}).encode()
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _poll_of_one_job(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    _, answer = await _ask(reader, writer, _submission())
    writer.close()
    return f"GET /v1/jobs/{json.loads(answer)['id']} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def _load(port: int, request: bytes, concurrency: int, seconds: float) -> list[float]:
    """The latency of every request, in seconds."""
    until_s = time.monotonic() + seconds
    latencies: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(_caller(port, request, until_s, latencies))
    return latencies


async def _caller(port: int, request: bytes, until_s: float, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while (started_s := time.monotonic()) < until_s:
            status, answer = await _ask(reader, writer, request)
            if status not in (200, 202):
                raise SystemExit(f"the gateway answered {status}: {answer.decode()}")
            latencies.append(time.monotonic() - started_s)
    finally:
        writer.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r")[0])
    return int(head[9:12]), await reader.readexactly(length)


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


if __name__ == "__main__":
    main()

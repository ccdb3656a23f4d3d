"""One side of the comparison, once: a worker process with its policy, the flood, and what came of it.

The worker is `codeyard worker` in a process of its own, new for each run, so no run learns from another.
It is warmed up, then the trace is played in open loop from this process: a job is submitted when its time
has come, whatever became of those before it. Times of interactive jobs are those of this reader; how long
bulk took is read from the records. Called by: bench_flood.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from loadtest.flood_machine import CpuMeter
from loadtest.flood_trace import Planned

from codeyard.producer import AsyncClient, Submission
from codeyard.producer.async_client import AsyncJob
from codeyard.shared.errors import FleetError
from codeyard.shared.job import JobId, Lane
from codeyard.shared.record import EventKind, Record, State

READY_S = 180.0  # a cold import of vLLM on a slow disk included
STOP_S = 30.0
POLL_S = 0.5
POLL_JOBS = 64  # records read in one go: reading them all would hold up the streams that are measured
WARM_UP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run happens."""

    broker_url: str
    store_url: str
    namespace: str
    folder: Path  # for the worker's settings and logs


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the run stands."""

    at_s: float
    interactive_submitted: int
    interactive_begun: int  # of them, those with a token
    bulk_done: int


Say = Callable[[Standing], None]


@dataclass(slots=True)
class Stream:
    """One interactive job as its reader saw it. Seconds from the call of `submit`."""

    planned: Planned
    id: JobId = ""
    late_s: float = 0.0  # submitted after its time
    chunks: list[tuple[float, int]] = field(default_factory=list)  # (when, tokens)
    restarts: int = 0

    @property
    def first_token_s(self) -> float:
        return self.chunks[0][0]

    @property
    def per_token_s(self) -> float | None:
        """Mean after the first chunk; None if there was only one."""
        tokens = sum(tokens for _, tokens in self.chunks[1:])
        return (self.chunks[-1][0] - self.chunks[0][0]) / tokens if tokens else None

    @property
    def gaps_s(self) -> list[float]:
        times = [when for when, _ in self.chunks]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


@dataclass(slots=True)
class SideRun:
    """All that is known of one run."""

    side: str
    engine: str  # as the worker names it
    load_before: float  # 1-minute load average when the run began
    start_s: float  # the worker's start, model included
    other_cores: float | None = None  # that other programs used while the trace was played
    streams: list[Stream] = field(default_factory=list)
    worker_first_token_s: list[float] = field(default_factory=list)  # of the interactive jobs, from their record
    bulk_ends: list[tuple[float, int]] = field(default_factory=list)  # (seconds into the run, tokens)
    last_end_s: float = 0.0
    num_jobs: int = 0
    not_succeeded: list[str] = field(default_factory=list)


async def run_side(
    side: str,
    place: Place,
    environment: Mapping[str, str],
    trace: Sequence[Planned],
    *,
    warm_up_jobs: int,
    limit_s: float,
    say: Say,
) -> SideRun:
    """Start the worker, warm it up with this many jobs, play the trace, drain the worker.

    Raises FleetError if the worker does not start or the flood is not worked off within `limit_s`.
    """
    load_before = os.getloadavg()[0]
    began_s = time.monotonic()
    async with _worker(place, environment) as worker:
        start_s = time.monotonic() - began_s
        async with AsyncClient(place.broker_url, place.store_url, namespace=place.namespace) as client:
            await _warm_up(client, warm_up_jobs)
            run, meter = SideRun(side, worker.engine, load_before, start_s), CpuMeter()
            try:
                async with asyncio.timeout(limit_s):
                    await _play(client, trace, run, say)
            except TimeoutError:
                raise FleetError(f"{side}: the flood was not worked off within {limit_s:g} s") from None
            run.other_cores = meter.others()
    firsts = worker.first_tokens()
    run.worker_first_token_s = [firsts[stream.id] for stream in run.streams if stream.id in firsts]
    return run


async def _warm_up(client: AsyncClient, count: int) -> None:
    """A few jobs, then `count` at once: what an engine does for the first time takes longer."""
    for jobs in (4, count):
        group = [
            Submission(
                f"# warm-up {jobs} {number}\ndef warm_up(n):",
                lane=Lane.BULK,
                sampling={"max_tokens": WARM_UP_TOKENS, "temperature": 0.0},
                stream=number % 8 == 0,
            )
            for number in range(jobs)
        ]
        accepted = [_accepted(job) for job in await client.submit_many(group)]
        await asyncio.gather(*[job.result(timeout=READY_S) for job in accepted])


async def _play(client: AsyncClient, trace: Sequence[Planned], run: SideRun, say: Say) -> None:
    submitted: dict[JobId, tuple[float, Planned]] = {}  # bulk: when, seconds into the run
    zero_s = time.monotonic()

    async def stream(planned: Planned) -> None:
        seen = Stream(planned)
        run.streams.append(seen)
        called_s = time.monotonic()
        seen.late_s = called_s - zero_s - planned.at_s
        job = await client.submit(planned.prompt, stream=True, **_asked(planned))
        seen.id = job.id
        async for event in job.stream():
            if event.kind is EventKind.RESTARTED:
                seen.restarts += 1
            elif event.token_ids:
                seen.chunks.append((time.monotonic() - called_s, len(event.token_ids)))

    async def submit(planned: Planned) -> None:
        called_s = time.monotonic() - zero_s
        job = await client.submit(planned.prompt, **_asked(planned))
        submitted[job.id] = called_s, planned

    async def submit_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for planned in trace:
                await asyncio.sleep(zero_s + planned.at_s - time.monotonic())
                tasks.create_task((stream if planned.lane is Lane.INTERACTIVE else submit)(planned))

    all_in = asyncio.create_task(submit_all(), name="open loop")
    records: dict[JobId, Record] = {}
    try:
        while not all_in.done() or len(records) < len(submitted):
            open_ids = [job_id for job_id in submitted if job_id not in records][:POLL_JOBS]
            found = [one for one in await client.store.read(open_ids) if one is not None and one.state.final]
            records.update((record.id, record) for record in found)
            begun = sum(bool(seen.chunks) for seen in run.streams)
            say(Standing(time.monotonic() - zero_s, len(run.streams), begun, len(records)))
            if len(found) < POLL_JOBS / 2:
                await asyncio.sleep(POLL_S)
    finally:
        all_in.cancel()
        await asyncio.wait([all_in])
    all_in.result()
    await _tell(client, run, submitted, records)


async def _tell(
    client: AsyncClient,
    run: SideRun,
    submitted: Mapping[JobId, tuple[float, Planned]],
    records: Mapping[JobId, Record],
) -> None:
    """From records to what the report needs."""
    interactive = await client.store.read([seen.id for seen in run.streams])
    everything = [*records.values(), *(record for record in interactive if record is not None)]
    run.num_jobs = len(submitted) + len(run.streams)
    run.not_succeeded = [f"{one.id}: {one.state}" for one in everything if one.state is not State.SUCCEEDED]
    for job_id, (called_s, _) in submitted.items():
        record = records[job_id]
        if record.result is not None:
            took_s = record.finished_at - record.created_at  # both of the store's clock
            run.bulk_ends.append((called_s + took_s, record.result.usage.completion_tokens))
    run.bulk_ends.sort()
    run.last_end_s = run.bulk_ends[-1][0] if run.bulk_ends else 0.0


def _asked(planned: Planned) -> dict[str, Any]:
    return {
        "lane": planned.lane,
        "tenant": planned.tenant,
        # Greedy: the same prompt has the same answer on every side.
        "sampling": {"max_tokens": planned.max_tokens, "temperature": 0.0},
    }


def _accepted(job: AsyncJob | FleetError) -> AsyncJob:
    if isinstance(job, FleetError):
        raise job
    return job


# The worker process --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Worker:
    """A running `codeyard worker`; `engine` is what it said when it was ready."""

    process: asyncio.subprocess.Process
    out: Path
    log: Path
    engine: str = ""

    async def ready(self) -> None:
        until_s = time.monotonic() + READY_S
        while True:
            if words := [line for line in self.out.read_text().splitlines() if line.startswith("worker ")]:
                self.engine = words[0].partition(" with ")[2]
                return
            if self.process.returncode is not None or time.monotonic() > until_s:
                raise FleetError(f"the worker did not start; the end of {self.log}:\n{self._tail()}")
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_S):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()

    def first_tokens(self) -> dict[JobId, float]:
        """Time to first token from the record, by job, from the line logged at the end of each."""
        found = {}
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["event"] == "job_ended":
                    found[entry["job"]] = float(entry["first_token_s"])
        return found

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


@contextlib.asynccontextmanager
async def _worker(place: Place, environment: Mapping[str, str]) -> AsyncIterator[_Worker]:
    """Ready when entered, drained when left."""
    place.folder.mkdir(parents=True, exist_ok=True)
    out, log = place.folder / "worker.out", place.folder / "worker.log"
    with out.open("wb") as out_file, log.open("wb") as log_file:
        worker = _Worker(await _start(place, environment, out_file, log_file), out, log)
        try:
            await worker.ready()
            yield worker
        finally:
            await worker.stop()


async def _start(
    place: Place, environment: Mapping[str, str], out: IO[bytes], log: IO[bytes]
) -> asyncio.subprocess.Process:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CODEYARD_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "codeyard.cli.main", "worker"),
        *("--broker", place.broker_url, "--store", place.store_url, "--namespace", place.namespace),
        *("--log-level", "INFO", "--log-format", "json"),
        env={**inherited, "PYTHONUNBUFFERED": "1", **environment},
        cwd=place.folder,  # no codeyard.yaml there
        stdin=asyncio.subprocess.DEVNULL,
        stdout=out,
        stderr=log,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h

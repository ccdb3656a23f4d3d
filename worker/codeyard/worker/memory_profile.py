"""Where the worker's own memory grows: allocations traced on demand, compared every N jobs.

    start (at launch, or SIGUSR2) -> a tenth of N jobs -> baseline -> N jobs -> report -> N jobs -> report ...
                                                                    SIGUSR2: report and stop

A site is reported if it grew by `PER_JOB_BYTES` for every job since the baseline, and since the last report
again: caches that fill up once are not. What grows outside of Python (`untraced_bytes`) is only summed. Tracing
makes the worker's Python about eight times as slow (docs/memory.md), so it is off unless asked for.
Called by: worker.service.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from codeyard.shared.settings import WorkerSettings, default_state_dir
from codeyard.worker.engines.children import descendants
from codeyard.worker.engines.memory import host_bytes

log = logging.getLogger(__name__)

FRAMES = 4  # of a traceback kept for each allocation: its caller's caller; 8 would cost twice as much again
PER_JOB_BYTES = 16  # the smallest leak that is reported: one small object per job is more
LEAST_BYTES = 16_384  # less than that is not worth a look, whatever the number of jobs
TOP_SITES = 10


@dataclass(frozen=True, slots=True)
class Site:
    """An allocation site that grew, with how it was reached (outermost call first)."""

    at: str  # file:line
    bytes_grown: int
    bytes_per_job: float
    blocks_grown: int
    traceback: list[str]


@dataclass(frozen=True, slots=True)
class Growth:
    """Since the baseline. `sites` is empty where nothing grew with the jobs."""

    num_jobs: int
    traced_bytes: int  # Python's allocations
    worker_bytes: int  # of this process, as the kernel counts
    untraced_bytes: int  # of those, not Python's: libraries, and memory kept by the allocator
    engine_bytes: int  # of the processes below this one
    sites: list[Site]


@dataclass(frozen=True, slots=True)
class _Mark:
    """What there was at one moment."""

    num_jobs: int
    snapshot: tracemalloc.Snapshot
    traced_bytes: int
    worker_bytes: int
    engine_bytes: int


class MemoryProfile:
    """Tell it of every job that ended (`job_ended`), and run it as a task of the worker's.

    Args:
        path: the newest report lies there as JSON.
        every_jobs: jobs between reports.
        at_start: begin with `run`; otherwise wait for SIGUSR2.
    """

    def __init__(self, path: Path, *, every_jobs: int, at_start: bool) -> None:
        self.path = path
        self._every_jobs = every_jobs
        self._num_jobs = 0
        self._due = 0  # jobs at which to look again
        self._ours = False  # whether it was us who turned tracing on
        self._baseline: _Mark | None = None
        self._last: _Mark | None = None
        self._wanted = at_start
        self._changed = asyncio.Event()
        self._changed.set()

    @classmethod
    def of(cls, settings: WorkerSettings) -> "MemoryProfile":
        path = settings.memory_profile_file or default_state_dir() / f"memory-profile-{os.getpid()}.json"
        return cls(path, every_jobs=settings.memory_profile_jobs, at_start=settings.memory_profile)

    def job_ended(self) -> None:
        """Costs nothing while it is off."""
        self._num_jobs += 1
        if self._due and self._num_jobs >= self._due:
            self._changed.set()

    def toggle(self) -> None:
        """What SIGUSR2 does: begin; or report what there is, and end."""
        self._wanted = not self._wanted
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled. SIGUSR2 is ours meanwhile, where this is the main thread."""
        with self._signal():
            try:
                while True:
                    await self._changed.wait()
                    self._changed.clear()
                    await self.look()
            finally:
                if self._due:
                    self._end()

    async def look(self) -> None:
        """Do what is due now: begin, take the baseline, report, end."""
        if self._wanted and not self._due:
            self._begin()
        elif not self._wanted and self._due:
            if self._baseline is not None and self._num_jobs > self._baseline.num_jobs:
                await self._report()
            self._end()
        elif self._due and self._num_jobs >= self._due:
            if self._baseline is None:
                self._baseline = self._last = await asyncio.to_thread(_mark, self._num_jobs)
            else:
                await self._report()
            self._due = self._num_jobs + self._every_jobs

    def _begin(self) -> None:
        self._ours = not tracemalloc.is_tracing()
        if self._ours:
            tracemalloc.start(FRAMES)
        self._baseline = self._last = None
        self._due = self._num_jobs + max(1, self._every_jobs // 10)  # until then caches fill
        log.info("memory_profile_begins", extra={"every_jobs": self._every_jobs, "file": str(self.path)})

    def _end(self) -> None:
        self._due = 0
        self._baseline = self._last = None
        if self._ours:
            tracemalloc.stop()
        log.info("memory_profile_ends", extra={"file": str(self.path)})

    async def _report(self) -> None:
        assert self._baseline is not None
        assert self._last is not None
        now = await asyncio.to_thread(_mark, self._num_jobs)
        growth = await asyncio.to_thread(_compare, self._baseline, self._last, now)
        self._last = now
        await asyncio.to_thread(_write, self.path, growth)
        shown = [f"{site.at} {site.bytes_per_job:.0f} B/job" for site in growth.sites[:3]]
        log.log(
            logging.WARNING if growth.sites else logging.INFO,
            "memory_grew" if growth.sites else "memory_flat",
            extra={
                "num_jobs": growth.num_jobs,
                "traced_bytes": growth.traced_bytes,
                "untraced_bytes": growth.untraced_bytes,
                "engine_bytes": growth.engine_bytes,
                "sites": "; ".join(shown),
                "file": str(self.path),
            },
        )

    @contextlib.contextmanager
    def _signal(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        try:
            loop.add_signal_handler(signal.SIGUSR2, self.toggle)
        except (RuntimeError, ValueError, NotImplementedError):  # not the main thread, or not a Unix
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGUSR2)


def _mark(num_jobs: int) -> _Mark:
    """Blocks, and holds the interpreter's lock, for up to a second or so in a large process."""
    snapshot = tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.Filter(False, __file__), tracemalloc.Filter(False, tracemalloc.__file__)]
    )
    own = os.getpid()
    traced = tracemalloc.get_traced_memory()[0]
    return _Mark(num_jobs, snapshot, traced, host_bytes([own]), host_bytes(descendants([own])))


def _compare(baseline: _Mark, last: _Mark, now: _Mark) -> Growth:
    num_jobs = now.num_jobs - baseline.num_jobs
    lately = {change.traceback: change.size_diff for change in now.snapshot.compare_to(last.snapshot, "traceback")}
    sites = [
        Site(
            at=_place(change.traceback[-1]),  # the innermost call
            bytes_grown=change.size_diff,
            bytes_per_job=round(change.size_diff / num_jobs, 1),
            blocks_grown=change.count_diff,
            traceback=[_place(frame) for frame in change.traceback],
        )
        for change in now.snapshot.compare_to(baseline.snapshot, "traceback")
        if change.size_diff >= max(LEAST_BYTES, PER_JOB_BYTES * num_jobs)
        and lately.get(change.traceback, 0) >= PER_JOB_BYTES * (now.num_jobs - last.num_jobs)
    ]
    sites.sort(key=lambda site: -site.bytes_grown)
    traced, worker = now.traced_bytes - baseline.traced_bytes, now.worker_bytes - baseline.worker_bytes
    return Growth(
        num_jobs=num_jobs,
        traced_bytes=traced,
        worker_bytes=worker,
        untraced_bytes=worker - traced,
        engine_bytes=now.engine_bytes - baseline.engine_bytes,
        sites=sites[:TOP_SITES],
    )


def _place(frame: tracemalloc.Frame) -> str:
    return f"{frame.filename}:{frame.lineno}"


def _write(path: Path, growth: Growth) -> None:
    """Whole or not at all: somebody may be reading the last one. A disk that is full costs the report only."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(json.dumps(asdict(growth), indent=1))
        fresh.replace(path)
    except OSError as error:
        log.warning("memory_profile_not_written", extra={"error": str(error)})

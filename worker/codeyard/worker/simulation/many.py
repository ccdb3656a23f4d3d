"""Many runs: in several processes, and kept on disk as they end, so that a long comparison can go on later.

A kept run is used again only for the very same run: its file's name is a digest of everything that
determines it, the source of the policy and the simulator included. Called by: simulation.cli.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from codeyard.worker.simulation.compare import simulate_one
from codeyard.worker.simulation.latency import LatencyTable
from codeyard.worker.simulation.metrics import RunStats
from codeyard.worker.simulation.plan import Loss
from codeyard.worker.simulation.traces import Trace

PACKAGE = Path(__file__).parents[1]
DECIDING = ("scheduling", "simulation", "data")  # what a run depends on


@dataclass(frozen=True, slots=True)
class Task:
    """One run of a trace."""

    trace_name: str
    trace: Trace
    table: LatencyTable
    policy: str
    workers: int
    load: float
    jobs: int
    seed: int
    losses: tuple[Loss, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.trace_name} {self.load:g} {self.policy} seed {self.seed}"

    def key(self) -> str:
        """Equal for runs that give the same result."""
        return hashlib.sha256(f"{_source()} {self!r}".encode()).hexdigest()[:32]

    def run(self, tick: Callable[[float], None] | None = None) -> RunStats:
        return simulate_one(
            self.trace_name, self.trace, self.table, policy_name=self.policy, workers=self.workers, load=self.load,
            jobs=self.jobs, seed=self.seed, losses=self.losses, tick=tick,
        )  # fmt: skip


def run_many(
    tasks: Sequence[Task], *, processes: int, keep: Path | None, begins: Callable[[str], Callable[[float], None]]
) -> Iterator[tuple[int, RunStats]]:
    """Each task's place and result, as they end. `begins` hears of a run that begins (or, of several at once,
    that ended) and gives where to report its progress. Interrupted, what has ended is kept."""
    left = []
    for place, task in enumerate(tasks):
        if keep is not None and (kept := _load(keep, task)) is not None:
            begins(task.name)
            yield place, kept
        else:
            left.append((place, task))
    if processes == 1:
        for place, task in left:
            yield place, _run(task, keep, begins(task.name))
        return
    with ProcessPoolExecutor(processes) as pool:
        running = {pool.submit(_run, task, keep): place for place, task in left}
        try:
            for ended in as_completed(running):
                begins(tasks[running[ended]].name)
                yield running[ended], ended.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(task: Task, keep: Path | None, tick: Callable[[float], None] | None = None) -> RunStats:
    stats = task.run(tick)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        part = keep / f"{task.key()}.{os.getpid()}.part"
        part.write_bytes(pickle.dumps(stats))
        part.replace(keep / f"{task.key()}.run")
    return stats


def _load(keep: Path, task: Task) -> RunStats | None:
    path = keep / f"{task.key()}.run"
    if not path.is_file():
        return None
    stats: RunStats = pickle.loads(path.read_bytes())  # noqa: S301 - a folder of the user's own runs
    return stats


@cache
def _source() -> str:
    digest = hashlib.sha256()
    for folder in DECIDING:
        for path in sorted((PACKAGE / folder).glob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()

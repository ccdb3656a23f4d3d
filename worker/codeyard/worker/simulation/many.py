"""Many runs: in several processes, and kept on disk as they end, so that a long comparison can go on later.

A kept run is used again only for the very same run: its file's name is a digest of everything that
determines it: jobs, promises, latency table, seed, the settings' defaults, and the source of the simulator and
of this run's policy. So after a change to one policy only its runs are made again. Called by: simulation.cli.
"""

import ast
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pydantic import TypeAdapter

from codeyard.shared.settings import AdmissionSettings
from codeyard.worker.simulation.compare import simulate_one
from codeyard.worker.simulation.latency import LatencyTable
from codeyard.worker.simulation.metrics import RunStats
from codeyard.worker.simulation.plan import Loss
from codeyard.worker.simulation.policies import policy
from codeyard.worker.simulation.traces import Trace

# What a run's source is followed through; other modules carry values that are in the key themselves.
DECIDING = (
    "codeyard.worker.scheduling.",
    "codeyard.worker.simulation.",
    "codeyard.shared.notice",
    "codeyard.shared.sharding",
)
# These import every policy there is, so they are read and not followed: the run's own policy is.
CHOOSING = ("codeyard.worker.simulation.policies", "codeyard.worker.scheduling.select")


_STATS = TypeAdapter(RunStats)


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
        scheduler = policy(self.policy, self.trace, self.table).make()
        said = f"{_source(type(scheduler).__module__)} {AdmissionSettings()!r} {self!r}"
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def run(self, tick: Callable[[float], None] | None = None) -> RunStats:
        return simulate_one(
            self.trace_name, self.trace, self.table, policy_name=self.policy, workers=self.workers, load=self.load,
            jobs=self.jobs, seed=self.seed, losses=self.losses, tick=tick,
        )  # fmt: skip


def kept_runs(tasks: Sequence[Task], keep: Path) -> dict[int, RunStats]:
    """Those made before, by their place among the tasks."""
    found = {}
    for place, task in enumerate(tasks):
        path = _file(keep, task)
        if path.is_file():
            found[place] = _STATS.validate_json(path.read_bytes())
    return found


def run_many(
    tasks: Mapping[int, Task], *, processes: int, keep: Path | None, begins: Callable[[str], Callable[[float], None]]
) -> Iterator[tuple[int, RunStats]]:
    """Each task's place and result, as they end. `begins` hears of a run that begins (or, of several at once,
    that ended) and gives where to report its progress. Interrupted, what has ended is kept."""
    files = {place: _file(keep, task) if keep is not None else None for place, task in tasks.items()}
    if processes == 1:
        for place, task in tasks.items():
            yield place, _run(task, files[place], begins(task.name))
        return
    with ProcessPoolExecutor(processes) as pool:
        running = {pool.submit(_run, task, files[place]): place for place, task in tasks.items()}
        try:
            for ended in as_completed(running):
                place = running.pop(ended)
                begins(tasks[place].name)
                yield place, ended.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _file(keep: Path, task: Task) -> Path:
    return keep / f"{task.key()}.json"


def _run(task: Task, file: Path | None, tick: Callable[[float], None] | None = None) -> RunStats:
    stats = task.run(tick)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(_STATS.dump_json(stats))
        part.replace(file)
    return stats


def sources(scheduler: str) -> list[str]:
    """The modules that decide a run under the policy in this module, by name."""
    found: set[str] = set()
    left = [simulate_one.__module__, *CHOOSING, scheduler]
    while left:
        module = left.pop()
        if module not in found and module.startswith(DECIDING):
            found.add(module)
            if module not in CHOOSING:
                tree = ast.parse(_read(module))
                left += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return sorted(found)


@cache
def _source(scheduler: str) -> str:
    digest = hashlib.sha256()
    for module in sources(scheduler):
        digest.update(module.encode() + _read(module))
    return digest.hexdigest()


def _read(module: str) -> bytes:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).read_bytes()

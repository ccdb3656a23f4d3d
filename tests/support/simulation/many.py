"""Thousands of schedules in a few processes: which failed, and what was covered.

    python -m support.simulation.many 20000 --processes 2        from the folder tests

Called by: tests/simulation, people.
"""

import argparse
import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from support.simulation import world
from support.simulation.plan import draw

CHUNK = 100  # schedules in one piece of work
COLLECT_EVERY = 20  # schedules; their garbage is some megabytes by then
MAX_FAILING = 20  # kept; one is enough to know


@dataclass(slots=True)
class Report:
    """Of many schedules. Counts are of schedules that saw it."""

    num_schedules: int = 0
    num_callbacks: int = 0
    num_faults: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    failing: dict[int, list[str]] = field(default_factory=dict)  # by seed
    arrows: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)  # faults by call and side

    def add(self, verdict: world.Verdict) -> None:
        self.num_schedules += 1
        self.num_callbacks += verdict.num_callbacks
        self.num_faults += verdict.num_faults
        self.virtual_s += verdict.ended_s
        self.arrows.update(verdict.arrows)
        self.met.update(set(verdict.met))
        if verdict.violations and len(self.failing) < MAX_FAILING:
            self.failing[verdict.plan.seed] = verdict.violations

    def merge(self, other: "Report") -> None:
        self.num_schedules += other.num_schedules
        self.num_callbacks += other.num_callbacks
        self.num_faults += other.num_faults
        self.virtual_s += other.virtual_s
        self.cpu_s += other.cpu_s
        self.failing |= other.failing
        self.arrows.update(other.arrows)
        self.met.update(other.met)

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.num_schedules} schedules, {self.num_faults} faults met, {self.virtual_s / 3600:.1f} virtual hours, "
            f"{self.num_callbacks} callbacks, {self.cpu_s:.0f} s of CPU"
        )
        yield from (f"  {count:6} schedules took {arrow}" for arrow, count in self.arrows.most_common())
        calls = sorted({name.rsplit(" ", 1)[0] for name in self.met})
        for call in calls:
            before, after = self.met[f"{call} before"], self.met[f"{call} after"]
            yield f"  {call:<20} faulted before its effect in {before:5} schedules, after it in {after:5}"


def run_many(seeds: Sequence[int], *, processes: int) -> Report:
    """Every schedule of `seeds`."""
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    report = Report()
    if processes == 1:
        for chunk in chunks:
            report.merge(run_some(chunk))
        return report
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(run_some, chunks):
            report.merge(part)
    return report


def run_some(seeds: Sequence[int]) -> Report:
    """In this process."""
    report, started_s = Report(), time.process_time()
    gc.disable()
    gc.freeze()  # what is there stays: collections look at the schedules' leavings alone
    try:
        for place, seed in enumerate(seeds, start=1):
            report.add(world.run(draw(seed)))
            if place % COLLECT_EVERY == 0:
                gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    report.cpu_s = time.process_time() - started_s
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Run simulated schedules and say what they covered.")
    parser.add_argument("schedules", type=int)
    parser.add_argument("--from-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    report = run_many(range(asked.from_seed, asked.from_seed + asked.schedules), processes=asked.processes)
    print("\n".join(report.lines()))
    for seed, violations in report.failing.items():
        print(f"seed {seed} fails: {'; '.join(violations[:3])}")
    raise SystemExit(bool(report.failing))


if __name__ == "__main__":
    main()

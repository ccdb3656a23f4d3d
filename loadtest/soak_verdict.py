"""From samples to a verdict: did a process grow?

Windows are compared, an early one against the last, and a line is laid through everything between them. A leak of a
handle for every thousandth job hides under the handles of the jobs in flight, so what is counted is also compared at
rest, when nothing is under way, before and after. Plain values in, plain values out. Called by: soak.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

RSS_GROWS = 0.02  # of the early window's median, at most
AT_REST = 2  # descriptors, threads, tasks: more than before by so many at most
WINDOW = 1 / 5  # of the time after the warm-up: the early window, and the last
FEWEST = 10  # samples after the warm-up

What = Literal["rss_bytes", "unique_bytes", "descriptors", "threads", "tasks"]
COUNTED: tuple[What, ...] = ("descriptors", "threads", "tasks")
MEMORY: tuple[What, ...] = ("rss_bytes", "unique_bytes")


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment, `at_s` seconds after the first job."""

    at_s: float
    rss_bytes: int
    unique_bytes: int  # its own alone: what would be free again without it
    descriptors: int
    threads: int
    tasks: int | None  # on its event loop; None: it tells of none
    cpu_s: float  # used since its start


@dataclass(frozen=True, slots=True)
class Growth:
    """One measure of one process. `line_share` is what the fitted line rises over the time after the warm-up, as a
    share of `early`; `rest` the counts at rest, before and after."""

    process: str
    what: What
    early: float
    last: float
    noise: float  # of the early window: between its tenth and its ninetieth percentile
    line_share: float
    hours: float
    rest: tuple[int, int] | None
    kept: bool | None  # None: reported, not judged

    @property
    def share(self) -> float:
        return (self.last - self.early) / self.early if self.early else 0.0

    @property
    def line_share_per_hour(self) -> float:
        return self.line_share / self.hours if self.hours else 0.0


def growths(
    samples: Mapping[str, Sequence[Sample]],
    rests: tuple[Mapping[str, Sample], Mapping[str, Sample]],
    *,
    warm_up_s: float,
    judged: Sequence[str],
) -> list[Growth]:
    """Every measure of every process. Those of `judged` may not grow: memory (RSS) by RSS_GROWS in windows and along
    the line, counts by more than the early window's own noise, and at rest by more than AT_REST.

    Raises ValueError if there are fewer than FEWEST samples of a process after the warm-up.
    """
    found = []
    for process, all_of_it in samples.items():
        steady = [sample for sample in all_of_it if sample.at_s >= warm_up_s]
        if len(steady) < FEWEST:
            raise ValueError(f"{len(steady)} samples of {process} after the warm-up: too few for a verdict")
        for what in (*MEMORY, *COUNTED):
            if getattr(steady[0], what) is not None:
                rest = _rest(process, what, rests) if what in COUNTED else None
                found.append(_growth(process, what, steady, rest, judged=process in judged))
    return found


def _growth(
    process: str, what: What, steady: Sequence[Sample], rest: tuple[int, int] | None, *, judged: bool
) -> Growth:
    began_s, ended_s = steady[0].at_s, steady[-1].at_s
    window_s = (ended_s - began_s) * WINDOW
    values = [float(getattr(sample, what)) for sample in steady]
    times = [sample.at_s for sample in steady]
    first = [value for at_s, value in zip(times, values, strict=True) if at_s <= began_s + window_s]
    last = [value for at_s, value in zip(times, values, strict=True) if at_s >= ended_s - window_s]
    early = statistics.median(first)
    slope = statistics.linear_regression(times, values).slope
    tenths = statistics.quantiles(first, n=10, method="inclusive") if len(first) > 1 else [early, early]
    line_share = slope * (ended_s - began_s) / early if early else 0.0
    growth = Growth(
        process=process,
        what=what,
        early=early,
        last=statistics.median(last),
        noise=tenths[-1] - tenths[0],
        line_share=line_share,
        hours=(ended_s - began_s) / 3_600,
        rest=rest,
        kept=None,
    )
    return _judged(growth) if judged and what != "unique_bytes" else growth


def _judged(growth: Growth) -> Growth:
    if growth.what == "rss_bytes":
        kept = growth.share < RSS_GROWS and growth.line_share < RSS_GROWS
    else:
        kept = growth.last - growth.early <= max(AT_REST, growth.noise)
        kept = kept and (growth.rest is None or growth.rest[1] - growth.rest[0] <= AT_REST)
    return replace(growth, kept=kept)


def _rest(process: str, what: str, rests: tuple[Mapping[str, Sample], Mapping[str, Sample]]) -> tuple[int, int] | None:
    before, after = (rest.get(process) for rest in rests)
    return (getattr(before, what), getattr(after, what)) if before is not None and after is not None else None


def quietest(samples: Sequence[Sample]) -> Sample:
    """The one with the fewest descriptors and tasks: at rest something may still be about to close."""
    return min(samples, key=lambda one: (one.descriptors + one.threads + (one.tasks or 0), one.at_s))

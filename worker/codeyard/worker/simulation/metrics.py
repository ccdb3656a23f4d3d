"""What a run was like: counts and quantiles in memory that does not grow with the number of jobs."""

import math
from dataclasses import dataclass, field

from codeyard.shared.job import Lane
from codeyard.shared.settings import Promise
from codeyard.worker.simulation.engine import SimJob

_GROWTH = math.log(1.02)  # a bucket is 2 % wide, so a quantile is off by at most 1 %
_LEAST_S = 1e-4


@dataclass(slots=True)
class Histogram:
    """Quantiles of positive seconds, within 1 %."""

    buckets: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: float = 0.0

    def add(self, value_s: float) -> None:
        bucket = int(math.log(value_s / _LEAST_S) / _GROWTH) if value_s > _LEAST_S else 0
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += value_s

    def quantile(self, share: float) -> float | None:
        """None of no values."""
        if not self.count:
            return None
        rank = share * (self.count - 1)
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen > rank:
                return _LEAST_S * math.exp(_GROWTH * (bucket + 0.5)) if bucket else _LEAST_S
        raise AssertionError("a histogram counts every value it holds")


@dataclass(slots=True)
class LaneStats:
    """One lane, or one tenant. Jobs still on their way at the end are judged by what is certain then."""

    arrived: int = 0
    finished: int = 0
    tokens: int = 0  # generated, of unfinished jobs too
    kept_tokens: int = 0  # of jobs that kept the promise
    kept: int = 0
    broken: int = 0
    wait: Histogram = field(default_factory=Histogram)  # submission to admission
    first_token: Histogram = field(default_factory=Histogram)  # submission to first token
    per_token: Histogram = field(default_factory=Histogram)
    latency: Histogram = field(default_factory=Histogram)

    @property
    def kept_share(self) -> float:
        judged = self.kept + self.broken
        return self.kept / judged if judged else 1.0

    def ended(self, job: SimJob, now_s: float, promise: Promise) -> None:
        """The job finished."""
        first_s = job.first_s - job.arrived_s
        per_token_s = (now_s - job.first_s) / (job.completion - 1) if job.completion > 1 else 0.0
        self.finished += 1
        self.first_token.add(first_s)
        self.latency.add(now_s - job.arrived_s)
        if job.completion > 1:
            self.per_token.add(per_token_s)
        self._judge(_keeps(promise, first_s, per_token_s), job.completion)

    def cut_off(self, job: SimJob, tokens: int, now_s: float, promise: Promise) -> None:
        """The run ended while the job had `tokens`. Nothing is held against it that may still come right."""
        if job.first_s >= 0:
            first_s = job.first_s - job.arrived_s
            self.first_token.add(first_s)
            per_token_s = (now_s - job.first_s) / max(1, tokens)  # its next token is already on its way
            self._judge(_keeps(promise, first_s, per_token_s), tokens)
        elif promise.first_token_s and now_s - job.arrived_s > promise.first_token_s:
            self.first_token.add(now_s - job.arrived_s)
            self._judge(False, tokens)
        else:
            self.tokens += tokens

    def _judge(self, kept: bool, tokens: int) -> None:
        self.tokens += tokens
        if kept:
            self.kept += 1
            self.kept_tokens += tokens
        else:
            self.broken += 1


def _keeps(promise: Promise, first_s: float, per_token_s: float) -> bool:
    return (not promise.first_token_s or first_s <= promise.first_token_s) and (
        not promise.per_token_s or per_token_s <= promise.per_token_s
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at one moment; `tokens` and `gpu_s` count from the start."""

    at_s: float
    depth: dict[Lane, int]  # ready at the broker
    in_engines: int
    window: float  # mean over workers
    tokens: int
    urgent: int  # interactive jobs anywhere


@dataclass(slots=True)
class RunStats:
    """Everything a report needs of one run."""

    trace: str
    policy: str
    load: float
    seed: int
    workers: int
    length_s: float
    lanes: dict[Lane, LaneStats] = field(default_factory=lambda: {lane: LaneStats() for lane in Lane})
    tenants: dict[str, LaneStats] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    calibration: dict[Lane, list[int]] = field(default_factory=lambda: {lane: [0, 0] for lane in Lane})  # right, all
    busy_s: float = 0.0
    preempted: int = 0
    decisions: int = 0
    wall_s: float = 0.0

    @property
    def jobs_s(self) -> float:
        return sum(lane.finished for lane in self.lanes.values()) / self.length_s

    @property
    def tokens_s(self) -> float:
        """Generated per second and GPU."""
        return sum(lane.tokens for lane in self.lanes.values()) / (self.workers * self.length_s)

    @property
    def busy_share(self) -> float:
        return self.busy_s / (self.workers * self.length_s)

    @property
    def keeps_promises(self) -> bool:
        return self.lanes[Lane.INTERACTIVE].kept_share >= 0.99 and self.lanes[Lane.STANDARD].kept_share >= 0.95

    @property
    def score(self) -> float:
        """Tokens of jobs that kept their promise per GPU-second; 0 for a run that did not keep its promises."""
        if not self.keeps_promises:
            return 0.0
        return sum(lane.kept_tokens for lane in self.lanes.values()) / (self.workers * self.length_s)

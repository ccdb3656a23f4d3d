"""Whether a submission is within its tenant's limits, as functions of plain values.

Two token buckets (submissions, and tokens of prompts and answers): a bucket holds up to its burst, fills at a
steady rate, and a submission is granted if both hold what it needs. Two quotas over the tenant's live jobs (how
many, how many tokens): the live jobs are a set of ids, each with an end, not a counter, so that nothing a
process forgot to subtract stays behind.

This file is the specification: the embedded file runs it, lua/take.lua is its port, and one test runs random
histories through both.
Called by: limits.sqlite, gateway.limits, tests.
"""

from dataclasses import dataclass
from enum import StrEnum

from codeyard.shared.job import JobId
from codeyard.shared.settings import TenantLimits


@dataclass(frozen=True, slots=True)
class Bucket:
    per_s: float
    burst: float


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits of one tenant; None: no limit."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    concurrent_jobs: int | None = None
    enqueued_tokens: int | None = None

    @classmethod
    def of(cls, limits: TenantLimits) -> "Allowance":
        return cls(
            requests=_bucket(limits.requests_per_minute, limits.requests_burst),
            tokens=_bucket(limits.tokens_per_minute, limits.tokens_burst),
            concurrent_jobs=limits.concurrent_jobs,
            enqueued_tokens=limits.enqueued_tokens,
        )

    @property
    def counts_live(self) -> bool:
        return self.concurrent_jobs is not None or self.enqueued_tokens is not None

    @property
    def unlimited(self) -> bool:
        return self.requests is None and self.tokens is None and not self.counts_live


class Verdict(StrEnum):
    """Granted, or the first limit in the way; a refusal takes nothing."""

    GRANTED = "granted"
    REQUESTS = "requests"
    TOKENS = "tokens"
    JOBS = "jobs"
    ENQUEUED = "enqueued"


@dataclass(frozen=True, slots=True)
class Take:
    """One submission asks. `tokens`: its estimate; `live_s`: from now to when it is gone whatever happens."""

    tenant: str
    job_id: JobId
    tokens: int
    live_s: float
    allowance: Allowance


@dataclass(frozen=True, slots=True)
class Level:
    """What a bucket holds, and the moment it held that (seconds, the store's clock). None: full."""

    amount: float
    at: float


@dataclass(frozen=True, slots=True)
class Live:
    """The tenant's live jobs, those past their end left out. `mine`: the id that asks is among them."""

    num_jobs: int = 0
    tokens: int = 0
    mine: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """What a caller is told. Without a bucket its numbers are 0."""

    verdict: Verdict
    charged: int = 0  # tokens taken from the bucket; 0 for a job that is live already: it generates nothing new
    added: bool = False  # to the live jobs, now
    wait_s: float = 0.0  # until the buckets hold what it needs
    requests_left: float = 0.0
    requests_full_s: float = 0.0  # until the bucket is full
    tokens_left: float = 0.0
    tokens_full_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GiveBack:
    """A job is no longer live, and `tokens` of its estimate go back into the bucket."""

    tenant: str
    job_id: JobId
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome, and the levels to keep. None: keep nothing, the bucket is full or there is none."""

    taken: Taken
    requests: Level | None
    tokens: Level | None


def take(ask: Take, requests: Level | None, tokens: Level | None, live: Live, now: float) -> Step:
    allowance = ask.allowance
    has_requests, has_tokens = _held(allowance.requests, requests, now), _held(allowance.tokens, tokens, now)
    charge = 0 if live.mine else ask.tokens
    wait_s = max(_wait_s(allowance.requests, has_requests, 1), _wait_s(allowance.tokens, has_tokens, charge))
    verdict = Verdict.GRANTED
    if allowance.requests and has_requests < 1:
        verdict = Verdict.REQUESTS
    elif allowance.tokens and has_tokens < charge:
        verdict = Verdict.TOKENS
    elif not live.mine and allowance.concurrent_jobs is not None and live.num_jobs >= allowance.concurrent_jobs:
        verdict = Verdict.JOBS
    elif (
        not live.mine and allowance.enqueued_tokens is not None and live.tokens + ask.tokens > allowance.enqueued_tokens
    ):
        verdict = Verdict.ENQUEUED
    granted = verdict is Verdict.GRANTED
    if granted:
        has_requests, has_tokens = has_requests - 1, has_tokens - charge
    taken = Taken(
        verdict,
        charged=charge if granted and allowance.tokens else 0,
        added=granted and allowance.counts_live and not live.mine,
        wait_s=wait_s,
        requests_left=has_requests if allowance.requests else 0.0,
        requests_full_s=_wait_s(allowance.requests, has_requests, None),
        tokens_left=has_tokens if allowance.tokens else 0.0,
        tokens_full_s=_wait_s(allowance.tokens, has_tokens, None),
    )
    return Step(
        taken,
        Level(has_requests, now) if allowance.requests else None,
        Level(has_tokens, now) if allowance.tokens else None,
    )


def never(ask: Take) -> Verdict | None:
    """The limit that this job is over even with everything free: waiting does not help."""
    if ask.allowance.tokens and ask.tokens > ask.allowance.tokens.burst:
        return Verdict.TOKENS
    if ask.allowance.enqueued_tokens is not None and ask.tokens > ask.allowance.enqueued_tokens:
        return Verdict.ENQUEUED
    return None


def _bucket(per_minute: float | None, burst: float | None) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute / 60, max(1.0, burst or per_minute))


def _held(bucket: Bucket | None, level: Level | None, now: float) -> float:
    """What the bucket holds now. A clock that went back fills nothing."""
    if bucket is None:
        return 0.0
    if level is None:
        return bucket.burst
    return min(bucket.burst, level.amount + max(0.0, now - level.at) * bucket.per_s)


def _wait_s(bucket: Bucket | None, held: float, wanted: float | None) -> float:
    """Until it holds `wanted`; None: all it can."""
    if bucket is None:
        return 0.0
    return max(0.0, ((bucket.burst if wanted is None else wanted) - held) / bucket.per_s)

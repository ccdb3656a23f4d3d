"""The Scheduler port: plain values in, decisions out. The worker, the simulator and the tests run the same objects.

A scheduler is told what arrives, what progresses and what ends, and asked what to do now. It reads no
clock, draws no randomness, touches nothing: the same calls give the same decisions. It holds every job
from `offer` until `ended` or `withdraw`. Called by: worker.runner, worker.simulation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from codeyard.shared.job import JobId, Lane


@dataclass(frozen=True, slots=True)
class Candidate:
    """A claimed job that waits for the engine. Times are monotonic seconds of the caller's clock."""

    job_id: JobId
    lane: Lane
    tenant: str
    prompt_tokens: int  # known, or estimated from the prompt's length
    max_tokens: int  # still to generate, at most
    submitted_s: float  # when its record was made: waits at the broker count too
    deadline_s: float
    suspect: bool = False  # may have killed an engine: run apart
    attempt: int = 1  # claims so far, this one included; suspects run in smaller groups the more there were


@dataclass(frozen=True, slots=True)
class Decision:
    """`admit` in this order. `preempt` are running jobs to abort and keep in hand: the caller aborts each
    and offers it again (with what it has generated). `wake_in_s`: ask again by then though nothing happens."""

    admit: tuple[JobId, ...] = ()
    preempt: tuple[JobId, ...] = ()
    wake_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the caller knows of the engine when it asks."""

    kv_cache_used: float | None = None  # 0..1, where the engine tells
    window_factor: float = 1.0  # of the window, above 0 and up to 1: less while memory is short


class Scheduler(Protocol):
    @property
    def window(self) -> int:
        """Most jobs it would let run right now; for metrics and results."""

    def offer(self, job: Candidate, now_s: float) -> None:
        """A job is in hand. Also how a preempted one returns."""

    def withdraw(self, job_id: JobId, now_s: float) -> None:
        """A waiting job left (cancelled, expired, handed back). Unknown ids are ignored."""

    def decide(self, now_s: float, backlog: Mapping[Lane, int], load: EngineLoad) -> Decision:
        """What to do now. `backlog` is ready messages at the broker by lane, maybe a little stale.
        Admitted jobs count as running from here on; preempted ones until `ended`."""

    def progressed(self, job_id: JobId, tokens: int, now_s: float) -> None:
        """A running job has generated `tokens` more; its first call marks the first token."""

    def ended(self, job_id: JobId, now_s: float) -> None:
        """A running job left the engine, whatever the outcome."""

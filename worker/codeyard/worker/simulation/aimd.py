"""Clipper's batch size, as a window: add while the objective holds, multiply down when it is missed.

Crankshaw et al., NSDI 2017, section 4.3.1: additive increase by a fixed amount until a batch exceeds the
latency objective, then multiplicative decrease by 10 %. Here the observation is a job's time per output
token against the strictest promise there is, judged once per window of finished jobs.
"""

from collections.abc import Mapping

from codeyard.shared.job import JobId, Lane
from codeyard.worker.scheduling.port import Candidate, Decision, EngineLoad
from codeyard.worker.scheduling.weighted import WeightedLanes

INCREASE = 4  # jobs
DECREASE = 0.9


class Aimd:
    """Weighted lanes under a window that follows the times per token it sees."""

    def __init__(self, *, slots: int, shares: Mapping[Lane, float], per_token_s: float) -> None:
        self._slots = slots
        self._per_token_s = per_token_s
        self._lanes = WeightedLanes(slots=INCREASE, continuous=True, shares=shares, linger_s=0.0)
        self._first_s: dict[JobId, float] = {}
        self._tokens: dict[JobId, int] = {}
        self._finished = 0
        self._missed = False

    @property
    def window(self) -> int:
        return self._lanes.window

    def offer(self, job: Candidate, now_s: float) -> None:
        self._lanes.offer(job, now_s)

    def withdraw(self, job_id: JobId, now_s: float) -> None:
        self._lanes.withdraw(job_id, now_s)

    def decide(self, now_s: float, backlog: Mapping[Lane, int], load: EngineLoad) -> Decision:
        return self._lanes.decide(now_s, backlog, load)

    def progressed(self, job_id: JobId, tokens: int, now_s: float) -> None:
        self._first_s.setdefault(job_id, now_s)
        self._tokens[job_id] = self._tokens.get(job_id, 0) + tokens

    def ended(self, job_id: JobId, now_s: float) -> None:
        self._lanes.ended(job_id, now_s)
        tokens = self._tokens.pop(job_id, 0)
        first_s = self._first_s.pop(job_id, now_s)
        if tokens > 1 and self._per_token_s:
            self._missed |= (now_s - first_s) / (tokens - 1) > self._per_token_s
        self._finished += 1
        if self._finished >= self.window:
            self._finished = 0
            wanted = self.window * DECREASE if self._missed else self.window + INCREASE
            self._lanes.resize(max(1, min(self._slots, int(wanted))))
            self._missed = False

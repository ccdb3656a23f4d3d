"""Everything to the engine at once: no policy above it. What most services do, and the base line.

With an engine that knows priorities the lanes still count inside it; without, first come first served.
Suspects are not run apart here: choose it to compare, not to serve.
"""

from collections.abc import Mapping

from codeyard.shared.job import JobId, Lane
from codeyard.worker.scheduling.port import Candidate, Decision, EngineLoad

UNBOUNDED = 1_000_000_000  # jobs


class Straight:
    """See the module."""

    def __init__(self) -> None:
        self._waiting: dict[JobId, None] = {}

    @property
    def window(self) -> int:
        return UNBOUNDED

    def offer(self, job: Candidate, now_s: float) -> None:
        self._waiting[job.job_id] = None

    def withdraw(self, job_id: JobId, now_s: float) -> None:
        self._waiting.pop(job_id, None)

    def decide(self, now_s: float, backlog: Mapping[Lane, int], load: EngineLoad) -> Decision:
        admitted = tuple(self._waiting)
        self._waiting.clear()
        return Decision(admit=admitted)

    def progressed(self, job_id: JobId, tokens: int, now_s: float) -> None:
        pass

    def ended(self, job_id: JobId, now_s: float) -> None:
        pass

"""A fixed window shared by weighted lanes: the simplest policy that is right.

Promise: at most `slots` jobs run; a free slot is never kept while a job waits (work-conserving);
lanes with work get slots by their shares; within a lane the longest-waiting job is first. Suspects run
apart. For an engine that takes closed batches, a batch starts when the engine is empty and the batch is
full, or nothing more is at the broker, or the first job in hand has lingered long enough.

Used where the adaptive policy is switched off (`admission.policy: fixed`), and as the base line it is
measured against. Called by: worker.runner, worker.simulation.
"""

import heapq
from collections.abc import Mapping

from codeyard.shared.job import JobId, Lane
from codeyard.worker.scheduling.lanes import LaneTurns
from codeyard.worker.scheduling.port import Candidate, Decision, EngineLoad
from codeyard.worker.scheduling.suspects import Quarantine


class WeightedLanes:
    """See the module. `linger_s` counts only where `continuous` is false."""

    def __init__(self, *, slots: int, continuous: bool, shares: Mapping[Lane, float], linger_s: float) -> None:
        if slots < 1:
            raise ValueError(f"a window has at least one slot, not {slots}")
        self._slots = slots
        self._continuous = continuous
        self._linger_s = linger_s
        self._turns = LaneTurns(shares)
        self._lanes: dict[Lane, _Oldest] = {lane: _Oldest() for lane in Lane}
        self._suspects = Quarantine(slots=slots)
        self._running: set[JobId] = set()
        self._apart = False  # a group of suspects has the engine to itself
        self._since_s: float | None = None  # when the first of the jobs now waiting came in hand

    @property
    def window(self) -> int:
        return self._slots

    def resize(self, slots: int) -> None:
        """Another window from the next decision on; what runs above it runs on."""
        self._slots = slots

    def offer(self, job: Candidate, now_s: float) -> None:
        if job.suspect:
            self._suspects.add(job)
        else:
            self._lanes[job.lane].add(job)
        if self._since_s is None:
            self._since_s = now_s

    def withdraw(self, job_id: JobId, now_s: float) -> None:
        if self._suspects.remove(job_id) is None:
            for lane in self._lanes.values():
                lane.remove(job_id)
        if not self._waiting():
            self._since_s = None

    def progressed(self, job_id: JobId, tokens: int, now_s: float) -> None:
        pass  # a fixed window learns nothing

    def ended(self, job_id: JobId, now_s: float) -> None:
        self._running.discard(job_id)

    def decide(self, now_s: float, backlog: Mapping[Lane, int], load: EngineLoad) -> Decision:
        if not self._running:
            self._apart = False
        if self._apart or not self._waiting():
            return Decision()
        if len(self._suspects):
            return self._admit_suspects(now_s)
        if not self._continuous:
            if self._running:
                return Decision()
            left_s = self._linger_left(now_s, backlog)
            if left_s > 0:
                return Decision(wake_in_s=left_s)
        return self._admit_lanes(now_s, max(1, int(self._slots * load.window_factor)))

    def _admit_suspects(self, now_s: float) -> Decision:
        """Wait until the engine is empty, then give it to one group of them."""
        if self._running:
            return Decision()
        self._apart = True
        return self._admitted([job.job_id for job in self._suspects.take_group()], now_s)

    def _admit_lanes(self, now_s: float, window: int) -> Decision:
        admitted: list[JobId] = []
        while len(self._running) + len(admitted) < window:
            with_work = [lane for lane, waiting in self._lanes.items() if waiting]
            if not with_work:
                break
            lane = self._turns.next(with_work)
            self._turns.charge(lane, 1)
            admitted.append(self._lanes[lane].take().job_id)
        return self._admitted(admitted, now_s)

    def _admitted(self, job_ids: list[JobId], now_s: float) -> Decision:
        self._running.update(job_ids)
        self._since_s = now_s if self._waiting() else None
        return Decision(admit=tuple(job_ids))

    def _linger_left(self, now_s: float, backlog: Mapping[Lane, int]) -> float:
        """Seconds a closed batch still waits for company; none when nobody is on the way."""
        if self._waiting() >= self._slots or not any(backlog.values()) or self._since_s is None:
            return 0.0
        return self._since_s + self._linger_s - now_s

    def _waiting(self) -> int:
        return len(self._suspects) + sum(map(len, self._lanes.values()))


class _Oldest:
    """Waiting jobs of one lane, by when they were submitted: one that comes back keeps its place."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, JobId]] = []
        self._jobs: dict[JobId, Candidate] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Candidate) -> None:
        self._jobs[job.job_id] = job
        self._count += 1
        heapq.heappush(self._heap, (job.submitted_s, self._count, job.job_id))

    def remove(self, job_id: JobId) -> None:
        self._jobs.pop(job_id, None)  # its heap entry is skipped when it comes up

    def take(self) -> Candidate:
        while True:
            _, _, job_id = heapq.heappop(self._heap)
            if (job := self._jobs.pop(job_id, None)) is not None:
                return job

"""Suspects: jobs that were in an engine when it died. One of them may have killed it; most did not.

They run apart from everything else, in groups that halve each time a group is lost, down to one job
alone. So a killer among n suspects is alone after log2(n) losses, its neighbours complete on the way,
and no innocent ever shares the engine with it. Only a loss while alone counts against a job; that is
decided by the store's record, not here.

Two things tell how large a group a suspect may join: the group this process last saw it in, and its
attempt, which survives the process: a crash that takes the worker down too must not bring back the
same group for ever.
"""

from collections import OrderedDict

from codeyard.shared.job import JobId
from codeyard.worker.scheduling.port import Candidate

REMEMBERED = 4_096  # jobs; a suspect forgotten here is bounded by its attempt alone


class Quarantine:
    """Waiting suspects, oldest first. The engine must be empty before a group is taken."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._waiting: OrderedDict[JobId, Candidate] = OrderedDict()
        self._last_group: OrderedDict[JobId, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._waiting

    def add(self, job: Candidate) -> None:
        self._waiting[job.job_id] = job

    def remove(self, job_id: JobId) -> Candidate | None:
        return self._waiting.pop(job_id, None)

    def take_group(self) -> list[Candidate]:
        """The next group to run with nothing else in the engine; empty if no suspect waits."""
        group: list[Candidate] = []
        room = self._slots
        for job in self._waiting.values():
            limit = min(room, self._limit(job))
            if len(group) < limit:
                group.append(job)
                room = limit
        for job in group:
            del self._waiting[job.job_id]
            self._last_group.pop(job.job_id, None)
            self._last_group[job.job_id] = len(group)
        while len(self._last_group) > REMEMBERED:
            self._last_group.popitem(last=False)
        return group

    def _limit(self, job: Candidate) -> int:
        """Most jobs, itself included, that this one may run with."""
        by_attempt = self._slots >> (job.attempt - 1) if job.attempt < 32 else 1
        last = self._last_group.get(job.job_id)
        by_memory = last // 2 if last is not None else (len(self._waiting) + 1) // 2
        return max(1, min(by_attempt, by_memory))

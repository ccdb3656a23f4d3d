"""Tenants of one lane, served fairly by the tokens they really use: virtual token counters.

Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588): each tenant has a counter
of the service it got, `prompt + 2 * completion` tokens over its weight (a generated token costs about
twice a prefilled one), and the tenant with the smallest counter is next. At admission the completion is
an estimate (the mean of what the tenant's jobs in this lane turned out to be, at most the job's limit);
when the job ends, the counter is set right.

Here counters within `slack` tokens of the smallest count as equal, and among equals the oldest job is
next: tenants that ask for about the same are served in the order they came, so waits are even and can be
promised. A tenant that had nothing waiting comes back with at most twice `slack` of credit: enough to be
ahead of one that never stops, not enough to lock it out.

Bound: between two tenants that both have jobs waiting all the time, service over weight differs by at
most twice `slack`, the cost of the jobs running at once, and one more, whatever either of them asks for.
"""

import heapq
from collections.abc import Mapping

from codeyard.shared.job import JobId
from codeyard.worker.scheduling.port import Candidate

COMPLETION_WEIGHT = 2.0  # of a generated token, in prompt tokens
FIRST_GUESS = 128.0  # completion tokens, before any job ended
_LEARN = 0.1  # weight of the newest completion in a tenant's mean
REMEMBERED = 4_096  # tenants without a job; beyond, the least served are forgotten: they would be lifted anyway


class Tenants:
    """Waiting jobs of one lane. Every operation is O(log jobs)."""

    def __init__(self, weights: Mapping[str, float], *, slack: float) -> None:
        self._weights = weights
        self._slack = slack
        self._served: dict[str, float] = {}
        self._expected: dict[str, float] = {}  # completion tokens
        self._mean = FIRST_GUESS  # of the lane
        self._waiting: dict[str, list[tuple[float, int, JobId]]] = {}  # tenant: heap by when submitted
        self._jobs: dict[JobId, Candidate] = {}
        self._counts: dict[str, int] = {}  # waiting jobs of a tenant
        self._order = 0
        # Heaps of tenants with waiting jobs; an entry is stale where the number in it no longer holds.
        self._least: list[tuple[float, str]] = []  # all, by counter
        self._equals: list[tuple[float, int, str]] = []  # those within the slack, by their oldest job
        self._behind: list[tuple[float, str]] = []  # the others, by counter
        self._floor = 0.0  # the smallest counter when somebody last waited

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._jobs

    def served(self, tenant: str) -> float:
        """Its counter: for metrics and tests."""
        return self._served.get(tenant, 0.0)

    def add(self, job: Candidate) -> None:
        """The job waits. A tenant that had none waiting keeps at most twice `slack` of credit."""
        tenant = job.tenant
        returns = not self._counts.get(tenant)
        if returns:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._smallest() - 2.0 * self._slack)
        self._counts[tenant] = self._counts.get(tenant, 0) + 1
        self._order += 1
        self._jobs[job.job_id] = job
        heap = self._waiting.setdefault(tenant, [])
        entry = (job.submitted_s, self._order, job.job_id)
        heapq.heappush(heap, entry)
        if returns:
            heapq.heappush(self._least, (self._served[tenant], tenant))
        if returns or heap[0] is entry:
            heapq.heappush(self._equals, (*entry[:2], tenant))

    def remove(self, job_id: JobId) -> Candidate | None:
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._uncount(job.tenant)
        return job

    def next(self) -> Candidate | None:
        """The oldest job among the tenants served least; it stays."""
        tenant = self._turn()
        return self._jobs[self._head(tenant)[2]] if tenant is not None else None

    def take(self) -> Candidate:
        """`next`, and it leaves. Charge it with `charge`."""
        tenant = self._turn()
        if tenant is None:
            raise LookupError("nobody waits")
        job = self._jobs.pop(self._head(tenant)[2])
        heapq.heappop(self._waiting[tenant])
        self._uncount(tenant)
        return job

    def ahead(self) -> bool:
        """Is the next job of a tenant that was served clearly less than another that waits?"""
        if self._turn() is None:
            return False
        behind = self._behind
        while behind and not self._holds(*behind[0]):
            heapq.heappop(behind)
        return bool(behind)

    def flooded(self) -> bool:
        """Is all that waits one tenant's, though it is not the only tenant there is?"""
        return len(self._counts) == 1 and len(self._served) > 1

    def cost(self, job: Candidate) -> float:
        """What the job will probably use, in prompt tokens."""
        return job.prompt_tokens + COMPLETION_WEIGHT * self.expected(job)

    def expected(self, job: Candidate) -> float:
        """Completion tokens the job will probably have."""
        return min(job.max_tokens, self._expected.get(job.tenant, self._mean))

    def charge(self, tenant: str, cost: float) -> None:
        """The tenant used this much more (or less: a correction)."""
        served = self._served.get(tenant, self._floor) + cost / self._weights.get(tenant, 1.0)
        self._served[tenant] = served
        if self._counts.get(tenant):
            heapq.heappush(self._least, (served, tenant))
            heapq.heappush(self._behind, (served, tenant))  # looked at again in its turn

    def learn(self, tenant: str, completion_tokens: int) -> None:
        """A job of the tenant ended by itself with this many tokens."""
        self._mean += _LEARN * (completion_tokens - self._mean)
        known = self._expected.get(tenant, self._mean)
        self._expected[tenant] = known + _LEARN * (completion_tokens - known)

    def _turn(self) -> str | None:
        """The tenant whose oldest job is next."""
        if not self._jobs:
            return None
        limit = self._smallest() + self._slack
        while self._behind and self._behind[0][0] <= limit:
            served, tenant = heapq.heappop(self._behind)
            if self._holds(served, tenant):
                heapq.heappush(self._equals, (*self._head(tenant)[:2], tenant))
        while True:
            submitted_s, order, tenant = self._equals[0]
            if self._counts.get(tenant) and self._head(tenant)[:2] == (submitted_s, order):
                if self._served[tenant] <= limit:
                    return tenant
                heapq.heappush(self._behind, (self._served[tenant], tenant))
            heapq.heappop(self._equals)

    def _smallest(self) -> float:
        """The smallest counter among tenants with waiting jobs, or when there last was one."""
        least = self._least
        while least:
            if self._holds(*least[0]):
                self._floor = least[0][0]
                break
            heapq.heappop(least)
        return self._floor

    def _holds(self, served: float, tenant: str) -> bool:
        """Is this entry of a heap still true?"""
        return bool(self._counts.get(tenant)) and self._served[tenant] == served

    def _head(self, tenant: str) -> tuple[float, int, JobId]:
        heap = self._waiting[tenant]
        while heap[0][2] not in self._jobs:
            heapq.heappop(heap)
        return heap[0]

    def _uncount(self, tenant: str) -> None:
        self._counts[tenant] -= 1
        if self._counts[tenant]:
            heapq.heappush(self._equals, (*self._head(tenant)[:2], tenant))
            return
        del self._counts[tenant]
        del self._waiting[tenant]
        if len(self._served) > 2 * REMEMBERED:
            self._forget()

    def _forget(self) -> None:
        idle = sorted((name for name in self._served if name not in self._counts), key=self._served.__getitem__)
        for name in idle[:-REMEMBERED]:
            del self._served[name]
            self._expected.pop(name, None)

"""Tenants of one lane, served fairly by the tokens they really use: virtual token counters.

Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588): each tenant has a counter
of the service it got, the tenant with the smallest counter is next, and one that comes back from having
nothing to do is lifted to the smallest counter of those that had, so that idling earns no credit.
Service is `prompt + 2 * completion` tokens over the tenant's weight: a generated token costs about twice
a prefilled one. At admission the completion is an estimate (the mean of what the tenant's jobs in this
lane turned out to be, at most the job's limit); when the job ends, the counter is set right.

Bound: between two tenants that both have jobs waiting all the time, service over weight differs by at
most the cost of the jobs running at once plus one, whatever either of them asks for.
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

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._served: dict[str, float] = {}
        self._expected: dict[str, float] = {}  # completion tokens
        self._mean = FIRST_GUESS  # of the lane
        self._waiting: dict[str, list[tuple[float, int, JobId]]] = {}  # tenant: heap by when submitted
        self._jobs: dict[JobId, Candidate] = {}
        self._counts: dict[str, int] = {}  # waiting jobs of a tenant
        self._order = 0
        self._turns: list[tuple[float, str]] = []  # heap of (served, tenant); stale where served has moved
        self._floor = 0.0  # the counter of the tenant served last, as it stood then

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._jobs

    def served(self, tenant: str) -> float:
        """Its counter: for metrics and tests."""
        return self._served.get(tenant, 0.0)

    def add(self, job: Candidate) -> None:
        """The job waits. A tenant that had none waiting is lifted to the least served that has."""
        tenant = job.tenant
        if not self._counts.get(tenant):
            least = self._least()
            lift = least if least is not None else self._floor
            self._served[tenant] = max(self._served.get(tenant, 0.0), lift)
            heapq.heappush(self._turns, (self._served[tenant], tenant))
        self._counts[tenant] = self._counts.get(tenant, 0) + 1
        self._order += 1
        self._jobs[job.job_id] = job
        heapq.heappush(self._waiting.setdefault(tenant, []), (job.submitted_s, self._order, job.job_id))

    def remove(self, job_id: JobId) -> Candidate | None:
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._uncount(job.tenant)
        return job

    def next(self) -> Candidate | None:
        """The longest-waiting job of the tenant served least; it stays."""
        if self._least() is None:
            return None
        return self._jobs[self._head(self._turns[0][1])]

    def take(self) -> Candidate:
        """`next`, and it leaves. Charge it with `charge`."""
        if self._least() is None:
            raise LookupError("nobody waits")
        served, tenant = self._turns[0]
        job = self._jobs.pop(self._head(tenant))
        heapq.heappop(self._waiting[tenant])
        self._floor = served
        self._uncount(tenant)
        return job

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
            heapq.heappush(self._turns, (served, tenant))

    def learn(self, tenant: str, completion_tokens: int) -> None:
        """A job of the tenant ended by itself with this many tokens."""
        self._mean += _LEARN * (completion_tokens - self._mean)
        known = self._expected.get(tenant, self._mean)
        self._expected[tenant] = known + _LEARN * (completion_tokens - known)

    def _least(self) -> float | None:
        """The smallest counter among tenants with waiting jobs; drops stale turns on the way."""
        turns = self._turns
        while turns:
            served, tenant = turns[0]
            if self._counts.get(tenant) and self._served[tenant] == served:
                return served
            heapq.heappop(turns)
        return None

    def _head(self, tenant: str) -> JobId:
        heap = self._waiting[tenant]
        while heap[0][2] not in self._jobs:
            heapq.heappop(heap)
        return heap[0][2]

    def _uncount(self, tenant: str) -> None:
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant]
            del self._waiting[tenant]
            if len(self._served) > 2 * REMEMBERED:
                self._forget()

    def _forget(self) -> None:
        idle = sorted((name for name in self._served if name not in self._counts), key=self._served.__getitem__)
        for name in idle[:-REMEMBERED]:
            del self._served[name]
            self._expected.pop(name, None)

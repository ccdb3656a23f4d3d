"""What this worker holds: every claimed job until it is settled, and its lease with it.

One owner, the event loop; the lease thread sees only ids and fences. Called by: intake (add), runner
(get), service (discard, when settled).
"""

from collections.abc import Iterator

from codeyard.shared.job import JobId, Lane
from codeyard.shared.telemetry import Metrics
from codeyard.worker.held import HeldJob
from codeyard.worker.leases import LeaseKeeper


class Hand:
    def __init__(self, leases: LeaseKeeper, metrics: Metrics) -> None:
        self._leases = leases
        self._metrics = metrics
        self._held: dict[JobId, HeldJob] = {}

    def add(self, held: HeldJob) -> None:
        self._held[held.id] = held
        self._leases.hold(held.id, held.fence)
        self._metrics.in_hand.labels(lane=held.job.lane).inc()
        self._metrics.queue_wait.labels(lane=held.job.lane).observe(held.claimed_s - held.submitted_s)

    def get(self, job_id: JobId) -> HeldJob | None:
        return self._held.get(job_id)

    def discard(self, held: HeldJob) -> None:
        """It is settled. Leaves a newer claim of the same job alone."""
        if self._held.get(held.id) is held:
            del self._held[held.id]
            self._leases.drop(held.id)
        self._metrics.in_hand.labels(lane=held.job.lane).dec()

    def __iter__(self) -> Iterator[HeldJob]:
        return iter(list(self._held.values()))

    def __len__(self) -> int:
        return len(self._held)

    def lanes(self) -> set[Lane]:
        return {held.job.lane for held in self._held.values()}

"""Watch the jobs of a drill while it runs: which are accepted, which are final, and with what result.

Each result is kept as it was when the job had just become final; the audit compares it with what is there at
the end. Reads only. Called by: run.
"""

import hashlib
import time
from collections import deque
from dataclasses import dataclass, field

from codeyard.cli.drill.ledger import Reader, Told
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.store.port import Store

LOOK = 2_048  # jobs asked about in one look
GROUP = 256


@dataclass(frozen=True, slots=True)
class Moment:
    """One point of the timeline; counts in jobs."""

    at_s: float
    accepted: int
    final: int


@dataclass(slots=True)
class Watch:
    store: Store
    readers: list[Reader]
    started_s: float  # monotonic
    told: Told = field(default_factory=Told)
    digests: dict[JobId, bytes] = field(default_factory=dict)  # of results, by the ids of final jobs
    timeline: list[Moment] = field(default_factory=list)
    moved_s: float = field(default_factory=time.monotonic)  # when a job was last seen to become final
    _open: deque[JobId] = field(default_factory=deque)
    _num_final: int = 0

    @property
    def num_open(self) -> int:
        """Accepted and not yet seen to be final."""
        return len(self._open)

    def add(self, job_id: JobId) -> None:
        """A job that no ledger names."""
        self._open.append(job_id)

    def read_ledgers(self) -> None:
        for reader in self.readers:
            self._open.extend(self.told.add(reader.news()))

    async def look(self) -> None:
        """Once: read what the ledgers have new, and ask about the oldest open jobs."""
        self.read_ledgers()
        try:
            for _ in range(LOOK // GROUP):
                if not self._open:
                    break
                await self._look_at([self._open.popleft() for _ in range(min(GROUP, len(self._open)))])
        except StoreUnavailable:
            pass  # the store may be what is being broken; the next look follows
        accepted = self._num_final + len(self._open)
        self.timeline.append(Moment(time.monotonic() - self.started_s, accepted, self._num_final))

    async def _look_at(self, group: list[JobId]) -> None:
        try:
            states = await self.store.states(group)
            final = [one for one, state in zip(group, states, strict=True) if state is not None and state.final]
            records = await self.store.read(final) if final else []
        except StoreUnavailable:
            self._open.extend(group)
            raise
        for record in records:
            if record is not None and record.result is not None:
                self.digests[record.id] = digest_of(record.result.encode())
        self._num_final += len(final)
        if final:
            self.moved_s = time.monotonic()
        gone = set(final)
        self._open.extend(one for one in group if one not in gone)


def digest_of(result: str) -> bytes:
    """Short, because a drill keeps one for each of its jobs."""
    return hashlib.blake2b(result.encode(), digest_size=12).digest()

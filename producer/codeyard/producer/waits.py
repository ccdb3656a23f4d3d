"""How long a job submitted now will wait, and which shard is emptiest: what one producer knows of the fleet.

The estimate is `shared.notice.LaneLoad` of the workers' notices, and what this producer published
since they looked. Refreshed at most every `PERIOD_S` while jobs are submitted: the first of them waits for it,
no longer than `WAIT_S`. A store that does not answer costs the estimate, never the submission.
Called by: producer.submission.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass

from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import Lane
from codeyard.shared.notice import ModelNotice, Notice, fleet, lane_load
from codeyard.shared.sharding import shards_of
from codeyard.shared.store.port import Store

log = logging.getLogger(__name__)

PERIOD_S = 0.5
WAIT_S = 0.5
STALE_S = 5.0  # an older board says nothing
LAG_S = 0.5  # a notice tells of the queues as they were about this long before it was read


@dataclass(frozen=True, slots=True)
class _Published:
    at_s: float
    revision: str
    lane: Lane
    shard: int


class WaitBoard:
    """What one producer knows of the fleet's load. Needs `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._notices: list[Notice] = []
        self._seen_s = float("-inf")
        self._asked_s = float("-inf")
        self._published: list[_Published] = []
        self._refreshing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    async def ready(self) -> None:
        """Before a group is estimated: begins a refresh if it is time for one."""
        now_s = time.monotonic()
        if now_s - self._asked_s >= PERIOD_S and (self._refreshing is None or self._refreshing.done()):
            self._asked_s = now_s
            self._refreshing = asyncio.create_task(self._refresh(), name="wait board")
        if now_s - self._seen_s > PERIOD_S and self._refreshing is not None:
            await asyncio.wait([self._refreshing], timeout=WAIT_S)

    def estimate_s(self, revision: str, lane: Lane) -> float | None:
        """Seconds until a job submitted now would start; None if that is not known."""
        if time.monotonic() - self._seen_s > STALE_S:
            return None
        self._forget()
        coming = sum(one.revision == revision and one.lane is lane for one in self._published)
        load = lane_load(self._workers(revision), lane)
        return load.start_s(on_the_way=coming, age_s=time.monotonic() - self._seen_s + LAG_S) if load else None

    def shard(self, revision: str, lane: Lane, tenant: str, *, shards: int, per_tenant: int) -> int:
        """The emptiest of the tenant's shards, by what is known; any of them where nothing is."""
        if shards == 1:
            return 0
        depths: Counter[int] = Counter()
        for worker in self._workers(revision):
            for shard, depth in enumerate(worker.backlog.get(lane, ())):
                depths[shard] = max(depths[shard], depth)
        self._forget()
        for one in self._published:
            if one.revision == revision and one.lane is lane:
                depths[one.shard] += 1
        hand = shards_of(tenant, shards=shards, per_tenant=per_tenant)
        return min(hand, key=lambda shard: (depths[shard], random.random()))

    def publishing(self, revision: str, lane: Lane, shard: int) -> None:
        """This producer is about to publish a job there."""
        self._published.append(_Published(time.monotonic(), revision, lane, shard))

    def _workers(self, revision: str) -> list[ModelNotice]:
        base = revision.split("@", 1)[0]  # an adapter's jobs wait in its base's queues
        return [model for notice in self._notices for model in notice.models if model.revision == base]

    def _forget(self) -> None:
        """What was published before the workers last looked is in their notices."""
        seen_s = self._seen_s - LAG_S
        if self._published and self._published[0].at_s < seen_s:
            self._published = [one for one in self._published if one.at_s >= seen_s]

    async def _refresh(self) -> None:
        try:
            self._notices = await fleet(self._store)
        except StoreUnavailable as error:
            log.debug("no_notices", extra={"error": str(error)})
            return
        self._seen_s = time.monotonic()

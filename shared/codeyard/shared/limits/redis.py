"""What each tenant has used, on Redis: one script call for a group of submissions.

    {ns}:{sNN}:<tenant>:levels   hash   requests, requests_at, tokens, tokens_at; ends when the buckets are full
    {ns}:{sNN}:<tenant>:live     zset   job ids by their end, in microseconds since the epoch
    {ns}:{sNN}:<tenant>:sizes    hash   id -> tokens, and `sum` of them; both end with the last id

The tenant is percent-encoded; sNN is its shard, drawn as a job's is.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from codeyard.shared.job import JobId
from codeyard.shared.limits.rules import Bucket, GiveBack, Take, Taken, Verdict
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.redis_link import Item, RedisLink
from codeyard.shared.topology import Topology, store_shard


class RedisLimitStore:
    def __init__(self, link: RedisLink, topology: Topology) -> None:
        self._link = link
        self._topology = topology

    @classmethod
    async def open(cls, settings: StoreSettings, topology: Topology) -> "RedisLimitStore":
        """Raises StoreUnavailable, SettingsError."""
        return cls(await RedisLink.open(settings), topology)

    async def take(self, group: Sequence[Take]) -> list[Taken]:
        items = [self._item(ask.tenant, _request(ask)) for ask in group]
        return [_taken(*outcome) for outcome in await self._link.run("limits/take", items, {})]

    async def give_back(self, group: Sequence[GiveBack]) -> None:
        items = [self._item(one.tenant, {"id": one.job_id, "tokens": one.tokens}) for one in group]
        await self._link.run("limits/give_back", items, {})

    async def live(self, tenant: str, *, start: int, count: int) -> list[JobId]:
        item = self._item(tenant, {"start": start, "count": count})
        [found] = await self._link.run("limits/live", [Item(item.shard, item.keys[1:2], item.request)], {})
        return list(found)  # cjson writes an empty list as an empty object; both iterate over nothing

    async def close(self) -> None:
        await self._link.close()

    def _item(self, tenant: str, request: dict[str, Any]) -> Item:
        name = quote(tenant, safe="")
        shard = store_shard(name)
        keys = tuple(self._topology.shard_key(shard, f"{name}:{part}") for part in ("levels", "live", "sizes"))
        return Item(shard, keys, request)


def _request(ask: Take) -> dict[str, Any]:
    """Limits that are not there are left out: JSON's null is something in Lua."""
    allowance = ask.allowance
    given = {
        "per_request": _bucket(allowance.requests),
        "per_token": _bucket(allowance.tokens),
        "most_jobs": allowance.concurrent_jobs,
        "most_tokens": allowance.enqueued_tokens,
    }
    present = {name: value for name, value in given.items() if value is not None}
    return {"id": ask.job_id, "tokens": ask.tokens, "live_s": ask.live_s, **present}


def _bucket(bucket: Bucket | None) -> list[float] | None:
    return [bucket.per_s, bucket.burst] if bucket else None


def _taken(verdict: str, charged: int, added: bool, *numbers: str) -> Taken:
    return Taken(Verdict(verdict), int(charged), added, *map(float, numbers))

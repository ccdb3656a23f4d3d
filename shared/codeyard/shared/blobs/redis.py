"""Chunks on Redis: one script call for a group; a tenant's keys share its shard, drawn as in limits/redis.py.

    {ns}:{sNN}:<tenant>:blob-ends           zset     digest by the end of its last holder, microseconds since the epoch
    {ns}:{sNN}:<tenant>:blob-sizes          hash     digest -> bytes, and `sum` of them
    {ns}:{sNN}:<tenant>:blob:<digest>       string   the bytes
    {ns}:{sNN}:<tenant>:holders:<digest>    zset     holder by its end

The tenant is percent-encoded. Every key ends with the last chunk it speaks of.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from codeyard.shared.blobs.port import Chunk, Digest, Hold, PutVerdict
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.redis_link import Item, RedisLink
from codeyard.shared.topology import Topology, store_shard


class RedisBlobStore:
    def __init__(self, link: RedisLink, topology: Topology, quota_bytes: int) -> None:
        self._link = link
        self._topology = topology
        self._quota_bytes = quota_bytes

    @classmethod
    async def open(cls, settings: StoreSettings, topology: Topology) -> "RedisBlobStore":
        """Raises StoreUnavailable, SettingsError."""
        return cls(await RedisLink.open(settings), topology, settings.blob_quota_bytes)

    async def put(self, group: Sequence[Chunk]) -> list[PutVerdict]:
        items = [self._holding(chunk.hold, data=chunk.data, quota=self._quota_bytes) for chunk in group]
        return [PutVerdict(verdict) for verdict in await self._link.run("blobs/put", items, {}, durable=True)]

    async def hold(self, group: Sequence[Hold]) -> list[bool]:
        verdicts = await self._link.run("blobs/put", [self._holding(hold) for hold in group], {}, durable=True)
        return [verdict == PutVerdict.PRESENT for verdict in verdicts]

    async def release(self, tenant: str, holder: str, digests: Sequence[Digest]) -> None:
        items = [self._item(tenant, digest, {"digest": digest, "holder": holder}) for digest in digests]
        await self._link.run("blobs/release", items, {})

    async def read(self, tenant: str, digests: Sequence[Digest]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for digest in digests:
            [_, _, data, _] = self._item(tenant, digest, {}).keys
            found.append(await self._link.command("GET", data, raw=True))
        return found

    async def used_bytes(self, tenant: str) -> int:
        item = self._item(tenant, "", {})
        [used] = await self._link.run("blobs/used", [Item(item.shard, item.keys[:2])], {})
        return int(used)

    async def close(self) -> None:
        await self._link.close()

    def _holding(self, hold: Hold, **more: Any) -> Item:
        request = {"digest": hold.digest, "holder": hold.holder, "ttl_s": hold.ttl_s, **more}
        return self._item(hold.tenant, hold.digest, request)

    def _item(self, tenant: str, digest: Digest, request: dict[str, Any]) -> Item:
        name = quote(tenant, safe="")
        shard = store_shard(name)
        parts = ("blob-ends", "blob-sizes", f"blob:{digest}", f"holders:{digest}")
        return Item(shard, tuple(self._topology.shard_key(shard, f"{name}:{part}") for part in parts), request)

"""A BlobStore under test, and time that passes at will: on Redis every moment it holds is moved back instead."""

import time
from dataclasses import dataclass, field

from redis.asyncio import Redis

from codeyard.shared.blobs.port import BlobStore, Chunk, Hold, digest_of
from codeyard.shared.blobs.redis import RedisBlobStore
from codeyard.shared.blobs.sqlite import SqliteBlobStore
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology
from support.redis_server import client_of

QUOTA_BYTES = 3_000_000


@dataclass
class BlobYard:
    url: str
    topology: Topology
    opened: list[BlobStore] = field(default_factory=list)
    _wall: float = field(default_factory=time.time)

    @property
    def is_redis(self) -> bool:
        return self.url.startswith("redis")

    async def open(self, topology: Topology | None = None) -> BlobStore:
        settings = StoreSettings(url=self.url, blob_quota_bytes=QUOTA_BYTES)
        store: BlobStore
        if self.is_redis:
            store = await RedisBlobStore.open(settings, topology or self.topology)
        else:
            store = await SqliteBlobStore.open(settings, topology or self.topology, clock=self.clock)
        self.opened.append(store)
        return store

    def clock(self) -> float:
        return self._wall

    async def elapse(self, seconds: float) -> None:
        self._wall += seconds
        if not self.is_redis:
            return
        async with self._redis() as redis:
            for key in await self.keys():
                await _move_back(redis, key, seconds)

    async def keys(self) -> list[str]:
        async with self._redis() as redis:
            return [key async for key in redis.scan_iter(f"{self.topology.namespace}:*", count=1_000)]

    async def lifetimes(self) -> dict[str, float]:
        """Seconds left to each key; -1 for one without an end. Redis only."""
        async with self._redis() as redis:
            return {key: await redis.pttl(key) / 1000 for key in await self.keys()}

    async def tidy(self) -> None:
        for store in self.opened:
            await store.close()
        if self.is_redis:
            async with self._redis() as redis:
                for key in await self.keys():
                    await redis.delete(key)

    def _redis(self) -> Redis:
        return client_of(self.url)


async def _move_back(redis: Redis, key: str, seconds: float) -> None:
    part = key.split(":")[3]
    if part in {"blob-ends", "holders"}:
        for member in await redis.zrange(key, 0, -1):
            await redis.zincrby(key, int(-seconds * 1_000_000), str(member))
    left_ms = await redis.pttl(key)
    if left_ms >= 0:
        await redis.pexpire(key, int(left_ms - seconds * 1000))


def chunk(data: bytes, *, tenant: str = "acme", holder: str = "file-1", ttl_s: float = 600.0) -> Chunk:
    return Chunk(Hold(tenant, digest_of(data), holder, ttl_s), data)

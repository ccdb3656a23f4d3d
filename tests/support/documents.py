"""A DocumentStore under test, and time that passes at will: on Redis every moment it holds is moved back instead."""

import time
from dataclasses import dataclass, field

from redis.asyncio import Redis

from codeyard.shared.documents.port import DocumentStore
from codeyard.shared.documents.redis import RedisDocumentStore
from codeyard.shared.documents.sqlite import SqliteDocumentStore
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology
from support.redis_server import client_of


@dataclass
class DocumentYard:
    url: str
    topology: Topology
    opened: list[DocumentStore] = field(default_factory=list)
    _wall: float = field(default_factory=time.time)

    @property
    def is_redis(self) -> bool:
        return self.url.startswith("redis")

    async def open(self) -> DocumentStore:
        settings = StoreSettings(url=self.url)
        store: DocumentStore
        if self.is_redis:
            store = await RedisDocumentStore.open(settings, self.topology)
        else:
            store = await SqliteDocumentStore.open(settings, self.topology, clock=self.clock)
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
                if key.endswith("-open"):
                    for member in await redis.zrange(key, 0, -1):
                        await redis.zincrby(key, int(-seconds * 1_000_000), str(member))
                left_ms = await redis.pttl(key)
                if left_ms >= 0:
                    await redis.pexpire(key, int(left_ms - seconds * 1000))

    async def keys(self) -> list[str]:
        async with self._redis() as redis:
            return [key async for key in redis.scan_iter(f"{self.topology.namespace}:*", count=1_000)]

    async def lifetimes(self) -> list[float]:
        """Seconds left to each key; -1 for one without an end. Redis only."""
        async with self._redis() as redis:
            return [await redis.pttl(key) / 1000 for key in await self.keys()]

    async def tidy(self) -> None:
        for store in self.opened:
            await store.close()
        if self.is_redis:
            async with self._redis() as redis:
                for key in await self.keys():
                    await redis.delete(key)

    def _redis(self) -> Redis:
        return client_of(self.url)

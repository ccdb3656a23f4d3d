"""A LimitStore under test, and time that passes at will: on Redis every moment it holds is moved back instead."""

import time
from dataclasses import dataclass, field

from redis.asyncio import Redis

from codeyard.shared.limits.port import LimitStore
from codeyard.shared.limits.redis import RedisLimitStore
from codeyard.shared.limits.rules import Allowance, Bucket, Take, Taken
from codeyard.shared.limits.sqlite import SqliteLimitStore
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology
from support.redis_server import client_of

SLOW = Bucket(per_s=1 / 3_600, burst=5)  # fills by nothing that counts during a test


@dataclass
class LimitYard:
    url: str
    topology: Topology
    opened: list[LimitStore] = field(default_factory=list)
    _wall: float = field(default_factory=time.time)

    @property
    def is_redis(self) -> bool:
        return self.url.startswith("redis")

    async def open(self) -> LimitStore:
        store: LimitStore
        settings = StoreSettings(url=self.url)
        if self.is_redis:
            store = await RedisLimitStore.open(settings, self.topology)
        else:
            store = await SqliteLimitStore.open(settings, self.topology, clock=self.clock)
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
    part = key.rsplit(":", 1)[1]
    if part == "live":
        for member in await redis.zrange(key, 0, -1):
            await redis.zincrby(key, int(-seconds * 1_000_000), str(member))
    if part == "levels":
        for name in ("requests_at", "tokens_at"):
            if (at := await redis.hget(key, name)) is not None:
                await redis.hset(key, name, repr(float(at) - seconds))
    left_ms = await redis.pttl(key)
    if left_ms >= 0:
        await redis.pexpire(key, int(left_ms - seconds * 1000))


def ask(
    job_id: str, *, tenant: str = "acme", tokens: int = 10, live_s: float = 600.0, allowance: Allowance | None = None
) -> Take:
    return Take(tenant, job_id, tokens, live_s, allowance or Allowance(requests=SLOW))


async def taken(store: LimitStore, *asks: Take) -> list[Taken]:
    return await store.take(asks)

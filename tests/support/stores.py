"""A Store adapter under test: a namespace of its own, everything opened on it, and time that passes at will.

The embedded store takes its clock from the test. Redis's cannot be turned, so every time it holds is
moved back instead: to all who read them, that is the same.
"""

import itertools
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from codeyard.shared.job import Job
from codeyard.shared.record import Event, Record
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import Store, Timing
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology
from support.redis_server import client_of
from support.simulation.store import MemoryStore, StoreServer
from support.simulation.wire import DirectLink

DURATIONS: dict[str, Any] = {  # long against what a test takes on a busy machine, and none the sum of others
    "lease_s": 100,
    "grace_s": 40,
    "unpublished_s": 300,
    "queue_check_s": 220,
    "longest_run_s": 1_000,
    "retention_s": 500_000,
}
SLACK_S = 5.0  # what Redis's own clock may add during one test
_TIMES = (
    "lease_until",
    "created_at",
    "queued_at",
    "started_at",
    "finished_at",
    "deadline_at",
    "check_at",
    "expires_at",
    "callback_at",
)


@dataclass
class StoreYard:
    url: str
    topology: Topology
    opened: list[Store] = field(default_factory=list)
    timing: Timing = field(default_factory=lambda: StoreSettings(**DURATIONS).timing())
    _wall: float = field(default_factory=time.time)

    @property
    def is_redis(self) -> bool:
        return self.url.startswith("redis")

    @property
    def kind(self) -> str:
        return "redis" if self.is_redis else "sqlite"

    @property
    def file(self) -> Path:
        return Path(self.url.removeprefix("sqlite:///"))

    async def open(self, topology: Topology | None = None) -> Store:
        settings = StoreSettings(url=self.url, **DURATIONS)
        store: Store
        if self.is_redis:
            store = await RedisStore.open(settings, topology or self.topology)
        else:
            store = await SqliteStore.open(settings, topology or self.topology, clock=self.clock)
        self.opened.append(store)
        return store

    def clock(self) -> float:
        return self._wall

    async def now(self) -> float:
        """By the store's clock."""
        if not self.is_redis:
            return self._wall
        async with self._redis() as redis:
            seconds, microseconds = await redis.time()
            return float(seconds) + microseconds / 1e6

    async def elapse(self, seconds: float) -> None:
        self._wall += seconds
        if self.is_redis:
            async with self._redis() as redis:
                for key in await self.keys():
                    await _move_back(redis, key, seconds)

    async def keys(self) -> list[str]:
        async with self._redis() as redis:
            return [key async for key in redis.scan_iter(f"{self.topology.namespace}:*", count=1_000)]

    async def lifetimes(self) -> dict[str, float]:
        """Seconds left to each key of the fleet; -1 for one without an end."""
        async with self._redis() as redis:
            return {key: await redis.pttl(key) / 1000 for key in await self.keys()}

    async def num_rows(self, table: str) -> int:
        with sqlite3.connect(self.file) as db:
            count: int = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        db.close()
        return count

    async def tidy(self) -> None:
        for store in self.opened:
            await store.close()
        if self.is_redis:
            async with self._redis() as redis:
                for key in await self.keys():
                    await redis.delete(key)

    def _redis(self) -> Redis:
        return client_of(self.url)


class MemoryStoreYard(StoreYard):
    """The simulation's store."""

    def __init__(self, topology: Topology) -> None:
        super().__init__("memory:", topology)
        self._servers: dict[str, StoreServer] = {}  # by namespace

    @property
    def kind(self) -> str:
        return "memory"

    async def open(self, topology: Topology | None = None) -> Store:
        namespace = (topology or self.topology).namespace
        server = self._servers.setdefault(namespace, StoreServer(self.timing, self.clock))
        store = MemoryStore(server, DirectLink())
        self.opened.append(store)
        return store

    async def num_rows(self, table: str) -> int:
        servers = self._servers.values()
        tables = {"events": [len(stream) for one in servers for stream in one.streams.values()]}
        return sum(tables.get(table, [len(one.records) for one in servers]))


async def _move_back(redis: Redis, key: str, seconds: float) -> None:
    part = key.rsplit(":", 1)[1]
    if part in {"due", "recent", "callbacks"}:  # indexes by time, in microseconds
        for member in await redis.zrange(key, 0, -1):
            await redis.zincrby(key, int(-seconds * 1_000_000), str(member))
        return
    if part == "until":  # of notices, in milliseconds
        for member in await redis.zrange(key, 0, -1):
            await redis.zincrby(key, -seconds * 1_000, str(member))
        return
    if part == "record":
        for name, value in zip(_TIMES, await redis.hmget(key, list(_TIMES)), strict=True):
            if float(value or 0):
                await redis.hincrbyfloat(key, name, -seconds)
    left_ms = await redis.pttl(key)
    if left_ms >= 0:
        await redis.pexpire(key, int(left_ms - seconds * 1000))  # below zero it is gone at once


async def record_of(store: Store, job: Job) -> Record:
    [record] = await store.read([job.id])
    assert record is not None
    return record


async def stream_of(store: Store, job: Job) -> list[Event]:
    """All events, read two at a time as a resuming reader would."""
    events: list[Event] = []
    for _ in itertools.count():
        page = await store.events(job.id, after=events[-1].seq if events else 0, limit=2)
        if not page:
            break
        events += page
    return events

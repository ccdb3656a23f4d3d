"""The Store on Redis 7.0 and later, alone or as a cluster.

Every call of the port is one script (lua/*.lua) for its whole group, on the server's clock. The
scripts are a port of transitions.py, function by function; what a record, an event stream and the
indexes look like in Redis is documented in docs/wire-contract.md.

    {ns}:{sNN}:<id>:record   hash     a field per Record field; ends at expires_at
    {ns}:{sNN}:<id>:events   stream   entry <seq>-0 holds the event's JSON; ends at expires_at
    {ns}:{sNN}:<id>:wake     channel  the newest seq, published with every event
    {ns}:{sNN}:due           zset     ids by check_at, of jobs that are not final
    {ns}:{sNN}:recent        zset     the newest ids by created_at, bounded
    {ns}:{sNN}:callbacks     zset     ids by callback_at, of final jobs whose caller is still to be told
    {ns}:aliases             hash     never read inside job scripts
    {ns}:{notices}:text      hash     a worker's notice by its name
    {ns}:{notices}:until     zset     when each is over, in milliseconds

Called through shared.connect.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Any, TypeVar

from codeyard.shared.alias import Alias
from codeyard.shared.job import JobId
from codeyard.shared.record import Event, Record, State
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store import redis_codec as codec
from codeyard.shared.store.port import (
    Append,
    AppendVerdict,
    CancelVerdict,
    Claim,
    Claimed,
    Commit,
    Committed,
    NoteCallback,
    Queued,
    QueuedVerdict,
    Recovered,
    Recovery,
    Redrive,
    Redriven,
    Release,
    ReleaseVerdict,
    Renewal,
    Renewed,
    Reservation,
    Reserved,
    TakeCallback,
    Wakeup,
)
from codeyard.shared.store.redis_link import Item, RedisLink
from codeyard.shared.store.redis_wakeups import Wakeups
from codeyard.shared.topology import NUM_STORE_SHARDS, Topology, store_shard

RequestT = TypeVar("RequestT")

SWAP = """
local now = redis.call("HGET", KEYS[1], ARGV[1])
if now and now ~= ARGV[2] then
    return now
end
redis.call("HSET", KEYS[1], ARGV[1], ARGV[3])
return ARGV[3]
"""

_NOW = 'local t = redis.call("TIME") local now = t[1] * 1000 + math.floor(t[2] / 1000) '
_PRUNE = """
local over = redis.call("ZRANGEBYSCORE", KEYS[2], "-inf", now)
for _, owner in ipairs(over) do
    redis.call("HDEL", KEYS[1], owner)
    redis.call("ZREM", KEYS[2], owner)
end
"""
ANNOUNCE = (
    _NOW
    + """
redis.call("HSET", KEYS[1], ARGV[1], ARGV[2])
redis.call("ZADD", KEYS[2], now + ARGV[3], ARGV[1])
"""
    + _PRUNE
)
NOTICES = _NOW + _PRUNE + 'return redis.call("HGETALL", KEYS[1])'


class RedisStore:
    """One per process and event loop: a thread with its own loop opens its own."""

    def __init__(self, link: RedisLink, wakeups: Wakeups, settings: StoreSettings, topology: Topology) -> None:
        self.timing = settings.timing()
        self._link = link
        self._wakeups = wakeups
        self._topology = topology
        self._common = {"timing": codec.protocol(self.timing)}
        self._notice_keys = (topology.key("{notices}:text"), topology.key("{notices}:until"))
        # A job is named several times in its life; of this many, 0.8 MiB are kept, however long the process lives.
        self._place = lru_cache(maxsize=1_024)(self._place_of)

    @classmethod
    async def open(cls, settings: StoreSettings, topology: Topology) -> "RedisStore":
        """Connect. Raises StoreUnavailable without an answer, SettingsError for a URL or server of no use."""
        link = await RedisLink.open(settings)
        wakeups = Wakeups(link.subscriber, anchor=topology.key("wake"), timeout_s=settings.timeout_s)
        return cls(link, wakeups, settings, topology)

    async def close(self) -> None:
        try:
            await self._wakeups.close()
        finally:
            await self._link.close()

    async def ping(self) -> str:
        await self._link.command("PING")
        return f"redis {self._link.version}"

    # The protocol, in the order of a job's life ----------------------------------------------------

    async def reserve(self, group: Sequence[Reservation]) -> list[Reserved]:
        outcomes = await self._call("reserve", group, codec.reservation, durable=True)
        return [codec.reserved(request, *outcome) for request, outcome in zip(group, outcomes, strict=True)]

    async def mark_queued(self, group: Sequence[Queued]) -> list[QueuedVerdict]:
        outcomes = await self._call("mark_queued", group, codec.queued, durable=True)
        return [QueuedVerdict(verdict) for verdict in outcomes]

    async def claim(self, group: Sequence[Claim]) -> list[Claimed]:
        outcomes = await self._call("claim", group, codec.claim, durable=True)
        return [codec.claimed(*outcome) for outcome in outcomes]

    async def renew(self, group: Sequence[Renewal]) -> list[Renewed]:
        outcomes = await self._call("renew", group, codec.renewal)
        return [codec.renewed(*outcome) for outcome in outcomes]

    async def append(self, group: Sequence[Append]) -> list[AppendVerdict]:
        outcomes = await self._call("append", group, codec.append)
        return [AppendVerdict(verdict) for verdict in outcomes]

    async def commit(self, group: Sequence[Commit]) -> list[Committed]:
        outcomes = await self._call("commit", group, codec.commit, durable=True)
        return [codec.committed(*outcome) for outcome in outcomes]

    async def release(self, group: Sequence[Release]) -> list[ReleaseVerdict]:
        outcomes = await self._call("release", group, codec.release, durable=True)
        return [ReleaseVerdict(verdict) for verdict in outcomes]

    async def cancel(self, group: Sequence[JobId]) -> list[CancelVerdict]:
        outcomes = await self._call("cancel", group, codec.job_id, durable=True)
        return [CancelVerdict(verdict) for verdict in outcomes]

    async def recover(self, group: Sequence[Recovery]) -> list[Recovered]:
        outcomes = await self._call("recover", group, codec.recovery)
        return [codec.recovered(*outcome) for outcome in outcomes]

    async def redrive(self, group: Sequence[Redrive]) -> list[Redriven]:
        outcomes = await self._call("redrive", group, codec.redrive, durable=True)
        return [codec.redriven(*outcome) for outcome in outcomes]

    async def callbacks_due(self, limit: int) -> list[JobId]:
        found = await self._look_through("callbacks", limit, script="due")
        return [job_id for _, job_id in sorted(found)[:limit]]

    async def take_callbacks(self, group: Sequence[TakeCallback]) -> list[Record | None]:
        outcomes = await self._call("take_callback", group, codec.callback_taking)
        return [codec.readable(stored) if stored else None for stored in outcomes]

    async def note_callbacks(self, group: Sequence[NoteCallback]) -> list[bool]:
        return await self._call("note_callback", group, codec.callback_note, durable=True)

    # Reading ---------------------------------------------------------------------------------------

    async def read(self, group: Sequence[JobId]) -> list[Record | None]:
        outcomes = await self._call("read", group, codec.job_id)
        return [codec.record(stored) if stored else None for stored in outcomes]

    async def states(self, group: Sequence[JobId]) -> list[State | None]:
        outcomes = await self._call("states", group, codec.job_id)
        return [State(state) if state else None for state in outcomes]

    async def events(self, job_id: JobId, *, after: int, limit: int = 1_000) -> list[Event]:
        key = self._topology.job_key(job_id, "events")
        entries = await self._link.command("XRANGE", key, f"{after + 1}-0", "+", "COUNT", limit)
        return [Event.decode(fields["event"]) for _, fields in entries]

    def watch(self, job_id: JobId) -> AbstractAsyncContextManager[Wakeup]:
        return self._wakeups.watch(self._topology.job_key(job_id, "wake"))

    async def due(self, limit: int) -> list[JobId]:
        found = await self._look_through("due", limit)
        return [job_id for _, job_id in sorted(found)[:limit]]

    async def recent(self, limit: int) -> list[Record]:
        found = await self._look_through("recent", limit)
        newest = [job_id for _, job_id in sorted(found, reverse=True)[:limit]]
        outcomes = await self._call("read", newest, codec.job_id)
        records = [codec.readable(stored) if stored else None for stored in outcomes]
        return [record for record in records if record is not None]

    # Aliases ---------------------------------------------------------------------------------------

    async def aliases(self) -> Mapping[str, Alias]:
        found = await self._link.command("HGETALL", self._topology.key("aliases"))
        return {name: Alias.decode(name, text) for name, text in found.items()}

    async def swap_alias(self, expected: Alias | None, new: Alias) -> Alias:
        key, name, text = self._topology.key("aliases"), new.name, new.encode()
        before = await self._link.command("HGET", key, name)
        if before and (there := Alias.decode(name, before)) != expected:
            return there
        now = await self._link.command("EVAL", SWAP, 1, key, name, before or "", text, durable=True)
        return Alias.decode(name, now)

    # Notices ---------------------------------------------------------------------------------------

    async def announce(self, owner: str, text: str, *, ttl_s: float) -> None:
        await self._link.command("EVAL", ANNOUNCE, 2, *self._notice_keys, owner, text, int(ttl_s * 1e3))

    async def notices(self) -> Mapping[str, str]:
        return dict(_pairs(await self._link.command("EVAL", NOTICES, 2, *self._notice_keys)))

    # Helpers ---------------------------------------------------------------------------------------

    async def _call(
        self,
        script: str,
        group: Sequence[RequestT],
        encode: Callable[[RequestT], codec.Request],
        *,
        durable: bool = False,
    ) -> list[Any]:
        items = [Item(*self._place(fields["id"]), fields) for fields in map(encode, group)]
        return await self._link.run(script, items, self._common, durable=durable)

    def _place_of(self, job_id: JobId) -> tuple[int, tuple[str, ...]]:
        shard, topology = store_shard(job_id), self._topology
        return shard, (
            topology.job_key(job_id, "record"),
            topology.job_key(job_id, "events"),
            topology.shard_key(shard, "due"),
            topology.shard_key(shard, "recent"),
            topology.shard_key(shard, "callbacks"),
        )

    async def _look_through(self, index: str, limit: int, *, script: str = "") -> list[tuple[float, JobId]]:
        """The first `limit` of every shard's index, with their times; each shard may hold the very first ones."""
        if limit < 1:
            return []
        items = [Item(shard, (self._topology.shard_key(shard, index),)) for shard in range(NUM_STORE_SHARDS)]
        shards = await self._link.run(script or index, items, {"limit": limit})
        return [(float(at), job_id) for found in shards for job_id, at in _pairs(found)]


def _pairs(flat: Sequence[str]) -> list[tuple[str, str]]:
    """cjson writes an empty list as an empty object; both iterate over nothing."""
    items = list(flat)
    return list(zip(items[::2], items[1::2], strict=True))

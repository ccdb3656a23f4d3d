"""Questions to a Redis that the Store port has no use for: does it keep what it was given, whatever happens?

Asks every primary of a cluster. Writes one key that ends within a second.
Called by: `codeyard doctor`. Raises StoreUnavailable as the port does; what an answer means is for the caller.
"""

import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.redis_connections import address_of, connect, on_host
from codeyard.shared.store.redis_link import RedisLink, _bounded, first_answer
from codeyard.shared.topology import Topology

# What every script of ours needs: its first line, and the right to write under our names.
TRIAL = '#!lua\nreturn redis.call("SET", KEYS[1], "1", "PX", 1000)'


@dataclass(frozen=True, slots=True)
class RedisNode:
    """What one server says of itself. None: it does not tell (a hosted one may forbid CONFIG)."""

    address: str
    version: str
    mode: str  # standalone | cluster | sentinel
    role: str  # master | slave
    loading: bool
    append_only: bool
    append_failed: bool  # the last write to its file did
    fsync: str | None  # always | everysec | no
    eviction: str  # maxmemory-policy
    max_bytes: int  # maxmemory; 0: no limit
    used_bytes: int
    evicted_keys: int
    replicas: int  # that follow it and are up to date
    clock_ahead_s: float  # of this machine's
    round_trip_s: float


async def look_at(settings: StoreSettings) -> list[RedisNode]:
    """The server of the URL, or the primary its Sentinels name; of a cluster every primary. Raises StoreUnavailable,
    SettingsError."""
    client, _ = await first_answer(settings)
    try:
        async with _bounded(settings.timeout_s):
            node = await _node(client)
            nodes = await client.execute_command("CLUSTER NODES") if node.mode == "cluster" else {}  # type: ignore[no-untyped-call]
    finally:
        await client.aclose()
    if not nodes:
        return [node]
    return [await _primary(settings, address) for address in _primaries(nodes)]


async def try_script(settings: StoreSettings, topology: Topology) -> None:
    """Run a script that writes a key of ours, as every call of the store does. Raises StoreUnavailable with the
    server's reason, SettingsError for a server of no use."""
    link = await RedisLink.open(settings)
    try:
        await link.command("EVAL", TRIAL, 1, topology.key(f"doctor:{uuid.uuid4().hex}"))
    finally:
        await link.close()


async def _primary(settings: StoreSettings, address: str) -> RedisNode:
    client = connect(settings.model_copy(update={"url": on_host(settings.url, address)}))
    try:
        async with _bounded(settings.timeout_s):
            return await _node(client)
    finally:
        await client.aclose()


async def _node(client: Redis) -> RedisNode:
    info: Mapping[str, Any] = await client.info()
    mode = str(info.get("redis_mode", "standalone"))
    asked_s, asked_at = time.monotonic(), time.time()
    seconds, microseconds = (int(asked_at), 0) if mode == "sentinel" else await client.time()
    round_trip_s = time.monotonic() - asked_s
    return RedisNode(
        address=address_of(client),
        version=str(info["redis_version"]),
        mode=mode,
        role=str(info.get("role", "")),
        loading=bool(info.get("loading")),
        append_only=bool(info.get("aof_enabled")),
        append_failed=info.get("aof_last_write_status", "ok") != "ok",
        fsync=await _setting(client, "appendfsync"),
        eviction=str(info.get("maxmemory_policy", "")),
        max_bytes=int(info.get("maxmemory", 0)),
        used_bytes=int(info.get("used_memory", 0)),
        evicted_keys=int(info.get("evicted_keys", 0)),
        replicas=sum(_is_online(value) for name, value in info.items() if name.startswith("slave")),
        clock_ahead_s=seconds + microseconds / 1e6 - (asked_at + round_trip_s / 2),
        round_trip_s=round_trip_s,
    )


async def _setting(client: Redis, name: str) -> str | None:
    with contextlib.suppress(StoreUnavailable):
        async with _bounded(5.0):
            return (await client.config_get(name)).get(name)
    return None


def _is_online(value: object) -> bool:
    """Of INFO's `slave0: ip=...,port=...,state=online,offset=...,lag=0`."""
    return isinstance(value, Mapping) and value.get("state") == "online"


def _primaries(nodes: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    return [
        address
        for address, one in sorted(nodes.items())
        if "master" in str(one.get("flags")) and "fail" not in str(one.get("flags")).replace("nofailover", "")
    ]

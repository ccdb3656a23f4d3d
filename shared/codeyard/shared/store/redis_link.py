"""The connections to one Redis, or one Redis Cluster, and the scripts it runs for us.

Promise: every call is answered within `timeout_s` or raises `StoreUnavailable`, and no library
exception leaves this module. A call that met a stale connection is sent once more; every script may
be repeated (store/port.py), so nothing is lost by not knowing whether the first one arrived.
Called by: store.redis. Does not know about: jobs, records.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.cluster import ClusterPipeline, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE

from codeyard.shared.errors import SettingsError, StoreUnavailable
from codeyard.shared.settings import StoreSettings, masked

MAX_CONNECTIONS = 16  # per store; a group is one call, so this many groups are under way at once
OLDEST_VERSION = (7, 0)
WITHOUT_PRELUDE = frozenset({"due", "recent"})  # they look at indexes, not at jobs
# These run on a full server too.
READING = frozenset({"read", "states", "due", "recent", "limits/live", "blobs/used", "documents/look"})

Argument = str | bytes | int

# In the order of asking: the first that fits. What a person on call should read first.
SENTENCES: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.BusyLoadingError, "the server is still loading its data"),
    (exceptions.ReadOnlyError, "this server is a read-only replica; the URL must name the primary"),
    (exceptions.OutOfMemoryError, "the server is out of memory (maxmemory, noeviction)"),
    (exceptions.AuthenticationError, "the server refused user or password"),
    (exceptions.AuthorizationError, "the server wants a password"),
    (exceptions.NoPermissionError, "the user may not run what the store needs"),
    (exceptions.ClusterDownError, "the cluster is down"),
    (exceptions.MaxConnectionsError, "all connections are in use"),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One job's, or one index's, part of a script call."""

    shard: int
    keys: tuple[str, ...]
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Script:
    """One file of lua/, as sent: its first line lets the server refuse it whole, never halfway."""

    source: str
    sha: str


class RedisLink:
    """Open with `open`; belongs to that event loop."""

    def __init__(self, client: "Redis | RedisCluster", settings: StoreSettings, *, version: str) -> None:
        self._client = client
        self._timeout_s = settings.timeout_s
        self._replicas = settings.replicas
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self.version = version

    @classmethod
    async def open(cls, settings: StoreSettings) -> "RedisLink":
        """Raises StoreUnavailable without an answer, SettingsError if the URL or the server is of no use."""
        try:
            plain = _connect(settings)
        except ValueError as error:
            raise SettingsError(f"CODEYARD_STORE_URL {masked(settings.url)}: {error}") from None
        client: Redis | RedisCluster = plain
        try:
            async with _bounded(settings.timeout_s):
                server = await plain.info("server")
            version = str(server["redis_version"])
            if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
                raise SettingsError(f"the store needs Redis 7.0 or later, this is {version}")
            if server["redis_mode"] == "cluster":
                await plain.aclose()
                client = _connect_cluster(settings)
                async with _bounded(settings.timeout_s):
                    await client.initialize()
        except BaseException:
            await client.aclose()
            raise
        return cls(client, settings, version=version)

    async def close(self) -> None:
        await self._client.aclose()

    async def run(
        self, script: str, items: Sequence[Item], common: Mapping[str, Any], *, before_ack: bool = False
    ) -> list[Any]:
        """One outcome per item, in order: one call, or on a cluster one for each shard there is among them.

        `before_ack`: the caller is going to forget what it holds; with `replicas` set, wait for them.
        """
        if not items:
            return []
        if not isinstance(self._client, RedisCluster):
            return await self._run(script, items, common, before_ack=before_ack)
        places: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            places.setdefault(item.shard, []).append(place)
        outcomes: list[Any] = [None] * len(items)

        async def run_shard(part: list[int]) -> None:
            found = await self._run(script, [items[place] for place in part], common, before_ack=before_ack)
            for place, outcome in zip(part, found, strict=True):
                outcomes[place] = outcome

        try:
            async with asyncio.TaskGroup() as tasks:
                for part in places.values():
                    tasks.create_task(run_shard(part))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return outcomes

    async def command(self, *command: Argument, raw: bool = False) -> Any:
        """One plain command, bounded and translated like the scripts. `raw`: the reply is bytes, not text."""
        options = {NEVER_DECODE: True} if raw else {}
        async with _bounded(self._timeout_s), self._free:
            return await self._client.execute_command(*command, **options)

    # One script call -------------------------------------------------------------------------------

    async def _run(self, name: str, items: Sequence[Item], common: Mapping[str, Any], *, before_ack: bool) -> list[Any]:
        script = _script(name)
        keys = [key for item in items for key in item.keys]
        rest: list[Argument] = [len(keys), *keys, *_arguments({**common, "requests": [item.request for item in items]})]
        deadline = time.monotonic() + self._timeout_s
        wait = before_ack and self._replicas > 0

        async def send(*command: Argument) -> Any:
            return await (self._send_and_wait(command, deadline) if wait else self._send(*command))

        async with _bounded(self._timeout_s), self._free:
            try:
                reply = await send("EVALSHA", script.sha, *rest)
            except exceptions.NoScriptError:  # a server that restarted, failed over, or was flushed
                reply = await send("EVAL", script.source, *rest)
        outcomes: list[Any] = json.loads(reply)
        return outcomes

    async def _send(self, *command: Argument) -> Any:
        return await self._client.execute_command(*command)

    async def _send_and_wait(self, command: Sequence[Argument], deadline: float) -> Any:
        """The same, and WAIT on the same connection: it counts what that connection wrote."""
        client = self._client
        pipeline: Pipeline | ClusterPipeline
        target: dict[str, Any] = {}
        if isinstance(client, RedisCluster):
            pipeline = client.pipeline()
            target["target_nodes"] = client.get_node_from_key(str(command[3]))
        else:
            pipeline = client.pipeline(transaction=False)
        wait_ms = max(1, int((deadline - time.monotonic()) * 500))  # the other half is for the way there and back
        pipeline.execute_command(*command)
        pipeline.execute_command("WAIT", self._replicas, wait_ms, **target)
        reply, reached = await pipeline.execute(raise_on_error=True)
        if int(reached) < self._replicas:
            raise StoreUnavailable(
                f"the write has reached {reached} of {self._replicas} replicas after {wait_ms / 1000:g} s"
            )
        return reply


def _arguments(body: Mapping[str, Any]) -> list[Argument]:
    """One JSON text, and behind it every bytes value in it, named there by its place in ARGV.

    Escaping them into the JSON and back would cost more than all the rest of a call.
    """
    texts: list[Argument] = []

    def place(text: bytes) -> int:
        texts.append(text)
        return len(texts) + 1

    return [json.dumps(body, ensure_ascii=False, default=place), *texts]


@cache
def _script(name: str) -> Script:
    """`name` is a file of store/lua, or `package/name` one of another package's; those have no prelude."""
    package, _, file = name.rpartition("/")
    folder = resources.files(f"codeyard.shared.{package or 'store'}") / "lua"
    flags = " flags=no-writes" if name in READING else ""
    prelude = "" if package or name in WITHOUT_PRELUDE else (folder / "prelude.lua").read_text("utf-8")
    source = f"#!lua{flags}\n{prelude}\n" + (folder / f"{file}.lua").read_text("utf-8")
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _connect(settings: StoreSettings) -> "Redis":
    pool = ConnectionPool.from_url(settings.url, max_connections=MAX_CONNECTIONS, **_options(settings))
    return Redis.from_pool(pool)


def _connect_cluster(settings: StoreSettings) -> RedisCluster:
    return RedisCluster.from_url(settings.url, **_options(settings))


def _options(settings: StoreSettings) -> dict[str, Any]:
    return {
        "protocol": 2,  # nothing here needs RESP3, and its push messages cost a handshake
        "decode_responses": True,
        "socket_timeout": None,  # ours bounds the call; with its own, redis-py sends through asyncio.wait_for,
        # which before Python 3.12 swallows a cancellation that arrives as the send ends
        "socket_connect_timeout": settings.timeout_s,
        "retry": Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),  # a stale pooled connection
    }


@asynccontextmanager
async def _bounded(timeout_s: float) -> AsyncIterator[None]:
    """Translate everything a call can raise."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (TimeoutError, exceptions.TimeoutError):
        raise StoreUnavailable(f"no answer from Redis within {timeout_s:g} s") from None
    except (exceptions.RedisError, exceptions.RedisClusterException, OSError) as error:
        raise StoreUnavailable(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    said = str(error) or type(error).__name__
    return next((f"{sentence}: {said}" for kind, sentence in SENTENCES if isinstance(error, kind)), f"Redis: {said}")

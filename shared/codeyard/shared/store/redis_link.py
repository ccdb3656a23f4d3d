"""The connections to one Redis, a failover group or a Redis Cluster, and the scripts it runs for us.

Promise: every call is answered within `timeout_s` or raises `StoreUnavailable`, and no library
exception leaves this module. A call that met a stale connection is sent once more; every script may
be repeated (store/port.py), so nothing is lost by not knowing whether the first one arrived. After a
call that failed, the next one looks again who the primary is: nothing needs a restart after a failover.
Called by: store.redis, and the other stores beside it. Does not know about: jobs, records, URLs.
"""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.client import NEVER_DECODE

from codeyard.shared.errors import SettingsError, StoreUnavailable
from codeyard.shared.settings import StoreSettings, masked
from codeyard.shared.store.redis_connections import (
    MAX_CONNECTIONS,
    connect,
    connect_cluster,
    each_host,
    on_host,
    uses_sentinels,
)

OLDEST_VERSION = (7, 0)
WITHOUT_PRELUDE = frozenset({"due", "recent"})  # they look at indexes, not at jobs
# These run on a full server too.
READING = frozenset({"read", "states", "due", "recent", "limits/live", "blobs/used", "documents/look"})

Argument = str | bytes | int

# In the order of asking: the first that fits. What a person on call should read first.
SENTENCES: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.BusyLoadingError, "the server is still loading its data"),
    (exceptions.ReadOnlyError, "this server is a read-only replica; the URL must name the primary, or the Sentinels"),
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
        self._settings = settings
        self._nodes: dict[str, Redis] = {}  # of a cluster, by address; for calls that wait for its replicas
        self._doubted: str | None = None  # a call failed since we last looked who the primary is; of a cluster, there
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self.version = version

    @classmethod
    async def open(cls, settings: StoreSettings) -> "RedisLink":
        """Raises StoreUnavailable without an answer, SettingsError if the URL or the server is of no use."""
        plain, server = await first_answer(settings)
        client: Redis | RedisCluster = plain
        try:
            version = str(server["redis_version"])
            if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
                raise SettingsError(f"the store needs Redis 7.0 or later, this is {version}")
            if server["redis_mode"] == "cluster":
                await plain.aclose()
                client = connect_cluster(settings)
                async with _bounded(settings.timeout_s):
                    await client.initialize()
        except BaseException:
            await client.aclose()
            raise
        return cls(client, settings, version=version)

    async def close(self) -> None:
        for client in (self._client, *self._nodes.values()):
            await client.aclose()

    def subscriber(self) -> Redis:
        """Another client, for one subscription: without retries; of a cluster to any node, since each hears all."""
        settings = self._settings
        if isinstance(self._client, RedisCluster) and (nodes := self._client.get_nodes()):
            node = random.choice(nodes)
            url = on_host(settings.url, f"{node.host}:{node.port}")
            settings = settings.model_copy(update={"url": url})
        return connect(settings, retries=0)

    async def run(
        self, script: str, items: Sequence[Item], common: Mapping[str, Any], *, durable: bool = False
    ) -> list[Any]:
        """One outcome per item, in order: one call, or on a cluster one for each shard there is among them.

        `durable`: the caller is going to rely on it; with `replicas` set, wait until so many have it.
        """
        if not items:
            return []
        if not isinstance(self._client, RedisCluster):
            return await self._run(script, items, common, durable=durable)
        places: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            places.setdefault(item.shard, []).append(place)
        outcomes: list[Any] = [None] * len(items)

        async def run_shard(part: list[int]) -> None:
            found = await self._run(script, [items[place] for place in part], common, durable=durable)
            for place, outcome in zip(part, found, strict=True):
                outcomes[place] = outcome

        try:
            async with asyncio.TaskGroup() as tasks:
                for part in places.values():
                    tasks.create_task(run_shard(part))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return outcomes

    async def command(self, *command: Argument, raw: bool = False, durable: bool = False) -> Any:
        """One plain command on one key, bounded and translated as scripts are. `raw`: the reply is bytes, not text."""
        place = 3 if command[0] == "EVAL" else 1
        key = str(command[place]) if len(command) > place else ""
        async with self._calling(key) as deadline:
            if durable and self._replicas:
                return await self._send_and_wait(command, key, deadline)
            return await self._client.execute_command(*command, **({NEVER_DECODE: True} if raw else {}))

    # One call --------------------------------------------------------------------------------------

    async def _run(self, name: str, items: Sequence[Item], common: Mapping[str, Any], *, durable: bool) -> list[Any]:
        script = _script(name)
        keys = [key for item in items for key in item.keys]
        rest: list[Argument] = [len(keys), *keys, *_arguments({**common, "requests": [item.request for item in items]})]
        async with self._calling(keys[0]) as deadline:

            async def send(*command: Argument) -> Any:
                if durable and self._replicas:
                    return await self._send_and_wait(command, keys[0], deadline)
                return await self._client.execute_command(*command)

            try:
                reply = await send("EVALSHA", script.sha, *rest)
            except exceptions.NoScriptError:  # a server that restarted, failed over, or was flushed
                reply = await send("EVAL", script.source, *rest)
        outcomes: list[Any] = json.loads(reply)
        return outcomes

    @asynccontextmanager
    async def _calling(self, key: str) -> AsyncIterator[float]:
        """Bounded, translated, and in its turn; yields until when. What fails here makes the next one look again."""
        deadline = time.monotonic() + self._timeout_s
        try:
            async with _bounded(self._timeout_s), self._free:
                await self._look_again()
                yield deadline
        except StoreUnavailable:
            self._doubted = self._address_of(key)
            raise

    async def _look_again(self) -> None:
        """Forget where the primary was. A server that hangs, or was cut off, never says that it is none any more."""
        doubted, self._doubted = self._doubted, None
        if doubted is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s / 2):
                if isinstance(self._client, RedisCluster):
                    await self._client.nodes_manager.initialize(last_failed_node_name=doubted)
                else:
                    await self._client.connection_pool.disconnect(inuse_connections=False)

    async def _send_and_wait(self, command: Sequence[Argument], key: str, deadline: float) -> Any:
        """The same, and WAIT on the same connection: it counts what that connection wrote.

        On a cluster too: the library's own pipeline may repeat or redirect the two to different nodes.
        """
        if not isinstance(self._client, RedisCluster):
            return await self._wait_at(self._client, command, deadline)
        await self._client.initialize()
        try:
            return await self._wait_at(self._node_of(key), command, deadline)
        except exceptions.MovedError:
            await self._client.nodes_manager.initialize()
            return await self._wait_at(self._node_of(key), command, deadline)

    async def _wait_at(self, client: Redis, command: Sequence[Argument], deadline: float) -> Any:
        wait_ms = max(1, int((deadline - time.monotonic()) * 500))  # the other half is for the way there and back
        pipeline = client.pipeline(transaction=False)
        pipeline.execute_command(*command)
        pipeline.execute_command("WAIT", self._replicas, wait_ms)
        reply, reached = await pipeline.execute(raise_on_error=True)
        if int(reached) < self._replicas:
            raise StoreUnavailable(
                f"the write has reached {reached} of {self._replicas} replicas after {wait_ms / 1000:g} s"
            )
        return reply

    def _node_of(self, key: str) -> Redis:
        address = self._address_of(key)
        if address not in self._nodes:
            url = on_host(self._settings.url, address)
            self._nodes[address] = connect(self._settings.model_copy(update={"url": url}))
        return self._nodes[address]

    def _address_of(self, key: str) -> str:
        """Of the node of a cluster that has `key`, as far as we know; where that is not one of many, nothing."""
        if not isinstance(self._client, RedisCluster) or not key:
            return ""
        with suppress(exceptions.RedisError):
            node = self._client.get_node_from_key(key)
            return str(node.name) if node else ""
        return ""


async def first_answer(settings: StoreSettings) -> tuple[Redis, Mapping[str, Any]]:
    """A client of the first host of the URL that answers, and what it says of itself."""
    try:
        urls = [settings.url] if uses_sentinels(settings.url) else each_host(settings.url)
        clients = [connect(settings.model_copy(update={"url": url})) for url in urls]
    except ValueError as error:
        raise SettingsError(f"CODEYARD_STORE_URL {masked(settings.url)}: {error}") from None
    for client in clients:
        try:
            async with _bounded(settings.timeout_s):
                return client, await client.info("server")
        except BaseException as error:
            await client.aclose()
            if not isinstance(error, StoreUnavailable) or client is clients[-1]:
                raise
    raise AssertionError("a URL has a host")


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

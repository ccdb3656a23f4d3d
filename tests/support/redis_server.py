"""A Redis server of one test's own: configured at will, filled up, paused, killed and started again.

servers.RedisServer is the one that tests share, run as our configurations run it.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.redis_connections import connect_cluster
from support.servers import Guarded, as_run, free_port, path
from support.servers import RedisServer as SharedServer
from support.services import missing

START_S = 10.0


class OwnRedis:
    """`redis-server` in `folder`; `options` are its command line, e.g. ("--appendonly", "yes")."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = free_port()
        self.bus_port = free_port()  # of a cluster's node
        self.paused = False
        self._process: Guarded | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        return self._process is not None

    async def start(self, *more: str, answering: bool = True) -> None:
        """Start, and wait until it answers a PING; without `answering`, until it listens."""
        if not SharedServer.available():
            missing("Redis", "redis-server", None)
        self.folder.mkdir(parents=True, exist_ok=True)
        own = ("--port", str(self.port), "--cluster-port", str(self.bus_port), "--dir", str(self.folder), "--save", "")
        at_once = ("--repl-diskless-sync-delay", "0")  # seconds a primary waits for more replicas to come; 5 by itself
        command = ("redis-server", *own, *at_once, *self.options, *more)
        self._process = await asyncio.to_thread(
            Guarded, as_run(command, self.folder), env={"PATH": path()}, cwd=self.folder, log=self.folder / "redis.log"
        )
        await self._until(answering)

    async def answering(self) -> None:
        """Wait until it answers a PING, e.g. because it has loaded its data."""
        await self._until(answering=True)

    async def cluster_formed(self) -> None:
        async with asyncio.timeout(START_S):
            while "cluster_state:ok" not in await self.command("CLUSTER", "INFO"):  # noqa: ASYNC110  # as below
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """kill -9, as the machine would."""
        self.paused = False
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(process.kill)

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send(signal.SIGCONT)
            await asyncio.to_thread(process.stop, START_S)

    def pause(self) -> None:
        """The process stands still: connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        assert self._process is not None
        self._process.send(signal.SIGCONT)
        self.paused = False

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Redis]:
        client: Redis = Redis.from_url(self.url, protocol=2, decode_responses=True)
        try:
            yield client
        finally:
            await client.aclose()

    async def command(self, *command: str | int) -> Any:
        async with self.client() as client:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py has no types here

    async def _until(self, answering: bool) -> None:
        async with asyncio.timeout(START_S):
            while not await self._listens(answering):  # noqa: ASYNC110  # another process, without an event for us
                await asyncio.sleep(0.01)

    async def _listens(self, answering: bool) -> bool:
        async with self.client() as client:
            try:
                await client.ping()
            except (exceptions.AuthenticationError, exceptions.BusyLoadingError):
                return not answering
            except exceptions.ConnectionError:
                return False
            return True


def client_of(url: str) -> Redis:
    """A client to look behind the store's back with; of a cluster, where the URL has several hosts."""
    if "," not in url:
        return Redis.from_url(url, protocol=2, decode_responses=True)
    cluster: Any = connect_cluster(StoreSettings(url=url))  # it has every command that the yards use
    client: Redis = cluster
    return client


@asynccontextmanager
async def running_redis(folder: Path, *options: str) -> AsyncIterator[OwnRedis]:
    server = OwnRedis(folder, *options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()

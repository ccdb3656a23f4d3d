"""A Redis primary, its replicas and three Sentinels, each server known to all by a proxy in front of it.

So a machine can be lost as machines are: what it had sent and nobody had received goes with it, which a kill -9
alone does not do to processes that share a kernel. Or it is cut off and lives on, and whoever is on its side of the
cut (`isolated_url`) still reaches it. Called by: tests/fault.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from support.proxy import TcpProxy
from support.redis_server import OwnRedis
from support.servers import Guarded, as_run, free_port, path

SERVICE = "yard"
NUM_SENTINELS = 3
DOWN_AFTER_MS = 500
FAILOVER_TIMEOUT_MS = 2_000  # half of how long a split vote is waited out
READY_S = 120.0  # reached only by a failing test
STILL_S = 0.3
OURS = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")
BRISK = ("--repl-diskless-sync-delay", "0", "--repl-backlog-size", "16mb")


@dataclass(eq=False)
class Node:
    server: OwnRedis
    proxy: TcpProxy
    options: tuple[str, ...]

    async def start(self, *more: str) -> None:
        announced = ("--replica-announce-ip", "127.0.0.1", "--replica-announce-port", str(self.proxy.port))
        await self.server.start(*BRISK, *announced, *self.options, *more, answering=False)

    async def info(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.server.command("INFO", "replication")
        return found


class RedisGroup:
    def __init__(self, nodes: list[Node], folder: Path) -> None:
        self.nodes = nodes
        self.folder = folder
        self._ports = [free_port() for _ in range(NUM_SENTINELS)]
        self._sentinels: list[Guarded] = []

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        return f"redis+sentinel://{hosts}/{SERVICE}/0"

    @staticmethod
    def isolated_url(node: Node) -> str:
        """For who is on that node's side when it is cut off."""
        return node.server.url

    async def start(self) -> None:
        first, *others = self.nodes
        await first.start()
        for node in others:
            await node.start("--replicaof", "127.0.0.1", str(first.proxy.port))
        for port in self._ports:
            self._sentinels.append(await asyncio.to_thread(self._sentinel, port, first))
        await self.whole()

    async def stop(self) -> None:
        for sentinel in self._sentinels:
            await asyncio.to_thread(sentinel.kill)
        for node in self.nodes:
            await node.server.kill()

    async def primary(self) -> Node:
        """As the Sentinels say."""
        for port in self._ports:
            with contextlib.suppress(exceptions.RedisError, OSError, TimeoutError):
                _, told = await _ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
                return next(node for node in self.nodes if node.proxy.port == int(told))
        raise AssertionError("no Sentinel answers")

    async def replicas(self) -> list[Node]:
        now = await self.primary()
        return [node for node in self.nodes if node is not now]

    async def lose(self, node: Node) -> None:
        """The machine is gone: process, links, and what was under way on them."""
        node.proxy.refuse()
        await node.server.kill()

    def cut_off(self, node: Node) -> None:
        """The network is gone, and says nothing of it; the machine lives."""
        node.proxy.stall()

    async def mend(self, node: Node) -> None:
        """It comes back, as its operator would bring it back: a replica of whoever is primary now. `whole` says when
        it is in step."""
        now = await self.primary()
        node.proxy.cut()  # what was held on its links was never delivered
        node.proxy.resume()
        node.proxy.accept()
        replica = ("127.0.0.1", str(now.proxy.port))
        if node.server.running:
            await node.server.command("REPLICAOF", *replica)
        else:
            await node.start("--replicaof", *replica)

    async def promoted(self, instead_of: Node) -> Node:
        """Return when another one is primary, by its own account and the Sentinels'."""
        async with asyncio.timeout(READY_S):
            while True:
                now = await self.primary()
                if now is not instead_of:
                    with contextlib.suppress(exceptions.RedisError, OSError):
                        if (await now.info())["role"] == "master":
                            return now
                await asyncio.sleep(0.02)

    async def whole(self) -> None:
        """Return when every replica follows, has what there is, and every Sentinel knows all of them and the others."""
        async with asyncio.timeout(READY_S):
            while not await self._is_whole():  # noqa: ASYNC110  # other processes, without an event for us
                await asyncio.sleep(0.05)

    async def _is_whole(self) -> bool:
        try:
            primary = await self.primary()
            info = await primary.info()
            others = len(self.nodes) - 1
            following = [one for name, one in info.items() if name.startswith("slave") and one["state"] == "online"]
            if info["role"] != "master" or len(following) != others:
                return False
            async with primary.server.client() as client:  # "online" is also one that still loads what it was sent
                pipeline = client.pipeline(transaction=False)
                pipeline.execute_command("SET", "whole", "1")
                pipeline.execute_command("WAIT", others, 500)
                if (await pipeline.execute())[1] != others:
                    return False
            return all([await self._knows_all(port, others) for port in self._ports])
        except (exceptions.RedisError, OSError):
            return False

    async def _knows_all(self, port: int, others: int) -> bool:
        replicas = [_pairs(one) for one in await _ask(port, "SENTINEL", "REPLICAS", SERVICE)]
        master = _pairs(await _ask(port, "SENTINEL", "MASTER", SERVICE))
        well = [one for one in replicas if one["flags"] == "slave"]  # that its link is up they hear 10 s later
        seen = int(master["num-other-sentinels"]) == NUM_SENTINELS - 1
        return seen and master["flags"] == "master" and len(well) == len(replicas) == others

    def _sentinel(self, port: int, primary: Node) -> Guarded:
        folder = self.folder / f"sentinel-{port}"
        folder.mkdir(parents=True)
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.proxy.port} {NUM_SENTINELS // 2 + 1}\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} {FAILOVER_TIMEOUT_MS}\n"
            f"sentinel parallel-syncs {SERVICE} 4\n"
        )
        command = as_run(("redis-server", str(conf), "--sentinel"), folder)
        return Guarded(command, env={"PATH": path()}, cwd=folder, log=folder / "sentinel.log")


@contextlib.asynccontextmanager
async def redis_group(folder: Path, *options: str, replicas: list[tuple[str, ...]]) -> AsyncIterator[RedisGroup]:
    """Running and whole. `options` are every server's, `replicas` one tuple of its own for each replica."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for number, own in enumerate([(), *replicas]):
            server = OwnRedis(folder / f"redis-{number}", *OURS)
            proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", server.port))
            nodes.append(Node(server, proxy, (*options, *own)))
        group = RedisGroup(nodes, folder)
        try:
            await group.start()
            yield group
        finally:
            await group.stop()


@contextlib.asynccontextmanager
async def lagging(node: Node) -> AsyncIterator[None]:
    """It stands still for a third of a second, and again, as a machine does that is short of memory or disk; not
    for so long that a Sentinel would take it for dead."""

    async def stumble() -> None:
        try:
            while True:
                node.server.pause()
                await _pass(STILL_S)
                node.server.resume()
                await _pass(STILL_S / 10)
        finally:
            if node.server.running:
                node.server.resume()

    async with asyncio.TaskGroup() as tasks:
        stumbling = tasks.create_task(stumble(), name="lagging")
        yield
        stumbling.cancel()


async def _pass(seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()


async def _ask(port: int, *command: str) -> Any:
    client: Redis = Redis.from_url(f"redis://127.0.0.1:{port}/0", protocol=2, decode_responses=True, socket_timeout=2)
    try:
        client.response_callbacks.clear()  # the answers as they come
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py has no types here
    finally:
        await client.aclose()


def _pairs(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))

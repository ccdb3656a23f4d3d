"""A Redis Cluster on this machine: three primaries, a replica of each, killed, paused and started as a test pleases.

Called by: tests/contract, tests/fault.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from redis import exceptions

from support.redis_server import OwnRedis

OURS = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")
NODE_TIMEOUT_MS = 1_000
NUM_PRIMARIES = 3
NUM_SLOTS = 16_384
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A line of CLUSTER NODES."""

    id: str
    port: int
    flags: frozenset[str]
    primary: str  # its id; "-" of a primary
    slots: bool
    linked: bool


class RedisCluster:
    def __init__(self, folder: Path, *, replicas: bool) -> None:
        options = (
            *("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
            *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0", *OURS),
        )
        count = NUM_PRIMARIES * (2 if replicas else 1)
        self.nodes = [OwnRedis(folder / f"node-{n}", *options) for n in range(count)]

    @property
    def url(self) -> str:
        return f"redis://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    async def start(self) -> None:
        await asyncio.gather(*(node.start() for node in self.nodes))
        first, *others = self.nodes
        for node in others:
            await first.command("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus_port)
        step = NUM_SLOTS // NUM_PRIMARIES
        for n, node in enumerate(self.nodes[:NUM_PRIMARIES]):
            last = NUM_SLOTS - 1 if n == NUM_PRIMARIES - 1 else (n + 1) * step - 1
            await node.command("CLUSTER", "ADDSLOTSRANGE", n * step, last)
        await self._until_all_know(len(self.nodes))
        for primary, node in zip(self.nodes, self.nodes[NUM_PRIMARIES:], strict=False):
            name = await primary.command("CLUSTER", "MYID")
            await node.command("CLUSTER", "REPLICATE", name)
        await self.whole()

    async def stop(self) -> None:
        for node in self.nodes:
            await node.kill()

    async def primaries(self) -> list[OwnRedis]:
        """Those that have slots and are not failing, as a majority would say: asked of one that is well."""
        return [self._on(one.port) for one in await self._seen() if one.slots and not one.flags & {"fail", "fail?"}]

    async def promoted(self, instead_of: OwnRedis) -> None:
        """Return when every slot has a living primary, and it is not that one."""
        async with asyncio.timeout(READY_S):
            while True:
                now = await self.primaries()
                if instead_of not in now and len(now) == NUM_PRIMARIES and await self._is_ok(now):
                    return
                await asyncio.sleep(0.05)

    async def whole(self) -> None:
        """Return when every node is well, every slot served, and every replica in step."""
        async with asyncio.timeout(READY_S):
            while not await self._is_whole():  # noqa: ASYNC110  # other processes, without an event for us
                await asyncio.sleep(0.05)

    async def _is_whole(self) -> bool:
        try:
            if not await self._is_ok(self.nodes):
                return False
            for node in self.nodes:
                info = await node.command("INFO", "replication")
                if info["role"] == "slave" and info["master_link_status"] != "up":
                    return False
            roles = [one.primary == "-" for one in await self._seen()]
            return sum(roles) == NUM_PRIMARIES and len(roles) == len(self.nodes)
        except (exceptions.RedisError, OSError):
            return False

    async def _is_ok(self, nodes: list[OwnRedis]) -> bool:
        for node in nodes:
            with contextlib.suppress(exceptions.RedisError, OSError):
                told = await node.command("CLUSTER", "INFO")
                if (
                    told["cluster_state"] if isinstance(told, dict) else told.partition("cluster_state:")[2][:2]
                ) != "ok":
                    return False
        return True

    async def _until_all_know(self, count: int) -> None:
        async with asyncio.timeout(READY_S):
            for node in self.nodes:
                while len([one for one in await self._seen(node) if one.linked]) < count:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    async def _seen(self, by: OwnRedis | None = None) -> list[Seen]:
        for node in [by] if by else self.nodes:
            if not node.running or node.paused:
                continue
            with contextlib.suppress(exceptions.RedisError, OSError):
                async with node.client() as client:
                    client.response_callbacks.clear()
                    text = await client.execute_command("CLUSTER NODES")  # type: ignore[no-untyped-call]
                    return [_parsed(line) for line in text.splitlines()]
        raise AssertionError("no node answers")

    def _on(self, port: int) -> OwnRedis:
        return next(node for node in self.nodes if node.port == port)


@contextlib.asynccontextmanager
async def redis_cluster(folder: Path, *, replicas: bool) -> AsyncIterator[RedisCluster]:
    cluster = RedisCluster(folder, replicas=replicas)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


def _parsed(line: str) -> Seen:
    """<id> <ip:port@bus> <flags> <primary> <ping> <pong> <epoch> <link> <slot> ..."""
    name, address, flags, primary, _, _, _, link, *slots = line.split()
    port = int(address.partition("@")[0].rpartition(":")[2])
    return Seen(name, port, frozenset(flags.split(",")), primary, bool(slots), link == "connected")

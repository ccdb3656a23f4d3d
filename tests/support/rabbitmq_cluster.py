"""A RabbitMQ cluster on this machine, its nodes killed and started as a test pleases.

Each node is a RabbitServer with ports and a folder of its own; one cookie and one port mapper (epmd) are shared,
so that they find each other and no Erlang program of the machine finds them. They join by the node list in their
configuration, and stop serving in a minority (`pause_minority`), as docs/rabbitmq-cluster.md advises.
All of them end with the process that started them. Called by: tests/fault.
"""

import json
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from support.servers import Guarded, RabbitServer, ServerFailed, as_run, found, free_port, start_epmd

PATIENCE_S = 180.0  # for what must happen; reached only by a failing test
_CONTROL_S = 30.0
_PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # /usr/sbin has wrappers that fix user and paths


class ClusterNode(RabbitServer):
    """One node. `peers` and the cookie are set by its cluster before it is started."""

    ready_within_s = PATIENCE_S  # three of them start at once

    def __init__(self, directory: Path, epmd_port: int, cookie: str) -> None:
        super().__init__(directory)
        self._epmd_port = epmd_port
        self.peers: tuple[str, ...] = ()
        file = directory / ".erlang.cookie"
        file.write_text(cookie)
        file.chmod(0o400)

    def _own_epmd(self) -> Guarded | None:
        return None  # the cluster's

    def _configuration(self) -> str:
        peers = enumerate(self.peers, start=1)
        nodes = "".join(f"cluster_formation.classic_config.nodes.{n} = {peer}\n" for n, peer in peers)
        return (
            f"{super()._configuration()}"
            "cluster_formation.peer_discovery_backend = classic_config\n"
            f"{nodes}"
            "cluster_partition_handling = pause_minority\n"
        )


@dataclass(frozen=True, slots=True)
class QueueState:
    """A quorum queue as the cluster sees it; nodes by their Erlang names."""

    name: str
    leader: str
    members: frozenset[str]
    online: frozenset[str]


class RabbitCluster:
    """Not started until `start`; `nodes` stay the same ones over kill and start."""

    def __init__(self, directory: Path, num_nodes: int = 3) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._epmd_port = free_port()
        self._epmd: Guarded | None = None
        cookie = secrets.token_hex(16)
        self.nodes = [ClusterNode(directory / f"node-{n}", self._epmd_port, cookie) for n in range(num_nodes)]
        self._up: set[str] = set()
        for node in self.nodes:
            node.peers = tuple(peer.node for peer in self.nodes)

    @classmethod
    def available(cls) -> bool:
        """Whether this machine has RabbitMQ and its command-line tools."""
        return RabbitServer.available() and all(
            found(str(_PROGRAMS / tool)) is not None for tool in ("rabbitmqctl", "rabbitmq-queues")
        )

    @property
    def url(self) -> str:
        """For clients: every node."""
        hosts = ",".join(f"{node.host}:{node.port}" for node in self.nodes)
        return f"amqp://guest:guest@{hosts}/"

    def start(self, num_nodes: int | None = None) -> Self:
        """Run all nodes, or the first few; return when they are one cluster. Raises ServerFailed with the end of a
        log. One that is left out joins when it is started."""
        first = self.nodes[:num_nodes]
        self._epmd = start_epmd(self.directory, self._epmd_port)
        try:
            with ThreadPoolExecutor(len(first)) as together:
                list(together.map(self.start_node, first))
            self.until(lambda: self.running() == {node.node for node in first}, "all nodes run as one cluster")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """The end of all of it; nothing that it held is wanted any more."""
        for node in self.nodes:
            self.kill_node(node)
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None

    def start_node(self, node: ClusterNode) -> None:
        node.start()
        self._up.add(node.node)

    def kill_node(self, node: ClusterNode) -> None:
        """SIGKILL, as a power cut would."""
        self._up.discard(node.node)
        node.kill()

    def named(self, name: str) -> ClusterNode:
        return next(node for node in self.nodes if node.node == name)

    def running(self) -> set[str]:
        """The nodes that the cluster itself counts as running."""
        return set(self._asked("cluster_status")["running_nodes"])

    def queues(self) -> list[QueueState]:
        rows = self._asked("list_queues", "name", "leader", "members", "online")
        return [
            QueueState(row["name"], row["leader"] or "", frozenset(row["members"]), frozenset(row["online"]))
            for row in rows
        ]

    def connections(self) -> dict[str, list[str]]:
        """What is connected to which node, by the names that clients give their connections."""
        names: dict[str, list[str]] = {node.node: [] for node in self.nodes}
        at = {node.port: node.node for node in self.nodes}
        for row in self._asked("list_connections", "port", "client_properties"):
            properties = {name: value for name, _, value in row["client_properties"]}
            names[at[row["port"]]].append(str(properties.get("connection_name", "")))
        return names

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Raises ServerFailed where it does not become so. A tool that gets no answer has none to give yet: a node
        that has just come back keeps whoever asks about its queues waiting."""
        deadline, never = time.monotonic() + PATIENCE_S, threading.Event()
        while not self._found(true):
            if time.monotonic() > deadline:
                raise ServerFailed(f"not within {PATIENCE_S:g} s: {what}")
            never.wait(0.2)

    def _found(self, true: Callable[[], bool]) -> bool:
        try:
            return true()
        except subprocess.SubprocessError:
            return False

    def control(self, *command: str, tool: str = "rabbitmqctl") -> str:
        """What a command-line tool says, run against a node that is up. Raises CalledProcessError."""
        node = next(node for node in self.nodes if node.node in self._up)
        done = subprocess.run(
            as_run([str(_PROGRAMS / tool), "--quiet", "--node", node.node, *command], node.directory),
            env=node.control_environment(),
            capture_output=True,
            text=True,
            timeout=_CONTROL_S,
            check=True,
        )
        return done.stdout

    def _asked(self, *command: str) -> Any:
        return json.loads(self.control(*command, "--formatter", "json"))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def by_leader(queues: list[QueueState]) -> Mapping[str, int]:
    """How many queues each node leads."""
    leaders = [queue.leader for queue in queues]
    return {leader: leaders.count(leader) for leader in set(leaders)}

"""What the processes of a soak hold, read from outside: proc(5), their metrics, the servers.

Reads only, and little: a dozen small files and three short requests every ten seconds. Linux. Called by: soak.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis.asyncio
import redis.exceptions
from loadtest.bench_streams import cpu_seconds
from loadtest.soak_verdict import Sample

from codeyard.shared.broker.port import Broker
from codeyard.shared.errors import BrokerUnavailable

PROC = Path("/proc")
_KIB = 1_024
_ESTABLISHED = "01"  # tcp_states.h
_TASKS = re.compile(r"^codeyard_loop_tasks ([0-9.]+)$", re.M)


@dataclass(frozen=True, slots=True)
class Around:
    """The rest of the fleet at one moment, `at_s` seconds after the first job."""

    at_s: float
    in_flight: int  # jobs that their callers have not seen end
    ready: int  # messages in the job queues
    dead: int  # in the dead-letter queue
    store_bytes: int  # Redis' used_memory: its data
    store_keys: int
    store_connections: int
    broker_connections: int


@dataclass(frozen=True, slots=True)
class Watched:
    """A process. `metrics`: where it serves them; None: it is no process of ours."""

    name: str
    pid: int
    metrics: str | None = None


@dataclass(slots=True)
class Watch:
    """`samples` by the process' name."""

    processes: Sequence[Watched]
    http: httpx.AsyncClient
    store: redis.asyncio.Redis
    broker: Broker
    store_port: int
    broker_port: int
    queues: Sequence[str]
    dead_queue: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    around: list[Around] = field(default_factory=list)
    missed: int = 0  # looks that a server did not answer in time

    async def look(self, at_s: float, in_flight: int) -> None:
        """Once. Raises OSError if a process is gone."""
        try:
            await self._look(at_s, in_flight)
        except (BrokerUnavailable, redis.exceptions.RedisError, httpx.HTTPError):
            self.missed += 1

    async def _look(self, at_s: float, in_flight: int) -> None:
        for name, sample in (await self.now(at_s)).items():
            self.samples.setdefault(name, []).append(sample)
        memory = await self.store.info("memory")
        *ready, dead = await self.broker.depth([*self.queues, self.dead_queue])
        connections = connections_by_port()
        self.around.append(
            Around(
                at_s=at_s,
                in_flight=in_flight,
                ready=sum(ready),
                dead=dead,
                store_bytes=int(memory["used_memory"]),
                store_keys=int(await self.store.dbsize()),
                store_connections=connections.get(self.store_port, 0),
                broker_connections=connections.get(self.broker_port, 0),
            )
        )

    async def now(self, at_s: float) -> Mapping[str, Sample]:
        """Of all processes; kept nowhere."""
        return {one.name: await self._sample(one, at_s) for one in self.processes}

    async def _sample(self, one: Watched, at_s: float) -> Sample:
        tasks = await self._tasks(one.metrics) if one.metrics is not None else None
        memory = _fields(PROC / str(one.pid) / "smaps_rollup")
        return Sample(
            at_s=at_s,
            rss_bytes=memory["Rss"] * _KIB,
            unique_bytes=(memory["Private_Clean"] + memory["Private_Dirty"]) * _KIB,
            descriptors=len(list((PROC / str(one.pid) / "fd").iterdir())),
            threads=_fields(PROC / str(one.pid) / "status")["Threads"],
            tasks=tasks,
            cpu_s=cpu_seconds(one.pid),
        )

    async def _tasks(self, url: str) -> int:
        told = _TASKS.search((await self.http.get(url)).text)
        assert told is not None, f"{url} does not tell of tasks"
        return int(float(told[1]))


def connections_by_port() -> dict[int, int]:
    """Established TCP connections of this machine, by their local port: of a server, those it has accepted."""
    found: dict[int, int] = {}
    for table in (PROC / "net" / "tcp", PROC / "net" / "tcp6"):
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == _ESTABLISHED:
                    port = int(local.rpartition(":")[2], 16)
                    found[port] = found.get(port, 0) + 1
    return found


def _fields(path: Path) -> dict[str, int]:
    """`Name:  123 kB` lines; those whose value is no number are left out."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0])
    return found

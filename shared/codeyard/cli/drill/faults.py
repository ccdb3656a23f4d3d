"""Faults carried out, one at a time, each with what it met and how long the fleet took to get over it.

Recovery is what a client sees: the seconds from the fault's beginning until a new urgent job, submitted at that
moment, has its result. What was killed is started again at once, as a supervisor would.
Called by: run.
"""

import asyncio
import itertools
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from codeyard.cli.drill.fleet import GRACE_S, LEASE_S, Fleet
from codeyard.cli.drill.patience import AGAIN_S, until_accepted, until_answered
from codeyard.cli.drill.plan import LONG_S, MAX_TOKENS, TENANT, Fault, FaultKind
from codeyard.cli.drill.proxy import TcpProxy
from codeyard.cli.processes import Child
from codeyard.producer import AsyncClient
from codeyard.shared.job import Lane
from codeyard.shared.topology import Topology

PROBE_LIMIT_S = 90.0  # a fleet that takes longer has not recovered
HOLD_S = (0.5, 2.5)  # how long a link is slow or refused
FILL_LIMIT_S = 8.0
NEARLY_FULL = 0.95

Probed = Callable[[str], None]
"""Told the id of each probe once it is accepted: it is a job like any other, and audited."""


@dataclass(frozen=True, slots=True)
class Met:
    """A fault as it happened; times in seconds since the drill's start."""

    kind: FaultKind
    victim: str
    began_s: float
    lasted_s: float  # until what was broken was whole again
    recovery_s: float | None  # None: not within PROBE_LIMIT_S
    note: str = ""


class Breaker:
    def __init__(self, fleet: Fleet, client: AsyncClient, started_s: float, on_probe: Probed) -> None:
        self._fleet = fleet
        self._client = client
        self._started_s = started_s
        self._on_probe = on_probe
        self._numbers = itertools.count()

    async def undisturbed(self) -> float | None:
        """What a probe takes when nothing is broken."""
        return await self._probe()

    async def commit(self, fault: Fault) -> Met:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            breaking = tasks.create_task(self._break(fault), name=str(fault.kind))
            probing = tasks.create_task(self._probe(), name="probe")
        victim, lasted_s, note = breaking.result()
        return Met(fault.kind, victim, began_s - self._started_s, lasted_s, probing.result(), note)

    async def _break(self, fault: Fault) -> tuple[str, float, str]:
        """(who or what was hit, seconds until it was whole again, what is worth knowing)."""
        fleet, began_s = self._fleet, time.monotonic()
        victim, note = "", ""
        match fault.kind:
            case FaultKind.KILL_WORKER:
                victim = await _kill(fleet.workers, fault)
            case FaultKind.KILL_GATEWAY:
                victim = await _kill(fleet.gateways, fault)
            case FaultKind.KILL_PRODUCER:
                victim = await _kill(fleet.producing, fault)
                note = "" if victim else "all had submitted everything"
            case FaultKind.PAUSE_WORKER:
                victim = await self._pause([fleet.workers[fault.choice % len(fleet.workers)]], fault)
            case FaultKind.FILL_QUEUE:
                victim, note = await self._fill()
            case FaultKind.RESTART_BROKER:
                assert fleet.rabbitmq is not None
                victim = "RabbitMQ"
                await asyncio.to_thread(fleet.rabbitmq.restart)
            case FaultKind.RESTART_STORE:
                assert fleet.redis is not None
                victim = "Redis"
                await asyncio.to_thread(fleet.redis.restart)
            case FaultKind.CUT_BROKER | FaultKind.DELAY_BROKER:
                victim = await _disturb(fleet.to_broker, fault)
            case FaultKind.CUT_STORE | FaultKind.DELAY_STORE:
                victim = await _disturb(fleet.to_store, fault)
        return victim, time.monotonic() - began_s, note

    async def _pause(self, children: Sequence[Child], fault: Fault) -> str:
        """SIGSTOP until its leases are over and others may have taken its jobs; then it goes on."""
        for child in children:
            _signal(child, signal.SIGSTOP)
        try:
            await asyncio.sleep(LEASE_S + GRACE_S + 2.0 * fault.scale)
        finally:
            for child in children:
                _signal(child, signal.SIGCONT)
        return ", ".join(child.name for child in children)

    async def _fill(self) -> tuple[str, str]:
        """Nobody takes jobs until a queue is at its length limit and producers are refused."""
        fleet = self._fleet
        most = fleet.wish.queue_max_length
        [alias] = (await until_answered(self._client.store.aliases)).values()
        topology = Topology(fleet.settings.namespace)
        queues = [topology.job_queue(alias.revision, lane) for lane in Lane]
        broker, depths = self._client.publisher, [0]
        for child in fleet.workers:
            _signal(child, signal.SIGSTOP)
        try:
            async with asyncio.timeout(FILL_LIMIT_S):
                while max(depths) < NEARLY_FULL * most and fleet.producing:
                    depths = await _depths(broker, queues)
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            pass
        finally:
            for child in fleet.workers:
                _signal(child, signal.SIGCONT)
        return "all workers paused", f"a queue held {max(depths)} of {most} messages"

    async def _probe(self) -> float | None:
        began_s, number = time.monotonic(), next(self._numbers)
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                job = await until_accepted(lambda: self._submit(number))
                self._on_probe(job)
                await until_accepted(lambda: self._client.wait(job, PROBE_LIMIT_S))
        except TimeoutError:
            return None
        return time.monotonic() - began_s

    async def _submit(self, number: int) -> str:
        fleet = self._fleet
        job = await self._client.submit(
            f"def probe_{fleet.wish.seed}_{number}():",
            model=fleet.wish.model.partition("=")[0],
            lane=Lane.INTERACTIVE,
            idempotency_key=f"{fleet.wish.namespace}-probe-{number}",
            sampling={"max_tokens": MAX_TOKENS, "temperature": 0.0},
            timeout_s=LONG_S,
            tenant=TENANT,
        )
        return job.id


async def _kill(children: Sequence[Child], fault: Fault) -> str:
    """-9, then another in its place. Nobody's name if there is nobody."""
    if not children:
        return ""
    child = children[fault.choice % len(children)]
    if child.process is not None and child.process.returncode is None:
        await child.kill()
    await child.start()
    return child.name


async def _disturb(proxy: TcpProxy | None, fault: Fault) -> str:
    """Cut: every link reset and new ones refused for a while. Delay: open links that carry nothing."""
    assert proxy is not None
    cut = fault.kind in (FaultKind.CUT_BROKER, FaultKind.CUT_STORE)
    links = proxy.links
    (proxy.refuse if cut else proxy.stall)()
    try:
        await asyncio.sleep(HOLD_S[0] + (HOLD_S[1] - HOLD_S[0]) * fault.scale)
    finally:
        (proxy.accept if cut else proxy.resume)()
    return f"{links} links"


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.returncode is None:
        child.process.send_signal(number)


async def _depths(broker: object, queues: Sequence[str]) -> list[int]:
    depth: Callable[[Sequence[str]], Awaitable[list[int]]] = broker.depth  # type: ignore[attr-defined]  # a Broker
    return await until_answered(lambda: depth(queues))

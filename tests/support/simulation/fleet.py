"""The real worker and producer code as programs of simulated processes.

A worker here is what `codeyard.worker.service.Worker` puts together, for one model and without what is not
the protocol: model cache, rollouts, notices, memory watch. Called by: world.py.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from typing import Any

from codeyard.cli.dead_letters import in_hand, redrive
from codeyard.producer import AsyncClient
from codeyard.producer.async_client import AsyncJob
from codeyard.shared.alias import Alias
from codeyard.shared.broker.port import PublishOutcome
from codeyard.shared.envelope import new_nonce, seal
from codeyard.shared.errors import (
    BrokerUnavailable,
    IdempotencyConflict,
    QueueFull,
    ResultTimeout,
    StoreUnavailable,
    UnknownModel,
)
from codeyard.shared.job import Job, JobId, Lane, Sampling, job_id_for_key
from codeyard.shared.reconciler import run_reconciler, settle_dropped
from codeyard.shared.settings import AdmissionSettings, EngineSettings, Settings, StoreSettings, load
from codeyard.shared.store.port import Store, Timing
from codeyard.shared.telemetry import Metrics
from codeyard.shared.topology import Topology
from codeyard.worker.catalogue import Served
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import EngineInfo
from codeyard.worker.leases import LeaseKeeper
from codeyard.worker.line import Line, Plant
from codeyard.worker.patience import persist
from codeyard.worker.scheduling.port import Candidate, Decision, EngineLoad, Scheduler
from codeyard.worker.scheduling.select import make_scheduler
from codeyard.worker.scheduling.step_time import StepCost
from support.simulation.audit import Audit
from support.simulation.broker import MemoryBroker
from support.simulation.engine import REVISION, TinyEngine, TinyLease, prompt_of
from support.simulation.loop import Process, SimulationLoop
from support.simulation.plan import Call, How, JobPlan
from support.simulation.store import MemoryStore

ALIAS = "tiny"
TOPOLOGY = Topology("sim")
LANES = tuple(Lane)
QUEUES = tuple(TOPOLOGY.job_queue(REVISION, lane) for lane in LANES)
CLIENT_TIMEOUT_S = 5.0
AGAIN_S = 0.4  # before a caller repeats what had no answer
READ_S = 20.0  # one wait for a result
TIMING = Timing(lease_s=3.0, grace_s=2.0, unpublished_s=8.0, queue_check_s=5.0)


@cache
def settings() -> Settings:
    """The fleet's: shorter where a wait would only cost time."""
    store = {"lease_s": TIMING.lease_s, "renew_s": 1.0, "grace_s": TIMING.grace_s}
    worker = {"engine": "simulated", "stall_s": 4.0, "drain_s": 2.0, "hand_back_s": 5.0}
    broker = {"publish_timeout_s": 2.0}
    return load(None, {"store": store, "worker": worker, "broker": broker, "admission": {"policy": "fixed"}})


@cache
def metrics() -> Metrics:
    return Metrics()


class Aside:
    """The leases' thread of a process."""

    def __init__(self, loop: SimulationLoop, process: Process) -> None:
        self._loop = loop
        self._process = process
        self._task: asyncio.Task[None] | None = None

    def start(self, program: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._task = self._loop.spawn(self._process.keeper, program(), name=f"leases of {self._process.name}")

    async def ended(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])


class WorkerProcess:
    """One worker from its start to its death, or to the end of its drain."""

    def __init__(
        self,
        loop: SimulationLoop,
        process: Process,
        broker: MemoryBroker,
        open_store: Callable[[], MemoryStore],
        *,
        owner: str,
        slots: int,
        tries: Counter[str],
    ) -> None:
        self.stop = asyncio.Event()
        self._loop = loop
        self._process = process
        self._broker = broker
        self._open_store = open_store
        self._owner = owner
        self._lease = TinyLease(slots, tries)
        self._scheduler: Capricious | None = None

    @property
    def engine(self) -> TinyEngine:
        return self._lease.engine

    def preempt(self) -> None:
        if self._scheduler is not None:
            self._scheduler.wanted = True

    async def run(self) -> None:
        broker, store, topology = self._broker, self._open_store(), TOPOLOGY
        leases = LeaseKeeper(
            self._store,
            renew_s=settings().store.renew_s,
            stall_s=settings().worker.stall_s,
            on_lost=lambda job_id: line.lose(job_id),
            on_cancel=lambda job_id: line.cancel(job_id),
            aside=Aside(self._loop, self._process),
        )
        plant = Plant(settings(), broker, store, topology, metrics(), leases, self._owner, schedule=self._schedule)
        queues = plant.queues_of(REVISION)
        backlog: Mapping[Lane, int] = {}
        served = Served(ALIAS, ModelSource(ALIAS, "tiny", REVISION), EngineSettings(), 4_096)
        line = Line(plant, served, self._lease, queues, backlog)
        await persist(lambda: broker.declare(QUEUES))
        await persist(lambda: store.swap_alias(None, Alias(ALIAS, REVISION, 4_096)))
        leases.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                keeping = [
                    tasks.create_task(run_reconciler(broker, store, topology, self.stop)),
                    tasks.create_task(settle_dropped(broker, store, topology, self.stop)),
                ]
                await line.serve(self.stop, lambda _: None)
                for task in keeping:
                    task.cancel()
        finally:
            await leases.stop()
        await broker.close()

    async def _store(self) -> Store:
        return self._open_store()

    def _schedule(self, admission: AdmissionSettings, info: EngineInfo, prior: StepCost) -> Scheduler:
        self._scheduler = Capricious(make_scheduler(admission, info, prior))
        return self._scheduler


class Capricious:
    """A real policy that now and then, when `wanted`, takes a running job back."""

    def __init__(self, policy: Scheduler) -> None:
        self.wanted = False
        self._policy = policy
        self._running: dict[JobId, None] = {}

    @property
    def window(self) -> int:
        return self._policy.window

    def offer(self, job: Candidate, now_s: float) -> None:
        self._policy.offer(job, now_s)

    def withdraw(self, job_id: JobId, now_s: float) -> None:
        self._policy.withdraw(job_id, now_s)

    def decide(self, now_s: float, backlog: Mapping[Lane, int], load: EngineLoad) -> Decision:
        decision = self._policy.decide(now_s, backlog, load)
        preempt: tuple[JobId, ...] = ()
        if self.wanted and self._running:
            self.wanted, preempt = False, (next(iter(self._running)),)
        self._running.update(dict.fromkeys(decision.admit))
        return Decision(decision.admit, preempt, decision.wake_in_s)

    def progressed(self, job_id: JobId, tokens: int, now_s: float) -> None:
        self._policy.progressed(job_id, tokens, now_s)

    def ended(self, job_id: JobId, now_s: float) -> None:
        self._running.pop(job_id, None)
        self._policy.ended(job_id, now_s)


class Callers:
    """Everyone who asks for jobs through one client process. `left` are calls that are not concluded: a client
    that was started again takes them up, as a caller with a key may."""

    def __init__(self, loop: SimulationLoop, audit: Audit, calls: list[tuple[JobPlan, Call]]) -> None:
        self.left = dict.fromkeys(calls)
        self._loop = loop
        self._audit = audit

    async def run(self, broker: MemoryBroker, store: MemoryStore) -> None:
        async def open_publisher(*_: object) -> MemoryBroker:
            return broker

        async def open_store(_: StoreSettings, __: Topology) -> Store:
            return store

        client = AsyncClient(
            settings=settings(),
            namespace=TOPOLOGY.namespace,
            timeout_s=CLIENT_TIMEOUT_S,
            open_publisher=open_publisher,
            open_store=open_store,
        )
        async with client, asyncio.TaskGroup() as tasks:
            for job, call in list(self.left):
                tasks.create_task(self._conclude(client, broker, job, call))

    async def _conclude(self, client: AsyncClient, broker: MemoryBroker, job: JobPlan, call: Call) -> None:
        await self._loop.pass_time(max(0.0, call.at_s - self._loop.now_s))
        if call.how is How.FOREIGN:
            await self._publish(broker, job, call)
        else:
            await self._submit(client, job, call)
        del self.left[job, call]

    async def _submit(self, client: AsyncClient, job: JobPlan, call: Call) -> None:
        """As a caller that heeds the errors' advice: the same key again."""
        job_id, asked = job_id_for_key("default", key_of(job)), wire_job(job, call)
        handle: AsyncJob | None = None
        num_tries = 0
        while handle is None and num_tries < call.num_tries:
            try:
                handle = await client.submit(
                    prompt_of(job, other=call.how is How.OTHER_BODY),
                    model=ALIAS,
                    lane=asked.lane,
                    idempotency_key=asked.key,
                    sampling=asked.sampling,
                    stream=asked.stream,
                    timeout_s=asked.timeout_s,
                )
            except IdempotencyConflict:
                return self._audit.conflicted(job_id, asked.digest())
            except UnknownModel:  # no worker has started yet
                await self._loop.pass_time(AGAIN_S)
            except (BrokerUnavailable, StoreUnavailable, QueueFull):
                num_tries += 1
                await self._loop.pass_time(AGAIN_S)
        if handle is not None:
            self._audit.accepted(handle.id, asked.digest())
        if call.cancels_after_s is not None:
            await self._loop.pass_time(call.cancels_after_s)
            await self._cancel(client, job_id)
        if handle is not None:
            await self._read(client, handle.id, follows=call.follows)
        return None

    async def _cancel(self, client: AsyncClient, job_id: JobId) -> None:
        self._audit.cancel_sent(job_id)
        while True:
            try:
                [verdict] = await client.store.cancel([job_id])
            except StoreUnavailable:
                await self._loop.pass_time(AGAIN_S)
            else:
                return self._audit.cancel_answered(job_id, verdict)

    async def _read(self, client: AsyncClient, job_id: JobId, *, follows: bool) -> None:
        while True:
            try:
                if follows:
                    self._audit.stream_told(job_id, [event async for event in client.stream(job_id)])
                else:
                    self._audit.result_told(job_id, await client.result(job_id, READ_S))
            except (StoreUnavailable, ResultTimeout):
                await self._loop.pass_time(AGAIN_S)
            else:
                return

    async def _publish(self, broker: MemoryBroker, job: JobPlan, call: Call) -> None:
        """A program in another language: it knows the message, not the store."""
        asked = wire_job(job, call)
        publication = new_nonce()
        while True:
            message = seal(asked, TOPOLOGY, publication=publication, incarnation="", deadline_at=None)
            try:
                [outcome] = await broker.publish([message], timeout_s=2.0)
            except BrokerUnavailable:
                outcome = PublishOutcome.UNKNOWN
            if outcome is PublishOutcome.CONFIRMED:
                return self._audit.accepted_from_abroad(asked.id)
            await self._loop.pass_time(AGAIN_S)


async def redrive_the_dead(loop: SimulationLoop, broker: MemoryBroker, store: MemoryStore) -> None:
    """`codeyard dead redrive`, repeated as its errors say. Poison stays where it is: its lives take minutes."""
    while True:
        try:
            async with in_hand(broker, TOPOLOGY) as hand:
                letters = [letter for letter in hand.letters if letter.reason != "poison"]
                await redrive(hand, letters, broker, store, TOPOLOGY, timeout_s=2.0)
        except (BrokerUnavailable, StoreUnavailable):
            await loop.pass_time(AGAIN_S)
        else:
            return


def key_of(job: JobPlan) -> str:
    return f"job-{job.number}"


def wire_job(job: JobPlan, call: Call) -> Job:
    key = key_of(job)
    return Job(
        id=job_id_for_key("default", key),
        key=key,
        model=ALIAS,
        revision=REVISION,
        lane=job.lane,
        prompt=prompt_of(job, other=call.how is How.OTHER_BODY),
        sampling=Sampling(max_tokens=job.max_tokens, seed=1 if job.seeded else None),
        stream=job.stream,
        timeout_s=job.timeout_s,
    )

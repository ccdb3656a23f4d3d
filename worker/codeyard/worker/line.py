"""One served model of a worker: its queues, the jobs in hand, and its engine, from opening to drained.

    deliveries -> Intake (claim) -> Runner (schedule, generate) -> Settler (commit, then ack)
                      |                  |  tokens -> EventWriter -> store
                      '---- Hand --------'  leases <- LeaseKeeper (thread, the worker's)

Promise: when `serve` returns, every job this line held is settled, handed back, or lost to another owner.
Called by: worker.station, which opens a line for each model it serves and closes it to make room.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.broker.port import Broker
from codeyard.shared.job import JobId, Lane
from codeyard.shared.notice import ModelNotice
from codeyard.shared.settings import AdmissionSettings, Settings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics
from codeyard.shared.topology import Topology
from codeyard.worker.catalogue import Served
from codeyard.worker.engines.port import EngineInfo
from codeyard.worker.events import EventWriter
from codeyard.worker.hand import Hand
from codeyard.worker.held import HeldJob
from codeyard.worker.intake import Intake
from codeyard.worker.leases import LeaseKeeper
from codeyard.worker.memory_watch import MemoryDecision
from codeyard.worker.patience import persist
from codeyard.worker.runner import EngineLease, Runner
from codeyard.worker.scheduling.port import Scheduler
from codeyard.worker.scheduling.select import make_scheduler
from codeyard.worker.scheduling.step_time import StepCost
from codeyard.worker.settler import Settler
from codeyard.worker.warmup import step_cost

log = logging.getLogger(__name__)

SHUTDOWN_S = 10.0  # for settling what a drain left; after it the rest comes back by itself


@dataclass(frozen=True, slots=True)
class Plant:
    """What all lines of a worker share."""

    settings: Settings
    broker: Broker
    store: Store
    topology: Topology
    metrics: Metrics
    leases: LeaseKeeper
    owner: str  # this worker's name; unique for every process ever started
    on_job_ended: Callable[[], None] = lambda: None
    blobs: BlobStore | None = None  # where long prompts lie; None: none come here
    schedule: Callable[[AdmissionSettings, EngineInfo, StepCost], Scheduler] = make_scheduler

    def queues_of(self, revision: str) -> dict[Lane, tuple[str, ...]]:
        """Every shard of every lane that this worker serves."""
        worker = self.settings.worker
        return {
            lane: tuple(self.topology.job_queue(revision, lane, shard) for shard in range(worker.shards))
            for lane in worker.lanes
        }


class Line:
    """See the module. `backlog` is ready messages by lane, kept fresh by the caller."""

    def __init__(
        self,
        plant: Plant,
        served: Served,
        lease: EngineLease,
        queues: Mapping[Lane, Sequence[str]],
        backlog: Mapping[Lane, int],
    ) -> None:
        self.served = served
        self.lease = lease
        self.queues = queues
        self._plant = plant
        self._backlog = backlog
        self._hand = Hand(plant.leases, plant.metrics)
        self._runner: Runner | None = None
        self._intake: Intake | None = None
        self._allowed = MemoryDecision()

    def constrain(self, decision: MemoryDecision) -> None:
        """What memory allows from now on."""
        self._allowed = decision
        if self._runner is not None and self._intake is not None:
            self._runner.window_factor = decision.window_factor
            self._intake.allow(decision.intake)

    def lose(self, job_id: JobId) -> None:
        """The job has another owner, or is final."""
        if self._runner is not None:
            self._runner.lose(job_id)

    def cancel(self, job_id: JobId) -> None:
        if self._runner is not None:
            self._runner.cancel(job_id)

    @property
    def num_jobs(self) -> int:
        """In hand: waiting, running or being settled."""
        return len(self._hand)

    def jobs(self) -> Mapping[Lane, int]:
        """The same, by lane."""
        return Counter(held.job.lane for held in self._hand)

    def _settled(self, held: HeldJob) -> None:
        self._hand.discard(held)
        self._plant.on_job_ended()

    def notice(self, tier: str, backlog: Mapping[Lane, tuple[int, ...]]) -> ModelNotice:
        """What producers estimate a wait from."""
        runner = self._runner
        return ModelNotice(
            alias=self.served.alias,
            revision=self.served.revision,
            tier=tier,
            serving=runner is not None,
            slots=runner.window if runner else 0,
            running=runner.num_running if runner else 0,
            waiting=dict(runner.waiting()) if runner else {},
            backlog=backlog,
            rate=runner.drain_rate.rates(time.monotonic()) if runner else {},
            job_s=runner.drain_rate.job_s if runner else None,
        )

    def waited_s(self, now_s: float) -> float:
        """How long the job that has waited longest in hand has."""
        return max((now_s - held.submitted_s for held in self._hand if held.first_token_s is None), default=0.0)

    async def serve(self, stop: asyncio.Event, on_open: Callable[["Line"], None]) -> None:
        """Consume the declared queues, run until `stop`, drain."""
        plant, worker, info = self._plant, self._plant.settings.worker, self.lease.engine.info
        # One tenant's hand of shards must be able to fill the engine.
        prefetch = math.ceil(info.max_running * (1 + worker.look_ahead) / worker.shards_per_tenant)
        prior = await step_cost(self.lease.engine)
        names = [name for shards in self.queues.values() for name in shards]
        consumer = await persist(lambda: plant.broker.consume(dict.fromkeys(names, prefetch)))
        settler = Settler(
            plant.broker,
            consumer,
            plant.store,
            plant.topology,
            plant.metrics,
            group=worker.settle_group,
            publish_timeout_s=plant.settings.broker.publish_timeout_s,
            on_settled=self._settled,
        )
        writer = EventWriter(plant.store, flush_s=worker.flush_s, on_fenced=self.lose)
        runner = self._runner = Runner(
            self.lease,
            plant.schedule(plant.settings.admission, info, prior),
            plant.store,
            settler,
            writer,
            plant.metrics,
            self._backlog,
            model=self.served.alias,
            revision=self.served.revision,
            adapters=self.served.adapters,
            max_attempts=worker.max_attempts,
            stall_s=worker.stall_s,
            hand_back_s=worker.hand_back_s,
            save_tokens=worker.save_tokens,
            blobs=plant.blobs,
        )
        intake = self._intake = Intake(
            consumer, plant.store, settler, self._hand, owner=plant.owner, on_claimed=runner.offer
        )
        self.constrain(self._allowed)
        try:
            async with asyncio.TaskGroup() as tasks:
                taking = tasks.create_task(intake.run(), name="intake")
                serving = [
                    tasks.create_task(runner.run(), name="runner"),
                    tasks.create_task(writer.run(), name="event writer"),
                    tasks.create_task(settler.run(), name="settler"),
                ]
                on_open(self)
                await stop.wait()
                log.info("line_drains", extra={"revision": self.served.revision, "num_jobs": len(self._hand)})
                taking.cancel()
                await consumer.stop()
                await runner.drain(worker.drain_s)
                await _settle_rest(settler)
                for task in serving:
                    task.cancel()
        finally:
            await consumer.close()


async def _settle_rest(settler: Settler) -> None:
    try:
        async with asyncio.timeout(SHUTDOWN_S):
            await settler.drain()
    except TimeoutError:
        log.warning("not_all_settled", extra={"wait_s": SHUTDOWN_S})

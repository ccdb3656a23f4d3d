"""One served model of a worker: its queues, the jobs in hand, and its engine, from opening to drained.

    deliveries -> Intake (claim) -> Runner (schedule, generate) -> Settler (commit, then ack)
                      |                  |  tokens -> EventWriter -> store
                      '---- Hand --------'  leases <- LeaseKeeper (thread, the worker's)

Promise: when `serve` returns, every job this line held is settled, handed back, or lost to another owner.
Called by: worker.service, which opens a line for each model it serves and closes it to make room.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from codeyard.shared.broker.port import Broker
from codeyard.shared.job import JobId, Lane
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics
from codeyard.shared.topology import Topology
from codeyard.worker.engines.port import Engine
from codeyard.worker.events import EventWriter
from codeyard.worker.hand import Hand
from codeyard.worker.intake import Intake
from codeyard.worker.leases import LeaseKeeper
from codeyard.worker.patience import persist
from codeyard.worker.runner import Runner
from codeyard.worker.scheduling.select import make_scheduler
from codeyard.worker.settler import Settler

log = logging.getLogger(__name__)

DEPTH_PERIOD_S = 0.5  # how stale the backlog that the scheduler sees may be
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


class Line:
    """See the module. `engine` is loaded; `start` loads it anew when it died."""

    def __init__(self, plant: Plant, engine: Engine, start: Callable[[], Awaitable[Engine]]) -> None:
        worker = plant.settings.worker
        self.engine = engine
        self.queues = {lane: plant.topology.job_queue(engine.info.revision, lane) for lane in worker.lanes}
        self._plant = plant
        self._start = start
        self._backlog: dict[Lane, int] = {}
        self._hand = Hand(plant.leases, plant.metrics)
        self._runner: Runner | None = None

    def lose(self, job_id: JobId) -> None:
        """The job has another owner, or is final."""
        if self._runner is not None:
            self._runner.lose(job_id)

    def cancel(self, job_id: JobId) -> None:
        if self._runner is not None:
            self._runner.cancel(job_id)

    async def serve(self, stop: asyncio.Event, on_open: Callable[["Line"], None]) -> None:
        """Consume the declared queues, run until `stop`, drain."""
        plant, worker = self._plant, self._plant.settings.worker
        prefetch = math.ceil(self.engine.info.max_running * (1 + worker.look_ahead))
        consumer = await persist(lambda: plant.broker.consume(dict.fromkeys(self.queues.values(), prefetch)))
        settler = Settler(
            plant.broker,
            consumer,
            plant.store,
            plant.topology,
            plant.metrics,
            group=worker.settle_group,
            publish_timeout_s=plant.settings.broker.publish_timeout_s,
            on_settled=self._hand.discard,
        )
        writer = EventWriter(plant.store, flush_s=worker.flush_s, on_fenced=self.lose)
        runner = self._runner = Runner(
            self.engine,
            self._start,
            make_scheduler(plant.settings.admission, self.engine.info),
            plant.store,
            settler,
            writer,
            plant.metrics,
            self._backlog,
            max_attempts=worker.max_attempts,
            stall_s=worker.stall_s,
            hand_back_s=worker.hand_back_s,
        )
        intake = Intake(consumer, plant.store, settler, self._hand, owner=plant.owner, on_claimed=runner.offer)
        try:
            async with asyncio.TaskGroup() as tasks:
                taking = tasks.create_task(intake.run(), name="intake")
                serving = [
                    tasks.create_task(runner.run(), name="runner"),
                    tasks.create_task(writer.run(), name="event writer"),
                    tasks.create_task(settler.run(), name="settler"),
                    tasks.create_task(self._watch_depth(), name="depth"),
                ]
                on_open(self)
                await stop.wait()
                log.info("line_drains", extra={"revision": self.engine.info.revision, "num_jobs": len(self._hand)})
                taking.cancel()
                await consumer.stop()
                await runner.drain(worker.drain_s)
                await _settle_rest(settler)
                for task in serving:
                    task.cancel()
        finally:
            await consumer.close()
            await runner.close()

    async def _watch_depth(self) -> None:
        while True:
            depths = await persist(lambda: self._plant.broker.depth(list(self.queues.values())))
            self._backlog.update(zip(self.queues, depths, strict=True))
            await asyncio.sleep(DEPTH_PERIOD_S)


async def _settle_rest(settler: Settler) -> None:
    try:
        async with asyncio.timeout(SHUTDOWN_S):
            await settler.drain()
    except TimeoutError:
        log.warning("not_all_settled", extra={"wait_s": SHUTDOWN_S})

"""The worker process: connect, serve, drain.

    deliveries -> Intake (claim) -> Runner (schedule, generate) -> Settler (commit, then ack)
                      |                  |  tokens -> EventWriter -> store
                      '---- Hand --------'  leases <- LeaseKeeper (thread)

Called by: the `codeyard worker` and `codeyard up` commands.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from codeyard.shared.broker.port import Broker
from codeyard.shared.connect import open_broker, open_store
from codeyard.shared.envelope import new_nonce
from codeyard.shared.job import Lane
from codeyard.shared.reconciler import run_reconciler, settle_dropped
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import Alias, Store
from codeyard.shared.telemetry import Metrics, start_metrics_server
from codeyard.shared.topology import Topology
from codeyard.worker.engines.models import parse_model
from codeyard.worker.engines.port import Engine, EngineInfo
from codeyard.worker.engines.select import start_engine
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
class Ready:
    """What a worker tells once it serves: for banners and tests."""

    owner: str
    alias: str
    engine: EngineInfo
    queues: dict[Lane, str]


class Worker:
    """One loaded engine serving one model's queues. Made by `run_worker`, which is what others call."""

    def __init__(self, settings: Settings, broker: Broker, store: Store, engine: Engine, alias: str) -> None:
        self._settings = settings
        self._broker = broker
        self._store = store
        self._engine = engine
        self._alias = alias
        self._topology = Topology(settings.namespace)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{new_nonce()[:8]}"
        self._queues = {lane: self._topology.job_queue(engine.info.revision, lane) for lane in settings.worker.lanes}
        self._backlog: dict[Lane, int] = {}

    async def serve(
        self, start: Callable[[], Awaitable[Engine]], stop: asyncio.Event, on_ready: Callable[[Ready], None]
    ) -> None:
        """Declare, consume, run until `stop`, drain."""
        settings, worker = self._settings, self._settings.worker
        metrics = Metrics()
        await persist(lambda: self._broker.declare(list(self._queues.values())))
        await self._point_alias()
        prefetch = math.ceil(self._engine.info.max_running * (1 + worker.look_ahead))
        consumer = await persist(lambda: self._broker.consume(dict.fromkeys(self._queues.values(), prefetch)))

        leases = LeaseKeeper(
            lambda: open_store(settings.store, self._topology),
            renew_s=settings.store.renew_s,
            stall_s=worker.stall_s,
            on_lost=lambda job_id: runner.lose(job_id),
            on_cancel=lambda job_id: runner.cancel(job_id),
        )
        hand = Hand(leases, metrics)
        settler = Settler(
            self._broker,
            consumer,
            self._store,
            self._topology,
            metrics,
            group=worker.settle_group,
            publish_timeout_s=settings.broker.publish_timeout_s,
            on_settled=hand.discard,
        )
        writer = EventWriter(self._store, flush_s=worker.flush_s, on_fenced=lambda job_id: runner.lose(job_id))
        runner = Runner(
            self._engine,
            start,
            make_scheduler(settings.admission, self._engine.info),
            self._store,
            settler,
            writer,
            metrics,
            self._backlog,
            max_attempts=worker.max_attempts,
            stall_s=worker.stall_s,
            hand_back_s=worker.hand_back_s,
        )
        intake = Intake(consumer, self._store, settler, hand, owner=self._owner, on_claimed=runner.offer)
        if worker.metrics_port is not None:
            start_metrics_server(worker.metrics_port, metrics)
        leases.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                taking = tasks.create_task(intake.run(), name="intake")
                serving = [
                    tasks.create_task(runner.run(), name="runner"),
                    tasks.create_task(writer.run(), name="event writer"),
                    tasks.create_task(settler.run(), name="settler"),
                    tasks.create_task(self._watch_depth(), name="depth"),
                    tasks.create_task(
                        run_reconciler(self._broker, self._store, self._topology, stop), name="reconciler"
                    ),
                    tasks.create_task(settle_dropped(self._broker, self._store, self._topology, stop), name="dropped"),
                ]
                log.info("worker_ready", extra={"owner": self._owner, "engine": self._engine.info.version})
                on_ready(Ready(self._owner, self._alias, self._engine.info, self._queues))
                await stop.wait()
                log.info("worker_drains", extra={"num_jobs": len(hand)})
                taking.cancel()
                await consumer.stop()
                await runner.drain(worker.drain_s)
                await self._settle_rest(settler)
                for task in serving:
                    task.cancel()
        finally:
            await leases.stop()
            await consumer.close()
            await runner.close()
        log.info("worker_stopped", extra={"owner": self._owner})

    async def _settle_rest(self, settler: Settler) -> None:
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await settler.drain()
        except TimeoutError:
            log.warning("not_all_settled", extra={"wait_s": SHUTDOWN_S})

    async def _point_alias(self) -> None:
        """New jobs for the alias go to this revision, unless it names another one already."""
        info = self._engine.info
        mine = Alias(self._alias, info.revision, info.context_tokens)
        now = await persist(lambda: self._store.set_alias(mine, only_if_absent=not self._settings.worker.set_alias))
        if now.revision != info.revision:
            log.warning(
                "alias_points_elsewhere",
                extra={
                    "alias": self._alias,
                    "points_to": now.revision,
                    "serving": info.revision,
                    "hint": "--set-alias",
                },
            )

    async def _watch_depth(self) -> None:
        while True:
            depths = await persist(lambda: self._broker.depth(list(self._queues.values())))
            self._backlog.update(zip(self._queues, depths, strict=True))
            await asyncio.sleep(DEPTH_PERIOD_S)


async def run_worker(
    settings: Settings, stop: asyncio.Event, *, on_ready: Callable[[Ready], None] = lambda _: None
) -> None:
    """Serve until `stop` is set, drain, return. A broker or store that is away is waited for.

    Raises EngineUnavailable if the engine cannot be started here, SettingsError for unusable settings.
    """
    topology = Topology(settings.namespace)
    source = parse_model(settings.worker.model)

    async def start() -> Engine:
        return await start_engine(settings.worker.engine, source, settings.engine)

    engine = await start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.close, force=True)  # repeatable; `serve` closes the one it ends with
        broker = await persist(lambda: open_broker(settings.broker, topology))
        stack.push_async_callback(broker.close)
        store = await persist(lambda: open_store(settings.store, topology))
        stack.push_async_callback(store.close)
        await Worker(settings, broker, store, engine, source.alias).serve(start, stop, on_ready)

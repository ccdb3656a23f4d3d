"""The worker process: connect, serve a line for each model, drain.

Called by: the `codeyard worker` and `codeyard up` commands. How a line works is in line.py.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from codeyard.shared.alias import Alias
from codeyard.shared.broker.port import Broker
from codeyard.shared.connect import open_broker, open_store
from codeyard.shared.envelope import new_nonce
from codeyard.shared.job import JobId, Lane
from codeyard.shared.reconciler import run_reconciler, settle_dropped
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics, start_metrics_server
from codeyard.shared.topology import Topology
from codeyard.worker.engines.models import parse_model
from codeyard.worker.engines.port import Engine, EngineInfo
from codeyard.worker.engines.select import start_engine
from codeyard.worker.leases import LeaseKeeper
from codeyard.worker.line import Line, Plant
from codeyard.worker.patience import persist

log = logging.getLogger(__name__)


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
        self._lines: list[Line] = []

    async def serve(
        self, start: Callable[[], Awaitable[Engine]], stop: asyncio.Event, on_ready: Callable[[Ready], None]
    ) -> None:
        """Until `stop`, then drain."""
        settings = self._settings
        metrics = Metrics()
        leases = LeaseKeeper(
            lambda: open_store(settings.store, self._topology),
            renew_s=settings.store.renew_s,
            stall_s=settings.worker.stall_s,
            on_lost=self._lose,
            on_cancel=self._cancel,
        )
        plant = Plant(settings, self._broker, self._store, self._topology, metrics, leases, self._owner)
        line = Line(plant, self._engine, start)
        self._lines.append(line)
        if settings.worker.metrics_port is not None:
            start_metrics_server(settings.worker.metrics_port, metrics)

        def opened(line: Line) -> None:
            log.info("worker_ready", extra={"owner": self._owner, "engine": line.engine.info.version})
            on_ready(Ready(self._owner, self._alias, line.engine.info, line.queues))

        await persist(lambda: self._broker.declare(list(line.queues.values())))
        await self._point_alias()
        leases.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                keeping = [
                    tasks.create_task(
                        run_reconciler(self._broker, self._store, self._topology, stop), name="reconciler"
                    ),
                    tasks.create_task(settle_dropped(self._broker, self._store, self._topology, stop), name="dropped"),
                ]
                await line.serve(stop, opened)
                for task in keeping:
                    task.cancel()
        finally:
            await leases.stop()
        log.info("worker_stopped", extra={"owner": self._owner})

    def _lose(self, job_id: JobId) -> None:
        for line in self._lines:
            line.lose(job_id)

    def _cancel(self, job_id: JobId) -> None:
        for line in self._lines:
            line.cancel(job_id)

    async def _point_alias(self) -> None:
        """New jobs for the alias go to this revision, unless it names another one already."""
        info = self._engine.info
        mine = Alias(self._alias, info.revision, info.context_tokens)
        now = await persist(lambda: self._store.swap_alias(None, mine))
        move = self._settings.worker.set_alias
        while (wanted := now.claimed_by(mine, move=move)) != now:
            now = await persist(lambda: self._store.swap_alias(now, wanted))  # noqa: B023 - awaited before they move
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
        stack.push_async_callback(engine.close, force=True)  # repeatable; the line closes the one it ends with
        broker = await persist(lambda: open_broker(settings.broker, topology))
        stack.push_async_callback(broker.close)
        store = await persist(lambda: open_store(settings.store, topology))
        stack.push_async_callback(store.close)
        await Worker(settings, broker, store, engine, source.alias).serve(start, stop, on_ready)

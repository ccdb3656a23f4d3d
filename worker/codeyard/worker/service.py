"""The worker process: connect, serve, drain.

    Station: a line for each model it serves      ModelCache: their engines
    Rollouts: new revisions of them               LeaseKeeper: leases of all jobs in hand (thread)
    reconciler, dropped messages: the fleet's housekeeping, shared by all workers and gateways

Called by: the `codeyard worker` and `codeyard up` commands.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from codeyard.shared.alias import Alias
from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.broker.port import Broker
from codeyard.shared.connect import open_blobs, open_broker, open_store
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.notice import TTL_S, Notice, fleet, reports_of
from codeyard.shared.reconciler import run_reconciler, settle_dropped
from codeyard.shared.rollout import Report
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics, start_metrics_server
from codeyard.shared.topology import Topology
from codeyard.worker.cache.model_cache import ModelCache, ModelSpec
from codeyard.worker.catalogue import Catalogue
from codeyard.worker.engines.port import Engine, EngineInfo
from codeyard.worker.engines.select import start_engine
from codeyard.worker.leases import LeaseKeeper
from codeyard.worker.line import Line, Plant
from codeyard.worker.memory_profile import MemoryProfile
from codeyard.worker.memory_watch import MemorySampler, MemoryWatch
from codeyard.worker.patience import persist
from codeyard.worker.rollouts import Rollouts
from codeyard.worker.station import Station
from codeyard.worker.warmup import expected_bytes, warm_up

log = logging.getLogger(__name__)

TELL_S = 0.5  # between notices


@dataclass(frozen=True, slots=True)
class Ready:
    """What a worker tells once it serves: for banners and tests."""

    owner: str
    aliases: tuple[str, ...]
    engine: EngineInfo  # of the model that was ready first


async def run_worker(
    settings: Settings, stop: asyncio.Event, *, on_ready: Callable[[Ready], None] = lambda _: None
) -> None:
    """Serve until `stop` is set, drain, return. A broker or store that is away is waited for.

    Raises EngineUnavailable if no model can be loaded here, SettingsError for unusable settings.
    """
    topology = Topology(settings.namespace)
    catalogue = Catalogue(settings)
    metrics = Metrics()

    async def load(spec: ModelSpec) -> Engine:
        return await start_engine(settings.worker.engine, spec.source, spec.settings)

    async with contextlib.AsyncExitStack() as stack:
        cache = ModelCache(
            load,
            metrics=metrics,
            expected_bytes=expected_bytes,
            warm_up=warm_up,
            budget_bytes=settings.worker.device_budget_bytes,
            host_budget_bytes=settings.worker.host_budget_bytes,
        )
        stack.push_async_callback(cache.close)
        broker = await persist(lambda: open_broker(settings.broker, topology))
        stack.push_async_callback(broker.close)
        store = await persist(lambda: open_store(settings.store, topology))
        stack.push_async_callback(store.close)
        blobs = await persist(lambda: open_blobs(settings.store, topology))
        stack.push_async_callback(blobs.close)
        await Worker(settings, broker, store, blobs, cache, catalogue, metrics).serve(stop, on_ready)


class Worker:
    """Made by `run_worker`, which is what others call."""

    def __init__(
        self,
        settings: Settings,
        broker: Broker,
        store: Store,
        blobs: BlobStore,
        cache: ModelCache,
        catalogue: Catalogue,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._broker = broker
        self._store = store
        self._catalogue = catalogue
        self._metrics = metrics
        self._topology = topology = Topology(settings.namespace)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{new_nonce()[:8]}"
        self._leases = LeaseKeeper(
            lambda: open_store(settings.store, topology),
            renew_s=settings.store.renew_s,
            stall_s=settings.worker.stall_s,
            on_lost=self._lose,
            on_cancel=self._cancel,
        )
        self._profile = MemoryProfile.of(settings.worker)
        job_ended = self._profile.job_ended
        plant = Plant(settings, broker, store, topology, metrics, self._leases, self._owner, job_ended, blobs)
        self._station = Station(plant, cache, catalogue, self._opened)
        self._rollouts = Rollouts(
            store,
            catalogue,
            prepare=self._station.prepare,
            prepare_s=settings.worker.prepare_s,
            reports_of=self._reports_of,
            has_work=self._station.has_work,
        )
        self._engine = ""
        self._on_ready: Callable[[Ready], None] | None = None

    async def serve(self, stop: asyncio.Event, on_ready: Callable[[Ready], None]) -> None:
        """Until `stop`, then drain."""
        self._on_ready = on_ready
        self._metrics.watch_tasks(asyncio.get_running_loop())
        for served in self._catalogue:
            await self._station.declare(served)
        await self._point_aliases()
        with contextlib.ExitStack() as servers:
            if self._settings.worker.metrics_port is not None:
                servers.enter_context(start_metrics_server(self._settings.worker.metrics_port, self._metrics))
            self._leases.start()
            try:
                async with asyncio.TaskGroup() as tasks:
                    keeping = [
                        tasks.create_task(run_reconciler(self._broker, self._store, self._topology, stop)),
                        tasks.create_task(settle_dropped(self._broker, self._store, self._topology, stop)),
                        tasks.create_task(self._rollouts.run(), name="rollouts"),
                        tasks.create_task(self._tell(), name="notices"),
                        tasks.create_task(self._watch_memory(), name="memory"),
                        tasks.create_task(self._profile.run(), name="memory profile"),
                    ]
                    await self._station.run(stop)
                    for task in keeping:
                        task.cancel()
            finally:
                await self._leases.stop()
        await self._withdraw()
        log.info("worker_stopped", extra={"owner": self._owner})

    async def _point_aliases(self) -> None:
        """New jobs for an alias go to this worker's revision, unless it names another one already."""
        worker = self._settings.worker
        for served in self._catalogue:
            for mine in served.aliases(shards=worker.shards, shards_per_tenant=worker.shards_per_tenant):
                now = await persist(lambda: self._store.swap_alias(None, mine))  # noqa: B023 - awaited here
                while (wanted := now.claimed_by(mine, move=worker.set_alias)) != now:
                    now = await persist(lambda: self._store.swap_alias(now, wanted))  # noqa: B023 - awaited here
                self._say_where_it_points(mine, now)

    def _say_where_it_points(self, mine: Alias, now: Alias) -> None:
        if now.revision != mine.revision and now.location is None:
            log.warning(
                "alias_points_elsewhere",
                extra={
                    "alias": mine.name,
                    "points_to": now.revision,
                    "serving": mine.revision,
                    "hint": "--set-alias",
                },
            )

    async def _reports_of(self, alias: str) -> Mapping[str, Report | None]:
        return reports_of(await fleet(self._store), alias)

    async def _tell(self) -> None:
        """Until cancelled: what this worker serves and how busy it is."""
        while True:
            notice = Notice(self._owner, self._engine, self._station.notices(), dict(self._rollouts.reports))
            await persist(lambda: self._store.announce(self._owner, notice.encode(), ttl_s=TTL_S))  # noqa: B023 - awaited
            await asyncio.sleep(TELL_S)

    async def _watch_memory(self) -> None:
        worker = self._settings.worker
        sampler = MemorySampler(worker.memory_limit, worker.device_memory_limit)
        await MemoryWatch(sampler, self._metrics).watch(self._station.constrain)

    async def _withdraw(self) -> None:
        """Nobody shall count on it any more; if the store is away its notice ends by itself."""
        with contextlib.suppress(StoreUnavailable):
            await self._store.announce(self._owner, "", ttl_s=0)

    def _opened(self, line: Line) -> None:
        info = line.lease.engine.info
        self._engine = info.version
        log.info("worker_ready", extra={"owner": self._owner, "model": line.served.alias, "engine": info.version})
        if self._on_ready is not None:
            self._on_ready(Ready(self._owner, tuple(one.alias for one in self._catalogue), info))
            self._on_ready = None

    def _lose(self, job_id: JobId) -> None:
        self._station.lose(job_id)

    def _cancel(self, job_id: JobId) -> None:
        self._station.cancel(job_id)

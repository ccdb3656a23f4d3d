"""Which models this worker serves now: a line for each, opened where jobs wait, closed to make room.

    every half second: depth of all queues -> place() -> open and close lines, preload
    a line: lease the engine (loaded if need be) -> serve until told to stop -> drained -> give it back

Decisions are in scheduling/placement.py; this is their shell. A model that cannot be loaded is left alone
for a while and said so; when none can be loaded at start, the worker ends with the reason.
Owns: the lines. Called by: worker.service, worker.rollouts (prepare).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from codeyard.shared.alias import Target
from codeyard.shared.errors import EngineUnavailable
from codeyard.shared.job import JobId, Lane
from codeyard.shared.notice import ModelNotice
from codeyard.shared.topology import DELAY_STEPS_S
from codeyard.worker.cache.forecast import Transitions
from codeyard.worker.cache.model_cache import Lease, ModelCache, ModelSpec, Tier
from codeyard.worker.catalogue import Catalogue, Served
from codeyard.worker.engines.port import Engine
from codeyard.worker.line import Line, Plant
from codeyard.worker.memory_watch import MemoryDecision
from codeyard.worker.patience import persist
from codeyard.worker.scheduling.placement import STARVATION_S, ModelState, Placement, place

log = logging.getLogger(__name__)

LOOK_S = 0.5  # how stale the backlog that scheduler and placement see may be
REFUSED_S = 30.0  # a model that did not load is not tried again for this long
ROOM_S = 60.0  # a line waits for room this long: lines that must close first are draining
QUIET_S = 5.0  # longer than producers keep an alias (submission.ALIAS_TTL_S)
DISK_S, SLEEP_S = 30.0, 2.0  # to get a model ready, before it was measured here


@dataclass(slots=True, eq=False)
class _Post:
    """A line that is open, or on its way."""

    served: Served
    since_s: float  # when its line opened, or else began to
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    line: Line | None = None  # None: its model is loading


@dataclass(slots=True, eq=False)
class _Watched:
    """What is known of one revision's queues."""

    queues: Mapping[Lane, tuple[str, ...]]
    backlog: dict[Lane, int] = field(default_factory=dict)  # over all shards
    by_shard: dict[Lane, tuple[int, ...]] = field(default_factory=dict)
    waiting_since_s: dict[Lane, float] = field(default_factory=dict)
    busy_s: float = 0.0  # when it last had work
    ready_s: dict[Tier, float] = field(default_factory=dict)  # measured here
    refused_until_s: float = 0.0


class LeasedEngine:
    """What a line holds of the cache, renewed when its engine died."""

    def __init__(self, cache: ModelCache, spec: ModelSpec, lease: Lease, who: str) -> None:
        self._cache = cache
        self._spec = spec
        self._lease = lease
        self._who = who

    @property
    def engine(self) -> Engine:
        return self._lease.engine

    async def renew(self) -> Engine:
        await self._lease.broken()
        self._lease = await self._cache.acquire(self._spec, who=self._who, timeout_s=ROOM_S)
        return self._lease.engine

    async def release(self) -> None:
        await self._lease.release()


class Station:
    """See the module. `on_open` hears of each line that is open."""

    def __init__(
        self,
        plant: Plant,
        cache: ModelCache,
        catalogue: Catalogue,
        on_open: Callable[[Line], None],
    ) -> None:
        self._plant = plant
        self._cache = cache
        self._catalogue = catalogue
        self._on_open = on_open
        self._posts: dict[str, _Post] = {}  # by revision
        self._watched: dict[str, _Watched] = {}
        self._transitions = Transitions()
        self._preloading: tuple[str, asyncio.Task[None]] | None = None
        self._preparing: dict[str, Served] = {}  # what rollouts load: room is made for it
        self._allowed = MemoryDecision()
        self._quiet_since_s: dict[str, float] = {}  # by revision that a rollout drains
        self._ever_open = False
        self._changed = asyncio.Event()

    async def declare(self, served: Served) -> None:
        """Make the queues of a revision, and watch them. Repeatable."""
        if served.revision in self._watched:
            return
        queues = self._plant.queues_of(served.revision)
        await persist(lambda: self._plant.broker.declare([name for names in queues.values() for name in names]))
        self._watched[served.revision] = _Watched(queues)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; returns when every line is drained. Raises EngineUnavailable if nothing can be served."""
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            async with asyncio.TaskGroup() as tasks:
                while not stop.is_set():
                    await self._look()
                    self._follow(self._decide(), tasks)
                    self._changed.clear()
                    changed = asyncio.ensure_future(self._changed.wait())
                    await asyncio.wait([stopping, changed], timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
                self._stop_preload()
                for post in self._posts.values():
                    post.stop.set()
        finally:
            stopping.cancel()

    def lose(self, job_id: JobId) -> None:
        for line in self.lines():
            line.lose(job_id)

    def cancel(self, job_id: JobId) -> None:
        for line in self.lines():
            line.cancel(job_id)

    async def constrain(self, decision: MemoryDecision) -> None:
        """What memory allows from now on: narrower windows, no new jobs, no engines that nobody uses. A line
        that has nothing to do is closed at the next look, and its engine when this is called again."""
        self._allowed = decision
        for line in self.lines():
            line.constrain(decision)
        if decision.evict_idle:
            await self._cache.evict_idle()

    def lines(self) -> list[Line]:
        return [post.line for post in self._posts.values() if post.line is not None]

    def notices(self) -> tuple[ModelNotice, ...]:
        """How each model here is doing."""
        told = []
        for served in self._known().values():
            watched, post = self._watched.get(served.revision), self._posts.get(served.revision)
            tier = self._cache.tier(served.revision)
            backlog = watched.by_shard if watched is not None else {}
            if post is not None and post.line is not None:
                told.append(post.line.notice(tier, backlog))
            else:
                told.append(ModelNotice(served.alias, served.revision, tier, backlog=backlog))
        return tuple(told)

    async def prepare(self, served: Served) -> None:
        """Load a revision, in place of others if need be, and have an answer from it (the cache's warm-up).
        Raises EngineUnavailable."""
        await self.declare(served)
        self._preparing[served.revision] = served
        self._changed.set()
        try:
            async with self._cache.lease(_spec(served), who="rollout", timeout_s=self._plant.settings.worker.prepare_s):
                pass
        finally:
            del self._preparing[served.revision]

    async def has_work(self, target: Target) -> bool:
        """Whether a job pinned to it may wait at the broker (in a delay queue it cannot be told whose it is), or
        be in hand here, or was within `QUIET_S`: a producer may not have heard yet that the alias moved."""
        post = self._posts.get(target.revision)
        queues = [name for names in self._plant.queues_of(target.revision).values() for name in names]
        queues += [self._plant.topology.delay_queue(step) for step in DELAY_STEPS_S]
        busy = post is not None and (post.line is None or post.line.num_jobs > 0)
        if busy or any(await persist(lambda: self._plant.broker.depth(queues))):
            self._quiet_since_s.pop(target.revision, None)
            return True
        now_s = time.monotonic()
        return now_s - self._quiet_since_s.setdefault(target.revision, now_s) < QUIET_S

    # Looking and deciding --------------------------------------------------------------------------

    async def _look(self) -> None:
        """How much waits for each model, and since when."""
        for served in self._catalogue:
            await self.declare(served)
        watched = list(self._watched.items())
        names = [queue for _, one in watched for queues in one.queues.values() for queue in queues]
        depths = iter(await persist(lambda: self._plant.broker.depth(names)))
        now_s = time.monotonic()
        for revision, one in watched:
            one.by_shard = {lane: tuple(islice(depths, len(queues))) for lane, queues in one.queues.items()}
            one.backlog.update((lane, sum(shards)) for lane, shards in one.by_shard.items())
            for lane, depth in one.backlog.items():
                if not depth:
                    one.waiting_since_s.pop(lane, None)
                else:
                    one.waiting_since_s.setdefault(lane, now_s)
            if any(one.backlog.values()) or self._num_jobs(revision):
                one.busy_s = now_s
                self._transitions.has_work(revision, now_s)

    def _num_jobs(self, revision: str) -> int:
        """In hand."""
        post = self._posts.get(revision)
        return post.line.num_jobs if post is not None and post.line is not None else 0

    def _decide(self) -> Placement:
        now_s = time.monotonic()
        models = {
            revision: self._state(self._watched[revision], served, now_s)
            for revision, served in self._known().items()
            if revision in self._watched and self._watched[revision].refused_until_s <= now_s
        }
        placement = place(
            models,
            self._plant.settings.admission.shares,
            budget_bytes=self._plant.settings.worker.device_budget_bytes,
            forecast=self._transitions.forecast(models),
            may_open=self._allowed.intake,
            may_idle=not self._allowed.evict_idle,
        )
        if placement.open or placement.preload is not None:
            waiting = [revision for revision, state in models.items() if state.waiting]
            self._cache.expect(self._transitions.soon(models, waiting))
        if placement.open or self._ever_open:
            return placement
        return Placement(open=self._first(models))

    def _known(self) -> dict[str, Served]:
        return {one.revision: one for one in self._catalogue} | self._preparing

    def _first(self, models: Mapping[str, ModelState]) -> tuple[str, ...]:
        """A worker that starts is ready before the first job comes: as many as fit, in the order given."""
        if self._posts:
            return ()
        budget_bytes = self._plant.settings.worker.device_budget_bytes
        chosen: list[str] = []
        for name, state in models.items():
            together = state.num_bytes + sum(models[one].num_bytes for one in chosen)
            if not chosen or budget_bytes is None or together <= budget_bytes:
                chosen.append(name)
        return tuple(chosen)

    def _state(self, one: _Watched, served: Served, now_s: float) -> ModelState:
        post, spec = self._posts.get(served.revision), _spec(served)
        oldest_s = {lane: now_s - since_s for lane, since_s in one.waiting_since_s.items()}
        running: Mapping[Lane, int] = {}
        if post is not None and post.line is not None:
            running = post.line.jobs()
            oldest_s = dict.fromkeys(oldest_s, post.line.waited_s(now_s))  # the rest moves up as these go
        depth = dict(one.backlog)
        if served.revision in self._preparing:  # as pressing as a job that starves
            depth[Lane.BULK] = depth.get(Lane.BULK, 0) + 1
            oldest_s[Lane.BULK] = max(oldest_s.get(Lane.BULK, 0.0), STARVATION_S)
        tier = self._cache.tier(served.revision)
        from_disk_s = one.ready_s.get(Tier.DISK, DISK_S)
        ready_s = {Tier.AWAKE: 0.0, Tier.ASLEEP: one.ready_s.get(Tier.ASLEEP, SLEEP_S), Tier.DISK: from_disk_s}[tier]
        return ModelState(
            depth=depth,
            oldest_s=oldest_s,
            num_bytes=self._cache.bytes_of(spec),
            ready_s=ready_s,
            load_s=min(one.ready_s.values(), default=from_disk_s),
            serving=post is not None,
            served_s=now_s - post.since_s if post is not None and post.line is not None else 0.0,
            running=running,
            idle_s=now_s - max(one.busy_s, post.since_s if post is not None else 0.0),
        )

    # Following -------------------------------------------------------------------------------------

    def _follow(self, placement: Placement, tasks: asyncio.TaskGroup) -> None:
        for revision in placement.close:
            log.info("line_closes", extra={"revision": revision})
            self._posts[revision].stop.set()
        served = self._known()
        for revision in placement.open:
            post = self._posts[revision] = _Post(served[revision], time.monotonic())
            tasks.create_task(self._serve(post), name=f"line {served[revision].alias}")
        if placement.open or (self._preloading is not None and placement.preload != self._preloading[0]):
            self._stop_preload()
        if placement.preload is not None and self._preloading is None and not self._preparing:
            task = tasks.create_task(self._preload(served[placement.preload], placement.over), name="preload")
            self._preloading = placement.preload, task

    async def _serve(self, post: _Post) -> None:
        served, spec = post.served, _spec(post.served)
        watched = self._watched[served.revision]
        try:
            tier, started_s = self._cache.tier(served.revision), time.monotonic()
            lease = await self._acquire(post, spec)
            if lease is None:
                return
            if tier is not Tier.AWAKE:
                watched.ready_s[tier] = time.monotonic() - started_s
            leased = LeasedEngine(self._cache, spec, lease, f"line {served.alias}")
            try:
                post.line = Line(self._plant, served, leased, watched.queues, watched.backlog)
                post.line.constrain(self._allowed)
                post.since_s = time.monotonic()
                self._ever_open = True
                await post.line.serve(post.stop, self._on_open)
            finally:
                await leased.release()
        finally:
            del self._posts[served.revision]
            self._changed.set()

    async def _acquire(self, post: _Post, spec: ModelSpec) -> Lease | None:
        """None: it cannot be had now. Told to stop while it loads, the load is cancelled."""
        acquiring = asyncio.ensure_future(self._cache.acquire(spec, who=f"line {post.served.alias}", timeout_s=ROOM_S))
        stopping = asyncio.ensure_future(post.stop.wait())
        try:
            await asyncio.wait([acquiring, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not acquiring.done():
                return None
            return acquiring.result()
        except EngineUnavailable as error:
            self._watched[spec.revision].refused_until_s = time.monotonic() + REFUSED_S
            log.error("model_not_loaded", extra={"revision": spec.revision, "error": str(error)})
            if not self._ever_open and all(one.refused_until_s for one in self._watched.values()):
                raise
            return None
        finally:
            stopping.cancel()
            if not acquiring.done():
                acquiring.cancel()
                await asyncio.wait([acquiring])

    async def _preload(self, served: Served, over: tuple[str, ...]) -> None:
        try:
            for revision in over:
                if (post := self._posts.get(revision)) is not None:
                    post.stop.set()  # idle, or it would not be named
            await self._cache.preload(_spec(served), over=over)
        except EngineUnavailable as error:
            self._watched[served.revision].refused_until_s = time.monotonic() + REFUSED_S
            log.warning("preload_failed", extra={"revision": served.revision, "error": str(error)})
        finally:
            self._preloading = None

    def _stop_preload(self) -> None:
        if self._preloading is not None:
            self._preloading[1].cancel()


def _spec(served: Served) -> ModelSpec:
    return ModelSpec(served.revision, served.source, served.engine)

"""Loaded engines, shared by whoever leases them and bounded by the memory they hold.

    acquire -> leased -> release -> kept, most recently used last
                 |                    |  room is needed: the least recently used one without a lease
                 '-> broken: closed   '-> asleep (if the engine can and host memory allows) -> closed

Promise:
- One load of a revision at a time, however many ask; all of them get that engine, or that error.
- An engine with a lease is never closed to make room. One that was evicted while leased is found again,
  not loaded twice, and closed at its last release.
- Awake engines hold at most `budget_bytes` of device memory, as measured after each load; what a closed one
  did not give back counts against it (accounts.py) until it is back.
- A load that nobody waits for any more is cancelled, and leaves nothing behind.
One owner, the event loop. Called by: worker.station. Does not know about: jobs, queues.
"""

import asyncio
import contextlib
import itertools
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from codeyard.shared.errors import EngineUnavailable, NoRoom
from codeyard.shared.settings import EngineSettings
from codeyard.shared.telemetry import Metrics
from codeyard.worker.cache.accounts import Accounts
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Engine, Memory

log = logging.getLogger(__name__)

FAILURE_S = 5.0  # a load that failed is not tried again for this long: whoever asks gets the same error
CLOSE_S = 30.0  # for an engine that does not close by itself; engines bound it by less


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What to load. Equal revisions are the same engine."""

    revision: str
    source: ModelSource
    settings: EngineSettings


class Tier(StrEnum):
    AWAKE = "awake"
    ASLEEP = "asleep"
    DISK = "disk"


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Handle:
    """One live engine. `leases` are the tokens of those who hold it, with their names."""

    spec: ModelSpec
    engine: Engine
    memory: Memory
    tier: Tier = Tier.AWAKE
    leases: dict[int, str] = field(default_factory=dict)
    kept: bool = True  # in the LRU; False: evicted while leased, or broken
    preloaded: bool = False  # nobody has leased it yet
    closing: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        return self.closing is None and self.tier is Tier.AWAKE


@dataclass(slots=True, eq=False)
class _Loading:
    task: asyncio.Task[_Handle]
    num_waiting: int = 0


class Lease:
    """The right to use an engine until `release`. Dropped without it, it is given back, with a warning that
    names who took it: an engine that nobody uses must not stay for ever."""

    def __init__(self, cache: "ModelCache", handle: _Handle, token: int) -> None:
        self._cache = cache
        self._handle: _Handle | None = handle
        self._token = token
        self._leaked = weakref.finalize(self, cache._leaked, handle, token)
        self._leaked.atexit = False

    @property
    def engine(self) -> Engine:
        assert self._handle is not None, "the lease was released"
        return self._handle.engine

    async def release(self) -> None:
        """Repeatable."""
        if (handle := self._let_go()) is not None:
            await self._cache._give_back(handle, self._token)

    async def broken(self) -> None:
        """The engine died or hangs: close it by force, whoever else holds it; the next `acquire` loads anew."""
        if (handle := self._let_go()) is not None:
            await self._cache._discard(handle, self._token)

    def _let_go(self) -> _Handle | None:
        handle, self._handle = self._handle, None
        self._leaked.detach()
        return handle


class ModelCache:
    """See the module.

    Args:
        load: makes a loaded, warm engine. Raises EngineUnavailable.
        warm_up: called with each engine after its load, so that the first job pays nothing.
        budget_bytes: of device memory for awake engines; None: no bound.
        host_budget_bytes: of host memory for those asleep; 0: none sleeps.
        expected_bytes: what a revision that was never loaded will hold, about; later its own measurement.
    """

    def __init__(
        self,
        load: Callable[[ModelSpec], Awaitable[Engine]],
        *,
        metrics: Metrics,
        expected_bytes: Callable[[ModelSpec], int],
        warm_up: Callable[[Engine], Awaitable[None]] | None = None,
        accounts: Accounts | None = None,
        budget_bytes: int | None = None,
        host_budget_bytes: int = 0,
        failure_s: float = FAILURE_S,
    ) -> None:
        self._load = load
        self._warm_up = warm_up
        self._metrics = metrics
        self._expected = expected_bytes
        self._accounts = accounts or Accounts()
        self._budget_bytes = budget_bytes
        self._host_budget_bytes = host_budget_bytes
        self._failure_s = failure_s
        self._kept: OrderedDict[str, _Handle] = OrderedDict()  # by revision, least recently used first
        self._alive: weakref.WeakValueDictionary[str, _Handle] = weakref.WeakValueDictionary()
        self._loading: dict[str, _Loading] = {}
        self._failed: dict[str, tuple[EngineUnavailable, float]] = {}  # until, monotonic
        self._soon: dict[str, float] = {}  # by revision, as last told
        self._measured: dict[str, int] = {}  # device bytes, by revision, as of its last load
        self._gate = asyncio.Lock()  # one makes room and loads at a time: what is free is free for one
        self._freed = asyncio.Event()  # a lease ended, or an engine closed
        self._tokens = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._chores: set[asyncio.Task[None]] = set()

    # What callers do -------------------------------------------------------------------------------

    async def acquire(self, spec: ModelSpec, *, who: str, timeout_s: float) -> Lease:
        """The engine, loaded if need be. `who` is for messages.

        Raises EngineUnavailable if it cannot be loaded (for a while the same error again, without another
        try), NoRoom if what else is leased does not leave enough memory within `timeout_s`.
        """
        handle = self._find(spec.revision)
        if handle is not None:
            self._metrics.model_hits.inc()
            return self._lease(handle, who)
        self._metrics.model_misses.labels(tier=self.tier(spec.revision)).inc()
        while handle is None or not handle.usable:  # it may have broken under another before its turn came here
            handle = await self._loaded(spec, who, timeout_s)
        return self._lease(handle, who)

    @contextlib.asynccontextmanager
    async def lease(self, spec: ModelSpec, *, who: str, timeout_s: float) -> AsyncIterator[Engine]:
        lease = await self.acquire(spec, who=who, timeout_s=timeout_s)
        try:
            yield lease.engine
        finally:
            await lease.release()

    async def preload(self, spec: ModelSpec, *, over: Collection[str] = ()) -> bool:
        """Load it for later, into spare memory or in place of these revisions while they have no lease.
        False: there is no room for it. Cancelling leaves nothing behind. Raises EngineUnavailable."""
        if self._find(spec.revision) is not None or spec.revision in self._loading:
            return True
        if not self._fits(spec, free=[one for one in self._idle() if one.spec.revision in over]):
            return False
        try:
            handle = await self._loaded(spec, "preload", 0.0, over=over)
        except NoRoom:
            return False  # somebody was faster
        handle.preloaded = not handle.leases
        return True

    async def evict(self, revision: str) -> None:
        """Forget it: closed now, or at its last release. Nothing if somebody waits for it just now."""
        handle = self._kept.get(revision)
        if handle is not None and revision not in self._loading:
            self._drop(handle)
            if not handle.leases:
                await self._close(handle)

    async def evict_idle(self) -> None:
        """Close every engine without a lease, those asleep too: the host's memory is short."""
        for revision, handle in list(self._kept.items()):
            if not handle.leases:
                await self.evict(revision)

    def expect(self, soon: Mapping[str, float]) -> None:
        """How soon each revision is needed, more for sooner: where not all can sleep, the last of them is closed.
        What is not named counts 0; among equals the least recently used goes."""
        self._soon = dict(soon)

    def tier(self, revision: str) -> Tier:
        """Where its weights are now."""
        handle = self._alive.get(revision)
        return Tier.DISK if handle is None or handle.closing is not None else handle.tier

    def bytes_of(self, spec: ModelSpec) -> int:
        """Device memory it holds when awake: measured, or expected if it was never loaded here."""
        return self._measured.get(spec.revision) or self._expected(spec)

    async def close(self) -> None:
        """Close every engine, also leased ones; nothing may be asked of the cache any more."""
        for loading in list(self._loading.values()):
            loading.task.cancel()
        await asyncio.gather(*(loading.task for loading in self._loading.values()), return_exceptions=True)
        handles = {id(handle): handle for handle in [*self._kept.values(), *self._alive.values()]}
        self._kept.clear()
        await asyncio.gather(*(self._close(handle) for handle in handles.values()))
        await asyncio.gather(*self._chores, return_exceptions=True)

    # Finding and leasing ---------------------------------------------------------------------------

    def _find(self, revision: str) -> _Handle | None:
        """A live engine that is awake, also one that was evicted and is still leased."""
        handle = self._alive.get(revision)
        return handle if handle is not None and handle.usable else None

    def _lease(self, handle: _Handle, who: str) -> Lease:
        token = next(self._tokens)
        handle.leases[token] = who
        handle.kept = True
        self._kept[handle.spec.revision] = handle
        if handle.preloaded:
            handle.preloaded = False
            self._metrics.model_preloads.labels(outcome="used").inc()
        self._kept.move_to_end(handle.spec.revision)
        return Lease(self, handle, token)

    async def _give_back(self, handle: _Handle, token: int) -> None:
        handle.leases.pop(token, None)
        if not handle.leases and not handle.kept and handle.closing is None:
            await self._close(handle)
        self._freed.set()

    async def _discard(self, handle: _Handle, token: int) -> None:
        handle.leases.pop(token, None)
        self._drop(handle)
        await self._close(handle, force=True)

    def _leaked(self, handle: _Handle, token: int) -> None:
        """Called by the garbage collector, from any thread and at any time."""
        who = handle.leases.get(token, "somebody")
        log.warning("engine_lease_leaked", extra={"who": who, "revision": handle.spec.revision})
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._give_back_later, handle, token)

    def _give_back_later(self, handle: _Handle, token: int) -> None:
        chore = self._loop.create_task(self._give_back(handle, token), name="leaked lease")
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    # Loading ---------------------------------------------------------------------------------------

    async def _loaded(
        self, spec: ModelSpec, who: str, timeout_s: float, *, over: Collection[str] | None = None
    ) -> _Handle:
        """Join the load that is under way, or begin one. The last one to give up cancels it."""
        failure, until_s = self._failed.get(spec.revision, (None, 0.0))
        if failure is not None and time.monotonic() < until_s:
            raise failure
        loading = self._loading.get(spec.revision)
        if loading is None or loading.task.done():
            task = asyncio.create_task(self._make(spec, who, timeout_s, over), name=f"load {spec.revision}")
            loading = self._loading[spec.revision] = _Loading(task)
        loading.num_waiting += 1
        try:
            return await asyncio.shield(loading.task)
        finally:
            loading.num_waiting -= 1
            if not loading.task.done() and not loading.num_waiting:
                loading.task.cancel()
                await asyncio.wait([loading.task])
            if not loading.num_waiting and self._loading.get(spec.revision) is loading:
                del self._loading[spec.revision]  # until then it is not idle: they are about to lease it

    async def _make(self, spec: ModelSpec, who: str, timeout_s: float, over: Collection[str] | None) -> _Handle:
        """Room, then the engine: from sleep, or from disk."""
        give_up_s = time.monotonic() + timeout_s
        async with self._gate:
            asleep = self._alive.get(spec.revision)
            await self._make_room(spec, who, give_up_s, over)
            started_s = time.monotonic()
            if asleep is not None and asleep.closing is None and asleep.tier is Tier.ASLEEP:
                await self._wake(asleep)
                self._metrics.model_load.labels(tier=Tier.ASLEEP).observe(time.monotonic() - started_s)
                return asleep
            try:
                engine = await self._load(spec)
            except EngineUnavailable as error:
                self._failed[spec.revision] = error, time.monotonic() + self._failure_s
                raise
            try:
                if self._warm_up is not None:
                    await self._warm_up(engine)
                memory = await engine.memory()
            except BaseException:
                await engine.close(force=True)
                raise
            self._metrics.model_load.labels(tier=Tier.DISK).observe(time.monotonic() - started_s)
            self._failed.pop(spec.revision, None)
            self._measured[spec.revision] = memory.device_bytes
            handle = _Handle(spec, engine, memory)
            self._alive[spec.revision] = self._kept[spec.revision] = handle
            self._tell()
            if self._budget_bytes is not None and self._used() > self._budget_bytes:
                log.warning(
                    "model_larger_than_expected",
                    extra={"revision": spec.revision, "bytes": memory.device_bytes, "budget": self._budget_bytes},
                )
                await self._shrink(spec.revision)
            return handle

    async def _wake(self, handle: _Handle) -> None:
        try:
            await handle.engine.wake()
            handle.memory = await handle.engine.memory()
        except BaseException:
            self._drop(handle)
            await self._close(handle, force=True)
            raise
        handle.tier = Tier.AWAKE
        handle.kept = True
        self._kept[handle.spec.revision] = handle
        self._kept.move_to_end(handle.spec.revision)
        self._tell()

    # Room ------------------------------------------------------------------------------------------

    async def _make_room(self, spec: ModelSpec, who: str, give_up_s: float, over: Collection[str] | None) -> None:
        """Until it fits. `over` None: any engine without a lease may go, the least recently used first."""
        while True:
            await self._accounts.look()
            if self._fits(spec):
                return
            idle = [one for one in self._idle() if over is None or one.spec.revision in over]
            if idle:
                await self._put_away(idle[0], but=spec.revision)
                continue
            if self._budget_bytes is not None and self.bytes_of(spec) > self._budget_bytes:
                raise NoRoom(
                    f"{spec.revision} needs about {_gib(self.bytes_of(spec))}, the budget is {_gib(self._budget_bytes)}"
                )
            self._freed.clear()
            try:
                async with asyncio.timeout(max(0.0, give_up_s - time.monotonic())):
                    await self._freed.wait()
            except TimeoutError:
                raise NoRoom(f"no room for {spec.revision} ({who}): {self._who_holds()}") from None

    async def _shrink(self, but: str) -> None:
        while self._used() > (self._budget_bytes or 0):
            idle = [one for one in self._idle() if one.spec.revision != but]
            if not idle:
                return
            await self._put_away(idle[0], but=but)

    async def _put_away(self, handle: _Handle, *, but: str) -> None:
        """To sleep if that is possible, else closed; `but` is what the room is for."""
        if handle.engine.info.can_sleep and await self._sleeps(handle, but):
            self._metrics.model_evictions.labels(to=Tier.ASLEEP).inc()
            return
        if handle.leases or handle.closing is not None:
            return  # somebody was faster
        self._drop(handle)
        self._metrics.model_evictions.labels(to=Tier.DISK).inc()
        await self._close(handle)

    async def _sleeps(self, handle: _Handle, but: str) -> bool:
        need = handle.memory.device_bytes  # its weights are most of it
        if need > self._host_budget_bytes:
            return False
        sleepers = [one for one in self._kept.values() if one.tier is Tier.ASLEEP and one.spec.revision != but]
        for older in sorted(sleepers, key=self._needed):
            if self._asleep_bytes() + need <= self._host_budget_bytes or self._needed(older) > self._needed(handle):
                break
            self._drop(older)
            self._metrics.model_evictions.labels(to=Tier.DISK).inc()
            await self._close(older)
        if handle.leases or handle.closing is not None or self._asleep_bytes() + need > self._host_budget_bytes:
            return False
        handle.tier = Tier.ASLEEP  # before it is: from here on nobody finds it awake
        try:
            await handle.engine.sleep()
        except EngineUnavailable as error:
            log.warning("engine_does_not_sleep", extra={"revision": handle.spec.revision, "error": str(error)})
            handle.tier = Tier.AWAKE
            return False
        handle.memory = await handle.engine.memory()
        self._tell()
        return True

    async def _close(self, handle: _Handle, *, force: bool = False) -> None:
        """Once, whoever asks; returns when its memory was measured."""
        if handle.closing is None:
            handle.closing = asyncio.create_task(self._end(handle, force), name=f"close {handle.spec.revision}")
        elif force:
            await handle.engine.close(force=True)
        await asyncio.shield(handle.closing)

    async def _end(self, handle: _Handle, force: bool) -> None:
        if handle.preloaded:
            self._metrics.model_preloads.labels(outcome="wasted").inc()
        pids = handle.engine.pids()
        try:
            async with asyncio.timeout(CLOSE_S):
                await handle.engine.close(force=force)
        except Exception as error:
            # Whatever went wrong in it, the worker goes on; what it still holds is measured below.
            log.error("engine_not_closed", extra={"revision": handle.spec.revision}, exc_info=error)
        if self._alive.get(handle.spec.revision) is handle:
            del self._alive[handle.spec.revision]
        await self._accounts.closed(handle.spec.revision, pids, handle.memory)
        self._tell()
        self._freed.set()

    # Sums ------------------------------------------------------------------------------------------

    def _fits(self, spec: ModelSpec, *, free: Collection[_Handle] = ()) -> bool:
        if self._budget_bytes is None:
            return True
        freed = sum(one.memory.device_bytes for one in free)
        return self._used() - freed + self.bytes_of(spec) <= self._budget_bytes

    def _used(self) -> int:
        return sum(one.memory.device_bytes for one in self._alive.values()) + self._accounts.quarantined_bytes

    def _needed(self, handle: _Handle) -> float:
        return self._soon.get(handle.spec.revision, 0.0)

    def _asleep_bytes(self) -> int:
        return sum(one.memory.host_bytes for one in self._alive.values() if one.tier is Tier.ASLEEP)

    def _idle(self) -> list[_Handle]:
        """Engines that may go, the least recently used first."""
        return [
            one
            for revision, one in self._kept.items()
            if not one.leases and one.tier is Tier.AWAKE and one.closing is None and revision not in self._loading
        ]

    def _leased(self) -> list[_Handle]:
        return [one for one in self._alive.values() if one.leases]

    def _who_holds(self) -> str:
        held = [
            f"{one.spec.revision} {_gib(one.memory.device_bytes)} ({', '.join(sorted(set(one.leases.values())))})"
            for one in self._leased()
        ]
        if self._accounts.quarantined_bytes:
            held.append(f"not given back {_gib(self._accounts.quarantined_bytes)}")
        return f"of {_gib(self._budget_bytes or 0)}, " + ", ".join(held)

    def _drop(self, handle: _Handle) -> None:
        handle.kept = False
        if self._kept.get(handle.spec.revision) is handle:
            del self._kept[handle.spec.revision]

    def _tell(self) -> None:
        live = list(self._alive.values())
        awake = sum(one.memory.device_bytes for one in live if one.tier is Tier.AWAKE)
        self._metrics.model_bytes.labels(tier=Tier.AWAKE).set(awake)
        self._metrics.model_bytes.labels(tier=Tier.ASLEEP).set(self._asleep_bytes())
        self._metrics.model_quarantined.set(self._accounts.quarantined_bytes)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

"""The model cache with engines that do nothing but count: who loads, who shares, who goes, who is let go."""

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import pytest

from codeyard.shared.errors import EngineUnavailable, NoRoom
from codeyard.shared.settings import EngineSettings
from codeyard.shared.telemetry import Metrics
from codeyard.worker.cache.accounts import Accounts
from codeyard.worker.cache.model_cache import Lease, ModelCache, ModelSpec, Tier
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load, Memory

SIZE = 10


class FakeEngine:
    """Holds `SIZE` bytes awake, as many on the host asleep."""

    def __init__(self, spec: ModelSpec, *, can_sleep: bool, size: int) -> None:
        self.info = EngineInfo("fake", "fake", spec.source.location, spec.revision, 100, 8, True, can_sleep)
        self.asleep = self.closed = self.forced = False
        self.size = size

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        yield Delta("", (), "stop")

    async def abort(self, job_id: str) -> None: ...

    def load(self) -> Load:
        return Load(0, 0)

    def pids(self) -> tuple[int, ...]:
        return ()

    async def memory(self) -> Memory:
        return Memory(0, self.size) if self.asleep else Memory(self.size, 0)

    async def sleep(self) -> None:
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False

    async def close(self, *, force: bool = False) -> None:
        assert not self.closed or force
        self.closed, self.forced = True, force


@dataclass
class Loader:
    """Loads when `open` is set, and remembers what it made."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    can_sleep: bool = False
    size: int = SIZE
    fails: bool = False
    begun: list[str] = field(default_factory=list)
    cancelled: int = 0
    made: list[FakeEngine] = field(default_factory=list)

    async def __call__(self, spec: ModelSpec) -> FakeEngine:
        self.begun.append(spec.revision)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails:
            raise EngineUnavailable("no weights there")
        engine = FakeEngine(spec, can_sleep=self.can_sleep, size=self.size)
        self.made.append(engine)
        return engine


def spec(name: str) -> ModelSpec:
    return ModelSpec(name, ModelSource(name, f"/models/{name}", name), EngineSettings())


@pytest.fixture
def loader() -> Loader:
    loader = Loader()
    loader.open.set()
    return loader


MakeCache = Callable[..., ModelCache]


@pytest.fixture
async def cache_of(loader: Loader) -> AsyncGenerator[MakeCache, None]:
    made: list[ModelCache] = []

    def make(budget: int | None = None, host: int = 0, **options: float) -> ModelCache:
        cache = ModelCache(
            loader,
            metrics=Metrics(),
            expected_bytes=lambda spec: SIZE,
            budget_bytes=budget,
            host_budget_bytes=host,
            **options,  # type: ignore[arg-type]  # failure_s
        )
        made.append(cache)
        return cache

    yield make
    for cache in made:
        await cache.close()
    assert all(engine.closed for engine in loader.made)  # whatever a test did


async def take(cache: ModelCache, name: str, timeout_s: float = 5.0) -> Lease:
    return await cache.acquire(spec(name), who=f"test {name}", timeout_s=timeout_s)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - turns of the loop, no time
            await asyncio.sleep(0)


async def test_a_hundred_leases_of_one_model_are_one_load(cache_of: MakeCache, loader: Loader) -> None:
    """Two loads of one model at once run out of memory."""
    cache = cache_of(budget=SIZE)
    loader.open.clear()
    asking = [asyncio.create_task(take(cache, "a")) for _ in range(100)]
    await until(lambda: bool(loader.begun))
    loader.open.set()

    leases = await asyncio.gather(*asking)

    assert loader.begun == ["a"]
    assert {id(lease.engine) for lease in leases} == {id(loader.made[0])}
    for lease in leases:
        await lease.release()
        await lease.release()
    assert cache.tier("a") is Tier.AWAKE


async def test_the_least_recently_used_goes_first(cache_of: MakeCache, loader: Loader) -> None:
    """And only when the room is needed."""
    cache = cache_of(budget=2 * SIZE)
    for name in "aba":
        await (await take(cache, name)).release()
    assert loader.begun == ["a", "b"]

    await (await take(cache, "c")).release()

    assert [cache.tier(name) for name in "abc"] == [Tier.AWAKE, Tier.DISK, Tier.AWAKE]
    assert [engine.closed for engine in loader.made] == [False, True, False]


async def test_what_is_leased_is_not_closed_and_the_wait_for_it_is_bounded(cache_of: MakeCache, loader: Loader) -> None:
    """The error says who holds what; a release in time lets the load go on."""
    cache = cache_of(budget=SIZE)
    lease = await take(cache, "a")

    with pytest.raises(NoRoom, match=r"no room for b \(test b\).*a 0\.00 GiB \(test a\)"):
        await take(cache, "b", timeout_s=0.01)
    waiting = asyncio.create_task(take(cache, "b"))
    await until(lambda: cache._gate.locked())
    await lease.release()

    assert (await waiting).engine.info.revision == "b"
    assert loader.made[0].closed


async def test_a_model_larger_than_the_budget_is_refused_at_once(cache_of: MakeCache, loader: Loader) -> None:
    """Waiting would not help."""
    cache = cache_of(budget=SIZE - 1)

    with pytest.raises(NoRoom, match="needs about"):
        await take(cache, "a", timeout_s=60)
    assert loader.begun == []


async def test_an_evicted_engine_that_is_leased_is_found_again(cache_of: MakeCache, loader: Loader) -> None:
    """Not loaded a second time beside itself; without a lease it is closed at the last release."""
    cache = cache_of()
    first = await take(cache, "a")
    await cache.evict("a")
    assert not loader.made[0].closed

    second = await take(cache, "a")
    assert second.engine is first.engine
    await cache.evict("a")
    await first.release()
    assert not loader.made[0].closed
    await second.release()

    assert loader.made[0].closed
    assert cache.tier("a") is Tier.DISK
    assert loader.begun == ["a"]


async def test_everybody_who_waits_hears_of_a_failed_load_and_it_is_not_tried_at_once(
    cache_of: MakeCache, loader: Loader
) -> None:
    """A model that cannot be loaded must not be read from disk for each job."""
    cache = cache_of(failure_s=60.0)
    loader.fails = True
    outcomes = await asyncio.gather(*[take(cache, "a") for _ in range(3)], return_exceptions=True)
    again = await asyncio.gather(take(cache, "a"), return_exceptions=True)

    assert [str(outcome) for outcome in [*outcomes, *again]] == ["no weights there"] * 4
    assert loader.begun == ["a"]
    other = cache_of(failure_s=0.0)
    with pytest.raises(EngineUnavailable):
        await take(other, "a")
    loader.fails = False
    await (await take(other, "a")).release()


async def test_the_last_one_to_give_up_cancels_the_load(cache_of: MakeCache, loader: Loader) -> None:
    """One of several does not; and nothing is left of a cancelled load."""
    cache = cache_of(budget=SIZE)
    loader.open.clear()
    one, other = (asyncio.create_task(take(cache, "a")) for _ in range(2))
    await until(lambda: bool(loader.begun))
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    cancelled = [loader.cancelled]
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    assert [*cancelled, loader.cancelled] == [0, 1]

    loader.open.set()
    await (await take(cache, "b")).release()
    assert loader.begun == ["a", "b"]


async def test_a_broken_engine_is_closed_by_force_and_loaded_anew(cache_of: MakeCache, loader: Loader) -> None:
    """Also for the others who hold it, whose release then changes nothing."""
    cache = cache_of(budget=SIZE)
    one, other = await take(cache, "a"), await take(cache, "a")

    await one.broken()
    fresh = await take(cache, "a")

    assert loader.made[0].forced
    assert fresh.engine is loader.made[1]
    await other.release()
    assert not loader.made[1].closed
    await fresh.release()


async def test_a_lease_that_leaks_is_given_back_and_its_taker_named(
    cache_of: MakeCache, loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    """By its finalizer, without the help of the cycle collector."""
    cache = cache_of(budget=SIZE)
    gc.disable()
    try:
        lease = await take(cache, "a")
        gone = weakref.ref(lease)
        with caplog.at_level(logging.WARNING):
            del lease
        assert gone() is None
    finally:
        gc.enable()

    assert [(record.message, record.__dict__["who"]) for record in caplog.records] == [
        ("engine_lease_leaked", "test a")
    ]
    await (await take(cache, "b")).release()  # there is room again
    assert loader.made[0].closed


async def test_a_closed_engine_is_let_go(cache_of: MakeCache, loader: Loader) -> None:
    """Nothing of ours keeps it: its memory is its own affair from then on."""
    cache = cache_of()
    gc.disable()
    try:
        lease = await take(cache, "a")
        await lease.release()
        gone = weakref.ref(loader.made.pop())
        await cache.evict("a")
        await asyncio.sleep(0)
        assert gone() is None
    finally:
        gc.enable()


async def test_an_engine_that_can_sleep_sleeps_while_host_memory_lasts(cache_of: MakeCache, loader: Loader) -> None:
    """The oldest sleeper goes to disk; waking is not a load."""
    loader.can_sleep = True
    cache = cache_of(budget=SIZE, host=2 * SIZE)
    for name in "abcd":
        await (await take(cache, name)).release()
    assert [cache.tier(name) for name in "abcd"] == [Tier.DISK, Tier.ASLEEP, Tier.ASLEEP, Tier.AWAKE]

    await (await take(cache, "b")).release()

    assert loader.begun == ["a", "b", "c", "d"]
    assert [cache.tier(name) for name in "abcd"] == [Tier.DISK, Tier.AWAKE, Tier.DISK, Tier.ASLEEP]


async def test_of_those_asleep_the_one_needed_last_goes_to_disk(cache_of: MakeCache, loader: Loader) -> None:
    """Whichever slept first; and where the one that makes room is itself needed last, it does not sleep at all."""
    loader.can_sleep = True
    cache = cache_of(budget=SIZE, host=2 * SIZE)
    for name in "abc":
        await (await take(cache, name)).release()

    cache.expect({"a": 0.5, "b": 0.2, "c": 0.4})
    await (await take(cache, "d")).release()
    sleeping = [cache.tier(name) for name in "abcd"]
    cache.expect({"a": 0.5, "c": 0.4, "d": 0.1})
    await (await take(cache, "e")).release()

    assert sleeping == [Tier.ASLEEP, Tier.DISK, Tier.ASLEEP, Tier.AWAKE]
    assert [cache.tier(name) for name in "abcde"] == [Tier.ASLEEP, Tier.DISK, Tier.ASLEEP, Tier.DISK, Tier.AWAKE]


async def test_preloading_takes_only_what_nobody_uses(cache_of: MakeCache, loader: Loader) -> None:
    """Spare room, or the idle models that were named; cancelled, it leaves nothing."""
    cache = cache_of(budget=2 * SIZE)
    lease = await take(cache, "a")
    await (await take(cache, "b")).release()

    assert not await cache.preload(spec("c"))
    assert not await cache.preload(spec("c"), over=["a"])  # leased
    assert await cache.preload(spec("c"), over=["a", "b"])
    assert [cache.tier(name) for name in "abc"] == [Tier.AWAKE, Tier.DISK, Tier.AWAKE]
    assert await cache.preload(spec("c"))
    await (await take(cache, "c")).release()
    loader.open.clear()
    loading = asyncio.create_task(cache.preload(spec("d"), over=["c"]))
    await until(lambda: "d" in loader.begun)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)

    assert loader.cancelled == 1
    assert cache.tier("d") is Tier.DISK
    await lease.release()


async def test_a_model_that_holds_more_than_expected_makes_the_others_go(cache_of: MakeCache, loader: Loader) -> None:
    """The budget is of what is measured; next time it is known before."""
    cache = cache_of(budget=2 * SIZE + 5)
    for name in "ab":
        await (await take(cache, name)).release()
    loader.size = SIZE + 8

    await (await take(cache, "c")).release()

    assert [cache.tier(name) for name in "abc"] == [Tier.DISK, Tier.DISK, Tier.AWAKE]
    assert cache.bytes_of(spec("c")) == SIZE + 8


async def test_memory_that_does_not_come_back_counts_as_used(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it does: loading another model into it would run out of memory."""
    process = await asyncio.create_subprocess_exec("sleep", "60")  # an engine's process that does not end
    monkeypatch.setattr(FakeEngine, "pids", lambda self: (process.pid,))
    monkeypatch.setattr("codeyard.worker.cache.accounts.SETTLE_S", 0.0)
    monkeypatch.setattr("codeyard.worker.cache.accounts.host_bytes", lambda pids: SIZE * len(list(pids)))
    metrics = Metrics()
    cache = ModelCache(
        loader, metrics=metrics, expected_bytes=lambda spec: SIZE, accounts=Accounts(), budget_bytes=SIZE
    )
    try:
        await (await take(cache, "a")).release()
        await cache.evict("a")
        assert "engine_memory_not_returned" in caplog.text
        assert metrics.registry.get_sample_value("codeyard_model_quarantined_bytes") == SIZE
        with pytest.raises(NoRoom, match="not given back"):
            await take(cache, "b", timeout_s=0.01)
    finally:
        process.kill()
        await process.wait()

    monkeypatch.undo()
    await (await take(cache, "b")).release()
    await cache.close()


async def test_what_happened_can_be_counted(loader: Loader) -> None:
    """Hits, misses by tier, loads, evictions and preloads: what a budget is set by."""
    metrics = Metrics()
    cache = ModelCache(loader, metrics=metrics, expected_bytes=lambda spec: SIZE, budget_bytes=SIZE)
    for name in "aab":
        await (await take(cache, name)).release()
    await cache.preload(spec("c"), over=["b"])
    await (await take(cache, "c")).release()
    await cache.preload(spec("d"), over=["c"])
    await cache.close()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"codeyard_model_{name}", labels)

    assert value("hits_total") == 2
    assert value("misses_total", tier="disk") == 2
    assert value("load_seconds_count", tier="disk") == 4
    assert value("evictions_total", to="disk") == 3
    assert value("preloads_total", outcome="used") == 1
    assert value("preloads_total", outcome="wasted") == 1
    assert value("bytes", tier="awake") == 0

"""The model cache under histories nobody would think of: many users at once, engines that fail, die and sleep,
in virtual time, with every promise checked at every step."""

import asyncio
import contextlib
import random

import pytest

from codeyard.shared.errors import EngineUnavailable
from codeyard.shared.settings import EngineSettings
from codeyard.shared.telemetry import Metrics
from codeyard.worker.cache.model_cache import ModelCache, ModelSpec
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import EngineInfo, Memory
from codeyard.worker.simulation.virtual_time import run_in_virtual_time

SIZE = 10
NAMES = "abcdef"


class Engine:
    """Takes time for everything; knows who uses it."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.info = EngineInfo("fake", "fake", name, name, 100, 8, True, can_sleep=world.host_budget > 0)
        self.users = 0
        self.dead = self.asleep = self.closed = False

    def pids(self) -> tuple[int, ...]:
        return ()

    async def memory(self) -> Memory:
        await self.world.nap()
        return Memory(0, SIZE) if self.asleep else Memory(SIZE, 0)

    async def sleep(self) -> None:
        self.world.unused(self, "put to sleep")
        await self.world.nap()
        self.world.unused(self, "put to sleep")
        self.asleep = True

    async def wake(self) -> None:
        await self.world.nap()
        self.asleep = False

    async def close(self, *, force: bool = False) -> None:
        if not force:
            self.world.unused(self, "closed")
        self.closed = True
        await self.world.nap()


class World:
    """Users that lease, use, lose and abandon engines; `wrong` collects broken promises."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.budget = self.rng.choice([1, 2, 3]) * SIZE
        self.host_budget = self.rng.choice([0, 1, 2]) * SIZE
        self.loading: set[str] = set()
        self.engines: list[Engine] = []
        self.wrong: list[str] = []
        self.served = 0

    async def nap(self) -> None:
        """Some virtual time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.choice([0.0, 0.0, 0.1, 1.0])):
                await asyncio.Event().wait()

    def unused(self, engine: Engine, what: str) -> None:
        if engine.users:
            self.wrong.append(f"{engine.name} was {what} while {engine.users} used it")

    def awake(self) -> int:
        return sum(SIZE for one in self.engines if not one.asleep and not one.closed)

    async def load(self, spec: ModelSpec) -> Engine:
        name = spec.revision
        if name in self.loading or any(one.name == name and not one.closed and not one.dead for one in self.engines):
            self.wrong.append(f"{name} was loaded beside itself")
        if self.awake() + SIZE > self.budget:
            self.wrong.append(f"{name} was loaded over the budget: {self.awake()} of {self.budget} in use")
        self.loading.add(name)
        try:
            await self.nap()
            if self.rng.random() < 0.1:
                raise EngineUnavailable("a bad day")
        finally:
            self.loading.discard(name)
        engine = Engine(self, name)
        self.engines.append(engine)
        return engine

    async def user(self, cache: ModelCache) -> None:
        for _ in range(self.rng.randint(1, 6)):
            await self.nap()
            name = self.rng.choice(NAMES)
            try:
                lease = await cache.acquire(_spec(name), who="user", timeout_s=self.rng.choice([0.5, 5.0, 50.0]))
            except EngineUnavailable:
                continue
            engine = lease.engine
            assert isinstance(engine, Engine)
            if engine.asleep or (engine.closed and not engine.dead):
                self.wrong.append(f"{name} was leased {'asleep' if engine.asleep else 'closed'}")
            engine.users += 1
            self.served += 1
            try:
                await self.nap()
                await self.nap()
            finally:
                engine.users -= 1
                fate = self.rng.random()
                if fate < 0.1:
                    engine.dead = True
                    await lease.broken()
                elif fate < 0.15:
                    del lease  # leaked: its finalizer gives it back
                else:
                    await lease.release()

    async def meddler(self, cache: ModelCache) -> None:
        """Evicts and preloads, and gives up in the middle of it."""
        for _ in range(10):
            await self.nap()
            if self.rng.random() < 0.5:
                await cache.evict(self.rng.choice(NAMES))
                continue
            preload = asyncio.create_task(cache.preload(_spec(self.rng.choice(NAMES)), over=self.rng.sample(NAMES, 2)))
            await self.nap()
            if self.rng.random() < 0.5:
                preload.cancel()
            await asyncio.gather(preload, return_exceptions=True)

    async def run(self) -> None:
        cache = ModelCache(
            self.load,  # type: ignore[arg-type]  # as much of an engine as a cache needs
            metrics=Metrics(),
            expected_bytes=lambda spec: SIZE,
            budget_bytes=self.budget,
            host_budget_bytes=self.host_budget,
            failure_s=0.5,
        )
        users = [asyncio.create_task(self.user(cache)) for _ in range(self.rng.randint(1, 8))]
        users.append(asyncio.create_task(self.meddler(cache)))
        for user in self.rng.sample(users, len(users) // 3):
            await self.nap()
            user.cancel()
        for outcome in await asyncio.gather(*users, return_exceptions=True):
            if isinstance(outcome, Exception):
                self.wrong.append(f"somebody failed: {outcome!r}")
        await cache.close()
        if left := [one.name for one in self.engines if not one.closed]:
            self.wrong.append(f"never closed: {left}")


def _spec(name: str) -> ModelSpec:
    return ModelSpec(name, ModelSource(name, name, name), EngineSettings())


@pytest.mark.parametrize("block", range(10))
def test_no_history_breaks_a_promise(block: int) -> None:
    """One load at a time, never over the budget, never closed or put to sleep under a user, nothing left."""
    served = 0
    for seed in range(block * 60, block * 60 + 60):
        world = World(seed)
        run_in_virtual_time(world.run())
        assert world.wrong == [], f"seed {seed}"
        served += world.served

    assert served > 60

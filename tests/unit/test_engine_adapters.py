"""Adapters of one engine: loaded once, kept by use, never taken from a job that runs."""

import asyncio
import gc
import json
import random
import weakref
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed
from codeyard.worker.engines.adapters import AdapterSlots, check_adapter
from codeyard.worker.engines.port import Adapter


def adapter(name: str) -> Adapter:
    return Adapter(name, f"/adapters/{name}")


class Library:
    """What is loaded, in the order it came; loads wait while `open` is not set."""

    def __init__(self, capacity: int) -> None:
        self.loaded: dict[int, str] = {}
        self.loads: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.broken: set[str] = set()
        self.slots = AdapterSlots(capacity, self.load, self.unload)
        self.most = 0

    async def load(self, one: Adapter, number: int) -> None:
        self.loads.append(one.name)
        await self.open.wait()
        if one.name in self.broken:
            raise JobFailed(f"{one.name} is broken")
        assert number not in self.loaded
        self.loaded[number] = one.name
        self.most = max(self.most, len(self.loaded))

    async def unload(self, number: int) -> None:
        await asyncio.sleep(0)
        del self.loaded[number]

    async def use(self, name: str) -> int:
        async with self.slots.hold(adapter(name)) as number:
            assert self.loaded[number] == name
            await asyncio.sleep(0)
            assert self.loaded[number] == name
            return number


async def turns(count: int = 20) -> None:
    """Let every task that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_jobs_that_ask_at_once_share_one_load() -> None:
    """A load costs seconds and a place."""
    library = Library(2)
    numbers = await asyncio.gather(*(library.use("sql") for _ in range(50)))
    assert library.loads == ["sql"]
    assert len(set(numbers)) == 1


async def test_the_one_used_longest_ago_goes() -> None:
    """The others are likelier to be asked for again."""
    library = Library(2)
    for name in ("a", "b", "a", "c"):
        await library.use(name)
    assert sorted(library.loaded.values()) == ["a", "c"]
    assert [one.name for one in library.slots.loaded] == ["a", "c"]


async def test_no_number_is_given_twice() -> None:
    """vLLM knows an adapter by its number alone: one that came back as another would answer for it."""
    library, other = Library(1), Library(1)
    numbers = [await one.use(name) for name in "abcab" for one in (library, other)]
    assert len(set(numbers)) == len(numbers)


async def test_a_job_never_loses_its_adapter() -> None:
    """It would go on with another one's weights. Jobs wait for a place, and all of them get one."""
    library = Library(3)
    await asyncio.gather(*(library.use(f"adapter {n % 10}") for n in range(200)))
    assert library.most <= 3
    assert len(library.loads) < 200


async def test_places_are_given_in_the_order_jobs_came() -> None:
    """A rare adapter must not wait for ever behind popular ones."""
    library = Library(1)
    order: list[str] = []

    async def note(name: str) -> None:
        await library.use(name)
        order.append(name)

    async with AsyncExitStack() as held:
        await held.enter_async_context(library.slots.hold(adapter("held")))
        waiting = []
        for name in ("rare", "b", "c", "b"):
            waiting.append(asyncio.create_task(note(name)))
            await turns()
    await asyncio.gather(*waiting)
    assert order == ["rare", "b", "b", "c"]  # the second b found its adapter loaded


async def test_who_gives_up_takes_nobody_along() -> None:
    """A cancelled job must neither end the load that others wait for, nor keep the place."""
    library = Library(1)
    library.open.clear()
    first, second = asyncio.create_task(library.use("a")), asyncio.create_task(library.use("a"))
    other = asyncio.create_task(library.use("b"))
    await turns()
    first.cancel()
    library.open.set()
    assert await second
    assert await other

    async with library.slots.hold(adapter("held")):
        gone, next_one = asyncio.create_task(library.use("c")), asyncio.create_task(library.use("d"))
        await turns()
    gone.cancel()  # at the moment it was its turn
    assert await next_one


@pytest.mark.parametrize("seed", range(100))
async def test_no_order_of_asking_failing_and_giving_up_leaves_a_job_waiting(seed: int) -> None:
    """A wake-up that went to a job which had just given up was lost, once in 300 of these."""
    chance = random.Random(seed)
    library = Library(chance.randint(1, 4))
    library.broken = {"adapter 0"} if chance.random() < 0.5 else set()

    async def use(name: str, num_turns: int) -> None:
        async with library.slots.hold(adapter(name)) as number:
            await turns(num_turns)
            assert library.loaded[number] == name

    jobs: list[asyncio.Task[None]] = []
    for _ in range(60):
        jobs.append(asyncio.create_task(use(f"adapter {chance.randint(0, 7)}", chance.randint(0, 6))))
        if chance.random() < 0.3:
            chance.choice(jobs).cancel()
        await turns(chance.randint(0, 3))
    async with asyncio.timeout(30):
        results = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(result is None or isinstance(result, JobFailed | asyncio.CancelledError) for result in results)


async def test_a_load_that_everybody_left_leaves_its_place() -> None:
    """Or one cancelled job after another fills the engine with nothing."""
    library = Library(1)
    library.open.clear()
    left = asyncio.create_task(library.use("a"))
    await turns()
    left.cancel()
    other = asyncio.create_task(library.use("b"))
    await turns()
    library.open.set()
    assert await other
    assert sorted(library.loaded.values()) == ["b"]


async def test_an_adapter_that_does_not_load_fails_its_own_jobs_and_is_tried_again() -> None:
    """Its directory may be mended; the engine and its other adapters go on."""
    library = Library(1)
    library.broken.add("a")
    results = await asyncio.gather(library.use("a"), library.use("a"), library.use("b"), return_exceptions=True)
    assert [type(result) for result in results] == [JobFailed, JobFailed, int]
    library.broken.clear()
    assert await library.use("a")


async def test_closing_ends_all_who_wait() -> None:
    """The engine is gone: they are offered to another one."""
    library = Library(1)
    library.open.clear()
    loading, waiting = asyncio.create_task(library.use("a")), asyncio.create_task(library.use("b"))
    await turns()
    await library.slots.close(EngineDead("closed"))
    results = await asyncio.gather(loading, waiting, library.use("c"), return_exceptions=True)
    assert [type(result) for result in results] == [EngineDead] * 3


async def test_what_is_closed_is_let_go() -> None:
    """A task or a future that held it would hold the engine too."""
    library = Library(2)
    await asyncio.gather(library.use("a"), library.use("b"))
    await library.slots.close(EngineDead("closed"))
    watched = weakref.ref(library.slots)
    gc.disable()
    try:
        del library.slots
        await turns()
        assert watched() is None
    finally:
        gc.enable()


CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "config,weights,said",
    [
        (None, True, r"adapter_config\.json"),
        ({"lora_alpha": 8}, True, "not the config of a LoRA adapter"),
        ([], True, "not the config of a LoRA adapter"),
        (CONFIG, False, "no adapter weights"),
        ({**CONFIG, "r": 64}, True, "rank 64, the engine takes 16: set CODEYARD_ENGINE_MAX_LORA_RANK"),
        ({**CONFIG, "rank_pattern": {"v_proj": 32}}, True, "rank 32"),
    ],
)
def test_what_is_no_usable_adapter_says_why(tmp_path: Path, config: Any, weights: bool, said: str) -> None:
    """vLLM's own words for it are a stack trace in another process's log."""
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(EngineUnavailable, match=said):
        check_adapter(Adapter("sql", str(tmp_path)), max_rank=16)


def test_an_adapter_as_peft_writes_it_is_taken(tmp_path: Path) -> None:
    """With or without a rank of its own for some modules."""
    for pattern in ({}, None, {"v_proj": 16}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, "rank_pattern": pattern}))
        (tmp_path / "adapter_model.safetensors").touch()
        check_adapter(Adapter("sql", str(tmp_path)), max_rank=16)

"""What a worker lets go of when memory is short: engines that no job uses, also where a line still held one."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from support.fleet import Backend, running, told, worker_task

from codeyard.shared.notice import Notice
from codeyard.shared.record import State
from codeyard.worker import service
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Engine
from codeyard.worker.engines.select import start_engine
from codeyard.worker.memory_watch import MemorySample, Usage
from codeyard.worker.scheduling import placement


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Percent of the memory limit, as the worker's sampler tells; a test sets it. A pause between jobs is short."""
    used = [50]
    monkeypatch.setattr(service, "MemorySampler", lambda *limits: lambda: MemorySample(Usage(used[0], 100)))
    monkeypatch.setattr(placement, "PAUSE_S", 0.1)
    return used


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, weakref.ref[Engine]]]:
    """The engine that was started last for each model, weakly held. The garbage collector is off: what is let go
    of goes at once, or is held by somebody."""
    engines: dict[str, weakref.ref[Engine]] = {}

    async def start(kind: str, source: ModelSource, *rest: object) -> Engine:
        engine = await start_engine(kind, source, *rest)  # type: ignore[arg-type]
        engines[source.alias] = weakref.ref(engine)
        return engine

    monkeypatch.setattr(service, "start_engine", start)
    gc.disable()
    yield engines
    gc.enable()


def tiers(notice: Notice) -> dict[str, tuple[str, bool]]:
    return {model.alias: (model.tier, model.serving) for model in notice.models}


async def test_at_90_percent_an_idle_line_gives_its_engine_back_and_a_busy_one_keeps_it(
    embedded: Backend, used: list[int], engines: dict[str, weakref.ref[Engine]]
) -> None:
    """An open line leases its engine whether it has jobs or not; short memory ends that. The next job of that
    model finds it again, and nothing happened to the other's."""
    settings = embedded.settings(worker={"model": "a=org/a,b=org/b", "stall_s": 60})
    async with worker_task(settings), embedded.client() as client:
        assert (await (await client.submit("def f():", model="a")).result(timeout=20)).state is State.SUCCEEDED
        busy = await client.submit("!hang", model="b", stream=True)
        await running(client, busy.id)
        before = engines["a"], engines["b"]
        used[0] = 92
        await told(client, lambda notice: tiers(notice) == {"a": ("disk", False), "b": ("awake", True)})
        let_go = [engine() is None for engine in before]
        again = await (await client.submit("def f():", model="a")).result(timeout=20)
        await busy.cancel()
        cancelled = await busy.result(timeout=20)

    assert let_go == [True, False]
    assert again.state is State.SUCCEEDED
    assert cancelled.state is State.CANCELLED


async def test_at_the_limit_no_engine_is_loaded_for_a_job_that_waits(
    embedded: Backend, used: list[int], engines: dict[str, weakref.ref[Engine]]
) -> None:
    """Intake is stopped, and a model is larger than any job."""
    async with worker_task(embedded.settings(worker={"model": "a=org/a"})), embedded.client() as client:
        await told(client, lambda notice: tiers(notice) == {"a": ("awake", True)})
        used[0] = 100
        await told(client, lambda notice: tiers(notice) == {"a": ("disk", False)})
        before = engines.pop("a")
        job = await client.submit("def waits():", model="a")
        await told(client, lambda notice: any(any(map(sum, model.backlog.values())) for model in notice.models))
        held, loaded = (await job.status()).state, dict(engines)
        used[0] = 50
        result = await job.result(timeout=20)

    assert before() is None
    assert (held, loaded) == (State.QUEUED, {})
    assert result.state is State.SUCCEEDED
    assert list(engines) == ["a"]


async def test_memory_that_is_short_for_a_moment_closes_nothing_between_two_jobs(
    embedded: Backend, used: list[int], engines: dict[str, weakref.ref[Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading costs more than such a pause."""
    monkeypatch.setattr(placement, "PAUSE_S", 3_600.0)
    async with worker_task(embedded.settings(worker={"model": "a=org/a"})), embedded.client() as client:
        first = engines["a"]()
        used[0] = 95
        async with asyncio.TaskGroup() as tasks:
            jobs = [await client.submit(f"def job_{number}():", model="a") for number in range(4)]
            results = [tasks.create_task(job.result(timeout=20)) for job in jobs]
        last = engines["a"]()

    assert {task.result().state for task in results} == {State.SUCCEEDED}
    assert first is last

"""A worker that serves several models: as many at once as its memory holds, the others when their jobs wait."""

import asyncio
from typing import Any

import pytest
from support.fleet import Backend, running, told, worker_task

from codeyard.shared.errors import UnknownModel
from codeyard.shared.job import Lane
from codeyard.shared.record import State
from codeyard.shared.settings import Settings
from codeyard.worker import service
from codeyard.worker.engines.simulated import simulated_completion
from codeyard.worker.memory_watch import MemorySample, Usage

SIZE = 1_000
NAMES = ("a", "b", "c", "d")


def settings_of(backend: Backend, *, held: int, names: tuple[str, ...] = NAMES, **worker: Any) -> Settings:
    """Simulated models, each of SIZE bytes, of which `held` fit."""
    models = ",".join(f"{name}=org/{name}" for name in names)
    return backend.settings(
        worker={"model": models, "device_budget_bytes": held * SIZE, **worker},
        engine={"simulated_bytes": SIZE, "simulated_load_s": 0.5},
    )


async def test_jobs_of_more_models_than_fit_are_all_served(backend: Backend) -> None:
    """Models take turns; each job's result is its own model's, and says which revision made it."""
    async with worker_task(settings_of(backend, held=2)), backend.client() as client:
        jobs = [
            await client.submit(f"def job_{number}():", model=NAMES[number % len(NAMES)], sampling={"max_tokens": 20})
            for number in range(40)
        ]
        results = [await job.result(timeout=40) for job in jobs]

    assert {result.state for result in results} == {State.SUCCEEDED}
    for number, (job, result) in enumerate(zip(jobs, results, strict=True)):
        assert job.accepted_status.revision.startswith(f"{NAMES[number % len(NAMES)]}-")
        assert result.text == simulated_completion(f"def job_{number}():", 20)[0]


async def test_with_room_for_all_no_model_waits_for_another(embedded: Backend) -> None:
    """No budget is set: every model stays loaded, and jobs of all run at once."""
    settings = embedded.settings(worker={"model": "a=org/a,b=org/b"})
    async with worker_task(settings), embedded.client() as client:
        jobs = [await client.submit("!hang", model=name, stream=True) for name in ("a", "b")]
        await asyncio.gather(*[running(client, job.id) for job in jobs])
        for job in jobs:
            await job.cancel()
        assert [(await job.result(timeout=20)).state for job in jobs] == [State.CANCELLED] * 2


async def test_a_model_that_does_not_load_does_not_keep_the_others_from_serving(embedded: Backend) -> None:
    """It is said in the log; its jobs wait for a worker that can."""
    async with worker_task(settings_of(embedded, held=2, names=("a", "fails"))), embedded.client() as client:
        job = await client.submit("def f():", model="a")
        assert (await job.result(timeout=20)).state is State.SUCCEEDED
        waiting = await client.submit("def f():", model="fails")
        assert (await waiting.status()).state is State.QUEUED
        with pytest.raises(UnknownModel):
            await client.submit("def f():", model="nobody")


async def test_an_engine_that_dies_takes_only_its_own_models_jobs_with_it(embedded: Backend) -> None:
    """The other line goes on; all jobs complete, none twice, the worker stays."""
    settings = embedded.settings(worker={"model": "a=org/a,b=org/b"})
    async with worker_task(settings), embedded.client() as client:
        other = [await client.submit(f"def job_{number}():", model="b") for number in range(8)]
        mine = [await client.submit(f"def job_{number}():", model="a", stream=True) for number in range(4)]
        killer = await client.submit("!die", model="a")
        results = [await job.result(timeout=40) for job in other + mine]
        dead = await killer.result(timeout=40)

    assert {result.state for result in results} == {State.SUCCEEDED}
    assert dead.error is not None
    assert dead.error.code == "poison"


async def test_at_the_memory_limit_no_job_is_taken_until_memory_fell(
    embedded: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued waits at the broker, for this worker or another; the kernel ends nobody."""
    used = [100]
    monkeypatch.setattr(service, "MemorySampler", lambda *limits: lambda: MemorySample(Usage(used[0], 100)))
    async with worker_task(embedded.settings()), embedded.client() as client:
        job = await client.submit("def waits():")
        await told(client, lambda notice: any(sum(model.backlog.get(Lane.STANDARD, ())) for model in notice.models))
        held = (await job.status()).state
        used[0] = 50
        result = await job.result(timeout=20)

    assert held is State.QUEUED
    assert result.state is State.SUCCEEDED


async def test_twenty_adapters_are_served_on_one_engine(backend: Backend) -> None:
    """Each is called as `model@adapter`, pinned to its own weights, and waits in its base's queues."""
    adapters = {}
    for number in range(20):
        folder = backend.folder / f"adapter-{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(f"weights {number}".encode())
        adapters[f"a{number}"] = str(folder)
    settings = backend.settings(worker={"model": "coder=org/coder"}, models={"coder": {"adapters": adapters}})
    async with worker_task(settings), backend.client() as client:
        jobs = [await client.submit("def f():", model=f"coder@a{number % 20}") for number in range(60)]
        base = await (await client.submit("def f():", model="coder")).result(timeout=40)
        results = [await job.result(timeout=40) for job in jobs]

    assert {result.state for result in results} == {State.SUCCEEDED}
    assert [result.revision for result in results] == [job.accepted_status.revision for job in jobs]
    assert len({result.revision for result in results}) == 20
    assert base.revision is not None
    assert all(result.revision.startswith(f"{base.revision}@a") for result in results if result.revision)
    assert len({result.text for result in results} | {base.text}) == 21

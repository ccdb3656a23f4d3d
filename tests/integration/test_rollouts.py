"""A new revision goes live under load: no job is lost, failed or mixed, and it can go back at any moment."""

import asyncio
import contextlib
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.fleet import Backend, WorkerProcess, worker_task

from codeyard.producer import AsyncClient, submission
from codeyard.producer.async_client import AsyncJob
from codeyard.shared.alias import Alias, Phase
from codeyard.shared.record import EventKind, State
from codeyard.shared.rollout import begin, change, promote, roll_back
from codeyard.shared.settings import Settings
from codeyard.worker import rollouts, service, station
from codeyard.worker.engines.models import starter_directory

WITHIN_S = 60.0
SIZE = 1_000
PAUSE_S = 0.02  # between submissions: 50 a second


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are tasks here look at the rollout ten times a second, and forget aliases soon: it has four steps,
    and what is waited before each shows nothing. Those that are processes look as they always do."""
    monkeypatch.setattr(rollouts, "PERIOD_S", 0.1)
    monkeypatch.setattr(service, "TELL_S", 0.1)
    monkeypatch.setattr(submission, "ALIAS_TTL_S", 0.4)
    monkeypatch.setattr(station, "QUIET_S", 1.0)  # longer than that, as always


def settings_of(backend: Backend, *, held: int | None = None, **worker: Any) -> Settings:
    budget = {} if held is None else {"device_budget_bytes": held * SIZE}
    return backend.settings(
        worker={"model": "coder=org/coder-1", **budget, **worker},
        engine={"simulated_bytes": SIZE, "simulated_load_s": 2.0, "max_running": 32},
    )


async def begun(client: AsyncClient, location: str, percent: int = 100) -> None:
    await change(
        client.store, "coder", partial(begin, location=location, rollout_id=location, percent=percent, now=0.0)
    )


async def reached(client: AsyncClient, phase: Phase) -> Alias:
    """The alias once its rollout is there; a rollout that is over elsewhere fails the test."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            alias = (await client.store.aliases())["coder"]
            assert alias.rollout is not None
            if alias.rollout.phase is phase:
                return alias
            assert not alias.rollout.phase.over, f"{alias.rollout.phase}: {alias.rollout.reason}"
            await asyncio.wait([asyncio.create_task(client.store.ping())], timeout=1)


class Load:
    """Jobs at a steady rate until it is stopped."""

    def __init__(self, client: AsyncClient, pause_s: float) -> None:
        self.jobs: list[AsyncJob] = []
        self._client = client
        self._pause_s = pause_s
        self._stop = asyncio.Event()

    async def run(self) -> None:
        while not self._stop.is_set():
            prompt = f"def job_{len(self.jobs)}():"
            self.jobs.append(
                await self._client.submit(
                    prompt, model="coder", stream=len(self.jobs) % 5 == 0, sampling={"max_tokens": 40}
                )
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self._pause_s)

    async def checked(self) -> list[str]:
        """Every job succeeded on the revision it was pinned to; the revisions, in the order of submission."""
        revisions = []
        for job in self.jobs:
            status = await self._client.wait(job.id, WITHIN_S)
            assert status.state is State.SUCCEEDED, status.result
            assert status.result is not None
            assert status.result.revision == status.revision == job.accepted_status.revision
            revisions.append(status.revision)
        return revisions


@contextlib.asynccontextmanager
async def under_load(client: AsyncClient, pause_s: float = PAUSE_S) -> AsyncIterator[Load]:
    load = Load(client, pause_s)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        try:
            yield load
        finally:
            load._stop.set()


async def test_a_rollout_under_load_loses_and_mixes_nothing(backend: Backend) -> None:
    """Two workers that have room for both revisions: the switch happens once both have the new one ready."""
    settings = settings_of(backend)
    async with worker_task(settings), worker_task(settings), AsyncClient(settings=settings, timeout_s=10) as client:
        async with under_load(client) as load:
            await begun(client, "org/coder-2")
            alias = await reached(client, Phase.DRAIN)
            switched_at = len(load.jobs)
            await reached(client, Phase.DONE)
        revisions = await load.checked()
        events = [event async for event in load.jobs[0].stream()]

    assert alias.location == "org/coder-2"
    assert len(set(revisions)) == 2
    assert revisions == sorted(revisions, key=lambda revision: revision == alias.revision)  # never back
    assert switched_at > 0
    assert events[0].kind is EventKind.TOKENS
    assert events[0].revision == revisions[0]


async def test_a_worker_with_room_for_one_loads_the_new_revision_in_the_old_ones_place(backend: Backend) -> None:
    """It drains the old one for that; jobs pinned to it wait and are served after."""
    settings = settings_of(backend, held=1)
    async with worker_task(settings), AsyncClient(settings=settings, timeout_s=10) as client:
        async with under_load(client) as load:
            await begun(client, "org/coder-2")
            await reached(client, Phase.DRAIN)
        revisions = await load.checked()
        await reached(client, Phase.DONE)

    assert len(set(revisions)) <= 2


async def test_a_revision_that_does_not_load_never_takes_a_job(backend: Backend) -> None:
    """The rollout fails with the worker's reason, and another may be begun."""
    settings = settings_of(backend)
    async with worker_task(settings), AsyncClient(settings=settings, timeout_s=10) as client:
        async with under_load(client) as load:
            await begun(client, "org/fails")
            alias = await reached(client, Phase.FAILED)
        revisions = await load.checked()
        await begun(client, "org/coder-2")
        await reached(client, Phase.DONE)

    assert alias.rollout is not None
    assert "cannot load" in alias.rollout.reason
    assert set(revisions) == {alias.revision}


async def test_a_part_of_the_jobs_first_then_all_then_back(backend: Backend) -> None:
    """A canary, its promotion, and a rollback of what was done: each in one write."""
    settings = settings_of(backend)
    async with worker_task(settings), AsyncClient(settings=settings, timeout_s=10) as client:
        old = (await client.store.aliases())["coder"].revision
        await begun(client, "org/coder-2", percent=50)
        alias = await reached(client, Phase.CANARY)
        assert alias.rollout is not None
        assert alias.rollout.new is not None
        new = alias.rollout.new.revision
        async with AsyncClient(settings=settings, timeout_s=10) as fresh:  # knows nothing of the alias before
            jobs = [await fresh.submit(f"def f_{n}():", model="coder", sampling={"max_tokens": 8}) for n in range(60)]
            pinned = [job.accepted_status.revision for job in jobs]
            results = [await job.result(timeout=30) for job in jobs]
        assert [result.revision for result in results] == pinned
        assert 10 <= pinned.count(new) <= 50
        await change(client.store, "coder", partial(promote, percent=100))
        await reached(client, Phase.DONE)
        await change(client.store, "coder", partial(roll_back, reason="worse answers"))
        async with AsyncClient(settings=settings, timeout_s=10) as fresh:
            result = await (await fresh.submit("def f():", model="coder")).result(timeout=30)

    assert result.revision == old


async def test_a_worker_that_starts_after_a_rollout_serves_the_new_revision(backend: Backend) -> None:
    """Its settings still name the old one; the alias knows where the new one lies."""
    settings = settings_of(backend)
    async with AsyncClient(settings=settings, timeout_s=10) as client:
        async with worker_task(settings):
            await begun(client, "org/coder-2")
            alias = await reached(client, Phase.DONE)
        async with worker_task(settings):
            job = await client.submit("def f():", model="coder")
            result = await job.result(timeout=30)

    assert result.revision == alias.revision == job.accepted_status.revision
    assert alias.location == "org/coder-2"


@pytest.mark.process
async def test_the_commands_tell_what_happens(backend: Backend) -> None:
    """As an operator does it, in a terminal."""
    settings = settings_of(backend)
    where = ("--broker", backend.broker_url, "--store", backend.store_url, "--namespace", backend.namespace)
    async with worker_task(settings), AsyncClient(settings=settings) as client:
        listed = await command("models", *where)
        done = await command("models", "rollout", "coder", "--to", "org/coder-2", *where)
        await reached(client, Phase.DONE)
        refused = await command("models", "rollout", "coder", "--to", "org/fails", *where, status=1)
        state = await command("models", "status", "coder", *where)
        back = await command("models", "rollback", "coder", *where, status=1)

    assert "coder-" in listed
    assert "preparing org/coder-2" in done
    assert "new jobs go to coder-" in done
    assert "failed" in refused
    assert "cannot load" in state
    assert "no rollout to go back from" in back


async def command(*arguments: str, status: int = 0) -> str:
    """What it printed, errors included."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "codeyard.cli.main", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(WITHIN_S):
        output, _ = await process.communicate()
    assert process.returncode == status, output.decode()
    return output.decode()


@pytest.mark.parametrize(
    "engine",
    [pytest.param("torch", marks=pytest.mark.torch), pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.long])],
)
async def test_a_rollout_of_real_weights_under_load(embedded: Backend, tmp_path: Path, engine: str) -> None:
    """The starter model, and a copy of it whose weights differ: every answer is the pinned revision's own."""
    from safetensors.torch import load_file, save_file  # comes with the engines

    second = tmp_path / "coder-2"
    shutil.copytree(starter_directory(), second)
    weights = load_file(second / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, second / "model.safetensors", {"format": "pt"})
    settings = embedded.settings(
        worker={"engine": engine, "model": f"coder={starter_directory()}", "stall_s": 60},
        engine={"enforce_eager": True, "time_scale": 1.0, "max_running": 16},
    )
    process = WorkerProcess(settings, tmp_path)
    await process.start()
    try:
        async with AsyncClient(settings=settings, timeout_s=10) as client:
            async with under_load(client, pause_s=0.2) as load:
                await begun(client, str(second))
                alias = await reached(client, Phase.DRAIN)
                await reached(client, Phase.DONE)
            revisions = await load.checked()
    finally:
        process.signal(signal.SIGTERM)
        status = await process.ended()

    assert status == 0
    assert revisions[0] != revisions[-1] == alias.revision
    assert revisions == sorted(revisions, key=lambda revision: revision == alias.revision)

"""A worker as a process: it drains when it is told to, and may die at any moment."""

import asyncio
import signal

import pytest
from support.fleet import Backend, WorkerProcess, first_token, worker_task

from codeyard.producer import Submission
from codeyard.shared.errors import FleetError
from codeyard.shared.record import EventKind, State
from codeyard.worker.engines.simulated import simulated_completion

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]


async def test_kill_minus_9_in_the_middle_of_a_batch_loses_nothing(backend: Backend) -> None:
    """Every accepted job ends with its one right result, on another worker if need be."""
    slow = backend.settings(engine={"time_scale": 2.0})
    worker = WorkerProcess(slow, backend.folder)
    await worker.start()
    async with backend.client() as client:
        prompts = [f"def job_{n}():" for n in range(40)]
        submissions = [
            Submission(prompt, sampling={"max_tokens": 60}, stream=n % 2 == 0) for n, prompt in enumerate(prompts)
        ]
        jobs = [job for job in await client.submit_many(submissions) if not isinstance(job, FleetError)]
        await first_token(client, jobs[0].id)

        worker.signal(signal.SIGKILL)
        await worker.ended()
        async with worker_task(backend.settings()):
            results = await asyncio.gather(*[job.result(timeout=60) for job in jobs])
            streams = [[event async for event in job.stream()] for job in jobs]

    assert [result.text for result in results] == [simulated_completion(prompt, 60)[0] for prompt in prompts]
    for result, events in zip(results, streams, strict=True):
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert "".join(event.text for event in events) == result.text
        assert events[-1].kind is EventKind.END


@pytest.mark.parametrize(
    "stream,stop", [(True, []), (True, [" never said"]), (False, [])], ids=["stream", "stop strings", "no stream"]
)
async def test_a_job_goes_on_from_its_tokens_after_its_worker_was_killed(
    backend: Backend, stream: bool, stop: list[str]
) -> None:
    """What readers saw stays true: no restart, no gap, and usage is counted once. One that does not stream is
    saved every so many tokens."""
    prompt = next(p for p in (f"def long_{n}():" for n in range(10_000)) if len(simulated_completion(p, 250)[1]) == 250)
    slow = backend.settings(engine={"time_scale": 4.0}, worker={"save_tokens": 32})
    worker = WorkerProcess(slow, backend.folder)
    await worker.start()
    async with backend.client() as client:
        job = await client.submit(prompt, stream=stream, sampling={"max_tokens": 250, "stop": stop})
        await first_token(client, job.id)

        worker.signal(signal.SIGKILL)
        await worker.ended()
        seen = await client.store.events(job.id, after=0)
        async with worker_task(backend.settings()):
            result = await job.result(timeout=60)
            events = [event async for event in job.stream()]
            status = await job.status()

    assert status.attempt == 2
    assert sum(len(event.token_ids) for event in seen) >= (1 if stream else 32)
    assert events[: len(seen)] == seen
    assert EventKind.RESTARTED not in [event.kind for event in events]
    assert result.text == "".join(event.text for event in events) == simulated_completion(prompt, 250)[0]
    assert result.usage.completion_tokens == 250


async def test_sigterm_lets_running_jobs_finish_and_hands_waiting_ones_back(backend: Backend) -> None:
    """A rolling restart costs no job an attempt and leaves nothing half done."""
    settings = backend.settings(engine={"time_scale": 1.0, "max_running": 2}, admission={"policy": "fixed"})
    worker = WorkerProcess(settings, backend.folder)
    await worker.start()
    async with backend.client() as client:
        running = await client.submit("def running():", stream=True, sampling={"max_tokens": 200})
        jobs = [await client.submit(f"def waiting_{n}():", sampling={"max_tokens": 200}) for n in range(12)]
        await first_token(client, running.id)

        worker.signal(signal.SIGTERM)
        status = await worker.ended()
        left = [(await job.status()).state for job in jobs]
        finished = await running.status()
        async with worker_task(backend.settings()):
            results = await asyncio.gather(*[job.result(timeout=60) for job in jobs])
            attempts = [(await job.status()).attempt for job in jobs]

    assert status == 0
    assert finished.state is State.SUCCEEDED
    assert State.QUEUED in left
    assert State.RUNNING not in left
    assert {result.state for result in results} == {State.SUCCEEDED}
    assert set(attempts) == {1}


async def test_a_worker_frozen_past_its_lease_loses_its_jobs_and_does_no_harm_when_it_wakes(backend: Backend) -> None:
    """Its late commit carries an old fence and is refused: one result, from the one that took over."""
    slow = backend.settings(engine={"time_scale": 3.0})
    worker = WorkerProcess(slow, backend.folder)
    await worker.start()
    async with backend.client() as client:
        job = await client.submit("def frozen():", stream=True, sampling={"max_tokens": 150})
        await first_token(client, job.id)

        worker.signal(signal.SIGSTOP)
        async with worker_task(backend.settings()):
            result = await job.result(timeout=60)
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGTERM)
            status = await worker.ended()
        after = await job.result(timeout=5)

    assert status == 0
    assert result.state is State.SUCCEEDED
    assert after == result
    assert result.text == simulated_completion("def frozen():", 150)[0]

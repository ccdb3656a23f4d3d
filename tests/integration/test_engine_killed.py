"""The engine's process dies in the middle of a batch: the worker stays, and every job completes, once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fleet import Backend, WorkerProcess, first_token

from codeyard.producer import Submission
from codeyard.shared.errors import FleetError
from codeyard.shared.record import EventKind, State

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]
NUM_JOBS, NUM_TOKENS = 40, 200


def below(pid: int) -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process under this one."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if parent == pid:
            yield int(entry.name), words
            yield from below(int(entry.name))


@pytest.mark.parametrize(
    "engine, name",
    [
        pytest.param("torch", "torch_host", marks=pytest.mark.torch),
        pytest.param("vllm", "EngineCore", marks=[pytest.mark.vllm, pytest.mark.long]),
    ],
)
async def test_an_engine_killed_in_the_middle_of_a_batch_costs_no_job(
    embedded: Backend, tmp_path: Path, engine: str, name: str
) -> None:
    """The worker loads it anew and runs again what it had in hand; nobody else has to notice."""
    settings = embedded.settings(
        worker={"engine": engine, "model": "starter", "stall_s": 60},
        engine={"enforce_eager": True, "time_scale": 1.0, "max_running": 8},
    )
    worker = WorkerProcess(settings, tmp_path)
    await worker.start()
    async with embedded.client() as client:
        group = [
            Submission(f"def job_{n}():", model="starter", sampling={"max_tokens": NUM_TOKENS}, stream=n % 2 == 0)
            for n in range(NUM_JOBS)
        ]
        jobs = [job for job in await client.submit_many(group) if not isinstance(job, FleetError)]
        await first_token(client, jobs[0].id)

        [core, *_] = [one for one, words in below(worker.pid) if name in words]
        os.kill(core, signal.SIGKILL)
        statuses = [await client.wait(job.id, 200) for job in jobs]
        streams = [[event async for event in job.stream()] for job in jobs]
    worker.signal(signal.SIGTERM)

    assert await worker.ended() == 0, "the worker did not outlive its engine"
    assert len(jobs) == NUM_JOBS
    for status, events in zip(statuses, streams, strict=True):
        assert status.state is State.SUCCEEDED, status.result
        assert status.result is not None
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events].count(EventKind.END) == 1
        last_start = max((n for n, event in enumerate(events) if event.kind is EventKind.RESTARTED), default=0)
        assert "".join(event.text for event in events[last_start:]) == status.result.text
        assert sum(len(event.token_ids) for event in events[last_start:]) == status.result.usage.completion_tokens

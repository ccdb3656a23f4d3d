"""How soon the jobs of a dead worker go on, by the store's own clock."""

import contextlib
import itertools
import signal
import time
from pathlib import Path

import pytest
from support.fleet import Backend, WorkerProcess
from support.owners import owned

from codeyard.worker.engines.simulated import simulated_completion

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

NUM_JOBS = 6
MAX_TOKENS = 200
LEASE_S = 3.0  # the default
WITHIN_S = LEASE_S + 1.0  # issue 6


@pytest.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def backend(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> Backend:
    """SQLite for both ports, then RabbitMQ and Redis."""
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        return Backend(tmp_path, url, url, namespace)
    return Backend(tmp_path, request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url"), namespace)


async def test_jobs_of_a_killed_worker_run_elsewhere_within_their_lease_and_a_second(backend: Backend) -> None:
    """The promise by which an interactive caller can live with a worker's death."""
    store = {"lease_s": LEASE_S, "renew_s": 1.0, "grace_s": 2.0}
    slow = backend.settings(engine={"time_scale": 40.0}, store=store, worker={"stall_s": 60})
    victim, other = (WorkerProcess(slow, folder(backend, name)) for name in ("victim", "other"))
    await victim.start()
    async with backend.client() as client:
        jobs = [await client.submit(prompt, sampling={"max_tokens": MAX_TOKENS}) for prompt in long_prompts()]
        ids = [job.id for job in jobs]
        try:
            first = {record.owner for record in await owned(client, ids)}
            await other.start()

            killed_at = time.time()
            victim.signal(signal.SIGKILL)
            records = await owned(client, ids, not_by=first)
        finally:
            for worker in (victim, other):
                if worker.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        worker.signal(signal.SIGKILL)
                    await worker.ended()

    assert len(first) == 1
    assert {record.attempt for record in records} == {2}
    late_s = max(record.started_at for record in records) - killed_at
    assert late_s <= WITHIN_S, f"the last job was claimed {late_s:.2f} s after the kill"


def long_prompts() -> list[str]:
    """Their answers have all the tokens they may, a fifth of a second each: none ends meanwhile."""
    prompts = (f"def long_{n}():" for n in itertools.count())
    long = (prompt for prompt in prompts if len(simulated_completion(prompt, MAX_TOKENS)[1]) == MAX_TOKENS)
    return list(itertools.islice(long, NUM_JOBS))


def folder(backend: Backend, name: str) -> Path:
    """A worker's settings file lies in its own."""
    path = backend.folder / name
    path.mkdir()
    return path

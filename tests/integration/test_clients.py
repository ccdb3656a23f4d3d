"""The clients as backend services use them: threads, forks, retries, servers that go away."""

import asyncio
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest
from support.fleet import Backend, fleet_settings, worker_process, worker_task
from support.proxy import TcpProxy

from codeyard.producer import AsyncClient, AsyncJob, Client, Submission
from codeyard.producer.submission import Submitter
from codeyard.shared.connect import open_broker
from codeyard.shared.errors import (
    BrokerUnavailable,
    FleetError,
    IdempotencyConflict,
    InvalidJob,
    JobNotFound,
    JobTooLarge,
    QueueFull,
    ResultTimeout,
    UnknownModel,
)
from codeyard.shared.job import Lane, new_job_id
from codeyard.shared.record import EventKind, State
from codeyard.shared.topology import Topology
from codeyard.worker.engines.simulated import simulated_completion

pytestmark = pytest.mark.timeout(90)


async def declared(backend: Backend) -> None:
    """A worker was there once: alias and queues exist, nobody consumes."""
    async with worker_task(backend.settings()):
        pass


async def test_two_clients_with_one_key_share_one_job(backend: Backend) -> None:
    """Two replicas of a service may both retry the same request."""
    await declared(backend)
    async with backend.client() as one, backend.client() as other:
        first = await one.submit("def shared():", idempotency_key="k")
        second = await other.submit("def shared():", idempotency_key="k")

    assert second.id == first.id
    assert (first.attached, second.attached) == (False, True)


async def test_the_same_key_with_another_body_is_a_conflict_and_changes_nothing(backend: Backend) -> None:
    """A key that is reused by mistake must not replay somebody else's answer."""
    await declared(backend)
    async with backend.client() as client:
        first = await client.submit("def one():", idempotency_key="k")
        with pytest.raises(IdempotencyConflict) as conflict:
            await client.submit("def other():", idempotency_key="k")
        with pytest.raises(IdempotencyConflict):
            await client.submit("def one():", idempotency_key="k", sampling={"max_tokens": 7})

        assert conflict.value.job_id == first.id
        assert (await first.status()).state is State.QUEUED


async def test_a_caller_in_a_hurry_publishes_what_a_dead_submitter_left_behind(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is shorter than a publish may take: who waited that long for the other would never get to it."""
    await declared(backend)
    async with backend.client() as dies, AsyncClient(settings=backend.settings(), timeout_s=4) as hasty:
        with monkeypatch.context() as patched:
            patched.setattr(Submitter, "_publish", lambda *_: _die())
            with pytest.raises(BrokerUnavailable):
                await dies.submit("def left():", idempotency_key="k")
        job = await hasty.submit("def left():", idempotency_key="k")

        assert job.attached
        assert (await job.status()).state is State.QUEUED


async def _die() -> None:
    raise BrokerUnavailable("died between reserve and publish")


async def test_fifty_concurrent_submits_of_one_key_make_one_job(backend: Backend) -> None:
    """However they interleave, one record and one result."""
    async with worker_task(backend.settings()), backend.client() as one, backend.client() as other:
        clients = [one, other] * 25
        jobs = await asyncio.gather(*[client.submit("def once():", idempotency_key="k") for client in clients])
        results = await asyncio.gather(*[job.result(timeout=30) for job in jobs])

    assert len({job.id for job in jobs}) == 1
    assert sum(not job.attached for job in jobs) == 1
    assert {result.text for result in results} == {simulated_completion("def once():", 128)[0]}


async def test_two_thousand_jobs_are_submitted_in_one_call_with_one_outcome_each(backend: Backend) -> None:
    """A bad one among them fails alone."""
    await declared(backend)
    group = [Submission(f"def f{n}():", lane=Lane.BULK) for n in range(2_000)]
    group[7] = Submission("", lane=Lane.BULK)
    group[8] = Submission("def f():", model="nobody-serves-this")
    async with backend.client() as client:
        outcomes = await client.submit_many(group)

    assert isinstance(outcomes[7], InvalidJob)
    assert outcomes[7].field == "prompt"
    assert isinstance(outcomes[8], UnknownModel)
    assert sum(not isinstance(one, FleetError) for one in outcomes) == 1_998


async def test_invalid_jobs_name_the_field(embedded: Backend) -> None:
    """The caller must see what to mend."""
    await declared(embedded)
    async with embedded.client() as client:
        with pytest.raises(InvalidJob) as wrong:
            await client.submit("def f():", sampling={"temperature": 9})
        assert wrong.value.field == "sampling.temperature"
        with pytest.raises(InvalidJob) as wrong:
            await client.submit("def f():", lane="express")
        assert wrong.value.field == "lane"
        with pytest.raises(JobTooLarge):
            await client.submit("x" * 17_000_000)


async def test_a_result_that_is_not_there_in_time_says_so_and_the_job_goes_on(embedded: Backend) -> None:
    """A timeout of the caller is not the end of the job."""
    await declared(embedded)
    async with embedded.client() as client:
        job = await client.submit("def later():")
        with pytest.raises(ResultTimeout):
            await job.result(timeout=0.05)
        async with worker_task(embedded.settings()):
            assert (await job.result(timeout=20)).state is State.SUCCEEDED
        with pytest.raises(JobNotFound):
            await client.status(new_job_id())


async def test_a_full_queue_tells_the_submitter_and_takes_the_job_when_there_is_room(backend: Backend) -> None:
    """Back-pressure reaches the caller; the same key succeeds later."""
    small = {"broker": {"url": backend.broker_url, "queue_max_length": 3}}
    settings = backend.settings(**small)
    async with worker_task(settings):
        pass
    async with AsyncClient(settings=settings, timeout_s=10) as client:
        outcomes = [await _outcome(client, n) for n in range(40)]
        refused = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, QueueFull)]
        assert refused, "reject-publish is soft, but not that soft"

        async with worker_task(settings):
            await asyncio.gather(*[o.result(timeout=30) for o in outcomes if not isinstance(o, FleetError)])
            late = await client.submit(f"def f{refused[0]}():", idempotency_key=f"k{refused[0]}")
            assert (await late.result(timeout=20)).state is State.SUCCEEDED


async def _outcome(client: AsyncClient, n: int) -> AsyncJob | QueueFull:
    try:
        return await client.submit(f"def f{n}():", idempotency_key=f"k{n}")
    except QueueFull as full:
        return full


@pytest.mark.services
async def test_a_broker_that_is_away_is_named_within_the_deadline(
    rabbitmq_url: str, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    """Not a hang, not a bare socket error; and the same key works when the broker is back."""
    parts = urlsplit(rabbitmq_url)
    async with TcpProxy(str(parts.hostname), parts.port or 5672) as proxy:
        through = rabbitmq_url.replace(f"{parts.hostname}:{parts.port}", f"127.0.0.1:{proxy.port}")
        settings = fleet_settings(tmp_path, through, redis_url, namespace)
        direct = fleet_settings(tmp_path, rabbitmq_url, redis_url, namespace)
        async with worker_task(direct), AsyncClient(settings=settings, timeout_s=2) as client:
            await client.submit("def before():")
            proxy.refuse()
            started_s = asyncio.get_running_loop().time()
            with pytest.raises(BrokerUnavailable) as away:
                await client.submit("def during():", idempotency_key="during")
            took_s = asyncio.get_running_loop().time() - started_s

            proxy.accept()
            job = await _until_accepted(client)
            result = await job.result(timeout=30)

    assert away.value.maybe_accepted
    assert away.value.job_id == job.id
    assert took_s < 10
    assert result.state is State.SUCCEEDED


async def _until_accepted(client: AsyncClient) -> AsyncJob:
    """As the error's text tells a caller: again, with the same key."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await client.submit("def during():", idempotency_key="during")
            except BrokerUnavailable:
                continue


def _with_worker(backend: Backend, use: Callable[[], None]) -> None:
    """Run a blocking `use` while a worker serves in a thread of its own."""

    async def main() -> None:
        async with worker_task(backend.settings()):
            await asyncio.to_thread(use)

    asyncio.run(main())


def test_the_blocking_client_submits_streams_and_reads_back(backend: Backend) -> None:
    """The README's example."""

    def use() -> None:
        with Client(settings=backend.settings()) as client:
            job = client.submit("def f():", stream=True, idempotency_key="k")
            events = list(job.stream())
            assert "".join(event.text for event in events) == simulated_completion("def f():", 128)[0]
            assert events[-1].kind is EventKind.END
            assert job.result() == job.status().result
            assert client.submit("def f():", idempotency_key="k").attached
            assert client.recent(5)[0].id == job.id
            outcomes = client.submit_many([Submission(f"def g{n}():") for n in range(300)])
            jobs = [one for one in outcomes if not isinstance(one, FleetError)]
            assert len(jobs) == 300
            assert jobs[299].result(timeout=30).state is State.SUCCEEDED

    _with_worker(backend, use)


def test_eight_threads_share_one_blocking_client(backend: Backend) -> None:
    """A threaded web server has one client and many requests."""

    def use() -> None:
        texts: dict[str, str] = {}

        def work(name: int) -> None:
            for n in range(12):
                prompt = f"def t{name}_{n}():"
                texts[prompt] = client.submit(prompt, sampling={"max_tokens": 16}).result(timeout=30).text

        with Client(settings=backend.settings()) as client:
            threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert texts == {prompt: simulated_completion(prompt, 16)[0] for prompt in texts}
        assert len(texts) == 96

    _with_worker(backend, use)


@pytest.mark.process
def test_a_forked_child_gets_connections_of_its_own_and_the_parents_still_work(backend: Backend) -> None:
    """Gunicorn and Celery fork after the application was loaded, and after it was used."""
    with worker_process(backend.settings(), backend.folder), Client(settings=backend.settings()) as client:
        assert client.submit("def parent():").result(timeout=20).state is State.SUCCEEDED
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if client.submit("def child():").result(timeout=20).state is State.SUCCEEDED else 2
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, wait_status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(wait_status) == 0, "see the child's traceback"
        assert client.submit("def again():").result(timeout=20).state is State.SUCCEEDED


@pytest.mark.services
async def test_jobs_of_a_purged_queue_are_published_again(
    rabbitmq_url: str, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    """An operator's purge loses messages, not accepted jobs."""
    settings = fleet_settings(tmp_path, rabbitmq_url, redis_url, namespace, store={"queue_check_s": 0.2})
    async with worker_task(settings):
        pass
    async with AsyncClient(settings=settings, timeout_s=10) as client:
        jobs = [await client.submit(f"def f{n}():") for n in range(5)]
        status = await jobs[0].status()
        queue = Topology(namespace).job_queue(status.revision, Lane.STANDARD)
        connection = await aio_pika.connect(rabbitmq_url)
        async with connection, connection.channel() as channel:
            await (await channel.get_queue(queue, ensure=False)).purge()
        broker = await open_broker(settings.broker, Topology(namespace))
        assert await broker.depth([queue]) == [0]
        await broker.close()

        async with worker_task(settings):
            results = await asyncio.gather(*[job.result(timeout=40) for job in jobs])

    assert {result.state for result in results} == {State.SUCCEEDED}

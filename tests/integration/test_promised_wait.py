"""What is promised at submission, against what came true, through the whole way of a job."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
from support.fleet import Backend, gateway_task, told, worker_task

from codeyard.producer import AsyncClient
from codeyard.producer.async_client import AsyncJob
from codeyard.producer.submission import Submission
from codeyard.shared.errors import DeadlineTooSoon
from codeyard.shared.job import Lane
from codeyard.shared.record import State
from codeyard.shared.settings import Settings

SAMPLING = {"max_tokens": 60}


def settings_of(
    backend: Backend, *, slots: int = 4, scale: float = 0.5, shards: int = 1, per_tenant: int = 1
) -> Settings:
    """A worker that takes a few dozen jobs a second; the same for whoever submits."""
    return backend.settings(
        engine={"max_running": slots, "time_scale": scale},
        worker={"shards": shards, "shards_per_tenant": per_tenant},
    )


async def line(client: AsyncClient, count: int, *, tenant: str = "default") -> list[str]:
    """That many jobs at once; their ids."""
    asked = Submission("", lane=Lane.BULK, tenant=tenant, sampling=SAMPLING)
    outcomes = await client.submit_many([replace(asked, prompt=f"def f_{tenant}_{n}():") for n in range(count)])
    return [outcome.id for outcome in outcomes if not isinstance(outcome, Exception)]


async def drains(client: AsyncClient) -> None:
    """Return when a worker has told at which rate a line drains."""
    await told(client, lambda notice: any(model.rate for model in notice.models))


async def known(client: AsyncClient) -> None:
    """Return when the client has an estimate to tell: its board may be half a second old."""
    async with asyncio.timeout(30):
        while (await client.submit("def probe():", lane="bulk", sampling=SAMPLING)).estimated_start_s is None:
            pass


async def refused(client: AsyncClient) -> DeadlineTooSoon:
    """Ask until it is refused: the client's board may be half a second old."""
    async with asyncio.timeout(30):
        while True:
            try:
                await client.submit("def late():", lane="bulk", sampling=SAMPLING, timeout_s=0.5)
            except DeadlineTooSoon as error:
                return error


async def test_the_promise_comes_true(backend: Backend) -> None:
    """Jobs at the end of lines of different lengths start about when it was said, and a longer line is a
    longer wait. How near is measured by loadtest/bench_wait.py."""
    settings = settings_of(backend)
    async with worker_task(settings), AsyncClient(settings=settings) as client:
        first = await client.submit("def warm():", lane="bulk", sampling=SAMPLING)
        await first.result(timeout=20)
        await line(client, 40)
        await drains(client)
        await known(client)
        promised: list[AsyncJob] = []
        for count in (0, 40, 40):
            await line(client, count)
            prompt = f"def last_{count}_{len(promised)}():"
            promised.append(await client.submit(prompt, lane="bulk", sampling=SAMPLING))
        statuses = [await client.wait(job.id, 60) for job in promised]

    estimates = [job.estimated_start_s for job in promised]
    waits = [status.started_at - status.created_at for status in statuses if status.started_at is not None]
    assert None not in estimates
    assert estimates == sorted(estimates, key=lambda value: value or 0.0)
    # a claim is up to look-ahead and a claim's own look ahead of the engine, on a busy machine
    for estimate, wait in zip(estimates, waits, strict=True):
        assert estimate is not None
        assert wait / 4 - 1.0 <= estimate <= wait * 4 + 1.0


async def test_a_job_that_would_start_too_late_is_refused_and_one_that_is_there_is_not(backend: Backend) -> None:
    """At once, with the time to come again; nothing of it is kept."""
    settings = settings_of(backend, slots=1)
    async with worker_task(settings), AsyncClient(settings=settings) as client:
        await (await client.submit("def warm():", lane="bulk", sampling=SAMPLING)).result(timeout=20)
        mine: dict[str, Any] = {"lane": "bulk", "idempotency_key": "there", "sampling": SAMPLING}
        there = await client.submit("def there():", **mine)
        await line(client, 300)
        await drains(client)
        error = await refused(client)
        again = await client.submit("def there():", timeout_s=0.5, **mine)

    assert error.estimated_start_s > 0.5
    assert error.retry_after_s >= 1.0
    assert (again.attached, again.id) == (True, there.id)


async def test_one_tenants_flood_does_not_bury_the_others_at_the_broker(backend: Backend) -> None:
    """Spread over shards, most tenants have a queue that the flood is not in; with one queue nobody has."""
    first_of_others = {}
    for shards, per_tenant in ((1, 1), (8, 2)):
        other = Backend(backend.folder, backend.broker_url, backend.store_url, f"{backend.namespace}-{shards}")
        settings = settings_of(other, slots=8, scale=0.2, shards=shards, per_tenant=per_tenant)
        async with worker_task(settings), AsyncClient(settings=settings) as client:
            flood = await line(client, 300, tenant="greedy")
            others = await line(client, 8, tenant="modest")
            statuses = [await client.wait(job_id, 60) for job_id in [*others, *flood[-50:]]]
        assert {status.state for status in statuses} == {State.SUCCEEDED}
        started = [status.started_at for status in statuses if status.started_at is not None]
        first_of_others[shards] = max(started[:8]) < min(started[8:])

    assert first_of_others == {1: False, 8: True}


async def test_the_gateway_tells_the_promise_and_refuses_with_it(backend: Backend) -> None:
    """429 with Retry-After, as every HTTP client knows to wait for."""
    settings = settings_of(backend, slots=1)
    body = {"model": "starter", "prompt": "def f():", "lane": "bulk", "sampling": SAMPLING}
    async with (
        worker_task(settings),
        AsyncClient(settings=settings) as client,
        gateway_task(settings) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as http,
    ):
        await (await client.submit("def warm():", lane="bulk", sampling=SAMPLING)).result(timeout=20)
        await line(client, 300)
        await drains(client)
        await refused(client)
        accepted = await http.post("/v1/jobs", json=body)
        answer = await http.post("/v1/jobs", json={**body, "timeout_s": 0.5})

    assert accepted.status_code == 202
    assert accepted.json()["estimated_start_s"] >= 0
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    problem = json.loads(answer.text)
    assert problem["type"] == "/docs#deadline-too-soon"
    assert problem["estimated_start_s"] > 0.5

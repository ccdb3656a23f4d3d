"""Limits over several gateways that are processes of their own, and after they were killed."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import MODEL, PATIENCE_S, Running, declared, settings_for

from codeyard.cli.processes import Child
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import Claim, ClaimVerdict, Store

pytestmark = [pytest.mark.services, pytest.mark.process]

Gateways = list[tuple[Child, httpx.AsyncClient]]


@contextlib.asynccontextmanager
async def gateways(settings: Settings, *, number: int, **limits: int) -> AsyncIterator[Gateways]:
    """So many `codeyard gateway` processes on one store and one broker, and a client of each."""
    environment = {
        "CODEYARD_BROKER_URL": settings.broker.url,
        "CODEYARD_STORE_URL": settings.store.url,
        "CODEYARD_NAMESPACE": settings.namespace,
        "CODEYARD_STORE_LEASE_S": str(settings.store.lease_s),
        **{f"CODEYARD_LIMIT_{name.upper()}": str(value) for name, value in limits.items()},
    }
    children = [Child(f"gateway {n}", ("gateway", "--port", "0"), environment, "gateway") for n in range(number)]
    async with contextlib.AsyncExitStack() as stack:
        for child in children:
            stack.push_async_callback(ended, child)
        urls = await asyncio.gather(*(child.start() for child in children))
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False))
            for url in urls
        ]
        yield list(zip(children, clients, strict=True))


async def ended(child: Child) -> None:
    if child.process is not None and child.process.returncode is None:
        await child.kill()


async def submit(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/jobs", json={"model": MODEL, "prompt": "x" * 30, **fields})


async def accepted_of(both: Gateways, number: int) -> int:
    answers = await asyncio.gather(*(submit(both[n % 2][1]) for n in range(number)))
    assert {answer.status_code for answer in answers} <= {202, 429}
    return sum(answer.status_code == 202 for answer in answers)


async def finish(store: Store, job_id: str) -> None:
    """As a worker would, without a word to any gateway."""
    [record] = await store.read([job_id])
    assert record is not None
    claim = Claim(record.job, record.digest, record.publication, "worker-under-test", record.incarnation)
    [claimed] = await store.claim([claim])
    assert claimed.verdict is ClaimVerdict.RUN
    await Running(store, job_id, claimed.fence, record.publication).succeeds()


@pytest.fixture
def settings(redis_url: str, tmp_path: Path, namespace: str) -> Settings:
    return settings_for(f"sqlite:///{tmp_path / 'yard.db'}", redis_url, namespace)


async def test_two_gateways_under_load_never_let_through_more_than_the_bucket_allows(settings: Settings) -> None:
    """120 submissions at once, half to each process; the bucket holds 25 and fills by one in a minute."""
    async with declared(settings), gateways(settings, number=2, requests_per_minute=1, requests_burst=25) as both:
        answers = await asyncio.gather(*(submit(both[n % 2][1]) for n in range(120)))

    assert Counter(answer.status_code for answer in answers) == {202: 25, 429: 95}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(0 < int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert {answer.json()["type"] for answer in refused} == {"/docs#rate-limited"}
    accepted = sorted(int(one.headers["x-ratelimit-remaining-requests"]) for one in answers if one.status_code == 202)
    assert accepted == list(range(25))


async def test_two_gateways_never_let_a_tenant_have_more_live_jobs_than_its_quota(settings: Settings) -> None:
    """Also while those that ended make room."""
    async with declared(settings) as (_, store), gateways(settings, number=2, concurrent_jobs=6) as both:
        first = await asyncio.gather(*(submit(both[n % 2][1]) for n in range(40)))
        live = [answer.json()["id"] for answer in first if answer.status_code == 202]
        for job_id in live[:4]:
            await finish(store, job_id)
        accepted = 0
        async with asyncio.timeout(PATIENCE_S):
            while accepted < 4:  # a look that found nothing is not repeated at once
                accepted += await accepted_of(both, 20)
        more = await accepted_of(both, 20)

    assert len(live) == 6
    assert {answer.json()["type"] for answer in first if answer.status_code == 429} == {"/docs#quota-exceeded"}
    assert (accepted, more) == (4, 0)


async def test_a_killed_gateway_leaves_no_quota_stuck(settings: Settings) -> None:
    """It cannot give anything back; its jobs end, and another gateway finds that out."""
    async with declared(settings) as (_, store), gateways(settings, number=2, concurrent_jobs=2) as both:
        (doomed, one), (_, other) = both
        ids = [(await submit(one)).json()["id"] for _ in range(2)]
        await doomed.kill()
        refused = await submit(other)
        for job_id in ids:
            await finish(store, job_id)

        async with asyncio.timeout(PATIENCE_S):
            while (again := await submit(other)).status_code != 202:
                assert again.json()["type"] == "/docs#quota-exceeded"

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) == 2


async def test_attaching_with_the_same_key_is_never_refused_for_the_job_it_attaches_to(settings: Settings) -> None:
    """A retry through another gateway must reach its job while the quota is full of it."""
    async with declared(settings), gateways(settings, number=2, concurrent_jobs=1, enqueued_tokens=200) as both:
        headers = {"Idempotency-Key": "release-1"}
        body = {"model": MODEL, "prompt": "x" * 30}
        first, again = [await http.post("/v1/jobs", json=body, headers=headers) for _, http in both]
        third = await submit(both[0][1])

    assert (first.status_code, again.status_code, third.status_code) == (202, 202, 429)
    assert (again.json()["attached"], again.json()["id"]) == (True, first.json()["id"])

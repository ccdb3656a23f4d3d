"""Long prompts from a client to an engine and back, on both back ends."""

from typing import Any

import httpx
import pytest
from support.fleet import Backend, gateway_task, worker_task

from codeyard.producer.submission import Submission
from codeyard.shared.blobs.port import digest_of
from codeyard.shared.chat import Chat, Message
from codeyard.shared.claims import HOLDER
from codeyard.shared.errors import InvalidJob, StorageQuotaExceeded
from codeyard.shared.job import Claim, Sampling, canonical_prompt, estimate_tokens
from codeyard.shared.record import State

LONG = tuple(range(2_000_000_000, 2_000_140_000))  # 1.5 MB as JSON: two chunks
ROOMY: dict[str, Any] = {"max_model_len": 1_000_000}  # tokens
ONE_TOKEN = Sampling(max_tokens=1)


async def test_a_prompt_larger_than_a_message_may_be_is_answered(backend: Backend) -> None:
    """The engine sees all of it; message and record hold a claim."""
    async with worker_task(backend.settings(engine=ROOMY)), backend.client() as client:
        job = await client.submit(LONG, idempotency_key="k", sampling=ONE_TOKEN)
        again = await client.submit(LONG, idempotency_key="k", sampling=ONE_TOKEN)
        result = await job.result()
        [record] = await client.store.read([job.id])

    assert result.state is State.SUCCEEDED, result.error
    assert result.usage.prompt_tokens == estimate_tokens(LONG)
    assert (again.id, again.attached) == (job.id, True)
    assert record is not None
    assert isinstance(record.job.prompt, Claim)
    assert len(record.job.prompt.chunks) == 2


async def test_equal_long_prompts_are_stored_once(backend: Backend) -> None:
    """Also as conversations, which are claimed in the same way."""
    chat = Chat(messages=(Message(role="user", content="# a repository\n" * 10_000),))
    async with worker_task(backend.settings(engine=ROOMY)), backend.client() as client:
        jobs = [await client.submit(chat, sampling=ONE_TOKEN) for _ in range(3)]
        results = [await job.result() for job in jobs]
        used = await (await client.blobs()).used_bytes("default")

    assert [result.state for result in results] == [State.SUCCEEDED] * 3
    assert results[0].usage.prompt_tokens == estimate_tokens(chat)
    assert used == len(canonical_prompt(chat))


async def test_a_job_whose_prompt_is_gone_fails_and_says_so(backend: Backend) -> None:
    """A lost store must not leave jobs that are tried for ever."""
    settings = backend.settings()
    async with worker_task(settings):
        pass  # declares the queues
    async with backend.client() as client:
        job = await client.submit("x" * 70_000)
        [record] = await client.store.read([job.id])
        assert record is not None
        assert isinstance(record.job.prompt, Claim)
        await (await client.blobs()).release("default", HOLDER, record.job.prompt.chunks)
        async with worker_task(settings):
            result = await job.result()

    assert result.state is State.FAILED
    assert result.error is not None
    assert result.error.code == "prompt_missing"


async def test_a_tenant_without_room_gets_no_job(embedded: Backend) -> None:
    """And its neighbours in the group do."""
    settings = embedded.settings(store={"blob_quota_bytes": 100_000})
    async with worker_task(settings):
        client = embedded.client()
        client.settings = settings
        async with client:
            large, small = await client.submit_many([Submission("x" * 200_000), Submission("def f(")])

    assert isinstance(large, StorageQuotaExceeded)
    assert not isinstance(small, Exception)


async def test_the_gateway_takes_long_prompts_and_shares_equal_jobs(embedded: Backend) -> None:
    """Over plain HTTP, where a claim itself is no prompt."""
    settings = embedded.settings(engine=ROOMY)
    body: dict[str, Any] = {"model": "starter", "prompt": LONG, "sampling": {"max_tokens": 1}, "share": True}
    claim = {"digest": digest_of(b"x"), "kind": "text", "size_bytes": 1, "tokens": 1, "chunks": [digest_of(b"x")]}
    async with worker_task(settings), gateway_task(settings) as url, httpx.AsyncClient(base_url=url) as http:
        first = await http.post("/v1/jobs", json=body, headers={"Prefer": "wait=30"})
        second = await http.post("/v1/jobs", json=body)
        drawn = await http.post("/v1/jobs", json={**body, "sampling": {"temperature": 0.5}})
        claimed = await http.post("/v1/jobs", json={"model": "starter", "prompt": claim})

    assert first.json()["state"] == "succeeded", first.text
    assert (second.status_code, second.json()["id"], second.json()["attached"]) == (200, first.json()["id"], True)
    assert (drawn.status_code, drawn.json()["field"]) == (422, "share")
    assert (claimed.status_code, claimed.json()["field"]) == (422, "prompt")


async def test_equal_jobs_of_a_client_share_one_generation_when_they_may(embedded: Backend) -> None:
    """Each tenant its own, and only those that ask for it."""
    async with worker_task(embedded.settings()), embedded.client() as client:
        first = await client.submit("def f(", sampling={"seed": 3, "temperature": 0.5}, share=True)
        second = await client.submit("def f(", sampling={"seed": 3, "temperature": 0.5}, share=True)
        alone = await client.submit("def f(", sampling={"seed": 3, "temperature": 0.5})
        foreign = await client.submit("def f(", sampling={"seed": 3, "temperature": 0.5}, share=True, tenant="acme")
        with pytest.raises(InvalidJob, match="share"):
            await client.submit("def f(", sampling={"temperature": 0.5}, share=True)
        await first.result()

    assert (second.id, second.attached) == (first.id, True)
    assert len({first.id, alone.id, foreign.id}) == 3

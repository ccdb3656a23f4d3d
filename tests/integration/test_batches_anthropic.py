"""Anthropic's message batches through the official SDK, on both back ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types.messages import MessageBatch
from support.batches import PATIENCE_S
from support.fleet import Backend, gateway_task, worker_task
from support.gateway import MODEL, declared

from codeyard.shared.connect import open_blobs
from codeyard.shared.settings import Settings
from codeyard.shared.topology import Topology

PARAMS: dict[str, Any] = {
    "model": "starter",
    "max_tokens": 4,
    "messages": [{"role": "user", "content": "Add two numbers."}],
}


def asked(n: int, **params: Any) -> Any:
    return {"custom_id": f"item-{n}", "params": {**PARAMS, **params}}


@contextlib.asynccontextmanager
async def fleet(settings: Settings) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with worker_task(settings), gateway_task(settings) as url, anthropic_at(url) as client:
        yield client


def anthropic_at(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)


async def ended(
    client: anthropic.AsyncAnthropic, batch_id: str, *, until: Callable[[MessageBatch], bool] | None = None
) -> MessageBatch:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            batch = await client.messages.batches.retrieve(batch_id)
            if until(batch) if until is not None else batch.processing_status == "ended":
                return batch


async def results_of(client: anthropic.AsyncAnthropic, batch_id: str) -> dict[str, Any]:
    found = [one async for one in await client.messages.batches.results(batch_id)]
    assert len({one.custom_id for one in found}) == len(found)
    return {one.custom_id: one.result for one in found}


async def test_every_request_has_a_result_of_its_own(backend: Backend) -> None:
    """Messages as the endpoint itself would answer them, and errors beside them."""
    long = "# a repository\n" * 40_000
    requests = [
        *(asked(n) for n in range(60)),
        asked(60, messages=[]),
        asked(61, model="nobody"),
        asked(62, stream=True),
        asked(63, messages=[{"role": "user", "content": long}]),
    ]
    async with fleet(backend.settings()) as client:
        batch = await client.messages.batches.create(requests=requests)
        assert (batch.processing_status, batch.request_counts.processing) == ("in_progress", 64)
        done = await ended(client, batch.id)
        results = await results_of(client, batch.id)

    assert done.request_counts.to_dict() == {
        "processing": 0, "succeeded": 60, "errored": 4, "canceled": 0, "expired": 0
    }  # fmt: skip
    assert done.ended_at is not None
    assert list(results) == [f"item-{n}" for n in range(64)]
    message = results["item-7"].message
    assert message.content[0].text
    assert message.usage.service_tier == "batch"
    assert {results[f"item-{n}"].type for n in range(60, 64)} == {"errored"}
    types = [results[f"item-{n}"].error.error.type for n in range(60, 64)]
    assert types == ["invalid_request_error", "not_found_error", "invalid_request_error", "invalid_request_error"]


async def test_results_come_as_they_finish_and_the_rest_can_be_cancelled(backend: Backend) -> None:
    """Behind a request whose model nobody serves now."""
    requests = [asked(0, model=MODEL), *(asked(n) for n in range(1, 11))]
    async with declared(backend.settings()), fleet(backend.settings()) as client:
        batch = await client.messages.batches.create(requests=requests)
        running = await ended(client, batch.id, until=lambda one: one.request_counts.succeeded == 10)
        early = await results_of(client, batch.id)
        cancelled = await client.messages.batches.cancel(batch.id)
        done = await ended(client, batch.id)
        late = await results_of(client, batch.id)

    assert running.request_counts.processing == 1
    assert list(early) == [f"item-{n}" for n in range(1, 11)]
    assert cancelled.processing_status == "canceling"
    assert done.request_counts.canceled == 1
    assert done.cancel_initiated_at is not None
    assert late["item-0"].type == "canceled"
    assert late["item-3"].type == "succeeded"


async def test_a_batch_that_has_ended_can_be_deleted_with_its_results(embedded: Backend) -> None:
    """And gives its room back; one that runs has to be cancelled first."""
    settings = embedded.settings()
    async with declared(settings), fleet(settings) as client:
        batch = await client.messages.batches.create(requests=[asked(0, model=MODEL)])
        with pytest.raises(anthropic.BadRequestError, match="cancel it first"):
            await client.messages.batches.delete(batch.id)
        await client.messages.batches.cancel(batch.id)
        await ended(client, batch.id)
        deleted = await client.messages.batches.delete(batch.id)
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.retrieve(batch.id)
        blobs = await open_blobs(settings.store, Topology(settings.namespace))
        used = await blobs.used_bytes("default")
        await blobs.close()

    assert (deleted.id, used) == (batch.id, 0)


async def test_a_batch_sent_again_under_its_key_is_the_one_that_is_there(embedded: Backend) -> None:
    """The whole body is compared; another one is a conflict."""
    key = {"Idempotency-Key": "k"}
    async with fleet(embedded.settings()) as client:
        made = [
            await client.messages.batches.create(requests=[asked(n) for n in range(3)], extra_headers=key)
            for _ in range(2)
        ]
        with pytest.raises(anthropic.ConflictError):
            await client.messages.batches.create(requests=[asked(7)], extra_headers=key)
        done = await ended(client, made[0].id)
        results = await results_of(client, made[0].id)

    assert made[0].id == made[1].id
    assert done.request_counts.succeeded == 3
    assert len(results) == 3


async def test_batches_are_listed_newest_first_in_pages(embedded: Backend) -> None:
    """The SDK turns them."""
    async with fleet(embedded.settings()) as client:
        made = [await client.messages.batches.create(requests=[asked(n)]) for n in range(5)]
        listed = [batch.id async for batch in client.messages.batches.list(limit=2)]
        for batch in made:
            await ended(client, batch.id)

    assert listed == [batch.id for batch in reversed(made)]


EMPTY = b'{"custom_id": "%d", "params": {}}'


@pytest.mark.parametrize(
    "body, status, says",
    [
        (b'{"requests": []}', 400, "requests: at least one"),
        (b"[]", 400, "requests: an object with"),
        (b'{"requests": [{"custom_id": "a", "params": {}}', 400, "xpecting"),
        (b'{"requests": [{"custom_id": "a b", "params": {}}]}', 400, "requests.0.custom_id"),
        (b'{"requests": [{"custom_id": "a"}]}', 400, "requests.0.params"),
        (b'{"requests": [{"custom_id": "a", "params": {}}, {"custom_id": "a", "params": {}}]}', 400, "requests.1"),
        (
            b'{"requests": [%s]}' % b",".join(b'{"custom_id": "%d", "params": {}}' % n for n in range(4)),
            400,
            "at most 3",
        ),
        (b'{"requests": [{"custom_id": "a", "params": {"x": "%s"}}]}' % (b"x" * 200_000), 413, "at most"),
        (b'{"requests": ["\xff"]}', 400, ""),
        (b'{"requests": [{"custom_id": "a", "params": {"x": "\xff"}}]}', 400, "utf-8"),
        (b'{"requests": [{"custom_id": "a", "params": {"x": "\\ud800"}}]}', 400, "surrogates"),
        (b'{"requests": [{"custom_id": "a", "params": {}}], "more": 1}', 400, "requests: an object with"),
        (b'{"requests": [{"custom_id": "a", "params": {}} 7]}', 400, "xpecting"),
        (b'{"requests": [%s1%s]}' % (b"[" * 100_000, b"]" * 100_000), 400, ""),
        (b'{"requests": [{"custom_id": "a", "params": %s1%s}]}' % (b"[" * 20_000, b"]" * 20_000), 400, ""),
    ],
)
async def test_a_body_that_is_no_batch_is_refused_in_anthropics_words(
    embedded: Backend, body: bytes, status: int, says: str
) -> None:
    """Whatever it is; nothing of it is kept."""
    limits = {"max_batch_items": 3, "max_body_bytes": 50_000, "max_file_bytes": 1_000_000}
    async with gateway_task(embedded.settings(gateway=limits)) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(
            "/v1/messages/batches", content=body, headers={"Content-Type": "application/json", "x-api-key": "none"}
        )
        listed = await http.get("/v1/messages/batches")

    assert (answer.status_code, answer.json()["type"]) == (status, "error"), answer.text
    assert says in answer.json()["error"]["message"]
    assert listed.json()["data"] == []

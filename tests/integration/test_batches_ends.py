"""How batches wait, change hands, and end otherwise than by finishing."""

import asyncio
import json
import time
from typing import Any

import httpx
from support.batches import OPENAI_LINE, PATIENCE_S, ended, openai_at, openai_line, uploaded
from support.fleet import Backend, gateway_task, worker_task
from support.gateway import MODEL, declared

from codeyard.producer.gateway.batches.reading import new_batch_id
from codeyard.producer.gateway.batches.record import BatchRecord, Phase, name_of
from codeyard.shared.blobs import whole
from codeyard.shared.connect import open_blobs, open_documents
from codeyard.shared.record import State
from codeyard.shared.settings import Settings
from codeyard.shared.topology import Topology

CHAT: Any = "/v1/chat/completions"


def unserved(n: int) -> str:
    """A line whose model has queues and no worker."""
    return json.dumps({**OPENAI_LINE, "custom_id": f"item-{n}", "body": {**OPENAI_LINE["body"], "model": MODEL}})


async def put_batch(settings: Settings, lines: list[str], *, age_s: float = 0.0, keep: bool = True) -> BatchRecord:
    """As a gateway would have made it so long ago."""
    topology = Topology(settings.namespace)
    blobs, documents = await open_blobs(settings.store, topology), await open_documents(settings.store, topology)
    pieces = whole.cut("\n".join(lines).encode())
    batch_id = new_batch_id("openai")
    chunks = await whole.keep(blobs, "default", pieces, holder=batch_id, ttl_s=600)
    if not keep:
        await blobs.release("default", batch_id, chunks)
    batch = BatchRecord(
        id=batch_id,
        api="openai",
        endpoint=CHAT,
        input_file_id="file-of-the-test",
        chunks=tuple(chunks),
        num_items=len(lines),
        created_at=time.time() - age_s,
    )
    await documents.create(name_of("openai", "default", batch_id), batch.encode(), ttl_s=600, open=True)
    await blobs.close()
    await documents.close()
    return batch


async def test_a_batch_waits_for_the_tenants_limits(embedded: Backend) -> None:
    """It would be of no use if every item over them failed."""
    limit = {"concurrent_jobs": 3, "requests_per_minute": 6_000, "requests_burst": 5}
    settings = embedded.settings(limit=limit)
    async with worker_task(settings), gateway_task(settings) as url, openai_at(url) as client:
        file = await uploaded(client, [openai_line(n) for n in range(30)])
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        done = await ended(client, batch.id)
        async with httpx.AsyncClient(base_url=url) as http:
            metrics = (await http.get("/metrics")).text

    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 30, "completed": 30, "failed": 0}
    assert 'codeyard_batch_items_total{outcome="succeeded"} 30.0' in metrics


async def test_a_batch_waits_for_a_full_queue(backend: Backend) -> None:
    """A queue has an end, a batch of fifty thousand does not care."""
    settings = backend.settings(broker={"queue_max_length": 4}, engine={"max_running": 2})
    async with worker_task(settings), gateway_task(settings) as url, openai_at(url) as client:
        file = await uploaded(client, [openai_line(n) for n in range(60)])
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        done = await ended(client, batch.id)

    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 60, "completed": 60, "failed": 0}


async def test_the_next_gateway_cancels_what_the_one_before_submitted(backend: Backend) -> None:
    """It has to find it first: nobody wrote down each job."""
    settings = backend.settings(gateway={"batch_in_flight": 10})
    async with declared(settings) as (_, store):
        async with gateway_task(settings) as url, openai_at(url) as client:
            file = await uploaded(client, [unserved(n) for n in range(40)])
            batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            await ended(client, batch.id, until=lambda one: one.status == "in_progress")
            async with httpx.AsyncClient(base_url=url) as http:
                async with asyncio.timeout(PATIENCE_S):
                    while len(jobs := (await http.get("/v1/jobs?limit=100")).json()["jobs"]) < 10:
                        pass
        async with gateway_task(settings) as url, openai_at(url) as client:
            await client.batches.cancel(batch.id)
            done = await ended(client, batch.id)
            content = await client.files.content(done.error_file_id or "")
        states = await store.states([job["id"] for job in jobs])

    assert (done.status, done.request_counts and done.request_counts.failed) == ("cancelled", 40)
    assert states == [State.CANCELLED] * 10
    errors = [json.loads(line) for line in content.text.splitlines()]
    assert [one["custom_id"] for one in errors] == [f"item-{n}" for n in range(40)]
    assert sum(one["response"] is not None for one in errors) == 10


async def test_a_batch_ends_with_its_window(embedded: Backend) -> None:
    """What was not executed says so; what was stays."""
    settings = embedded.settings(gateway={"batch_in_flight": 3})
    async with declared(settings), worker_task(settings):
        batch = await put_batch(settings, [openai_line(0), *(unserved(n) for n in range(1, 8))], age_s=86_400 - 4)
        async with gateway_task(settings) as url, openai_at(url) as client:
            done = await ended(client, batch.id)
            errors = [json.loads(x) for x in (await client.files.content(done.error_file_id or "")).text.splitlines()]
            results = (await client.files.content(done.output_file_id or "")).text.splitlines()

    assert done.status == "expired"
    assert done.expired_at is not None
    assert [json.loads(line)["custom_id"] for line in results] == ["item-0"]
    assert [one["custom_id"] for one in errors] == [f"item-{n}" for n in range(1, 8)]
    assert {(one["error"] or one["response"]["body"]["error"])["code"] for one in errors} <= {
        "batch_expired",
        "job_expired",
        "deadline_exceeded",
    }


async def test_a_batch_whose_input_is_gone_fails_and_says_so(embedded: Backend) -> None:
    """It is not taken again and again."""
    settings = embedded.settings()
    batch = await put_batch(settings, [openai_line(0)], keep=False)
    async with gateway_task(settings) as url, openai_at(url) as client:
        done = await ended(client, batch.id)

    assert (done.status, done.output_file_id) == (Phase.FAILED.value, None)
    assert done.errors is not None
    assert [error.code for error in done.errors.data or []] == ["input_missing"]

"""Batches while a server is away, and the official SDKs' blocking clients."""

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from support.batches import ENDED, PATIENCE_S, ended, openai_at, openai_line, uploaded
from support.fleet import Backend, gateway_task, worker_task
from support.servers import RedisServer

CHAT: Any = "/v1/chat/completions"


@pytest.mark.services
async def test_a_batch_goes_on_after_its_store_was_killed(
    private_redis: RedisServer, tmp_path: Path, namespace: str
) -> None:
    """Restarted from its file, as appendfsync always left it: every item once."""
    backend = Backend(tmp_path, f"sqlite:///{tmp_path / 'yard.db'}", private_redis.url, namespace)
    settings = backend.settings(gateway={"batch_in_flight": 20})
    async with worker_task(settings), gateway_task(settings) as url, openai_at(url) as client:
        file = await uploaded(client, [openai_line(n) for n in range(300)])
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        await ended(client, batch.id, until=lambda one: one.request_counts is not None and half_done(one))
        await asyncio.to_thread(private_redis.restart)
        patient = client.with_options(max_retries=10)
        done = await ended(patient, batch.id)
        content = await patient.files.content(done.output_file_id or "")

    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 300, "completed": 300, "failed": 0}
    assert [json.loads(line)["custom_id"] for line in content.text.splitlines()] == [f"item-{n}" for n in range(300)]


def half_done(batch: openai.types.Batch) -> bool:
    return batch.request_counts is not None and batch.request_counts.completed >= 100


async def test_the_blocking_sdks_make_batches_too(embedded: Backend) -> None:
    """As in their documentation: no line of it is changed but the base URL."""

    def with_openai(url: str) -> list[str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            content = "\n".join(openai_line(n) for n in range(5)).encode()
            file = client.files.create(file=("requests.jsonl", content), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            while (batch := client.batches.retrieve(batch.id)).status not in ENDED:
                pass
            return [
                json.loads(line)["custom_id"] for line in client.files.content(batch.output_file_id or "").iter_lines()
            ]

    def with_anthropic(url: str) -> list[str]:
        messages: Any = [{"role": "user", "content": "Add two numbers."}]
        params: Any = {"model": "starter", "max_tokens": 4, "messages": messages}
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
            batch = client.messages.batches.create(
                requests=[{"custom_id": f"item-{n}", "params": params} for n in range(5)]
            )
            while (batch := client.messages.batches.retrieve(batch.id)).processing_status != "ended":
                pass
            return [
                one.custom_id for one in client.messages.batches.results(batch.id) if one.result.type == "succeeded"
            ]

    settings = embedded.settings()
    async with worker_task(settings), gateway_task(settings) as url, asyncio.timeout(PATIENCE_S):
        found = [await asyncio.to_thread(one, url) for one in (with_openai, with_anthropic)]

    assert found == [[f"item-{n}" for n in range(5)]] * 2

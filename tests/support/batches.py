"""Batches as the official SDKs make them, and how to wait for one."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import openai
from openai.types import Batch, FileObject

PATIENCE_S = 60.0  # for what must happen; reached only by a failing test
ENDED = {"completed", "failed", "expired", "cancelled"}

OPENAI_LINE: dict[str, Any] = {
    "custom_id": "item",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "starter", "messages": [{"role": "user", "content": "Add two numbers."}], "max_tokens": 4},
}


def openai_line(n: int, *, max_tokens: int = 4) -> str:
    body = {**OPENAI_LINE["body"], "max_tokens": max_tokens}
    return json.dumps({**OPENAI_LINE, "custom_id": f"item-{n}", "body": body})


def openai_at(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


async def uploaded(client: openai.AsyncOpenAI, lines: Sequence[str]) -> FileObject:
    content = "\n".join(lines).encode()
    return await client.files.create(file=("batch.jsonl", content), purpose="batch")


async def ended(
    client: openai.AsyncOpenAI,
    batch_id: str,
    *,
    until: Callable[[Batch], bool] | None = None,
    patience_s: float = PATIENCE_S,
) -> Batch:
    """The batch once it has ended, or is as `until` says. It is polled, as its callers do."""
    async with asyncio.timeout(patience_s):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if until(batch) if until is not None else batch.status in ENDED:
                return batch
            await asyncio.sleep(0.05)

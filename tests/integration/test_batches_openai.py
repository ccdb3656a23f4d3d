"""OpenAI's files and batches through the official SDK, on both back ends."""

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import openai
import pytest
from support.batches import OPENAI_LINE, ended, openai_at, openai_line, uploaded
from support.fleet import Backend, gateway_task, worker_task

from codeyard.shared.settings import Settings


@contextlib.asynccontextmanager
async def fleet(settings: Settings) -> AsyncIterator[openai.AsyncOpenAI]:
    async with worker_task(settings), gateway_task(settings) as url, openai_at(url) as client:
        yield client


async def results_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    content = await client.files.content(file_id)
    return [json.loads(line) for line in content.text.splitlines()]


def custom_ids(results: Sequence[dict[str, Any]]) -> list[str]:
    return [result["custom_id"] for result in results]


async def test_every_request_of_a_batch_is_answered_once_in_its_order(backend: Backend) -> None:
    """Chat completions as the endpoint itself would answer them."""
    async with fleet(backend.settings()) as client:
        file = await uploaded(client, [openai_line(n) for n in range(150)])
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "tests"}
        )
        assert (batch.status, batch.metadata) == ("validating", {"for": "tests"})
        done = await ended(client, batch.id)
        results = await results_of(client, done.output_file_id)
        output = await client.files.retrieve(done.output_file_id or "")
        size = len((await client.files.content(output.id)).content)

    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 150, "completed": 150, "failed": 0}
    assert done.error_file_id is None
    assert custom_ids(results) == [f"item-{n}" for n in range(150)]
    answer = results[7]["response"]
    assert (answer["status_code"], results[7]["error"]) == (200, None)
    assert openai.types.chat.ChatCompletion.model_validate(answer["body"]).choices[0].message.content
    assert answer["body"]["service_tier"] == "flex"
    assert (output.bytes, output.purpose) == (size, "batch_output")


async def test_what_is_no_request_is_in_the_error_file_with_its_line_and_reason(embedded: Backend) -> None:
    """And the rest of the batch is answered."""
    lines = [
        openai_line(0),
        "this is not JSON",
        json.dumps({**OPENAI_LINE, "custom_id": "get", "method": "GET"}),
        json.dumps({**OPENAI_LINE, "custom_id": "url", "url": "/v1/completions"}),
        json.dumps({**OPENAI_LINE, "custom_id": "body", "body": {"model": "starter", "messages": []}}),
        json.dumps({**OPENAI_LINE, "custom_id": "item-0"}),
        json.dumps({**OPENAI_LINE, "custom_id": "stream", "body": {**OPENAI_LINE["body"], "stream": True}}),
        json.dumps({**OPENAI_LINE, "custom_id": "model", "body": {**OPENAI_LINE["body"], "model": "nobody"}}),
        json.dumps({**OPENAI_LINE, "custom_id": ""}),
        json.dumps({**OPENAI_LINE, "custom_id": "half \ud800"}),
        "[" * 100_000,
        "",
        json.dumps({**OPENAI_LINE, "custom_id": "long", "body": {**OPENAI_LINE["body"], "messages": [LONG]}}),
        openai_line(1),
    ]
    async with fleet(embedded.settings()) as client:
        file = await uploaded(client, lines)
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        done = await ended(client, batch.id)
        results, errors = await results_of(client, done.output_file_id), await results_of(client, done.error_file_id)

    assert custom_ids(results) == ["item-0", "item-1"]
    said = [(one["custom_id"], (one["error"] or {}).get("code"), (one["error"] or {}).get("line")) for one in errors]
    assert said == [
        (None, "invalid_json_line", 2),
        ("get", "invalid_method", 3),
        ("url", "invalid_url", 4),
        ("body", "invalid_value", 5),
        ("item-0", "duplicate_custom_id", 6),
        ("stream", "invalid_value", 7),
        ("model", "model_not_found", 8),
        (None, "missing_required_parameter", 9),
        (None, "invalid_json_line", 10),
        (None, "invalid_json_line", 11),
        ("long", None, None),
    ]
    failed = errors[-1]["response"]
    assert (failed["status_code"], failed["body"]["error"]["code"]) == (400, "context_length_exceeded")
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 13, "completed": 2, "failed": 11}


LONG = {"role": "user", "content": "# a repository\n" * 40_000}  # 200,000 tokens, and a claimed prompt


async def test_results_are_read_while_the_batch_runs(backend: Backend) -> None:
    """An item as soon as it has ended: here behind one that never does."""
    settings = backend.settings(worker={"stall_s": 60})
    hanging = json.dumps({**COMPLETION_LINE, "body": {**COMPLETION_LINE["body"], "prompt": "!hang"}})
    lines = [hanging, *(completion_line(n) for n in range(20))]
    async with fleet(settings) as client:
        file = await uploaded(client, lines)
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        running = await ended(client, batch.id, until=lambda one: (one.request_counts or NONE).completed == 20)
        results = await results_of(client, running.output_file_id)
        cancelled = await client.batches.cancel(batch.id)
        done = await ended(client, batch.id)
        errors = await results_of(client, done.error_file_id)

    assert running.status == "in_progress"
    assert custom_ids(results) == [f"item-{n}" for n in range(20)]
    assert cancelled.status == "cancelling"
    assert done.status == "cancelled"
    assert done.cancelling_at is not None
    assert custom_ids(errors) == ["hanging"]
    assert errors[0]["response"]["body"]["error"]["code"] == "job_cancelled"


COMPLETION_LINE: dict[str, Any] = {
    "custom_id": "hanging",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": "starter", "prompt": "def f(", "max_tokens": 4},
}
NONE = openai.types.BatchRequestCounts(total=0, completed=0, failed=0)


def completion_line(n: int) -> str:
    return json.dumps({**COMPLETION_LINE, "custom_id": f"item-{n}"})


async def test_a_cancelled_batch_submits_nothing_more(embedded: Backend) -> None:
    """What is under way is cancelled, what was not is said to be."""
    settings = embedded.settings(worker={"stall_s": 60}, gateway={"batch_in_flight": 5})
    hanging = {**COMPLETION_LINE, "body": {**COMPLETION_LINE["body"], "prompt": "!hang"}}
    lines = [json.dumps({**hanging, "custom_id": f"item-{n}"}) for n in range(30)]
    async with fleet(settings) as client:
        file = await uploaded(client, lines)
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        await ended(client, batch.id, until=lambda one: one.status == "in_progress")
        await client.batches.cancel(batch.id)
        done = await ended(client, batch.id)
        errors = await results_of(client, done.error_file_id)
        results = await results_of(client, done.output_file_id)

    assert done.status == "cancelled"
    assert results == []
    assert custom_ids(errors) == [f"item-{n}" for n in range(30)]
    never = [one for one in errors if one["error"] is not None]
    assert len(never) >= 20
    assert {one["error"]["code"] for one in never} == {"batch_cancelled"}


async def test_a_batch_asked_for_again_under_its_key_is_the_one_that_is_there(backend: Backend) -> None:
    """An answer that was lost must not cost fifty thousand jobs. Another body under the key is a conflict."""
    body = {"endpoint": CHAT, "completion_window": "24h"}
    async with fleet(backend.settings()) as client:
        files = [(await uploaded(client, [openai_line(n)])).id for n in range(2)]

        async def create(file_id: str, key: str) -> httpx.Response:
            headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
            content = json.dumps({**body, "input_file_id": file_id}).encode()
            async with httpx.AsyncClient(base_url=str(client.base_url)) as http:
                return await http.post("batches", content=content, headers=headers)

        first, again, other, conflict = [
            await create(*asked) for asked in ((files[0], "a"), (files[0], "a"), (files[0], "b"), (files[1], "a"))
        ]
        for one in (first, other):
            await ended(client, one.json()["id"])
        listed = [batch.id async for batch in client.batches.list()]

    assert again.json()["id"] == first.json()["id"] != other.json()["id"]
    assert (conflict.status_code, conflict.json()["error"]["param"]) == (409, "Idempotency-Key")
    assert listed == [other.json()["id"], first.json()["id"]]


CHAT = "/v1/chat/completions"
FIELDS: dict[str, list[Any]] = {
    "input_file_id": [None, 7, [], {}],
    "endpoint": [None, 7, [], {}, "/v1/embeddings"],
    "completion_window": [None, [], "1h"],
    "metadata": [7, [], {"a": 1}, {"a": "x" * 600}, {"x" * 65: ""}, {"a": "\ud800"}],
    "output_expires_after": [{"anchor": "created_at", "seconds": 3600}],
}
BATCH: dict[str, Any] = {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"}


async def test_a_body_that_asks_for_no_batch_is_refused_naming_the_field(embedded: Backend) -> None:
    """Whatever it is: it is never our fault."""
    wrong: list[tuple[bytes, str | None]] = [
        (b"", None),
        (b"[]", None),
        (b"[" * 100_000, None),
        *(
            (json.dumps({**BATCH, field: value}).encode(), field)
            for field, values in FIELDS.items()
            for value in values
        ),
    ]
    async with gateway_task(embedded.settings()) as url, httpx.AsyncClient(base_url=url) as http:
        answers = [
            await http.post("/v1/batches", content=body, headers={"Content-Type": "application/json"})
            for body, _ in wrong
        ]

    assert [(one.status_code, one.json()["error"]["param"]) for one in answers] == [(400, field) for _, field in wrong]


async def test_several_choices_are_one_result(embedded: Backend) -> None:
    """As in a call of their own."""
    line = json.dumps({**OPENAI_LINE, "custom_id": "three", "body": {**OPENAI_LINE["body"], "n": 3}})
    async with fleet(embedded.settings()) as client:
        file = await uploaded(client, [line])
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        done = await ended(client, batch.id)
        [result] = await results_of(client, done.output_file_id)

    assert len(result["response"]["body"]["choices"]) == 3


async def test_batches_are_listed_newest_first_and_asked_for_wrongly_in_openais_words(embedded: Backend) -> None:
    """The SDK turns pages, and raises its own errors."""
    async with fleet(embedded.settings()) as client:
        file = await uploaded(client, [openai_line(0)])
        made = [
            await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
            for _ in range(5)
        ]
        listed = [batch.id async for batch in client.batches.list(limit=2)]
        for batch in made:
            await ended(client, batch.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve(made[0].id[:-1] + "x")
        with pytest.raises(openai.NotFoundError):
            await client.batches.create(
                input_file_id="file-none", endpoint="/v1/chat/completions", completion_window="24h"
            )
        with pytest.raises(openai.BadRequestError) as refused:
            await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")

    assert refused.value.param == "endpoint"
    assert listed == [batch.id for batch in reversed(made)]

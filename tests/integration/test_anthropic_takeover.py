"""A stream of Anthropic's whose worker is killed in the middle: it goes on, or says that it cannot."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from support.openai_sdk import Yard, yard_running

pytestmark = pytest.mark.process

MODEL = "starter"
TURNS: list[Any] = [{"role": "user", "content": "Write add(a, b) in Python."}]
TOOL: Any = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}
ANSWERED: list[Any] = [  # the simulated engine answers the result of a tool with text
    *TURNS,
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "rain"}]},
]


@pytest.fixture
def yard(tmp_path: Path, namespace: str) -> Iterator[Yard]:
    """A slow engine: a token in about 50 ms, so that there is a middle."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    with yard_running(tmp_path, url, url, namespace, engine={"time_scale": 10.0}) as running:
        yield running


@pytest.fixture
def client(yard: Yard) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=yard.url, api_key="unused", max_retries=0, timeout=60.0) as one:
        yield one


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def replace_worker(yard: Yard) -> None:
    yard.kill_worker()
    yard.start_worker()


def words(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_plain_stream_goes_on_at_the_very_character(yard: Yard, client: anthropic.Anthropic) -> None:
    """The reader notices nothing but a pause; the stored result is what it read."""
    asked: Any = {"model": MODEL, "max_tokens": 40, "messages": TURNS, "extra_headers": new_key()}
    with client.messages.stream(**asked) as stream:
        pieces = iter(stream.text_stream)
        first = [next(pieces) for _ in range(3)]
        replace_worker(yard)
        streamed = "".join([*first, *pieces])
        final = stream.get_final_message()

    stored = client.messages.create(**asked)

    assert streamed == words(final) == words(stored)
    assert final.usage == stored.usage


def test_a_conversation_that_offers_tools_goes_on_where_its_worker_died(
    yard: Yard, client: anthropic.Anthropic
) -> None:
    """Nearly all that a coding agent asks offers tools; what it was shown stays true."""
    asked: Any = {"model": MODEL, "max_tokens": 40, "messages": ANSWERED, "tools": [TOOL], "extra_headers": new_key()}
    with client.messages.stream(**asked) as stream:
        pieces = iter(stream.text_stream)
        first = [next(pieces) for _ in range(3)]
        replace_worker(yard)
        streamed = "".join([*first, *pieces])
        final = stream.get_final_message()
    stored = client.messages.create(**asked)

    assert streamed == words(final) == words(stored)
    assert final.usage == stored.usage


def test_a_stream_whose_gateway_is_killed_is_told_again_by_another(yard: Yard, client: anthropic.Anthropic) -> None:
    """The reader is told that it ended early, and the same request under its key gives the whole of the same job."""
    asked: Any = {"model": MODEL, "max_tokens": 60, "messages": TURNS, "extra_headers": new_key()}
    with yard.another_gateway() as url:
        other = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=60.0)
        stream = other.messages.stream(**asked).__enter__()
        pieces = iter(stream.text_stream)
        first = [next(pieces) for _ in range(3)]
    with other, stream, pytest.raises((anthropic.APIConnectionError, httpx2.TransportError)):
        list(pieces)

    with client.messages.stream(**asked) as again:
        message = again.get_final_message()

    assert words(message).startswith("".join(first))
    assert message.id == stream.current_message_snapshot.id
    assert message.usage.output_tokens == 60

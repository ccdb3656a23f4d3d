"""A job's events as Anthropic's stream: how it begins, and every way it can end."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from support.asgi import JOB_ID, status

from codeyard.producer.gateway.anthropic.convert import Asked
from codeyard.producer.gateway.anthropic.legacy import CompletionTeller
from codeyard.producer.gateway.anthropic.stream import MessageTeller, told
from codeyard.producer.gateway.merged import Merged, without_taken_back
from codeyard.shared.chat import Chat, Message, ToolCall, ToolCallDelta
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import Sampling, estimate_tokens
from codeyard.shared.record import Event, EventKind, Failure, JobStatus, Result, State, Usage

ASKED = Asked("tiny", Chat(messages=(Message(role="user", content="x"),)), Sampling(max_tokens=50))
REQUEST = f"req_{JOB_ID}"


def tokens(seq: int, text: str, **fields: Any) -> Event:
    return Event(seq=seq, kind=EventKind.TOKENS, text=text, **fields)


def restarted(seq: int) -> Event:
    return Event(seq=seq, kind=EventKind.RESTARTED)


def end(seq: int) -> Event:
    return Event(seq=seq, kind=EventKind.END)


def ended(state: State = State.SUCCEEDED, code: str | None = None, **fields: Any) -> JobStatus:
    error = Failure(code=code, message="because") if code else None
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    return status(state, result=Result(state=state, error=error, finish_reason="stop", usage=usage, **fields))


async def told_of(
    events: Sequence[Event | Exception], final: JobStatus | None = None, *, known_seq: int = 0, old: bool = False
) -> list[dict[str, Any]]:
    """The data of every frame but pings."""

    async def source() -> AsyncGenerator[Event, None]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def read() -> JobStatus:
        return final or ended()

    accepted = status(last_seq=known_seq)
    teller = CompletionTeller(accepted) if old else MessageTeller(ASKED, accepted)
    merged = Merged([without_taken_back(source(), known_seq)])
    frames = [frame async for frame in told(teller, merged, accepted, read)]
    documents = []
    for frame in frames:
        kind, _, data = frame.removeprefix("event: ").removesuffix("\n\n").partition("\ndata: ")
        assert "\n" not in data
        assert json.loads(data)["type"] == kind
        documents.append(json.loads(data))
    return [document for document in documents if document["type"] != "ping"]


def kinds(documents: Sequence[dict[str, Any]]) -> list[str]:
    return [document["type"] for document in documents]


def text_of(documents: Sequence[dict[str, Any]]) -> str:
    deltas = [document["delta"] for document in documents if document["type"] == "content_block_delta"]
    return "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")


async def test_a_text_is_one_block_between_start_and_stop() -> None:
    """The event order of Anthropic's documentation."""
    documents = await told_of([tokens(1, "a"), tokens(2, "b\n"), end(3)])

    assert documents[0]["message"] == {
        "id": f"msg_{JOB_ID}",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": estimate_tokens(ASKED.prompt),  # no more; `message_delta` has it counted
            "output_tokens": 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "service_tier": "standard",
        },
    }
    assert documents[1:] == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "b\n"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None},
            "usage": {
                "input_tokens": 3,
                "output_tokens": 2,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
            },
        },
        {"type": "message_stop"},
    ]


async def test_text_calls_and_text_again_are_blocks_one_after_another() -> None:
    """A block ends before the next one begins; the pieces of a call are JSON that adds up."""
    call = ToolCallDelta(index=0, id="c0", name="weather", arguments='{"ci')
    rest = ToolCallDelta(index=0, arguments='ty":1}')
    other = ToolCallDelta(index=1, id="c1", name="weather")
    calls = (ToolCall(id="c0", name="weather", arguments='{"city":1}'), ToolCall(id="c1", name="weather"))

    documents = await told_of(
        [
            tokens(1, "<call>", content="So: "),
            tokens(2, "...", content="", tool_calls=(call,)),
            tokens(3, "...", content="", tool_calls=(rest, other)),
            tokens(4, ".", content="."),
            end(5),
        ],
        ended(content="So: .", tool_calls=calls),
    )

    assert [
        (document["type"].removeprefix("content_block_"), document["index"])
        for document in documents
        if "index" in document
    ] == [
        *[("start", 0), ("delta", 0), ("stop", 0)],
        *[("start", 1), ("delta", 1), ("delta", 1), ("stop", 1)],
        *[("start", 2), ("stop", 2)],
        *[("start", 3), ("delta", 3), ("stop", 3)],
    ]
    assert documents[4]["content_block"] == {"type": "tool_use", "id": "c0", "name": "weather", "input": {}}
    assert documents[5]["delta"] == {"type": "input_json_delta", "partial_json": '{"ci'}
    assert text_of(documents) == "So: ."
    assert documents[-2]["delta"]["stop_reason"] == "tool_use"


async def test_calls_that_no_event_told_are_told_at_the_end() -> None:
    """A result is what the job did; a stream must not say less."""
    call = ToolCall(id="c0", name="weather", arguments='{"city":1}')

    documents = await told_of([tokens(1, "a"), end(2)], ended(content="a", tool_calls=(call,)))

    assert documents[4]["content_block"]["name"] == "weather"
    assert documents[5]["delta"]["partial_json"] == '{"city":1}'


async def test_an_answer_of_nothing_has_no_blocks() -> None:
    """Start, delta, stop."""
    assert kinds(await told_of([end(1)])) == ["message_start", "message_delta", "message_stop"]


async def test_a_restart_before_any_text_is_nobodys_business() -> None:
    """Nothing was shown, so nothing is wrong."""
    documents = await told_of([restarted(1), tokens(2, "a"), end(3)])

    assert (text_of(documents), kinds(documents)[-1]) == ("a", "message_stop")


@pytest.mark.parametrize("old", [False, True])
async def test_a_restart_after_text_ends_the_stream_with_an_error(old: bool) -> None:
    """What follows would not go with what was shown, and Anthropic has no way to take text back."""
    documents = await told_of([tokens(1, "a"), restarted(2), tokens(3, "b"), end(4)], old=old)

    assert documents[-1]["type"] == "error"
    assert documents[-1]["error"]["type"] == "api_error"
    assert documents[-1]["request_id"] == REQUEST
    assert "message_stop" not in kinds(documents)


@pytest.mark.parametrize("known_seq", [3, 4, 5])
async def test_who_comes_back_after_a_restart_reads_the_new_text_alone(known_seq: int) -> None:
    """Else the same request with its key would end in the same error for ever."""
    events = [tokens(1, "old"), restarted(2), tokens(3, "new"), tokens(4, "er"), end(5)]

    documents = await told_of(events, known_seq=known_seq)

    assert (text_of(documents), kinds(documents)[-1]) == ("newer", "message_stop")


async def test_a_restart_that_comes_while_a_caller_who_came_back_reads_is_an_error_again() -> None:
    """Only what was known when the stream began can be left out."""
    documents = await told_of([tokens(1, "a"), tokens(2, "b"), restarted(3), end(4)], known_seq=2)

    assert (text_of(documents), kinds(documents)[-1]) == ("ab", "error")


@pytest.mark.parametrize(
    "state, code, kind",
    [
        (State.FAILED, "engine_error", "api_error"),
        (State.FAILED, "prompt_too_long", "invalid_request_error"),
        (State.EXPIRED, "deadline_exceeded", "timeout_error"),
        (State.CANCELLED, "cancelled", "invalid_request_error"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
async def test_a_job_that_did_not_succeed_ends_its_stream_with_an_error(
    state: State, code: str, kind: str, old: bool
) -> None:
    """The same as without a stream; the headers are out, so only an event can say it."""
    documents = await told_of([tokens(1, "a"), end(2)], ended(state, code), old=old)

    assert documents[-1] == {
        "type": "error",
        "error": {"type": kind, "message": f"because ({code})"},
        "request_id": REQUEST,
    }


async def test_a_store_that_goes_away_ends_the_stream_with_an_error() -> None:
    """The SDK takes the end of a stream for the end of the message."""
    documents = await told_of([tokens(1, "a"), StoreUnavailable("gone")])

    assert documents[-1]["type"] == "error"
    assert documents[-1]["error"]["type"] == "api_error"


async def test_the_old_form_is_told_in_pieces() -> None:
    """Each has the new text; the last one says why it ended."""
    documents = await told_of([tokens(1, " a"), tokens(2, "b"), end(3)], old=True)

    assert [(one["completion"], one["stop_reason"]) for one in documents] == [
        (" a", None),
        ("b", None),
        ("", "stop_sequence"),
    ]
    assert {one["id"] for one in documents} == {f"compl_{JOB_ID}"}

"""The events of a response: numbered, the same for every reader, and resumed anywhere."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from support.asgi import JOB_ID

from codeyard.producer.gateway.merged import Merged
from codeyard.producer.gateway.openai.response_events import told
from codeyard.producer.gateway.openai.responses import read_response, response_of
from codeyard.shared.chat import TokenLogprob, ToolCall, ToolCallDelta
from codeyard.shared.job import Job
from codeyard.shared.record import Event, EventKind, Failure, Record, Result, State, Usage

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
KINDS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def record(state: State = State.RUNNING, *, result: Result | None = None, last_seq: int = 0, **body: Any) -> Record:
    """Of a job that a response's body led to."""
    asked = read_response({"model": "tiny", "input": "hi", **body}).asked
    [wanted] = asked.jobs
    job = Job.build(
        id=JOB_ID,
        key="key-1",
        model="tiny",
        revision="tiny-1",
        prompt=wanted.prompt,
        sampling=wanted.sampling,
        metadata=dict(asked.metadata),
    )
    return Record(
        id=JOB_ID,
        state=state,
        job=job,
        digest="",
        incarnation="i",
        publication="p",
        created_at=1.0,
        finished_at=2.0,
        deadline_at=9.0,
        expires_at=10.0,
        last_seq=last_seq,
        result=result,
    )


def events(*said: Event | str | None) -> list[Event]:
    """Text; None is where it began again; the last is followed by `end`."""
    made = [
        one
        if isinstance(one, Event)
        else Event(seq=1, kind=EventKind.RESTARTED)
        if one is None
        else Event(seq=1, kind=EventKind.TOKENS, text=one)
        for one in said
    ]
    made.append(Event(seq=1, kind=EventKind.END, state=State.SUCCEEDED))
    return [event.model_copy(update={"seq": seq}) for seq, event in enumerate(made, start=1)]


def done(text: str, **more: Any) -> Result:
    usage = Usage(prompt_tokens=2, completion_tokens=3)
    return Result(**{"state": State.SUCCEEDED, "text": text, "finish_reason": "stop", "usage": usage, **more})


async def read(
    given: Sequence[Event], result: Result, *, after: int | None = None, known: int = 0, **body: Any
) -> list[dict[str, Any]]:
    """What a reader gets that comes when `known` events are there."""

    async def stream() -> AsyncGenerator[Event, None]:
        for event in given:
            yield event

    async def final() -> Record:
        return record(result.state, result=result, last_seq=len(given), **body)

    begun = record(last_seq=known, **body)
    frames = [frame async for frame in told(begun, Merged([stream()]), final, starting_after=after)]
    told_events = []
    for frame in frames:
        first, second, *rest = frame.split("\n")
        said = json.loads(second.removeprefix("data: "))
        assert first == f"event: {said['type']}"
        assert rest == ["", ""]
        told_events.append(said)
    return told_events


def kinds(said: list[dict[str, Any]]) -> list[str]:
    return [one["type"] for one in said]


async def test_text_is_told_in_openais_order_and_counted_from_zero() -> None:
    """The SDK's accumulator wants every one of these."""
    said = await read(events("a ", "b"), done("a b"))

    assert kinds(said) == KINDS
    assert [one["sequence_number"] for one in said] == list(range(len(KINDS)))
    assert said[0]["response"]["status"] == "in_progress"
    assert [one["delta"] for one in said if "delta" in one] == ["a ", "b"]
    assert said[6]["text"] == "a b"
    assert said[-1]["response"] == response_of(record(State.SUCCEEDED, result=done("a b")))


@pytest.mark.parametrize("known", range(4))
async def test_a_reader_that_comes_back_gets_exactly_the_rest(known: int) -> None:
    """Whatever was there when it came, and wherever it was."""
    given, result = events("a ", "b"), done("a b")
    whole = await read(given, result, background=True)
    assert kinds(whole)[:3] == ["response.created", "response.queued", "response.in_progress"]

    for after in range(len(whole)):
        rest = await read(given, result, after=after, known=known, background=True)
        assert rest == whole[after + 1 :]
    assert await read(given, result, known=known, background=True) == whole


async def test_calls_are_items_of_their_own() -> None:
    """Arguments come in pieces, each under its item."""
    pieces = [
        Event(seq=1, kind=EventKind.TOKENS, text="I look. ", content="I look. "),
        Event(
            seq=2,
            kind=EventKind.TOKENS,
            text="<call>",
            content="",
            tool_calls=(ToolCallDelta(index=0, id="call_1", name="weather", arguments='{"city":'),),
        ),
        Event(
            seq=3, kind=EventKind.TOKENS, text="x", content="", tool_calls=(ToolCallDelta(index=0, arguments='"X"}'),)
        ),
    ]
    call = ToolCall(id="call_1", name="weather", arguments='{"city":"X"}')
    result = done("I look. <call>x", content="I look. ", tool_calls=(call,))
    said = await read(events(*pieces), result, tools=[WEATHER])

    arguments = [one for one in said if one["type"].startswith("response.function_call_arguments")]
    assert [one.get("delta", one.get("arguments")) for one in arguments] == ['{"city":', '"X"}', '{"city":"X"}']
    assert {one["output_index"] for one in arguments} == {1}
    output = said[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call"]
    assert output == response_of(record(State.SUCCEEDED, result=result, tools=[WEATHER]))["output"]
    assert output[1]["id"] == arguments[0]["item_id"]


async def test_an_answer_without_a_word_is_an_empty_message() -> None:
    """The output is never empty, so `output_text` is there."""
    said = await read(events(), done(""))

    assert kinds(said) == [kind for kind in KINDS if not kind.endswith("delta")]
    assert said[-1]["response"]["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize(
    "result, kind, status",
    [
        (done("a", finish_reason="length"), "response.incomplete", "incomplete"),
        (Result(state=State.FAILED, error=Failure(code="poison", message="why")), "response.failed", "failed"),
        (Result(state=State.CANCELLED), "response.failed", "cancelled"),
        (Result(state=State.EXPIRED), "response.failed", "failed"),
    ],
)
async def test_how_it_ended_is_the_last_event(result: Result, kind: str, status: str) -> None:
    """Whoever reads to it knows all."""
    last = (await read(events("a"), result))[-1]

    assert (last["type"], last["response"]["status"]) == (kind, status)
    assert (last["response"]["error"] is None) == (result.state is State.SUCCEEDED)


async def test_log_probabilities_travel_with_their_text() -> None:
    """In each delta, and all of them at the end."""
    token = TokenLogprob(token_id=1, text="a", logprob=-0.5)
    given = events(Event(seq=1, kind=EventKind.TOKENS, text="a", logprobs=(token,)))
    said = await read(given, done("a", logprobs=(token,)), include=["message.output_text.logprobs"])

    shown = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    [delta] = [one for one in said if one["type"] == "response.output_text.delta"]
    assert delta["logprobs"] == [shown]
    assert said[-1]["response"]["output"][0]["content"][0]["logprobs"] == [shown]


# Where generation began again ----------------------------------------------------------------------


async def test_text_that_was_told_cannot_be_taken_back_so_the_stream_ends_in_an_error() -> None:
    """Going on would show the reader a text that nobody generated."""
    said = await read(events("lost ", None, "found"), done("found"))

    assert kinds(said)[-1] == "error"
    assert (said[-1]["code"], said[-1]["sequence_number"]) == ("generation_restarted", len(said) - 1)
    assert "found" not in json.dumps(said)


async def test_what_begins_again_before_anything_was_told_goes_unnoticed() -> None:
    """There is nothing to take back."""
    assert kinds(await read(events(None, "a ", "b"), done("a b"))) == KINDS


@pytest.mark.parametrize("known", [2, 3, 4])
async def test_a_reader_that_comes_later_gets_what_counts_under_numbers_of_its_own(known: int) -> None:
    """From the beginning: the response as it is now. No number stands for two events."""
    given, result = events("lost ", None, "found"), done("found")
    first = await read(given, result)
    again = await read(given, result, known=known)

    assert [kind for kind in KINDS if kind != "response.output_text.delta"] == [
        kind for kind in kinds(again) if kind != "response.output_text.delta"
    ]
    assert "lost" not in json.dumps(again)
    assert [one["sequence_number"] for one in again] == list(range(len(first), len(first) + len(again)))


async def test_a_reader_that_had_not_come_to_the_error_gets_the_error_and_then_the_rest() -> None:
    """It holds text that does not count, and must be told so once."""
    given, result = events("lost ", None, "found"), done("found")
    error = (await read(given, result))[-1]
    known = len(given)

    for after in range(error["sequence_number"]):
        assert await read(given, result, after=after, known=known) == [error]
    rest = await read(given, result, after=error["sequence_number"], known=known)
    assert rest == await read(given, result, known=known)

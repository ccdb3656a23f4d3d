"""What a job has said: the events a reader sees, joined, are the result, wherever they were cut."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.store_calls import make_job

from codeyard.shared.broker.port import Delivery
from codeyard.shared.chat import Chat, Message, NamedTool, TokenLogprob, Tool, ToolCall, ToolCallDelta
from codeyard.shared.envelope import Envelope
from codeyard.shared.job import OutputFormat, Sampling
from codeyard.shared.record import Event, EventKind
from codeyard.worker.engines.port import Delta
from codeyard.worker.held import HeldJob, Said, TokenLog

texts = st.text(alphabet="ab\n", max_size=3)


@st.composite
def spoken(draw: st.DrawFn) -> list[Delta]:
    """Deltas as an engine gives them: calls in order, the first piece of each named."""
    deltas, index = [], -1
    for _ in range(draw(st.integers(0, 12))):
        calls = []
        for _ in range(draw(st.integers(0, 2))):
            if index < 0 or draw(st.booleans()):
                index += 1
                calls.append(ToolCallDelta(index=index, id=f"call_{index}", name="f", arguments=draw(texts)))
            else:
                calls.append(ToolCallDelta(index=index, arguments=draw(texts)))
        text, ids = draw(texts), tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
        logprobs = tuple(TokenLogprob(token_id=token, text="x", logprob=-1.0) for token in ids)
        deltas.append(Delta(text, ids, content=draw(texts), tool_calls=tuple(calls), logprobs=logprobs))
    return deltas


@given(spoken(), st.sets(st.integers(0, 12)))
def test_events_joined_are_what_was_said_wherever_they_were_cut(deltas: list[Delta], flushes: set[int]) -> None:
    """A reader of the stream and a reader of the result must see the same text, content, calls and odds."""
    log = TokenLog(last_seq=0)
    for number, delta in enumerate(deltas):
        log.add(delta)
        if number in flushes:
            log.flush()
    events = log.flush()

    seen = Said()
    for event in events:
        seen.add(Event.decode(event.encode()))

    assert (seen.text, seen.token_ids) == ("".join(d.text for d in deltas), [i for d in deltas for i in d.token_ids])
    assert (seen.content or "") == "".join(delta.content or "" for delta in deltas)
    assert [one.token_id for one in seen.logprobs] == seen.token_ids
    assert seen.tool_calls == log.said.tool_calls
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    for call in seen.tool_calls:
        mine = [piece for piece in pieces if f"call_{piece.index}" == call.id]
        assert call.arguments == "".join(piece.arguments for piece in mine)


def test_pieces_of_one_call_are_written_as_one() -> None:
    """An event a few times a second holds a few tokens' worth of arguments, each of a few characters."""
    log = TokenLog(last_seq=4)
    log.add(Delta("a", (1,), content="", tool_calls=(ToolCallDelta(index=0, id="call_a", name="f", arguments="{"),)))
    log.add(Delta("b", (2,), content="", tool_calls=(ToolCallDelta(index=0, arguments="}"),)))

    [event] = log.flush()

    assert (event.seq, event.kind, event.content) == (5, EventKind.TOKENS, "")
    assert event.tool_calls == (ToolCallDelta(index=0, id="call_a", name="f", arguments="{}"),)
    assert log.said.tool_calls == (ToolCall(id="call_a", name="f", arguments="{}"),)


def test_content_that_was_held_back_is_written_without_new_tokens() -> None:
    """What looked like the beginning of a call and was none comes with the end."""
    log = TokenLog(last_seq=0)
    log.add(Delta("<tool", (1,), content=""))
    log.flush()
    log.add(Delta("", (), "stop", content="<tool"))

    assert [event.content for event in log.flush()] == ["", "<tool"]


def test_without_tools_the_content_is_the_text() -> None:
    """And takes no place in the events."""
    log = TokenLog(last_seq=0)
    log.add(Delta("x = 1", (1, 2)))

    [event] = log.flush()

    assert event.content is None
    assert '"content"' not in event.encode()


def test_a_restart_drops_everything_that_was_said() -> None:
    """The reader is told to forget it, so the result must not hold it."""
    log = TokenLog(last_seq=0)
    log.add(Delta("a", (1,), content="a", tool_calls=(ToolCallDelta(index=0, id="call_a", name="f"),)))
    log.flush()
    log.restart()

    assert [event.kind for event in log.flush()] == [EventKind.TOKENS, EventKind.RESTARTED]
    assert (log.text, log.said.content, log.said.tool_calls) == ("", None, ())


TOOLS = (Tool(name="look"),)
HELLO = (Message(role="user", content="hello"),)


@pytest.mark.parametrize(
    "changes,continuable",
    [
        ({}, True),
        ({"sampling": Sampling(temperature=1.0)}, True),
        ({"sampling": Sampling(stop=("\n\n",))}, True),
        ({"sampling": Sampling(seed=0)}, False),
        ({"sampling": Sampling(logprobs=0)}, False),
        ({"sampling": Sampling(output_format=OutputFormat(type="regex", regex="a+"))}, False),
        ({"prompt": Chat(messages=HELLO)}, True),
        ({"prompt": Chat(messages=HELLO, tools=TOOLS)}, None),
        ({"prompt": Chat(messages=HELLO, tools=TOOLS, tool_choice=NamedTool(name="look"))}, False),
        ({"prompt": Chat(messages=HELLO, tools=TOOLS, tool_choice="none")}, True),
    ],
)
def test_what_cannot_go_on_exactly_starts_over(changes: dict[str, Any], continuable: bool | None) -> None:
    """A grammar and a generator have a state that token ids do not hold; readers of calls, some of them (None)."""
    for resumes_calls in (True, False):
        expected = resumes_calls if continuable is None else continuable
        assert held(**changes).continuable(resumes_calls=resumes_calls) is expected


def held(**changes: Any) -> HeldJob:
    job = make_job().model_copy(update=changes)
    envelope = Envelope(job, job.digest(), "p1", "i", deadline_at=None, published_at=None, traceparent=None)
    delivery = Delivery("q", job.id, b"", {}, redelivered=False, timestamp=None, tag=None)
    times: dict[str, Any] = {"claimed_s": 0.0, "submitted_s": 0.0, "deadline_s": 1.0}
    return HeldJob(envelope, delivery, "i.1", attempt=1, suspect=False, log=TokenLog(last_seq=0), **times)


def test_a_claimed_conversation_with_tools_starts_over_as_well() -> None:
    """What a claim stands for is known once it is redeemed, which is before anything is taken over."""
    one = held()
    one.redeemed = Chat(messages=HELLO, tools=TOOLS)
    assert not one.continuable(resumes_calls=False)

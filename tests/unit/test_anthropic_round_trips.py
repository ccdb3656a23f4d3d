"""From Anthropic's form to ours and back: nothing that the one can say is lost in the other."""

import json
from collections.abc import Sequence
from typing import Any

from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support.asgi import status

from codeyard.producer.gateway.anthropic.convert import Asked, message_of, read_message
from codeyard.producer.gateway.anthropic.legacy import chat_from, text_of
from codeyard.producer.gateway.anthropic.stream import MessageTeller
from codeyard.shared.chat import Chat, Message, NamedTool, ToolCall, ToolCallDelta
from codeyard.shared.job import Lane, Sampling
from codeyard.shared.record import Event, EventKind, Result, State, Usage

TEXT = st.text(min_size=1, max_size=20)
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
CHOICES = ("auto", "any", "none", "tool")


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@st.composite
def user_turns(draw: st.DrawFn) -> dict[str, Any]:
    """Results of tools first, then what the user says: at least one of both."""
    results = draw(st.lists(st.tuples(NAMES, st.text(max_size=9), st.booleans()), max_size=2))
    said = draw(TEXT if not results else st.none() | TEXT)
    if not results:
        return {"role": "user", "content": said}
    blocks: list[dict[str, Any]] = [
        {"type": "tool_result", "tool_use_id": name, "content": content, "is_error": is_error}
        for name, content, is_error in results
        if is_error or not content.startswith("Error: ")
    ]
    return {"role": "user", "content": [*blocks, *([text(said or "")] if said or not blocks else [])]}


@st.composite
def assistant_turns(draw: st.DrawFn) -> dict[str, Any]:
    calls = draw(st.lists(st.tuples(NAMES, NAMES, OBJECTS), max_size=2))
    said = draw(TEXT if not calls else st.none() | TEXT)
    if not calls:
        return {"role": "assistant", "content": said}
    blocks = [{"type": "tool_use", "id": id_, "name": name, "input": given} for id_, name, given in calls]
    return {"role": "assistant", "content": [*([text(said)] if said else []), *blocks]}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Requests in the one form that `body_of` writes."""
    turns = draw(st.lists(st.tuples(user_turns(), assistant_turns()), min_size=1, max_size=3))
    flat = [turn for pair in turns for turn in pair]
    body: dict[str, Any] = {
        "model": draw(NAMES),
        "max_tokens": draw(st.integers(1, 131_072)),
        "messages": flat if draw(st.booleans()) else flat[:-1],
        "stream": draw(st.booleans()),
        "service_tier": draw(st.sampled_from(["auto", "standard_only"])),
    }
    optional = {
        "system": TEXT,
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(1, 1000),
        "stop_sequences": st.lists(TEXT, min_size=1, max_size=16),
        "metadata": st.builds(lambda user_id: {"user_id": user_id}, TEXT),
        "output_config": st.builds(lambda schema: {"format": {"type": "json_schema", "schema": schema}}, OBJECTS),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            body[name] = draw(values)
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    if names:
        body["tools"] = [
            {
                "name": name,
                "input_schema": draw(OBJECTS),
                **draw(st.fixed_dictionaries({}, optional={"description": TEXT})),
            }
            for name in names
        ]
        kind = draw(st.sampled_from(CHOICES))
        named = {"name": draw(st.sampled_from(names))} if kind == "tool" else {}
        one = {"disable_parallel_tool_use": True} if kind != "none" and draw(st.booleans()) else {}
        body["tool_choice"] = {"type": kind, **named, **one}
    return body


def body_of(asked: Asked) -> dict[str, Any]:
    """The request that a job came from, in the plainest form: the inverse of `read_message`."""
    chat, sampling = asked.prompt, asked.sampling
    system, *rest = chat.messages if chat.messages[0].role == "system" else (None, *chat.messages)
    tier = {Lane.INTERACTIVE: "auto", Lane.STANDARD: "standard_only"}[asked.lane]
    schema = sampling.output_format.json_schema if sampling.output_format else None
    optional = {
        "system": system.content if system else None,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_sequences": list(sampling.stop) or None,
        "metadata": asked.metadata or None,
        "output_config": {"format": {"type": "json_schema", "schema": schema}} if schema is not None else None,
        "tools": [_tool_of(tool.name, tool.description, tool.parameters) for tool in chat.tools] or None,
        "tool_choice": _choice_of(chat) if chat.tools else None,
    }
    return {
        "model": asked.model,
        "max_tokens": sampling.max_tokens,
        "messages": _turns_of([message for message in rest if message is not None]),
        "stream": asked.stream,
        "service_tier": tier,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _tool_of(name: str, description: str | None, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "input_schema": schema, **({"description": description} if description is not None else {})}


def _choice_of(chat: Chat) -> dict[str, Any]:
    one = {} if chat.parallel_tool_calls else {"disable_parallel_tool_use": True}
    if isinstance(chat.tool_choice, NamedTool):
        return {"type": "tool", "name": chat.tool_choice.name, **one}
    return {"type": {"auto": "auto", "required": "any", "none": "none"}[chat.tool_choice], **one}


def _turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "tool":
            is_error = (message.content or "").startswith("Error: ")
            content = (message.content or "").removeprefix("Error: ") if is_error else message.content
            result = {"type": "tool_result", "tool_use_id": message.tool_call_id, "content": content}
            if not (turns and turns[-1]["role"] == "user" and isinstance(turns[-1]["content"], list)):
                turns.append({"role": "user", "content": []})
            turns[-1]["content"].append({**result, "is_error": is_error})
        elif message.role == "user" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"].append(text(message.content or ""))
        elif message.tool_calls:
            blocks = [text(message.content)] if message.content is not None else []
            calls = [
                {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
                for call in message.tool_calls
            ]
            turns.append({"role": "assistant", "content": [*blocks, *calls]})
        else:
            turns.append({"role": message.role, "content": message.content})
    return turns


@given(bodies())
def test_a_request_survives_the_way_there_and_back(body: dict[str, Any]) -> None:
    """Everything that a request can say is in the job, in the same order."""
    assert body_of(read_message(json.dumps(body).encode())) == _plain(body)


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    """A user's turn of one text block says what a turn of that text says."""
    turns = []
    for turn in body["messages"]:
        content = turn["content"]
        if isinstance(content, list) and [block["type"] for block in content] == ["text"]:
            content = content[0]["text"]
        turns.append({**turn, "content": content})
    return {**body, "messages": turns}


@given(bodies(), st.data())
def test_how_a_text_is_cut_into_blocks_and_marked_for_caches_changes_nothing(
    body: dict[str, Any], data: st.DataObject
) -> None:
    """Clients send one text in many ways; the job, and so its idempotency, must be the same."""
    marked = json.loads(json.dumps(body))
    mark = {"cache_control": {"type": "ephemeral"}}
    if "system" in marked:
        marked["system"] = [{**text(piece), **mark} for piece in _cut(marked["system"], data)]
    for turn in marked["messages"]:
        if isinstance(turn["content"], str) and turn["role"] == "user":
            turn["content"] = [{**text(piece), **mark} for piece in _cut(turn["content"], data)]
        elif isinstance(turn["content"], list):
            turn["content"] = [{**block, **mark} for block in turn["content"]]
            for block in turn["content"]:
                if block["type"] == "tool_result":
                    block["content"] = [{**text(piece), **mark} for piece in _cut(block["content"], data)]

    assert read_message(marked) == read_message(body)


def _cut(words: str, data: st.DataObject) -> list[str]:
    """At some of its line breaks: that is how blocks are joined."""
    lines = words.split("\n")
    kept = data.draw(st.lists(st.booleans(), min_size=len(lines) - 1, max_size=len(lines) - 1))
    pieces = [lines[0]]
    for apart, line in zip(kept, lines[1:], strict=True):
        if apart:
            pieces.append(line)
        else:
            pieces[-1] += "\n" + line
    return pieces


@st.composite
def results(draw: st.DrawFn) -> Result:
    calls = draw(
        st.lists(st.builds(lambda i, n, o: ToolCall(id=i, name=n, arguments=json.dumps(o)), NAMES, NAMES, OBJECTS))
    )
    return Result(
        state=State.SUCCEEDED,
        text="as it was generated",
        content=draw(st.text(max_size=20)),
        tool_calls=tuple(calls),
        finish_reason="tool_calls" if calls else draw(st.sampled_from(["stop", "length"])),
        usage=Usage(prompt_tokens=draw(st.integers(0, 99)), completion_tokens=draw(st.integers(0, 99))),
    )


@given(results())
def test_an_answer_sent_back_as_the_next_turn_is_what_the_model_said(result: Result) -> None:
    """Agents do nothing else, turn after turn: what changes on the way changes what the model sees of itself."""
    asked = Asked("tiny", Chat(messages=(Message(role="user", content="x"),)), Sampling())
    answer = message_of(asked, status(State.SUCCEEDED, result=result))
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer["content"]}]

    again = read_message({"model": "tiny", "max_tokens": 1, "messages": turns}).prompt.messages[-1]

    assert (again.content or "") == result.content
    assert [(call.id, call.name) for call in again.tool_calls] == [(call.id, call.name) for call in result.tool_calls]
    for before, after in zip(result.tool_calls, again.tool_calls, strict=True):
        assert json.loads(after.arguments) == json.loads(before.arguments)


@given(results(), st.data())
def test_a_stream_adds_up_to_the_message_however_it_was_cut(result: Result, data: st.DataObject) -> None:
    """By the official SDK's own adding up."""
    asked = Asked("tiny", Chat(messages=(Message(role="user", content="x"),)), Sampling(max_tokens=50))
    accepted = status(State.SUCCEEDED, result=result)
    teller = MessageTeller(asked, accepted)
    frames = [*teller.begin()]
    for event in _events(result, data):
        frames += teller.tokens(event)
    frames += teller.end(accepted)

    snapshot: Any = None
    bufs: dict[int, bytes] = {}
    kind: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
    opened: list[int] = []
    for frame in frames:
        name, _, rest = frame.removeprefix("event: ").partition("\ndata: ")
        if name == "ping":
            continue
        sent = kind.validate_json(rest.removesuffix("\n\n"))
        assert sent.type == name
        if sent.type == "content_block_start":
            assert opened == [], "one block at a time"
            opened.append(sent.index)
        if sent.type == "content_block_stop":
            opened.remove(sent.index)
        snapshot = accumulate_event(event=sent, current_snapshot=snapshot, json_bufs=bufs)

    assert opened == []
    whole = message_of(asked, accepted)
    assert [block.to_dict() for block in snapshot.content] == whole["content"]
    assert {name: getattr(snapshot, name) for name in ("id", "role", "model", "stop_reason", "stop_sequence")} == {
        name: whole[name] for name in ("id", "role", "model", "stop_reason", "stop_sequence")
    }
    assert snapshot.usage.to_dict() == whole["usage"]


def _events(result: Result, data: st.DataObject) -> list[Event]:
    """What a worker might have told of this result: text first, each call in pieces."""
    pieces: list[dict[str, Any]] = [{"content": piece} for piece in _anywhere(result.content or "", data)]
    for index, call in enumerate(result.tool_calls):
        first, *rest = _anywhere(call.arguments, data)
        deltas = [ToolCallDelta(index=index, id=call.id, name=call.name, arguments=first)]
        deltas += [ToolCallDelta(index=index, arguments=piece) for piece in rest]
        pieces += ({"content": "", "tool_calls": (delta,)} for delta in deltas)
    return [Event(seq=n, kind=EventKind.TOKENS, text="raw", **piece) for n, piece in enumerate(pieces, start=1)]


def _anywhere(words: str, data: st.DataObject) -> list[str]:
    at = sorted(data.draw(st.lists(st.integers(0, len(words)), max_size=3)))
    return [words[start:end] for start, end in zip([0, *at], [*at, len(words)], strict=True)]


SAID = TEXT.filter(lambda words: "Human:" not in words and "Assistant:" not in words and not words.endswith("\n"))


@given(
    st.none() | SAID.filter(lambda words: words == words.strip()),
    st.lists(st.tuples(SAID, SAID), min_size=1),
    st.booleans(),
)
def test_the_old_text_form_survives_too(system: str | None, turns: list[tuple[str, str]], begun: bool) -> None:
    """A chat written as text and read again is the chat."""
    said = [message for user, assistant in turns for message in _pair(user, assistant)]
    chat = Chat(
        messages=(*([Message(role="system", content=system)] if system else []), *(said if begun else said[:-1]))
    )

    assert chat_from(text_of(chat)) == chat


def _pair(user: str, assistant: str) -> list[Message]:
    return [Message(role="user", content=user), Message(role="assistant", content=assistant)]

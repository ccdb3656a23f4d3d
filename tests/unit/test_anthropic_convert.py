"""Anthropic's requests as jobs, and jobs as messages."""

import json
from typing import Any

import pytest
from anthropic.types import Message as SdkMessage
from support.asgi import JOB_ID, status

from codeyard.producer.gateway.anthropic.convert import Asked, message_of, read_count, read_message
from codeyard.producer.gateway.anthropic.errors import failed_as
from codeyard.producer.gateway.problems import Refused
from codeyard.shared.chat import Chat, Message, NamedTool, Tool, ToolCall
from codeyard.shared.job import Lane, OutputFormat, Sampling
from codeyard.shared.record import Failure, JobStatus, Result, State, Usage

WEATHER = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}


def asked(*turns: Any, **fields: Any) -> Asked:
    """Turns are (role, content)."""
    messages = [{"role": role, "content": content} for role, content in turns] or [{"role": "user", "content": "hi"}]
    return read_message({"model": "tiny", "max_tokens": 9, "messages": messages, **fields})


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def done(**fields: Any) -> JobStatus:
    result = Result(**{"state": State.SUCCEEDED, "text": "hi", "finish_reason": "stop", **fields})
    return status(State.SUCCEEDED, result=result)


def test_a_request_becomes_a_job_of_the_urgent_lane() -> None:
    """Somebody waits for a message; what may wait says so."""
    body = {
        "model": "tiny",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "hi"}],
        "system": "be brief",
        "stop_sequences": ["\n\n"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stream": True,
        "metadata": {"user_id": "u-1"},
    }

    assert read_message(json.dumps(body).encode()) == Asked(
        model="tiny",
        prompt=Chat(messages=(Message(role="system", content="be brief"), Message(role="user", content="hi"))),
        sampling=Sampling(max_tokens=64, stop=("\n\n",), temperature=0.5, top_p=0.9, top_k=40),
        lane=Lane.INTERACTIVE,
        stream=True,
        metadata={"user_id": "u-1"},
    )


def test_blocks_become_text_and_what_tools_said_becomes_messages_of_their_own() -> None:
    """A whole exchange as a coding agent sends it, in the order a chat template needs."""
    chat = asked(
        ("user", [text("What is"), text("the weather?")]),
        (
            "assistant",
            [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                text("Let me "),
                text("look."),
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
            ],
        ),
        (
            "user",
            [
                {"type": "tool_result", "tool_use_id": "t1", "content": [text("12"), text("rain")]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no city", "is_error": True},
                text("And tomorrow?"),
            ],
        ),
        system=[{**text("a"), "cache_control": {"type": "ephemeral"}}, text("b")],
        tools=[WEATHER],
    ).prompt

    assert chat.messages == (
        Message(role="system", content="a\nb"),
        Message(role="user", content="What is\nthe weather?"),
        Message(
            role="assistant",
            content="Let me look.",
            tool_calls=(
                ToolCall(id="t1", name="weather", arguments='{"city":"Köln"}'),
                ToolCall(id="t2", name="weather", arguments="{}"),
            ),
        ),
        Message(role="tool", content="12\nrain", tool_call_id="t1"),
        Message(role="tool", content="Error: no city", tool_call_id="t2"),
        Message(role="user", content="And tomorrow?"),
    )
    assert chat.tools == (Tool(name="weather", description="of a city", parameters=WEATHER["input_schema"]),)


def test_turns_of_one_role_in_a_row_become_one() -> None:
    """Anthropic joins them, and many templates refuse them."""
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}

    chat = asked(("user", "a"), ("user", [text("b")]), ("assistant", "c"), ("assistant", [text("d"), call])).prompt

    assert chat.messages == (
        Message(role="user", content="a\nb"),
        Message(role="assistant", content="cd", tool_calls=(ToolCall(id="t1", name="weather"),)),
    )


def test_an_answer_that_was_begun_stays_the_last_turn() -> None:
    """It is continued, not answered."""
    assert asked(("user", "a"), ("assistant", "b")).prompt.messages[-1] == Message(role="assistant", content="b")


def test_a_system_turn_in_the_middle_stays_where_it_is() -> None:
    """Agents remind a model there."""
    roles = [message.role for message in asked(("user", "a"), ("system", "b"), ("user", [text("c")])).prompt.messages]

    assert roles == ["user", "system", "user"]


@pytest.mark.parametrize(
    "given, choice, parallel",
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, NamedTool(name="weather"), False),
    ],
)
def test_a_tool_choice_means_the_same(given: Any, choice: Any, parallel: bool) -> None:
    """Four ways, and one at a time or several."""
    chat = asked(tools=[WEATHER], **({"tool_choice": given} if given else {})).prompt

    assert (chat.tool_choice, chat.parallel_tool_calls) == (choice, parallel)


@pytest.mark.parametrize("form", [{"output_config": {"format": SCHEMA, "effort": "low"}}, {"output_format": SCHEMA}])
def test_a_schema_for_the_answer_is_the_jobs_output_format(form: Any) -> None:
    """Under its newer and its older name."""
    assert asked(**form).sampling.output_format == OutputFormat(type="json_schema", json_schema={"type": "object"})


def test_what_changes_nothing_here_is_accepted() -> None:
    """Coding agents send these with every request."""
    plain = asked(tools=[WEATHER])

    assert plain == asked(
        tools=[{**WEATHER, "type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}],
        cache_control={"type": "ephemeral"},
        thinking={"type": "adaptive"},
        output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        container=None,
        service_tier="auto",
    )


def test_standard_only_is_the_standard_lane() -> None:
    """The caller says that it is in no hurry."""
    assert asked(service_tier="standard_only").lane is Lane.STANDARD


@pytest.mark.parametrize(
    "turn, field",
    [
        (("user", [{"type": "image", "source": {}}]), "messages.0.content.0"),
        (("user", [text("a"), {"type": "document", "source": {}}]), "messages.0.content.1"),
        (("user", [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}]), None),
        (("user", [{"type": "tool_use", "id": "x", "name": "y", "input": {}}]), "messages.0.content.0"),
        (("assistant", [{"type": "tool_result", "tool_use_id": "x"}]), "messages.0.content.0"),
        (("system", [{"type": "tool_result", "tool_use_id": "x"}]), "messages.0.content.0"),
        (("assistant", [{"type": "tool_use", "id": "x", "name": "y", "input": []}]), "messages.0.content.0.input"),
        (("user", [{"type": "text", "text": 5}]), "messages.0.content.0.text"),
        (("user", [{"text": "x"}]), "messages.0.content.0"),
        (("user", 5), "messages.0.content"),
        (("robot", "x"), "messages.0.role"),
    ],
)
def test_a_turn_that_cannot_be_read_is_refused_where_it_is_wrong(turn: Any, field: str | None) -> None:
    """In a conversation of hundreds of blocks the place is all that helps."""
    with pytest.raises(Refused) as refused:
        asked(turn)

    assert refused.value.kind == "invalid-job"
    assert refused.value.members["field"] == (field or "messages.0.content.0.content.0.type")


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 131_073}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"model": ""}, "model"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences.1"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"service_tier": "fast"}, "service_tier"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits.0"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"colour": "red"}, "colour"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
        ({"tools": [{**WEATHER, "name": "two words"}]}, "tools.0.name"),
        ({"tools": [{**WEATHER, "strict": True}]}, "tools.0.strict"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "other"}, "tools": [WEATHER]}, "tools"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type"),
        ({"output_config": {"task_budget": 5}}, "output_config.task_budget"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_its_name(fields: Any, field: str) -> None:
    """Silence would change what is generated."""
    with pytest.raises(Refused) as refused:
        asked(**fields)

    assert (refused.value.kind, refused.value.members["field"]) == ("invalid-job", field)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b'{"model":"\xff"}', b'{"model":"\\ud800"}', b"[" * 5_000]
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    """Whatever comes."""
    with pytest.raises(Refused):
        read_message(body)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 5_000])
def test_a_number_that_is_none_does_not_reach_the_model(number: str) -> None:
    """The arguments of a call are written as JSON again."""
    turn = f'[{{"role":"assistant","content":[{{"type":"tool_use","id":"x","name":"y","input":{{"n":{number}}}}}]}}]'

    with pytest.raises(Refused):
        read_message(f'{{"model":"tiny","max_tokens":1,"messages":{turn}}}'.encode())


def test_counting_asks_for_no_token_and_not_for_max_tokens() -> None:
    """The prompt is the one that the message would have, tools included."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER], "system": "s"}

    counted = read_count(body)

    assert counted.sampling == Sampling(max_tokens=0)
    assert counted.prompt == read_message({**body, "max_tokens": 5}).prompt


# Answers -------------------------------------------------------------------------------------------


def test_a_result_becomes_a_message_that_the_sdk_reads() -> None:
    """Every field that its type has."""
    message = message_of(asked(), done(text="hi", usage=Usage(prompt_tokens=3, completion_tokens=2)))

    read = SdkMessage.model_validate(message, strict=True)
    assert (read.id, read.role, read.model) == (f"msg_{JOB_ID}", "assistant", "tiny")
    assert [block.to_dict() for block in read.content] == [text("hi")]
    assert (read.stop_reason, read.stop_sequence) == ("end_turn", None)
    assert (read.usage.input_tokens, read.usage.output_tokens, read.usage.service_tier) == (3, 2, "standard")


def test_calls_become_tool_use_blocks_after_what_was_said() -> None:
    """`content`, where there is one, is what of the text is for the reader."""
    calls = (ToolCall(id="c1", name="weather", arguments='{"city":"Köln"}'), ToolCall(id="c2", name="weather"))

    message = message_of(asked(), done(text="<raw>", content="So:", tool_calls=calls, finish_reason="tool_calls"))

    assert message["content"] == [
        text("So:"),
        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
    ]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", "", "null"])
def test_arguments_that_are_no_object_are_shown_as_they_are(arguments: str) -> None:
    """A model may write anything; the caller needs an object, and the text to tell the model what was wrong."""
    message = message_of(asked(), done(content="", tool_calls=(ToolCall(id="c", name="f", arguments=arguments),)))

    assert message["content"] == [{"type": "tool_use", "id": "c", "name": "f", "input": {"INVALID_JSON": arguments}}]


@pytest.mark.parametrize(
    "finish, tokens, reason",
    [
        ("stop", 2, "end_turn"),
        ("length", 9, "max_tokens"),
        ("length", 2, "model_context_window_exceeded"),
    ],
)
def test_why_it_ended_in_anthropics_words(finish: str, tokens: int, reason: str) -> None:
    """An answer cut by the context is not one cut by the caller's own limit."""
    message = message_of(asked(), done(finish_reason=finish, usage=Usage(completion_tokens=tokens)))

    assert message["stop_reason"] == reason


def test_the_stop_sequence_that_ended_it_is_told() -> None:
    """Where a tool is called that comes first: the caller has to answer it."""
    stopped = message_of(asked(), done(stop="\n\n"))
    called = message_of(asked(), done(stop="\n\n", tool_calls=(ToolCall(id="c", name="f"),)))

    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "\n\n")
    assert (called["stop_reason"], called["stop_sequence"]) == ("tool_use", None)


def test_an_empty_answer_has_no_blocks() -> None:
    """Anthropic refuses an empty text block when it is sent back."""
    assert message_of(asked(), done(text=""))["content"] == []


@pytest.mark.parametrize(
    "state, code, expected",
    [
        (State.FAILED, "prompt_too_long", (400, "invalid_request_error")),
        (State.FAILED, "invalid_prompt", (400, "invalid_request_error")),
        (State.FAILED, "engine_error", (500, "api_error")),
        (State.FAILED, "poison", (500, "api_error")),
        (State.FAILED, "unknown_revision", (500, "api_error")),
        (State.CANCELLED, "cancelled", (409, "invalid_request_error")),
        (State.EXPIRED, "deadline_exceeded", (504, "timeout_error")),
    ],
)
def test_a_job_that_did_not_succeed_is_an_error_by_whose_fault_it_was(
    state: State, code: str, expected: tuple[int, str]
) -> None:
    """The SDKs raise by the status."""
    result = Result(state=state, error=Failure(code=code, message="because"))

    failed = failed_as(status(state, result=result))

    assert (failed.status, failed.error["type"]) == expected
    assert "because" in failed.error["message"]

"""From OpenAI's words into ours and back, without a server."""

import json
from typing import Any

import pytest
from support.asgi import JOB_ID, status

from codeyard.producer.gateway.openai.convert import (
    DEFAULT_MAX_TOKENS,
    Asked,
    completion_of,
    key_of,
    read_chat,
    read_completion,
)
from codeyard.producer.gateway.openai.errors import of_error, of_job
from codeyard.producer.gateway.openai.parameters import TABLE, Api, Use
from codeyard.producer.gateway.problems import Refused
from codeyard.shared.chat import Chat, Message, NamedTool, TokenLogprob, Tool, ToolCall
from codeyard.shared.errors import QuotaExceeded, RateLimited, UnknownModel
from codeyard.shared.job import Lane, OutputFormat, Sampling
from codeyard.shared.limits.standing import Standing
from codeyard.shared.record import Failure, JobStatus, Result, State, Usage

USER = {"role": "user", "content": "Add two numbers."}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city", "parameters": {"type": "object"}, "strict": True},
}


def chat_asked(**more: Any) -> Asked:
    return read_chat(json.dumps({"model": "tiny", "messages": [USER], **more}).encode())


def text_asked(**more: Any) -> Asked:
    return read_completion(json.dumps({"model": "tiny", "prompt": "def add(", **more}).encode())


def chat_of(asked: Asked) -> Chat:
    assert isinstance(asked.jobs[0].prompt, Chat)
    return asked.jobs[0].prompt


def refused(**more: Any) -> tuple[str | None, str | None]:
    """Parameter and code of the error body that a chat completion with these ends in."""
    with pytest.raises(Refused) as caught:
        chat_asked(**more)
    error = of_error(caught.value)
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert error.param is None or error.param in error.message
    return error.param, error.code


def done(text: str = "a + b", **result: Any) -> JobStatus:
    fields: dict[str, Any] = {"finish_reason": "stop", "usage": Usage(prompt_tokens=5, completion_tokens=3), **result}
    return status(
        State.SUCCEEDED, created_at=1_795_226_400.7, result=Result(state=State.SUCCEEDED, text=text, **fields)
    )


# Reading -------------------------------------------------------------------------------------------


def test_a_conversation_is_read_with_its_roles_tool_calls_and_answers() -> None:
    """A whole round with a tool, as a coding agent sends it back."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    asked = chat_asked(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Go."}]},
            {"role": "user", "content": "Weather?", "name": "ann"},
            {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
    )

    assert chat_of(asked) == Chat(
        messages=(
            Message(role="system", content="Be brief.\nGo."),
            Message(role="user", content="Weather?", name="ann"),
            Message(
                role="assistant", tool_calls=(ToolCall(id="call_1", name="weather", arguments='{"city": "Oslo"}'),)
            ),
            Message(role="tool", tool_call_id="call_1", content="rain"),
        ),
        tools=(Tool(name="weather", description="Of a city", parameters={"type": "object"}),),
        tool_choice=NamedTool(name="weather"),
        parallel_tool_calls=False,
    )


def test_every_sampling_parameter_becomes_its_field() -> None:
    """Read off the table: a row that is not read would be silence."""
    values: dict[str, Any] = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": 3,
        "stop": ["\n", "#"],
    }
    rows = [row for row in TABLE if row.use is Use.SAMPLING]
    assert {row.becomes for row in rows} == set(values)

    for row in rows:
        read = {Api.CHAT: chat_asked, Api.COMPLETIONS: text_asked}
        for api in set(row.apis) & set(read):
            sampling = read[api](**{row.name: values[row.becomes]}).jobs[0].sampling
            expected = Sampling(**{"max_tokens": DEFAULT_MAX_TOKENS[api], row.becomes: values[row.becomes]})
            assert sampling == expected, row.name


def test_the_newer_name_for_max_tokens_goes_before_the_older() -> None:
    """SDKs send both while they change over."""
    assert chat_asked(max_tokens=5, max_completion_tokens=6).jobs[0].sampling.max_tokens == 6


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, OutputFormat(type="json_schema", json_schema={})),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}, "strict": True}},
            OutputFormat(type="json_schema", json_schema={"type": "array"}),
        ),
    ],
)
def test_a_response_format_becomes_the_output_format(given: Any, expected: OutputFormat | None) -> None:
    """json_object is any JSON object."""
    assert chat_asked(response_format=given).jobs[0].sampling.output_format == expected


@pytest.mark.parametrize(
    "tier, lane",
    [(None, "standard"), ("auto", "standard"), ("default", "standard"), ("priority", "interactive"), ("flex", "bulk")],
)
def test_the_service_tier_chooses_the_lane(tier: str | None, lane: str) -> None:
    """The one word OpenAI's API has for how urgent a request is."""
    asked = chat_asked(service_tier=tier)

    assert asked.lane is Lane(lane)
    assert (
        completion_of(asked, [status(State.SUCCEEDED, lane=lane, result=Result(state=State.SUCCEEDED))])["service_tier"]
        == {"standard": "default", "interactive": "priority", "bulk": "flex"}[lane]
    )


def test_n_choices_are_n_jobs_with_seeds_and_keys_of_their_own() -> None:
    """Jobs of one body and one seed would all say the same; jobs of one key would be one job."""
    asked = read_completion({"model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": 2**63 - 1})

    assert [job.prompt for job in asked.jobs] == ["a", "a", "b", "b"]
    assert [job.sampling.seed for job in asked.jobs] == [2**63 - 1, 0, 2**63 - 1, 0]
    keys = [key_of("k" * 200, place) for place in range(128)] + [key_of("k" * 199 + "j", place) for place in range(128)]
    assert len(set(keys)) == 256
    assert key_of("mine", 0) == "mine"
    assert all(len(key) <= 200 for key in keys)
    assert not key_of("mine", 1).isascii(), "a caller could have sent that one for another job"


@pytest.mark.parametrize(
    "prompt, expected",
    [("x", ["x"]), ([1, 2], [(1, 2)]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [(1,), (2, 3)])],
)
def test_a_prompt_is_text_or_token_ids_or_a_list_of_either(prompt: Any, expected: list[Any]) -> None:
    """OpenAI's four forms."""
    assert [job.prompt for job in text_asked(prompt=prompt).jobs] == expected


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    """Chat: a switch and a number. Completions: a number."""
    assert chat_asked().jobs[0].sampling.logprobs is None
    assert chat_asked(logprobs=True).jobs[0].sampling.logprobs == 0
    assert chat_asked(logprobs=True, top_logprobs=4).jobs[0].sampling.logprobs == 4
    assert text_asked(logprobs=2).jobs[0].sampling.logprobs == 2
    assert refused(top_logprobs=2) == ("top_logprobs", "invalid_value")


@pytest.mark.parametrize("row", [row for row in TABLE if Api.CHAT in row.apis and row.use is Use.REFUSED])
def test_what_is_not_offered_is_refused_by_name_unless_it_is_not_used(row: Any) -> None:
    """Silence would be a wrong answer that looks right."""
    assert refused(**{row.name: {"some": "value"}}) == (row.name, "unsupported_parameter")
    for unused in (None, *row.unused):
        assert chat_asked(**{row.name: unused}) == chat_asked()


@pytest.mark.parametrize(
    "more, param, code",
    [
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"stream": 1}, "stream", "invalid_value"),
        (
            {"stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "invalid_value",
        ),
        ({"service_tier": "scale"}, "service_tier", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata", "invalid_value"),
        ({"model": 1}, "model", "invalid_value"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": ["x"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1]", "invalid_value"),
        ({"messages": [{**USER, "audio": {}}]}, "messages[0].audio", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema", "invalid_value"),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], param: str, code: str) -> None:
    """`param` is how the SDKs' users find it."""
    assert refused(**more) == (param, code)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff", b'{"model":"\\ud800"}', b"[" * 100_000, b'{"a":NaN}', b"null"],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    """Whatever the bytes are."""
    with pytest.raises(Refused) as caught:
        read_chat(body)
    assert of_error(caught.value).code == "invalid_json"


def test_a_number_too_large_for_a_float_is_refused_inside_a_schema() -> None:
    """It was read as infinity, and would leave here as something that is not JSON."""
    tool = '{"type":"function","function":{"name":"f","parameters":{"maximum":1e999}}}'
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"tools":[%s]}' % tool.encode()
    with pytest.raises(Refused) as caught:
        read_chat(body)
    assert of_error(caught.value).param == "tools[0].function.parameters"


# Answering -----------------------------------------------------------------------------------------


def test_a_chat_completion_says_what_the_job_did() -> None:
    """Any replica gives the same object: everything in it is from the record."""
    assert completion_of(chat_asked(), [done()]) == {
        "id": f"chatcmpl-{JOB_ID}",
        "object": "chat.completion",
        "created": 1_795_226_400,
        "model": "tiny",
        "system_fingerprint": "tiny-1",
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a + b", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


def test_calls_of_tools_are_in_the_message_and_not_in_its_content() -> None:
    """The text of a result still holds the call as the model wrote it."""
    call = ToolCall(id="call_1", name="weather", arguments='{"city": "Oslo"}')
    [choice] = completion_of(chat_asked(tools=[WEATHER]), [done("<tool>", content="", tool_calls=(call,))])["choices"]

    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    }


def test_choices_of_several_prompts_count_each_prompt_once() -> None:
    """What was read once is paid for once."""
    asked = text_asked(prompt=["a", "b"], n=2)
    answer = completion_of(asked, [done(str(n), finish_reason="length") for n in range(4)])

    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == [
        (n, str(n), "length") for n in range(4)
    ]
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}
    assert (answer["id"], answer["object"]) == (f"cmpl-{JOB_ID}", "text_completion")


def test_log_probabilities_come_in_each_apis_own_form() -> None:
    """Tokens with bytes and the likeliest beside them; or columns with offsets into the text."""
    other = TokenLogprob(token_id=2, text="b", logprob=-2.0)
    tokens = (
        TokenLogprob(token_id=1, text="\u00e4", logprob=-0.5, top=(other,)),
        TokenLogprob(token_id=2, text="b", logprob=-1.0),
    )
    [chat] = completion_of(chat_asked(logprobs=True), [done("\u00e4b", logprobs=tokens)])["choices"]
    [text] = completion_of(text_asked(logprobs=1), [done("\u00e4b", logprobs=tokens)])["choices"]

    assert chat["logprobs"]["content"][0] == {
        "token": "\u00e4",
        "logprob": -0.5,
        "bytes": [195, 164],
        "top_logprobs": [{"token": "b", "logprob": -2.0, "bytes": [98]}],
    }
    assert text["logprobs"] == {
        "tokens": ["\u00e4", "b"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"b": -2.0}, {}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize(
    "state, code, expected",
    [
        (State.FAILED, "prompt_too_long", (400, "invalid_request_error", "context_length_exceeded")),
        (State.FAILED, "invalid_prompt", (400, "invalid_request_error", "invalid_prompt")),
        (State.FAILED, "engine_error", (500, "server_error", "engine_error")),
        (State.CANCELLED, "cancelled", (503, "server_error", "job_cancelled")),
        (State.EXPIRED, "deadline_exceeded", (503, "server_error", "job_expired")),
    ],
)
def test_a_job_without_an_answer_is_an_error_that_says_whose_it_is(
    state: State, code: str, expected: tuple[int, str, str]
) -> None:
    """The SDKs raise BadRequestError for the caller's own, and InternalServerError for ours."""
    error = of_job(status(state, result=Result(state=state, error=Failure(code=code, message="why"))))

    assert error is not None
    assert (error.status, error.type, error.code) == expected
    assert "why" in error.message


def test_limits_are_named_as_openai_names_them() -> None:
    """Clients tell them from a queue that is full."""
    rate = of_error(RateLimited("too much", limit="tokens", retry_after_s=1, standing=Standing()))
    quota = of_error(QuotaExceeded("too many", limit="jobs", retry_after_s=1, standing=Standing()))
    model = of_error(UnknownModel("big"))

    assert (rate.status, rate.type, rate.code) == (429, "tokens", "rate_limit_exceeded")
    assert (quota.status, quota.type, quota.code) == (429, "requests", "rate_limit_exceeded")
    assert (model.status, model.code, model.param) == (404, "model_not_found", "model")

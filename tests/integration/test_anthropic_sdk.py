"""Anthropic's API as the official SDK finds it: unmodified, against a real gateway and a real worker process."""

import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import pytest
from support.openai_sdk import Yard, yard_running

from codeyard.shared.job import job_id_for_key

pytestmark = pytest.mark.process

MODEL = "starter"
PATIENCE_S = 60.0  # for what must happen; reached only by a failing test
KEY = "a-static-key-of-a-test-0123456789abcdef"
TURNS: list[Any] = [{"role": "user", "content": "Write add(a, b) in Python."}]
WEATHER: Any = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module", params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Both ways of running it; one gateway and one worker for all the tests here."""
    folder = tmp_path_factory.mktemp("yard")
    broker = store = f"sqlite:///{folder / 'yard.db'}"
    if request.param == "servers":
        broker, store = request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CODEYARD_AUTH_STATIC_KEY", KEY)  # a file of settings would have it masked
        with yard_running(folder, broker, store, f"t{uuid.uuid4().hex[:12]}") as running:
            yield running


@pytest.fixture
def client(yard: Yard) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=yard.url, api_key=KEY, max_retries=0) as one:
        yield one


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def words(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_is_answered(client: anthropic.Anthropic) -> None:
    """The first call anybody makes."""
    message = client.messages.create(model=MODEL, max_tokens=12, system="be brief", messages=TURNS)

    assert (message.role, message.model, message.stop_reason) == ("assistant", MODEL, "max_tokens")
    assert message.id.startswith("msg_")
    assert message.usage.output_tokens == 12
    assert message.usage.input_tokens > 0
    assert message._request_id == f"req_{message.id.removeprefix('msg_')}"
    assert words(message)


async def test_a_message_without_blocking(yard: Yard) -> None:
    """With the token in the other header."""
    async with anthropic.AsyncAnthropic(base_url=yard.url, auth_token=KEY, max_retries=0) as client:
        message = await client.messages.create(model=MODEL, max_tokens=500, messages=TURNS)

    assert message.stop_reason == "end_turn"


def test_a_stream_adds_up_to_the_message(client: anthropic.Anthropic) -> None:
    """The SDK's own helper; the whole message comes under the same key."""
    key = new_key()
    with client.messages.stream(model=MODEL, max_tokens=40, messages=TURNS, extra_headers=key) as stream:
        pieces = list(stream.text_stream)
        streamed = stream.get_final_message()

    whole = client.messages.create(model=MODEL, max_tokens=40, messages=TURNS, extra_headers=key)

    assert len(pieces) > 1
    assert "".join(pieces) == words(streamed) == words(whole)
    assert streamed.to_dict() == whole.to_dict()


async def test_a_stream_without_blocking_has_the_events_in_order(yard: Yard) -> None:
    """Raw, as `create(stream=True)` gives them."""
    async with anthropic.AsyncAnthropic(base_url=yard.url, api_key=KEY, max_retries=0) as client:
        stream = await client.messages.create(model=MODEL, max_tokens=8, messages=TURNS, stream=True)
        kinds = [event.type async for event in stream]

    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_called_and_its_result_answered(client: anthropic.Anthropic, choice: Any) -> None:
    """Both turns of the exchange, with the model's own blocks sent back as they came."""
    asked = client.messages.create(model=MODEL, max_tokens=300, messages=TURNS, tools=[WEATHER], tool_choice=choice)
    [call] = [block for block in asked.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "12 degrees"}]}
    turns = [*TURNS, asked.to_param(), {"role": "user", "content": [result]}]

    answered = client.messages.create(model=MODEL, max_tokens=300, messages=turns, tools=[WEATHER])

    assert (asked.stop_reason, call.name, call.input) == ("tool_use", "weather", {})
    assert answered.stop_reason == "end_turn"
    assert words(answered)


def test_a_streamed_call_is_the_call(client: anthropic.Anthropic) -> None:
    """Its arguments come in pieces of JSON that the SDK puts together."""
    with client.messages.stream(model=MODEL, max_tokens=300, messages=TURNS, tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()

    [call] = [block for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason, call.name, call.input) == ("tool_use", "weather", {})
    assert "content_block_start" in kinds


def test_tokens_are_counted_as_the_message_counts_them(client: anthropic.Anthropic) -> None:
    """By the same template, tools and system included, and without generating anything."""
    asked: Any = {"model": MODEL, "messages": TURNS, "system": "be brief", "tools": [WEATHER]}

    counted = client.messages.count_tokens(**asked)

    assert counted.input_tokens == client.messages.create(max_tokens=1, **asked).usage.input_tokens
    assert counted.input_tokens > client.messages.count_tokens(model=MODEL, messages=TURNS).input_tokens


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_sequence_is_named(client: anthropic.Anthropic, streaming: bool) -> None:
    """The simulated engine's answers are words after blanks; one of them stops the same answer."""
    asked: Any = {"model": MODEL, "max_tokens": 30, "messages": TURNS}
    answer = words(client.messages.create(**asked))
    word = answer.split(" ")[3]

    with client.messages.stream(**asked, stop_sequences=["never", f" {word}"]) as stream:
        stopped = stream.get_final_message() if streaming else None
    if stopped is None:
        stopped = client.messages.create(**asked, stop_sequences=["never", f" {word}"])

    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", f" {word}")
    assert words(stopped) == answer[: answer.index(f" {word}")]


def test_the_models_are_listed_in_anthropics_form(client: anthropic.Anthropic) -> None:
    """The path is OpenAI's too; the SDK's own header says which is meant."""
    [model] = client.models.list()

    assert (model.id, model.type, model.lifecycle) == (MODEL, "model", "active")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nobody")


def test_the_same_key_is_the_same_message(client: anthropic.Anthropic) -> None:
    """A caller that lost the answer sends the request again."""
    key = new_key()

    first, again = [
        client.messages.create(model=MODEL, max_tokens=9, messages=TURNS, extra_headers=key) for _ in range(2)
    ]

    assert first == again


def test_a_conflict_is_raised_at_once_and_not_tried_again(yard: Yard) -> None:
    """The SDK repeats a 409 unless it is told that this cannot help."""
    key, seen = new_key(), []
    http = anthropic.DefaultHttpxClient(event_hooks={"response": [lambda response: seen.append(response.status_code)]})
    with anthropic.Anthropic(base_url=yard.url, api_key=KEY, max_retries=3, http_client=http) as client:
        client.messages.create(model=MODEL, max_tokens=9, messages=TURNS, extra_headers=key)
        with pytest.raises(anthropic.ConflictError):
            client.messages.create(model=MODEL, max_tokens=10, messages=TURNS, extra_headers=key)

    assert seen == [200, 409]


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"model": "nobody"}, anthropic.NotFoundError),
        ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"extra_body": {"colour": "red"}}, anthropic.BadRequestError),
        ({"thinking": {"type": "enabled", "budget_tokens": 2_048}}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": "x " * 60_000}]}, anthropic.BadRequestError),
        ({"extra_headers": {"x-api-key": "nobody's"}}, anthropic.AuthenticationError),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_is_raised_as_the_sdks_own(
    client: anthropic.Anthropic, fields: Any, error: type[anthropic.APIStatusError], streaming: bool
) -> None:
    """By status; the body is Anthropic's. A prompt too long for the model is found by the worker."""
    request = {"model": MODEL, "max_tokens": 9, "messages": TURNS, "stream": streaming, **fields}

    with pytest.raises(anthropic.APIStatusError) as raised:
        for _ in client.messages.create(**request):
            pass

    body: Any = raised.value.body
    assert type(raised.value) is error
    assert body["error"]["type"] in ("invalid_request_error", "not_found_error", "authentication_error")
    assert (body["type"], body["request_id"][:4]) == ("error", "req_")


async def test_what_a_coding_agent_sends_works(yard: Yard) -> None:
    """Several turns as such an agent makes them: system blocks marked for a cache, many tools with real schemas,
    results of tools that failed, betas, a large max_tokens, a user id; all of it streamed."""
    tools = [
        {
            "name": f"mcp__files__tool_{n}",
            "description": "Reads a file.\n\nUsage:\n- an absolute path\n" * 20,
            "input_schema": {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "type": "object",
                "properties": {
                    "path": {"type": "string", "description": "absolute"},
                    "limit": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None},
                    "edits": {"type": "array", "items": {"type": "object", "additionalProperties": False}},
                },
                "required": ["path"],
                "additionalProperties": False,
            },
        }
        for n in range(25)
    ]
    tools[-1]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    cached = {"cache_control": {"type": "ephemeral"}}
    turns: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nnotes\n</system-reminder>"},
                {"type": "text", "text": "Fix the bug.", **cached},
            ],
        }
    ]
    request: Any = {
        "model": MODEL,
        "max_tokens": 32_000,
        "system": [
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Rules: be careful.", **cached},
        ],
        "tools": tools,
        "metadata": {"user_id": json.dumps({"device": "d" * 64, "session": str(uuid.uuid4())})},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "medium"},
        "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14"],
        "extra_body": {"temperature": 1},
    }
    async with anthropic.AsyncAnthropic(base_url=yard.url, auth_token=KEY, max_retries=0) as client:
        async with client.beta.messages.stream(messages=turns, **request) as stream:
            first = await stream.get_final_message()
        [call] = [block for block in first.content if block.type == "tool_use"]
        failed = {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": "<tool_use_error>File does not exist.</tool_use_error>",
            "is_error": True,
            **cached,
        }
        answer = {"role": "assistant", "content": [block.to_dict() for block in first.content]}
        turns += [answer, {"role": "user", "content": [failed, {"type": "text", "text": "Try another."}]}]
        async with client.beta.messages.stream(messages=turns, **request) as stream:
            second = await stream.get_final_message()
        counted = await client.beta.messages.count_tokens(
            messages=turns, **{name: request[name] for name in ("model", "system", "tools", "betas")}
        )

    assert (first.stop_reason, call.name) == ("tool_use", "mcp__files__tool_0")
    assert second.stop_reason == "tool_use"
    assert counted.input_tokens == second.usage.input_tokens


def test_the_old_text_form_is_the_same_conversation(yard: Yard, client: anthropic.Anthropic) -> None:
    """The SDK of today has no call for it; programs of that time do."""
    prompt = "be brief\n\nHuman: Write add(a, b) in Python.\n\nAssistant:"
    body = {"model": MODEL, "max_tokens_to_sample": 20, "prompt": prompt}
    chat = client.messages.create(model=MODEL, max_tokens=20, system="be brief", messages=TURNS)

    whole = httpx.post(f"{yard.url}/v1/complete", json=body, headers={"x-api-key": KEY}, trust_env=False)
    streamed = httpx.post(
        f"{yard.url}/v1/complete", json={**body, "stream": True}, headers={"x-api-key": KEY}, trust_env=False
    )

    assert whole.json()["completion"] == words(chat)
    pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert "".join(piece.get("completion", "") for piece in pieces) == words(chat)
    assert (whole.json()["stop_reason"], pieces[-1]["stop_reason"]) == ("max_tokens", "max_tokens")


def test_the_sdks_own_retries_reach_the_one_job_that_outlives_its_worker(yard: Yard) -> None:
    """A worker is killed and comes back while the caller tries again and again: one job, one answer."""
    key, again = new_key(), threading.Event()
    requests: list[object] = []

    def asked(request: object) -> None:
        requests.append(request)
        if len(requests) > 1:
            again.set()

    yard.kill_worker()
    http = anthropic.DefaultHttpxClient(event_hooks={"request": [asked]})
    options: Any = {"max_retries": 20, "timeout": 2.0, "http_client": http}
    with anthropic.Anthropic(base_url=yard.url, api_key=KEY, **options) as client, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.messages.create, model=MODEL, max_tokens=9, messages=TURNS, extra_headers=key)
        assert again.wait(PATIENCE_S)
        yard.start_worker()
        message = answer.result(PATIENCE_S)

    assert message.usage.output_tokens == 9
    assert message.id == f"msg_{job_id_for_key('default', key['Idempotency-Key'])}"

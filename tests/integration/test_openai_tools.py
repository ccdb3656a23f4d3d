"""Tools, log probabilities and formats through the official `openai` SDK. The simulated engine answers a
conversation that offers tools and ends with the user with a call."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.openai_sdk import MODEL, Yard, yards

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
TOOL: Any = {"type": "function", "function": WEATHER}
ASK: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module", params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    with yards(request, tmp_path_factory) as running:
        yield running


def test_a_round_with_a_tool_goes_there_and_back(yard: Yard) -> None:
    """The SDK's own message objects are sent back as they came."""
    client = yard.client()
    asked = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL])
    [choice] = asked.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"

    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    answered = client.chat.completions.create(model=MODEL, messages=[*ASK, choice.message, result], tools=[TOOL])  # type: ignore[list-item]

    assert answered.choices[0].finish_reason == "stop"
    assert answered.choices[0].message.tool_calls is None
    assert answered.choices[0].message.content


def test_the_pieces_of_a_streamed_call_are_the_call(yard: Yard) -> None:
    """Put together by the SDK's own accumulator; under one key it is the very same job."""
    client = yard.client(default_headers={"Idempotency-Key": "tools"})
    with client.chat.completions.stream(model=MODEL, messages=ASK, tools=[TOOL]) as stream:
        streamed = stream.get_final_completion()
    whole = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL])

    told, kept = streamed.choices[0].message.tool_calls, whole.choices[0].message.tool_calls
    assert told is not None
    assert kept is not None
    assert [(call.id, call.function.name, call.function.arguments) for call in told] == [
        (call.id, call.function.name, call.function.arguments) for call in kept if call.type == "function"
    ]
    assert streamed.choices[0].finish_reason == "tool_calls"
    assert streamed.id == whole.id


async def test_a_response_with_a_call_streams_it_as_an_item(yard: Yard) -> None:
    """And goes on from it by its id, with the call's output as the only input."""
    tool: Any = {"type": "function", **WEATHER}
    async with yard.async_client() as client:
        async with client.responses.stream(model=MODEL, input="What is the weather?", tools=[tool]) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_response()
        [call] = streamed.output
        assert call.type == "function_call"
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        answered = await client.responses.create(
            model=MODEL, previous_response_id=streamed.id, input=[output], tools=[tool]
        )
        read_again = await client.responses.retrieve(streamed.id)

    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    assert [item.model_dump(exclude={"parsed_arguments"}) for item in streamed.output] == [
        item.model_dump() for item in read_again.output
    ]
    assert answered.output_text


def test_log_probabilities_are_there_for_every_token_whole_and_streamed(yard: Yard) -> None:
    """Joined, their tokens are the text."""
    client = yard.client(default_headers={"Idempotency-Key": "logprobs"})
    ask: dict[str, Any] = {"model": MODEL, "messages": ASK, "logprobs": True, "top_logprobs": 2, "max_tokens": 12}
    whole = client.chat.completions.create(**ask).choices[0]
    chunks = list(client.chat.completions.create(**ask, stream=True))

    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert "".join(token.token for token in whole.logprobs.content) == whole.message.content
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in whole.logprobs.content]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}},
    ],
)
def test_a_format_that_the_engine_cannot_keep_is_the_callers_error(
    yard: Yard, response_format: Any, stream: bool
) -> None:
    """Text that is no JSON would be silence. The vllm engine keeps formats."""
    with pytest.raises(openai.BadRequestError) as caught:
        yard.client().chat.completions.create(model=MODEL, messages=ASK, response_format=response_format, stream=stream)

    assert caught.value.code == "unsupported_parameter"
    assert "structured outputs" in caught.value.message


def test_a_long_conversation_is_gone_on_from_and_shown_like_a_short_one(yard: Yard) -> None:
    """Over 64 KiB it lies elsewhere, which nobody sees."""
    client = yard.client()
    first = client.responses.create(model=MODEL, instructions="Be brief.", input="x " * 40_000, max_output_tokens=4)
    second = client.responses.create(model=MODEL, input="And now?", previous_response_id=first.id, max_output_tokens=4)

    assert client.responses.retrieve(first.id).instructions == "Be brief."
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens

"""What only vLLM can, through the official `openai` SDK: formats that are kept, calls that are forced."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.openai_sdk import MODEL, Yard, yards

pytestmark = [pytest.mark.vllm, pytest.mark.process, pytest.mark.timeout(900)]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}
ASK: Any = [{"role": "user", "content": "How large is it?"}]
TOOL: Any = {"type": "function", "function": {"name": "measure", "parameters": SCHEMA}}


@pytest.fixture(scope="module", params=["embedded"])
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Compact JSON, or the starter model writes blanks for ever."""
    pytest.importorskip("vllm")
    compact = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    groups: dict[str, dict[str, Any]] = {
        "worker": {"engine": "vllm", "stall_s": 60},
        "engine": {"engine_args": compact, "enforce_eager": True},  # compiling takes longer than all the tests
        "store": {"lease_s": 10, "renew_s": 1},
    }
    with yards(request, tmp_path_factory, **groups) as running:
        yield running


def fits(text: str | None) -> bool:
    return json.loads(text or "null") in ({"size": "small"}, {"size": "large"})


def test_an_answer_in_a_format_is_json_of_its_schema(yard: Yard) -> None:
    """Over both routes, whole and streamed."""
    client = yard.client()
    chat_format: Any = {"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA, "strict": True}}
    text_format: Any = {"format": {"type": "json_schema", "name": "size", "schema": SCHEMA, "strict": True}}
    ask: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 60, "response_format": chat_format}

    whole = client.chat.completions.create(**ask).choices[0]
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)
    )
    response = client.responses.create(model=MODEL, input="How large?", max_output_tokens=60, text=text_format)

    assert fits(whole.message.content)
    assert fits(streamed)
    assert fits(response.output_text)
    assert response.text is not None
    assert response.text.model_dump(by_alias=True)["format"]["schema"] == SCHEMA


def test_a_call_that_is_forced_has_arguments_of_its_schema(yard: Yard) -> None:
    """The same over both routes."""
    client = yard.client()
    chosen: Any = {"type": "function", "function": {"name": "measure"}}
    [choice] = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=60, tools=[TOOL], tool_choice=chosen
    ).choices
    response = client.responses.create(
        model=MODEL,
        input="How large?",
        max_output_tokens=60,
        tools=[{"type": "function", "name": "measure", "parameters": SCHEMA, "strict": True}],
        tool_choice={"type": "function", "name": "measure"},
    )

    assert choice.message.tool_calls is not None
    [call], [item] = choice.message.tool_calls, response.output
    assert call.type == "function"
    assert item.type == "function_call"
    assert choice.finish_reason == "tool_calls"
    assert fits(call.function.arguments)
    assert fits(item.arguments)


def test_a_schema_that_is_none_and_a_prompt_that_is_too_long_are_bad_requests(yard: Yard) -> None:
    """The engine says so, and the SDK raises it as the caller's."""
    client = yard.client()
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=ASK, response_format=broken)
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x " * 2_000}])

    assert refused.value.code == "unsupported_parameter"
    assert too_long.value.code == "context_length_exceeded"


def test_choices_with_one_seed_differ_and_are_the_same_again(yard: Yard) -> None:
    """The k-th choice has the seed and k."""
    client = yard.client()
    ask: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 12, "n": 3, "seed": 11, "temperature": 1.5}
    first, second = [
        [choice.message.content for choice in client.chat.completions.create(**ask).choices] for _ in range(2)
    ]

    assert first == second
    assert len(set(first)) == 3

"""Responses through the official `openai` SDK: in the background, followed from anywhere, cancelled; and what a
fleet that is killed leaves of a stream."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from support.openai_sdk import MODEL, Yard, yards

from codeyard.shared.chat import Chat, Message
from codeyard.worker.engines.simulated import simulated_completion

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """One fleet for all tests here, on each back end; slow enough to be left, followed and cancelled."""
    with yards(request, tmp_path_factory, engine={"time_scale": 1.0}) as running:
        yield running


def expected(*turns: tuple[str, str], max_tokens: int = 4_096) -> str:
    chat = Chat(messages=tuple(Message(role=role, content=text) for role, text in turns))
    return simulated_completion(chat, max_tokens)[0]


def deltas(events: list[ResponseStreamEvent]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def test_a_response_is_the_jobs_answer_and_can_be_read_again(yard: Yard) -> None:
    """The object is made of the record alone."""
    client = yard.client()
    made = client.responses.create(
        model=MODEL, input="one", instructions="Be brief.", metadata={"for": "tests"}, service_tier="priority"
    )

    assert made.output_text == expected(("system", "Be brief."), ("user", "one"))
    assert (made.status, made.instructions, made.metadata) == ("completed", "Be brief.", {"for": "tests"})
    assert (made.service_tier, made.background) == ("priority", False)
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert client.responses.retrieve(made.id).model_dump() == made.model_dump()


async def test_the_asynchronous_client_streams_it(yard: Yard) -> None:
    """With the SDK's accumulator, which checks the order of events."""
    async with yard.async_client() as client, client.responses.stream(model=MODEL, input="stream") as stream:
        numbers = [event.sequence_number async for event in stream]
        answer = await stream.get_final_response()

    assert answer.output_text == expected(("user", "stream"))
    assert numbers == list(range(len(numbers)))


def test_a_response_goes_on_from_an_earlier_one(yard: Yard) -> None:
    """Its conversation and its answer; its instructions are not taken over."""
    client = yard.client()
    first = client.responses.create(model=MODEL, input="one", instructions="Old.")
    second = client.responses.create(model=MODEL, input="two", instructions="New.", previous_response_id=first.id)

    turns = (("system", "New."), ("user", "one"), ("assistant", first.output_text), ("user", "two"))
    assert second.output_text == expected(*turns)
    assert second.previous_response_id == first.id


def test_calls_and_their_outputs_are_turns_of_the_conversation(yard: Yard) -> None:
    """As an agent sends them back."""
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
    ]
    tool: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
    answer = yard.client().responses.create(model=MODEL, input=items, tools=[tool], tool_choice="none")

    assert answer.status == "completed"
    assert answer.usage is not None
    assert [one.name for one in answer.tools if one.type == "function"] == ["weather"]
    assert answer.tool_choice == "none"


def test_in_the_background_it_is_answered_at_once_polled_and_followed_from_anywhere(yard: Yard) -> None:
    """The rest of a stream, whatever number the reader stopped at, is the rest of the whole."""
    client = yard.client()
    made = client.responses.create(model=MODEL, input="background", background=True)
    assert made.status in ("queued", "in_progress")
    assert made.output == []

    live = list(client.responses.retrieve(made.id, stream=True))
    again = list(client.responses.retrieve(made.id, stream=True))

    assert deltas(live) == expected(("user", "background"))
    assert len([event for event in live if event.type == "response.output_text.delta"]) > 1
    assert [event.model_dump() for event in again] == [event.model_dump() for event in live]
    for after in range(0, len(live), 3):
        rest = list(client.responses.retrieve(made.id, stream=True, starting_after=after))
        assert [event.sequence_number for event in rest] == list(range(after + 1, len(live)))
    polled = client.responses.retrieve(made.id)
    assert (polled.status, polled.output_text, polled.background) == ("completed", deltas(live), True)


def test_a_cancelled_response_says_so_and_asking_twice_is_no_error(yard: Yard) -> None:
    """Its tokens stop, too."""
    client = yard.client()
    made = client.responses.create(model=MODEL, input="cancel me, please", background=True)
    cancelled, twice = client.responses.cancel(made.id), client.responses.cancel(made.id)

    assert (cancelled.status, twice.status) == ("cancelled", "cancelled")
    assert list(client.responses.retrieve(made.id, stream=True))[-1].type == "response.failed"


@pytest.mark.parametrize(
    "more, param",
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
def test_what_is_not_offered_is_named(yard: Yard, more: dict[str, Any], param: str) -> None:
    """BadRequestError with `param`."""
    with pytest.raises(openai.BadRequestError) as caught:
        yard.client().responses.create(**{"model": MODEL, "input": "x", **more})

    assert caught.value.param == param


def test_a_response_that_is_not_there_cannot_be_gone_on_from(yard: Yard) -> None:
    """A NotFoundError that names the parameter."""
    nobody = "resp_99999999-9999-4999-8999-999999999999"
    with pytest.raises(openai.NotFoundError) as caught:
        yard.client().responses.create(model=MODEL, input="x", previous_response_id=nobody)

    assert caught.value.param == "previous_response_id"


# When the fleet is killed --------------------------------------------------------------------------


@pytest.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def mortal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """A fleet of one test's own."""
    with yards(request, tmp_path_factory, engine={"time_scale": 6.0}) as running:
        yield running


def test_a_stream_goes_on_when_its_worker_is_killed_and_no_token_is_lost(mortal: Yard) -> None:
    """The next worker goes on from the tokens that were stored; the reader sees a pause."""
    client = mortal.client(timeout=120)
    stream = iter(
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "kill"}], stream=True)
    )
    chunks = [next(stream) for _ in range(3)]
    mortal.kill_worker()
    mortal.start_worker()
    chunks += list(stream)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected(
        ("user", "kill")
    )
    job = httpx.get(f"{mortal.url}/v1/jobs/{chunks[0].id.removeprefix('chatcmpl-')}").json()
    assert job["attempt"] == 2


def test_a_stream_that_had_to_begin_again_ends_in_the_sdks_error_and_the_key_gets_the_answer(mortal: Yard) -> None:
    """With a seed a job cannot be continued exactly, so what was told does not count."""
    client = mortal.client(timeout=120, default_headers={"Idempotency-Key": "seeded"})
    ask: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a seed"}],
        "seed": 7,
        "stream": True,
    }
    stream = iter(client.chat.completions.create(**ask))
    for _ in range(3):
        next(stream)
    mortal.kill_worker()
    mortal.start_worker()
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    again = list(client.chat.completions.create(**ask))

    assert caught.value.code == "generation_restarted"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in again) == expected(("user", "a seed"))


async def test_a_response_is_followed_from_gateway_to_gateway(mortal: Yard) -> None:
    """Replicas share nothing but the store, and count alike."""
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(mortal.another_gateway()) for _ in range(2)]
        made = mortal.client().responses.create(model=MODEL, input="replicas", background=True)
        text, last, after, turn = "", "", -1, 0
        async with asyncio.timeout(120):
            while last != "response.completed":
                url = others[turn % 2]
                turn += 1
                params = {"stream": "true"} | ({"starting_after": str(after)} if after >= 0 else {})
                async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
                    events = await client.responses.retrieve(made.id, stream=True, extra_query=params)
                    async for event in events:
                        assert event.sequence_number == after + 1
                        after, last = event.sequence_number, event.type
                        text += event.delta if event.type == "response.output_text.delta" else ""
                        if after % 3 == 2:
                            break  # the reader loses its connection
                    await events.close()

    assert text == expected(("user", "replicas"))
    assert turn > 2

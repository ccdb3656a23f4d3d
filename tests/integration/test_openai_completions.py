"""The official `openai` SDK, unmodified, against a gateway and a worker in processes of their own."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support.openai_sdk import MODEL, Yard, yards

from codeyard.shared.chat import Chat, Message
from codeyard.worker.engines.simulated import simulated_completion

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

PROMPT = "def add(a, b):\n"


@pytest.fixture(scope="module", params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """One fleet for all tests here, on each back end."""
    with yards(request, tmp_path_factory, worker={"max_attempts": 1}) as running:
        yield running


@pytest.fixture(params=["embedded"])
def impatient(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """A fleet of one test's own, whose gateway waits for an answer no longer than a second."""
    with yards(request, tmp_path_factory, gateway={"answer_wait_s": 1.0}) as running:
        yield running


def turns(text: str) -> Any:
    return [{"role": "user", "content": text}]


def expected(text: str, max_tokens: int = 4_096) -> str:
    """What the simulated engine says to a conversation of this one turn."""
    chat = Chat(messages=(Message(role="user", content=text),))
    return simulated_completion(chat, max_tokens)[0]


# Whole answers -------------------------------------------------------------------------------------


def test_a_chat_completion_is_the_jobs_answer(yard: Yard) -> None:
    """And the request id leads to the job."""
    answer = yard.client().chat.completions.create(model=MODEL, messages=turns("one"), metadata={"for": "tests"})

    [choice] = answer.choices
    assert (choice.message.content, choice.message.role) == (expected("one"), "assistant")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.service_tier == "default"
    job = httpx.get(f"{yard.url}/v1/jobs/{answer._request_id}").json()
    assert answer.id == f"chatcmpl-{job['id']}"
    assert (job["lane"], job["result"]["text"]) == ("standard", choice.message.content)


async def test_the_asynchronous_client_gets_the_same(yard: Yard) -> None:
    """Ten at once."""
    async with yard.async_client() as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model=MODEL, messages=turns(f"async {n}")) for n in range(10))
        )

    assert [answer.choices[0].message.content for answer in answers] == [expected(f"async {n}") for n in range(10)]


def test_an_answer_that_is_cut_says_so(yard: Yard) -> None:
    """OpenAI's word is ours."""
    answer = yard.client().chat.completions.create(model=MODEL, messages=turns("one"), max_completion_tokens=4)

    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == expected("one", 4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_a_completion_of_several_prompts_and_choices_has_them_in_order(yard: Yard) -> None:
    """Each is a job of its own."""
    answer = yard.client().completions.create(model=MODEL, prompt=[PROMPT, "x = "], n=2, max_tokens=5, seed=1)

    texts = [simulated_completion(prompt, 5)[0] for prompt in (PROMPT, "x = ")]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_stop_sequences_cut_the_answer(yard: Yard) -> None:
    """They are not in it."""
    whole = simulated_completion(PROMPT, 200)[0]
    word = whole.split()[3]
    answer = yard.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, stop=[f" {word}"])

    assert answer.choices[0].text == whole[: whole.index(f" {word}")]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("tier, lane", [("priority", "interactive"), ("auto", "standard"), ("flex", "bulk")])
def test_the_service_tier_is_the_lane_and_is_echoed(yard: Yard, tier: Any, lane: str) -> None:
    """The job's record says in which lane it went."""
    answer = yard.client().chat.completions.create(model=MODEL, messages=turns("tier"), service_tier=tier)

    assert answer.service_tier == {"auto": "default"}.get(tier, tier)
    assert httpx.get(f"{yard.url}/v1/jobs/{answer._request_id}").json()["lane"] == lane


def test_models_are_the_aliases(yard: Yard) -> None:
    """A list, and one by its name."""
    client = yard.client()

    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


# Streams -------------------------------------------------------------------------------------------


def test_a_stream_says_the_same_in_pieces(yard: Yard) -> None:
    """Role first, then the text, how it ended, the usage, and `[DONE]`."""
    chunks = list(
        yard.client().chat.completions.create(
            model=MODEL, messages=turns("stream"), stream=True, stream_options={"include_usage": True}
        )
    )

    begin, *middle, end, usage = chunks
    assert (begin.choices[0].delta.role, begin.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == expected("stream")
    assert len(middle) > 1
    assert (end.choices[0].finish_reason, end.choices[0].delta.content) == ("stop", None)
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_wire_ends_in_done(yard: Yard) -> None:
    """Readers other than the SDK wait for it."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "stream": True}
    lines = httpx.post(f"{yard.url}/v1/completions", json=body).text.split("\n\n")

    assert lines[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == simulated_completion(PROMPT, 3)[0]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == "length"


async def test_two_choices_stream_side_by_side(yard: Yard) -> None:
    """Each chunk says of which choice it is."""
    texts = {0: "", 1: ""}
    ends: dict[int, str] = {}
    async with yard.async_client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=turns("two"), n=2, stream=True)
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}

    assert texts == {0: expected("two"), 1: expected("two")}
    assert ends == {0: "stop", 1: "stop"}


def test_the_sdks_own_accumulator_understands_the_stream(yard: Yard) -> None:
    """`client.chat.completions.stream` is what helpers are built on."""
    with yard.client().chat.completions.stream(model=MODEL, messages=turns("helper")) as stream:
        answer = stream.get_final_completion()

    assert answer.choices[0].message.content == expected("helper")


# The same again ------------------------------------------------------------------------------------


def test_the_same_key_gets_the_same_answer_whole_or_streamed(yard: Yard) -> None:
    """A caller that lost its connection sends the request again; the job runs once."""
    client = yard.client(default_headers={"Idempotency-Key": "again"})
    first = client.chat.completions.create(model=MODEL, messages=turns("again"), n=2)
    second = client.chat.completions.create(model=MODEL, messages=turns("again"), n=2)
    chunks = list(client.chat.completions.create(model=MODEL, messages=turns("again"), n=2, stream=True))

    assert second.model_dump() == first.model_dump()
    assert {chunk.id for chunk in chunks} == {first.id}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == 1) == (
        first.choices[1].message.content
    )


def test_a_reader_that_left_in_the_middle_gets_all_of_it_from_the_beginning(yard: Yard) -> None:
    """Nothing of the text is lost, and nothing is generated twice."""
    client = yard.client(default_headers={"Idempotency-Key": "left"})
    stream = client.chat.completions.create(model=MODEL, messages=turns("left"), stream=True)
    first = next(iter(stream))
    stream.close()

    chunks = list(client.chat.completions.create(model=MODEL, messages=turns("left"), stream=True))

    assert chunks[0].id == first.id
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected("left")
    assert httpx.get(f"{yard.url}/v1/jobs/{first.id.removeprefix('chatcmpl-')}").json()["attempt"] == 1


def test_the_same_key_for_another_request_is_a_conflict_that_is_not_tried_again(yard: Yard) -> None:
    """The SDK retries 409 unless it is told that it is of no use."""
    client = yard.client(default_headers={"Idempotency-Key": "taken"}, max_retries=5)
    client.chat.completions.create(model=MODEL, messages=turns("taken"))
    with pytest.raises(openai.ConflictError) as caught:
        client.chat.completions.create(model=MODEL, messages=turns("other"))

    assert caught.value.code == "idempotency_conflict"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, error, code, param",
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"logit_bias": {"50256": -100}}, openai.BadRequestError, "unsupported_parameter", "logit_bias"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown_parameter", "temprature"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": turns("x" * 150_000)}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": turns("x" * 150_000), "stream": True}, openai.BadRequestError, "context_length_exceeded", None),
        (
            {"extra_headers": {"Idempotency-Key": "k" * 201}},
            openai.BadRequestError,
            "invalid_header",
            "Idempotency-Key",
        ),
    ],
)
def test_errors_are_the_sdks_own_exceptions_and_say_what_is_wrong(
    yard: Yard, more: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str | None
) -> None:
    """Also of a stream, as long as nothing of it was told."""
    with pytest.raises(error) as caught:
        yard.client().chat.completions.create(**{"model": MODEL, "messages": turns("x"), **more})

    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"


def test_a_job_that_fails_for_good_is_a_server_error(yard: Yard) -> None:
    """The simulated engine fails prompts that begin so, each time."""
    with pytest.raises(openai.InternalServerError) as caught:
        yard.client().completions.create(model=MODEL, prompt="!fail", max_tokens=5)

    assert (caught.value.status_code, caught.value.code, caught.value.type) == (500, "engine_error", "server_error")


def test_an_answer_that_takes_too_long_names_the_job_and_the_sdks_own_retries_find_it(impatient: Yard) -> None:
    """Nothing is lost: under the same key it is waited for again, or the job is read by its id."""
    impatient.kill_worker()
    headers = {"Idempotency-Key": "slow"}
    with pytest.raises(openai.InternalServerError) as caught:
        impatient.client(default_headers=headers).chat.completions.create(model=MODEL, messages=turns("slow"))
    impatient.start_worker()
    patient = impatient.client(default_headers=headers, max_retries=50)
    answer = patient.chat.completions.create(model=MODEL, messages=turns("slow"))

    assert (caught.value.status_code, caught.value.code) == (504, "answer_timeout")
    job_id = answer.id.removeprefix("chatcmpl-")
    assert f"/v1/jobs/{job_id}" in caught.value.message
    assert answer.choices[0].message.content == expected("slow")


def test_what_is_no_id_and_what_is_nobodys_are_not_found(yard: Yard) -> None:
    """In the same words, so that nothing can be learned by guessing."""
    nobody = "99999999-9999-4999-8999-999999999999"
    for given in (f"resp_{nobody}", nobody, "x", f"resp_resp_{nobody}"):
        answer = httpx.get(f"{yard.url}/v1/responses/{given}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")

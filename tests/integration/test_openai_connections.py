"""Callers of OpenAI's routes that leave, and gateways that stop, over real sockets; the test is the worker."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from support.gateway import MODEL, PATIENCE_S, GatewayUnderTest, Running, gateway_running, settings_for

from codeyard.shared.job import job_id_for_key
from codeyard.shared.settings import Settings

CHAT = "/v1/chat/completions"
KEY = {"Idempotency-Key": "mine"}
JOB_ID = job_id_for_key("default", "mine")
ROUTE = 'codeyard_http_requests_total{route="POST /v1/chat/completions",status="499"}'


@pytest_asyncio.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
async def gateway(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[GatewayUnderTest]:
    """Both ways of running it."""
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        settings = settings_for(url, url, namespace)
    else:
        settings = settings_for(
            request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url"), namespace
        )
    async with gateway_running(settings) as running:
        yield running


def hasty(settings: Settings) -> Settings:
    """Of a gateway whose drain is over before any answer is."""
    return settings.model_copy(update={"gateway": settings.gateway.model_copy(update={"drain_s": 0.05})})


def body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}


async def ask(gateway: GatewayUnderTest, **more: Any) -> httpx.Response:
    return await gateway.http.post(CHAT, json=body(**more), headers=KEY)


async def taken(gateway: GatewayUnderTest) -> Running:
    """The job once it is accepted, as the worker that has it."""
    async with asyncio.timeout(PATIENCE_S):
        while (await gateway.store.read([JOB_ID]))[0] is None:  # nobody announces it; each look is a round trip
            pass
    return await gateway.claimed(JOB_ID)


async def comes_to(gateway: GatewayUnderTest, line: str, value: float) -> None:
    """Ask until it is so; each question is a round trip."""
    async with asyncio.timeout(PATIENCE_S):
        while await gateway.metric(line) != value:
            pass


def said(lines: list[str]) -> list[Any]:
    """The data of the frames, without what keeps the connection open."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def text(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if "choices" in chunk)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_before_the_answer_is_let_go_and_the_job_goes_on(
    gateway: GatewayUnderTest, stream: bool
) -> None:
    """Hanging up is no cancellation: the same key gets the answer later."""
    asking = asyncio.create_task(ask(gateway, stream=stream))
    job = await taken(gateway)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await comes_to(gateway, ROUTE, 1)
    await comes_to(gateway, "codeyard_waits_open", 0)

    await job.says("an ", "answer")
    await job.succeeds()
    answer = await ask(gateway)

    assert answer.json()["choices"][0]["message"]["content"] == "an answer"


async def test_a_reader_that_leaves_in_the_middle_leaves_nothing_behind(gateway: GatewayUnderTest) -> None:
    """Streams are counted down, and the job goes on without a reader."""
    async with asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(taken(gateway))
        async with gateway.http.stream("POST", CHAT, json=body(stream=True), headers=KEY) as answer:
            job = await worker
            lines = answer.aiter_lines()
            await job.says("one ")
            while '"one "' not in await anext(lines):
                pass
            assert await gateway.metric("codeyard_streams_open") == 1
    await comes_to(gateway, "codeyard_streams_open", 0)

    await job.says("two")
    await job.succeeds()
    again = said((await ask(gateway, stream=True)).text.splitlines())

    assert (text(again[:-1]), again[-1]) == ("one two", "[DONE]")


async def test_a_gateway_that_stops_ends_its_streams_in_an_error_and_another_has_all_of_it(
    gateway: GatewayUnderTest,
) -> None:
    """A rollout whose answers take longer than the drain: no reader takes half an answer for the whole."""
    async with gateway_running(hasty(gateway.settings)) as other, asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(taken(gateway))
        async with other.http.stream("POST", CHAT, json=body(stream=True), headers=KEY) as answer:
            job = await worker
            lines = answer.aiter_lines()
            await job.says("one ")
            while '"one "' not in await anext(lines):
                pass
            other.stop.set()
            async with asyncio.timeout(PATIENCE_S):
                rest = said([line async for line in lines])
    await job.says("two")
    await job.succeeds()
    again = said((await ask(gateway, stream=True)).text.splitlines())

    assert [one["error"]["code"] for one in rest] == ["gateway_stopping"]
    assert (text(again[:-1]), again[-1]) == ("one two", "[DONE]")


async def test_a_gateway_that_stops_tells_those_who_wait_to_come_again(gateway: GatewayUnderTest) -> None:
    """The SDK does so by itself, and finds its job under the key."""
    async with gateway_running(hasty(gateway.settings)) as other:
        asking = asyncio.create_task(ask(other))
        job = await taken(gateway)
        await comes_to(other, "codeyard_waits_open", 1)
        other.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            stopped = await asking
    await job.says("an answer")
    await job.succeeds()

    assert (stopped.status_code, stopped.json()["error"]["code"]) == (503, "gateway_stopping")
    assert stopped.headers["x-should-retry"] == "true"
    assert (await ask(gateway)).json()["choices"][0]["message"]["content"] == "an answer"


async def test_a_stream_begins_before_its_first_word_where_that_takes_long(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies and clients give up on answers without headers; a refusal after that is an event."""
    monkeypatch.setattr("codeyard.producer.gateway.openai.calls.FIRST_S", 0.05)
    async with gateway.http.stream("POST", CHAT, json=body(stream=True), headers=KEY) as answer:
        lines = answer.aiter_lines()
        begun = said([await anext(lines)])  # nobody has taken the job yet
        assert (await gateway.http.delete(f"/v1/jobs/{JOB_ID}")).json()["outcome"] == "cancelled"
        async with asyncio.timeout(PATIENCE_S):
            rest = said([line async for line in lines])

    assert answer.status_code == 200
    assert begun[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [one["error"]["code"] for one in rest] == ["job_cancelled"]

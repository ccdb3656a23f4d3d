"""Anthropic's routes without a socket: headers, lanes, refusals, over jobs that the test makes up."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from support.asgi import JOB_ID, MadeUpJob, MadeUpJobs, app_over, http_to, limits_over, status

from codeyard.producer.gateway.anthropic import handlers
from codeyard.producer.gateway.auth import Caller
from codeyard.shared.access.keys import Scope
from codeyard.shared.chat import Chat
from codeyard.shared.errors import (
    BrokerUnavailable,
    DeadlineTooSoon,
    FleetError,
    Forbidden,
    IdempotencyConflict,
    QueueFull,
    StoreUnavailable,
    Unauthorized,
    UnknownModel,
)
from codeyard.shared.job import Lane, Sampling
from codeyard.shared.record import Event, EventKind, Failure, Result, State, Usage
from codeyard.shared.settings import LimitSettings, TenantLimits

BODY = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
OLD = {"model": "tiny", "max_tokens_to_sample": 9, "prompt": "\n\nHuman: hi\n\nAssistant:"}
DONE = status(
    State.SUCCEEDED,
    last_seq=2,
    result=Result(
        state=State.SUCCEEDED,
        text="hello",
        finish_reason="stop",
        usage=Usage(prompt_tokens=7, completion_tokens=2),
    ),
)
EVENTS = [
    Event(seq=1, kind=EventKind.TOKENS, text="hello"),
    Event(seq=2, kind=EventKind.END, state=State.SUCCEEDED),
]


def jobs_done(**fields: Any) -> MadeUpJobs:
    return MadeUpJobs(**{"known": DONE, "events": EVENTS, **fields})


async def post(jobs: MadeUpJobs, body: Any = BODY, *, path: str = "/v1/messages", **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    async with http_to(app_over(jobs, **more)) as http:
        return await http.post(path, json=body, headers=headers)


async def test_a_message_is_a_job_and_the_answer_names_it() -> None:
    """Any gateway finds the job by the message's id."""
    jobs = jobs_done()

    answer = await post(jobs, headers={"Idempotency-Key": "k-1", "anthropic-version": "2023-06-01"})

    assert (answer.status_code, answer.json()["id"]) == (200, f"msg_{JOB_ID}")
    assert answer.headers["request-id"] == f"req_{JOB_ID}"
    [submitted] = jobs.submitted
    assert isinstance(submitted["prompt"], Chat)
    assert {name: submitted[name] for name in ("model", "lane", "idempotency_key", "sampling", "stream")} == {
        "model": "tiny",
        "lane": Lane.INTERACTIVE,
        "idempotency_key": "k-1",
        "sampling": Sampling(max_tokens=9),
        "stream": False,
    }


async def test_what_coding_agents_add_to_a_request_is_accepted() -> None:
    """`?beta=true` and the headers of the SDKs."""
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b-2025-02-02", "x-app": "cli"}

    assert (await post(jobs_done(), path="/v1/messages?beta=true", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "fields, header, lane",
    [
        ({}, None, Lane.INTERACTIVE),
        ({"service_tier": "standard_only"}, None, Lane.STANDARD),
        ({}, "bulk", Lane.BULK),
        ({"service_tier": "standard_only"}, "interactive", Lane.INTERACTIVE),
    ],
)
async def test_a_lane_is_chosen_by_tier_and_by_header(fields: Any, header: str | None, lane: Lane) -> None:
    """Anthropic has no word for bulk; its SDKs let one add a header."""
    jobs = jobs_done()

    await post(jobs, {**BODY, **fields}, headers={"x-codeyard-lane": header} if header else {})

    assert jobs.submitted[0]["lane"] is lane


async def test_a_job_of_the_bulk_lane_has_a_day_and_one_that_is_waited_for_an_hour() -> None:
    """What nobody waits for any more should not take the place of what somebody does."""
    jobs = jobs_done()

    await post(jobs)
    await post(jobs, headers={"x-codeyard-lane": "bulk"})

    assert [job["timeout_s"] for job in jobs.submitted] == [3_600.0, 86_400.0]


async def test_counting_is_a_job_without_tokens_that_answers_with_the_prompts() -> None:
    """Exact: the worker counts, by the model's own template."""
    jobs = jobs_done()

    answer = await post(jobs, {**BODY, "max_tokens": None}, path="/v1/messages/count_tokens")

    assert answer.json() == {"input_tokens": 7}
    assert (jobs.submitted[0]["sampling"], jobs.submitted[0]["lane"]) == (Sampling(max_tokens=0), Lane.INTERACTIVE)


async def test_the_old_form_is_answered_in_the_old_form() -> None:
    """It always stops at the next turn of the Human."""
    jobs = jobs_done()

    answer = await post(jobs, {**OLD, "stop_sequences": ["x"]}, path="/v1/complete")

    assert answer.json() == {
        "type": "completion",
        "id": f"compl_{JOB_ID}",
        "completion": "hello",
        "stop_reason": "stop_sequence",
        "stop": None,
        "model": "tiny",
    }
    assert jobs.submitted[0]["sampling"] == Sampling(max_tokens=9, stop=("\n\nHuman:", "x"))


@pytest.mark.parametrize("prompt", ["hi", "\n\nHuman: hi", "\n\nAssistant:", "\n\nAssistant: a\n\nHuman: b"])
async def test_a_text_without_its_turns_is_refused(prompt: str) -> None:
    """Nobody could say where the answer goes."""
    answer = await post(jobs_done(), {**OLD, "prompt": prompt}, path="/v1/complete")

    assert (answer.status_code, answer.json()["error"]["message"].partition(":")[0]) == (400, "prompt")


@pytest.mark.parametrize("path, body", [("/v1/messages", BODY), ("/v1/complete", OLD)])
async def test_a_stream_is_one_of_events_and_names_the_job(path: str, body: Any) -> None:
    """The headers are the same as without."""
    answer = await post(jobs_done(), {**body, "stream": True}, path=path)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["request-id"] == f"req_{JOB_ID}"
    assert "hello" in answer.text


async def test_a_silent_stream_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies cut what says nothing for a minute."""
    monkeypatch.setattr(handlers, "FIRST_S", 0.0)
    stopping = asyncio.Event()
    jobs = MadeUpJobs(endless=True)
    async with http_to(app_over(jobs, stopping=stopping, heartbeat_s=0.0)) as http:
        asked = asyncio.create_task(http.post("/v1/messages", json={**BODY, "stream": True}))
        while not jobs.submitted:  # noqa: ASYNC110 - the app runs in this loop
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        stopping.set()
        text = (await asked).text

    assert text.count('event: ping\ndata: {"type":"ping"}\n\n') > 2
    assert text.index("message_start") < text.index("ping")


async def test_a_gateway_that_stops_ends_its_streams_with_an_error() -> None:
    """The SDK would take a mere end for the whole message."""
    stopping = asyncio.Event()
    jobs = MadeUpJobs(events=EVENTS[:1], endless=True)
    async with http_to(app_over(jobs, stopping=stopping)) as http:
        asked = asyncio.create_task(http.post("/v1/messages", json={**BODY, "stream": True}))
        while not jobs.submitted:  # noqa: ASYNC110 - the app runs in this loop
            await asyncio.sleep(0)
        stopping.set()
        text = (await asked).text

    assert text.rpartition("event: ")[2].startswith('error\ndata: {"type":"error","error":{"type":"overloaded_error"')


async def test_a_gateway_that_stops_sends_those_who_wait_elsewhere() -> None:
    """Another one answers the same request; the job goes on."""
    stopping = asyncio.Event()
    stopping.set()

    answer = await post(MadeUpJobs(), stopping=stopping)

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert f"/v1/jobs/{JOB_ID}" in answer.json()["error"]["message"]


@pytest.mark.parametrize("key, retry", [(None, "false"), ("k-1", "true")])
async def test_an_answer_that_takes_too_long_says_where_it_will_be(key: str | None, retry: str) -> None:
    """Without a key the SDK's own second try would be a second job."""
    answer = await post(MadeUpJobs(), answer_wait_s=0.01, headers={"Idempotency-Key": key} if key else {})

    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, retry)
    assert f"/v1/jobs/{JOB_ID}" in answer.json()["error"]["message"]


TOO_LONG = status(
    State.FAILED,
    last_seq=1,
    result=Result(state=State.FAILED, error=Failure(code="prompt_too_long", message="because")),
)


class EndsAtOnce(MadeUpJobs):
    """Its job is accepted, and then fails before it says a word."""

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        job = await super().submit(prompt, **fields)
        self.known = TOO_LONG
        return job


@pytest.mark.parametrize(
    "jobs",
    [
        EndsAtOnce(events=[Event(seq=1, kind=EventKind.END)]),
        MadeUpJobs(known=TOO_LONG, events=[Event(seq=1, kind=EventKind.TOKENS, text="a")], endless=True),
    ],
)
async def test_a_stream_that_is_over_before_it_begins_is_a_status(jobs: MadeUpJobs) -> None:
    """The SDKs raise by the status, and not every one looks into an event. Also of a job that was there already."""
    answer = await post(jobs, {**BODY, "stream": True})

    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "because (prompt_too_long)")


async def test_a_store_that_is_gone_before_a_stream_begins_is_a_status() -> None:
    """There it can still be said so."""

    class Gone(MadeUpJobs):
        async def stream(self, job_id: str, after: int = 0) -> AsyncGenerator[Event, None]:
            raise StoreUnavailable("gone")
            yield

    answer = await post(Gone(), {**BODY, "stream": True})

    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "api_error")


@pytest.mark.parametrize(
    "error, expected",
    [
        (UnknownModel("tiny"), (404, "not_found_error")),
        (IdempotencyConflict(JOB_ID), (409, "invalid_request_error")),
        (QueueFull("q", retry_after_s=3), (529, "overloaded_error")),
        (DeadlineTooSoon(estimated_start_s=90, timeout_s=60), (529, "overloaded_error")),
        (BrokerUnavailable("down"), (503, "api_error")),
        (StoreUnavailable("down"), (503, "api_error")),
    ],
)
@pytest.mark.parametrize(
    "path, body", [("/v1/messages", BODY), ("/v1/messages/count_tokens", BODY), ("/v1/complete", OLD)]
)
async def test_a_refusal_is_an_error_body_with_the_status_its_clients_know(
    error: FleetError, expected: tuple[int, str], path: str, body: Any
) -> None:
    """On every route."""
    answer = await post(MadeUpJobs(error=error), body, path=path)

    document = answer.json()
    assert (answer.status_code, document["error"]["type"]) == expected
    assert document["type"] == "error"
    assert document["request_id"] == answer.headers["request-id"]
    assert set(document) == {"type", "error", "request_id"}
    assert answer.headers["content-type"] == "application/json"


async def test_what_may_go_better_later_says_when_and_what_may_not_says_so() -> None:
    """The SDKs go by these two headers."""
    full = await post(MadeUpJobs(error=QueueFull("q", retry_after_s=3)))
    conflict = await post(MadeUpJobs(error=IdempotencyConflict(JOB_ID)))

    assert (full.headers["retry-after"], full.headers.get("x-should-retry")) == ("3", None)
    assert (conflict.headers.get("retry-after"), conflict.headers["x-should-retry"]) == (None, "false")


@pytest.mark.parametrize(
    "code, expected", [("prompt_too_long", (400, "invalid_request_error")), ("engine_error", (500, "api_error"))]
)
@pytest.mark.parametrize(
    "path, body", [("/v1/messages", BODY), ("/v1/messages/count_tokens", BODY), ("/v1/complete", OLD)]
)
async def test_a_job_that_failed_is_an_error_that_is_not_tried_again(
    code: str, expected: tuple[int, str], path: str, body: Any
) -> None:
    """The worker tried it as often as it may; the SDKs would try again whatever is 500."""
    failed = Result(state=State.FAILED, error=Failure(code=code, message="because"))

    answer = await post(MadeUpJobs(known=status(State.FAILED, result=failed)), body, path=path)

    assert (answer.status_code, answer.json()["error"]) == (
        expected[0],
        {"type": expected[1], "message": f"because ({code})"},
    )
    assert answer.headers["x-should-retry"] == "false"


class _Nobody:
    def __init__(self, error: FleetError) -> None:
        self._error = error

    async def caller(self, authorization: Any, api_key: Any) -> Caller:
        raise self._error


@pytest.mark.parametrize(
    "error, expected",
    [
        (Unauthorized("no credentials"), (401, "authentication_error")),
        (Forbidden("no scope"), (403, "permission_error")),
    ],
)
async def test_who_may_not_is_told_in_the_same_words(error: FleetError, expected: tuple[int, str]) -> None:
    """Before the body is read."""
    answer = await post(jobs_done(), auth=_Nobody(error))

    assert (answer.status_code, answer.json()["error"]["type"]) == expected
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_key_that_may_only_read_submits_nothing() -> None:
    """A message costs what a job costs."""

    class Reader:
        async def caller(self, authorization: Any, api_key: Any) -> Caller:
            return Caller("default", frozenset({Scope.READ}), "reader")

    jobs = jobs_done()

    assert (await post(jobs, auth=Reader())).status_code == 403
    assert jobs.submitted == []


async def test_limits_are_told_in_anthropics_headers() -> None:
    """With every answer, and with the refusal when one is reached."""
    limits = limits_over(LimitSettings(tenants={"default": TenantLimits(requests_per_minute=60, requests_burst=1)}))
    async with http_to(app_over(jobs_done(), limits=limits)) as http:
        first = await http.post("/v1/messages", json=BODY)
        second = await http.post("/v1/messages", json=BODY)

    assert first.headers["anthropic-ratelimit-requests-limit"] == "1"
    assert first.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert (second.status_code, second.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(second.headers["retry-after"]) >= 1
    assert "anthropic-ratelimit-requests-reset" in second.headers


@pytest.mark.parametrize(
    "headers, content, expected",
    [
        ({}, b"{", (400, "invalid_request_error")),
        ({"content-type": "text/plain"}, b"{}", (415, "invalid_request_error")),
        ({}, b'{"x":"' + b"y" * 3_000 + b'"}', (413, "request_too_large")),
        ({"idempotency-key": " "}, b"{}", (400, "invalid_request_error")),
        ({"x-codeyard-lane": "fast"}, None, (400, "invalid_request_error")),
    ],
)
async def test_a_request_that_is_wrong_as_such_is_refused_in_the_same_words(
    headers: dict[str, str], content: bytes | None, expected: tuple[int, str]
) -> None:
    """Size, type, header, JSON."""
    async with http_to(app_over(jobs_done(), max_body_bytes=2_000)) as http:
        sent = {"content": content} if content is not None else {"json": BODY}
        answer = await http.post(
            "/v1/messages",
            headers={**({"content-type": "application/json"} if content else {}), **headers},
            **sent,
        )

    assert (answer.status_code, answer.json()["error"]["type"]) == expected


async def test_submissions_are_counted_by_how_they_went() -> None:
    """One metric for every API."""
    async with http_to(app_over(jobs_done())) as http:
        await http.post("/v1/messages", json=BODY)
        await http.post("/v1/messages", json={})
        text = (await http.get("/metrics")).text

    assert 'codeyard_submissions_total{lane="interactive",outcome="accepted"} 1.0' in text
    assert 'codeyard_submissions_total{lane="unknown",outcome="invalid-job"} 1.0' in text

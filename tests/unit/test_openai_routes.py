"""OpenAI's routes over jobs that a test makes up: what the simulated engine cannot be brought to say."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.asgi import JOB_ID, MadeUpJob, MadeUpJobs, app_over, http_to, limits_over, status
from support.tokens import STATIC, MadeUpKeys, auth_settings

from codeyard.producer.gateway.auth import Credentials
from codeyard.producer.gateway.keys import ApiKeys
from codeyard.producer.gateway.openai.parameters import ROWS, TABLE, Api, Use
from codeyard.shared.chat import Chat, TokenLogprob, ToolCall, ToolCallDelta
from codeyard.shared.errors import (
    BrokerUnavailable,
    DeadlineTooSoon,
    FleetError,
    IdempotencyConflict,
    JobTooLarge,
    QueueFull,
    StoreUnavailable,
    UnknownModel,
)
from codeyard.shared.record import Event, EventKind, Failure, JobStatus, Result, State, Usage
from codeyard.shared.settings import LimitSettings
from codeyard.shared.store.port import CancelVerdict

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "weather"}}
END = Event(seq=9, kind=EventKind.END, state=State.SUCCEEDED)


def done(text: str = "ab", **more: Any) -> JobStatus:
    usage = Usage(prompt_tokens=2, completion_tokens=3)
    result = Result(**{"state": State.SUCCEEDED, "text": text, "finish_reason": "stop", "usage": usage, **more})
    return status(State.SUCCEEDED, result=result, last_seq=9)


def ended(state: State, code: str) -> JobStatus:
    return status(state, result=Result(state=state, error=Failure(code=code, message="why")), last_seq=9)


def tokens(text: str, **more: Any) -> Event:
    return Event(seq=1, kind=EventKind.TOKENS, text=text, **more)


class Speaking(MadeUpJobs):
    """A job that is running when it is asked for, says its events, and is `then` as it ended."""

    def __init__(self, *events: Event, then: JobStatus | None = None, there: int = 0) -> None:
        """`there`: how many events there are before the caller comes."""
        numbered = [event.model_copy(update={"seq": seq}) for seq, event in enumerate(events, start=1)]
        super().__init__(known=then or done(), events=numbered)
        self._accepted = status(State.RUNNING, last_seq=there)

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        job = await super().submit(prompt, **fields)
        return MadeUpJob(job.id, False, self._accepted)


async def asked(
    jobs: MadeUpJobs, path: str = CHAT, *, headers: Mapping[str, str] | None = None, **body: Any
) -> httpx.Response:
    async with http_to(app_over(jobs)) as http:
        return await http.post(path, json={**ASK, **body} if path == CHAT else body, headers=headers)


async def streamed(jobs: MadeUpJobs, path: str = CHAT, **body: Any) -> list[Any]:
    """The data of each frame; `[DONE]` as it is."""
    answer = await asked(jobs, path, stream=True, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame]
    return [frame if frame == "[DONE]" else json.loads(frame) for frame in frames]


# Streams -------------------------------------------------------------------------------------------


async def test_calls_of_tools_stream_as_their_pieces_come() -> None:
    """The first piece has id and name; all arguments joined are the call's."""
    first = ToolCallDelta(index=0, id="call_1", name="weather", arguments="")
    call = ToolCall(id="call_1", name="weather", arguments='{"city":"Oslo"}')
    jobs = Speaking(
        tokens("Look. ", content="Look. "),
        tokens("<t>", content="", tool_calls=(first, ToolCallDelta(index=0, arguments='{"city"'))),
        tokens("x", content="", tool_calls=(ToolCallDelta(index=0, arguments=':"Oslo"}'),)),
        END,
        then=done("Look. <t>x", content="Look. ", tool_calls=(call,)),
    )
    *chunks, last = await streamed(jobs, tools=[TOOL])

    assert last == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Look. "},
        {
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
                {"index": 0, "function": {"arguments": '{"city"'}},
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": ':"Oslo"}'}}]},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "tool_calls"]


async def test_log_probabilities_stream_with_their_text() -> None:
    """Offsets of a completion go on over the chunks."""
    one, two = (TokenLogprob(token_id=n, text=text, logprob=-n) for n, text in ((1, "ab"), (2, "c")))
    events = (tokens("ab", logprobs=(one,)), tokens("c", logprobs=(two,)), END)
    chat = await streamed(Speaking(*events), logprobs=True)
    text = await streamed(Speaking(*events), "/v1/completions", model="tiny", prompt="x", logprobs=1)

    assert [token["token"] for chunk in chat[1:3] for token in chunk["choices"][0]["logprobs"]["content"]] == [
        "ab",
        "c",
    ]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in text[:2]] == [[0], [2]]
    assert text[2]["choices"][0]["logprobs"] is None


async def test_text_that_was_told_cannot_be_taken_back_so_the_stream_ends_in_an_error_event() -> None:
    """The SDK raises it; what follows would be another text."""
    jobs = Speaking(tokens("lost "), Event(seq=2, kind=EventKind.RESTARTED), tokens("found"), END)
    *chunks, last = await streamed(jobs)

    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "lost "]
    assert last["error"]["code"] == "generation_restarted"
    assert last["error"]["type"] == "server_error"


@pytest.mark.parametrize("there", [0, 2, 3, 4])
async def test_what_begins_again_before_anything_was_told_goes_unnoticed(there: int) -> None:
    """Also to a caller that comes back after the error: it gets what counts, and only that."""
    lost = [tokens("lost ")] if there else []
    jobs = Speaking(*lost, Event(seq=2, kind=EventKind.RESTARTED), tokens("found"), END, there=there)
    *chunks, last = await streamed(jobs)

    assert last == "[DONE]"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "found", None]


async def test_a_job_that_fails_before_its_first_word_is_a_status_and_not_an_event() -> None:
    """So that a prompt that is too long is a BadRequestError, streamed or not."""
    jobs = Speaking(END, then=ended(State.FAILED, "prompt_too_long"))
    answer = await asked(jobs, stream=True)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"] == JOB_ID


@pytest.mark.parametrize("state, code", [(State.CANCELLED, "job_cancelled"), (State.EXPIRED, "job_expired")])
async def test_a_job_that_ends_badly_in_the_middle_ends_the_stream_in_an_error_event(state: State, code: str) -> None:
    """Without `[DONE]`: nobody takes it for the whole."""
    *_, last = await streamed(Speaking(tokens("some"), END, then=ended(state, "why")))

    assert last["error"]["code"] == code


async def test_a_store_that_goes_away_in_the_middle_is_an_error_event() -> None:
    """The headers are out, so the status cannot say it."""

    class Lost(Speaking):
        async def status(self, job_id: str) -> JobStatus:
            if self.submitted and job_id == JOB_ID:
                raise StoreUnavailable("gone")
            return await super().status(job_id)

    *_, last = await streamed(Lost(tokens("some"), END))

    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "store_unavailable")


async def test_a_gateway_that_stops_says_so_in_its_last_event() -> None:
    """A stream that just ends looks like an answer that is complete."""
    stopping = asyncio.Event()
    jobs = Speaking(tokens("some"))
    jobs.endless = True

    async with http_to(app_over(jobs, stopping=stopping)) as http:
        answering = asyncio.create_task(http.post(CHAT, json={**ASK, "stream": True}))
        while not jobs.submitted:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        stopping.set()
        answer = await answering

    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "gateway_stopping"


# Whole answers -------------------------------------------------------------------------------------


async def test_what_is_asked_for_is_what_is_submitted() -> None:
    """The choices under keys of their own."""
    jobs = MadeUpJobs(known=done())
    await asked(
        jobs,
        headers={"Idempotency-Key": "mine", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01"},
        n=2,
        service_tier="priority",
        metadata={"a": "b"},
        max_tokens=7,
    )

    assert [one["idempotency_key"] for one in jobs.submitted] == ["mine", "mine\u00b71"]
    for one in jobs.submitted:
        assert isinstance(one["prompt"], Chat)
        assert (one["lane"], one["metadata"], one["stream"]) == ("interactive", {"a": "b"}, False)
        assert one["traceparent"] == f"00-{'1' * 32}-{'2' * 16}-01"
        assert one["sampling"].max_tokens == 7


@pytest.mark.parametrize("key, cancelled", [(None, [JOB_ID]), ("mine", [])])
async def test_choices_whose_request_was_refused_half_way_are_let_go_unless_a_key_finds_them(
    key: str | None, cancelled: list[str]
) -> None:
    """Nobody was told of them."""

    class Half(MadeUpJobs):
        asked_for: list[str]

        async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
            if self.submitted:
                raise QueueFull("q", retry_after_s=3)
            return await super().submit(prompt, **fields)

        async def cancel(self, job_id: str) -> CancelVerdict:
            self.asked_for.append(job_id)
            return CancelVerdict.CANCELLED

    jobs = Half()
    jobs.asked_for = []
    answer = await asked(jobs, n=2, headers={"Idempotency-Key": key} if key else {})

    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert jobs.asked_for == cancelled


@pytest.mark.parametrize("keyed", [False, True])
async def test_an_answer_that_does_not_come_in_time_is_tried_again_only_under_a_key(keyed: bool) -> None:
    """Without one the SDK's second try would be a second job."""
    jobs = MadeUpJobs()
    async with http_to(app_over(jobs, answer_wait_s=0.01)) as http:
        answer = await http.post(CHAT, json=ASK, headers={"Idempotency-Key": "k"} if keyed else {})

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "answer_timeout")
    assert f"/v1/jobs/{JOB_ID}" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == str(keyed).lower()


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, name",
    [
        (UnknownModel("big"), 404, "model_not_found"),
        (IdempotencyConflict(JOB_ID), 409, "idempotency_conflict"),
        (JobTooLarge("long", field="prompt"), 413, "request_too_large"),
        (QueueFull("q", retry_after_s=3), 429, "queue_full"),
        (DeadlineTooSoon(estimated_start_s=9, timeout_s=1), 429, "deadline_too_soon"),
        (BrokerUnavailable("down"), 503, "broker_unavailable"),
        (StoreUnavailable("down"), 503, "store_unavailable"),
    ],
)
async def test_every_refusal_is_in_openais_body_with_the_problems_status(
    error: FleetError, code: int, name: str
) -> None:
    """And `Retry-After` where the problem has one."""
    answer = await asked(MadeUpJobs(error=error))

    assert (answer.status_code, answer.json()["error"]["code"]) == (code, name)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert ("retry-after" in answer.headers) == (code in (429, 503))


async def test_limits_answer_with_openais_headers_and_so_do_answers() -> None:
    """Clients pace themselves by them."""
    limits = limits_over(LimitSettings(requests_per_minute=1))
    async with http_to(app_over(MadeUpJobs(known=done()), limits=limits)) as http:
        first, second = [await http.post(CHAT, json=ASK) for _ in range(2)]

    assert (first.status_code, second.status_code) == (200, 429)
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert second.headers["x-ratelimit-limit-requests"] == "1"
    assert int(second.headers["retry-after"]) >= 1
    assert second.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }


async def test_strangers_are_told_in_openais_words() -> None:
    """AuthenticationError, and not a document the SDK cannot read."""
    auth = auth_settings(static_key=STATIC)
    app = app_over(MadeUpJobs(known=done()), auth=Credentials(auth, ApiKeys(MadeUpKeys(), cache_s=5), None))
    async with http_to(app) as http:
        stranger = await http.post(CHAT, json=ASK)
        known = await http.post(CHAT, json=ASK, headers={"Authorization": f"Bearer {STATIC}"})

    assert (stranger.status_code, stranger.json()["error"]["code"]) == (401, "invalid_api_key")
    assert stranger.headers["www-authenticate"] == 'Bearer realm="codeyard"'
    assert known.status_code == 200


@pytest.mark.parametrize(
    "headers, content, code",
    [
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Content-Type": "application/json"}, b"{", 400),
        ({"Content-Type": "application/json"}, b"x" * 3_000, 413),
        ({"Content-Type": "application/json", "Idempotency-Key": " "}, b"{}", 400),
    ],
)
async def test_requests_that_are_no_requests_are_refused_in_openais_body(
    headers: dict[str, str], content: bytes, code: int
) -> None:
    """Before anything is submitted."""
    jobs = MadeUpJobs()
    async with http_to(app_over(jobs, max_body_bytes=2_000)) as http:
        for path in (CHAT, "/v1/completions", "/v1/responses"):
            answer = await http.post(path, content=content, headers=headers)
            assert answer.status_code == code
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert jobs.submitted == []


NAMES = sorted({name for rows in ROWS.values() for name in rows} | {"type", "role", "content", "function", "name"})
REFUSED = next(row for row in TABLE if row.use is Use.REFUSED)
NOBODY_SERVES = app_over(MadeUpJobs(error=UnknownModel("tiny")))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "path, api", [(CHAT, Api.CHAT), ("/v1/completions", Api.COMPLETIONS), ("/v1/responses", Api.RESPONSES)]
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_no_body_whatever_gets_more_than_a_refusal(path: str, api: Api, data: st.DataObject) -> None:
    """Begun from a good one, a few parameters wrong: deeper than random bytes come."""
    good: dict[str, Any] = {"model": "tiny", "messages": ASK["messages"], "prompt": "x", "input": "x"}
    body = {
        name: value
        for name, value in good.items()
        if name in ROWS[api] and (name != "prompt" or api is Api.COMPLETIONS)
    }
    body |= data.draw(st.dictionaries(st.sampled_from(sorted(ROWS[api])), VALUES, max_size=4))
    async with http_to(NOBODY_SERVES) as http:
        answer = await http.post(path, json=body)

    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

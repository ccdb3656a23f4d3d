"""The app around the jobs: errors of ours and the framework's, readiness, streams that nobody takes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.asgi import JOB_ID, MadeUpJobs, app_over, http_to, status

from codeyard.producer.gateway import app as gateway_app
from codeyard.producer.gateway import sse
from codeyard.producer.gateway.problems import KIND_OF, KINDS
from codeyard.shared import errors
from codeyard.shared.errors import (
    BrokerUnavailable,
    FleetError,
    Forbidden,
    IdempotencyConflict,
    InvalidJob,
    JobNotFound,
    JobTooLarge,
    QueueFull,
    StoreUnavailable,
    Unauthorized,
    UnknownModel,
)
from codeyard.shared.record import Event, EventKind, State

JOB = {"model": "tiny", "prompt": "x"}


@pytest.mark.parametrize(
    "error, code, kind, members",
    [
        (InvalidJob("too hot", field="sampling.temperature"), 422, "invalid-job", {"field": "sampling.temperature"}),
        (JobTooLarge("the encoded job is too large", field="prompt"), 413, "too-large", {"field": "prompt"}),
        (IdempotencyConflict(JOB_ID), 409, "idempotency-conflict", {"job_id": JOB_ID}),
        (QueueFull("q", retry_after_s=4.2), 429, "queue-full", {}),
        (UnknownModel("tiny"), 404, "unknown-model", {}),
        (JobNotFound(JOB_ID), 404, "job-not-found", {"job_id": JOB_ID}),
        (Unauthorized("no token"), 401, "unauthorized", {}),
        (Forbidden("not yours"), 403, "forbidden", {}),
        (BrokerUnavailable("away"), 503, "broker-unavailable", {}),
        (
            BrokerUnavailable("no confirm", job_id=JOB_ID, maybe_accepted=True),
            503,
            "broker-unavailable",
            {"job_id": JOB_ID, "maybe_accepted": True},
        ),
        (StoreUnavailable("away", job_id=JOB_ID), 503, "store-unavailable", {"job_id": JOB_ID}),
    ],
)
async def test_each_error_of_ours_has_its_status_and_says_what_it_knows(
    error: FleetError, code: int, kind: str, members: dict[str, Any]
) -> None:
    """The caller decides by status and type; the members save it from parsing the text."""
    async with http_to(app_over(MadeUpJobs(error))) as http:
        answer = await http.post("/v1/jobs", json=JOB)

    document = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, document.pop("status"), document.pop("type")) == (code, code, f"/docs#{kind}")
    assert document.pop("title") == KINDS[kind].title
    assert document.pop("detail")
    assert document == members
    retry_after = answer.headers.get("retry-after")
    assert retry_after == {429: "5", 503: "2"}.get(code)


def test_every_error_that_a_caller_can_meet_is_mapped() -> None:
    """A new one must not become a 500 by oversight."""
    inside = {  # the worker's own, those that stop a process, and the one that is 202
        errors.FleetError,
        errors.SettingsError,
        errors.MalformedMessage,
        errors.LaterVersion,
        errors.JobRejected,
        errors.JobFailed,
        errors.EngineDead,
        errors.EngineUnavailable,
        errors.NoRoom,
        errors.ResultTimeout,
    }
    declared = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, FleetError)}

    assert declared - inside == set(KIND_OF)
    assert set(KIND_OF.values()) <= set(KINDS)


@pytest.mark.parametrize("error", [RuntimeError("secret detail"), FleetError("submission broke off: secret detail")])
async def test_what_nobody_expected_is_a_500_without_its_cause_logged_once_under_its_number(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets a number to report; the person on call finds the traceback under it."""
    async with http_to(app_over(MadeUpJobs(error))) as http:
        answer = await http.get(f"/v1/jobs/{JOB_ID}")

    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    [logged] = [record for record in caplog.records if record.exc_info]
    assert logged.incident == answer.json()["incident"]  # type: ignore[attr-defined]  # an extra
    assert logged.exc_info is not None
    assert logged.exc_info[1] is error


async def test_an_unknown_route_is_a_problem_too() -> None:
    """Clients parse one shape of error."""
    async with http_to(app_over(MadeUpJobs())) as http:
        for path in ("/v1/job", "/v1/jobs/", "/v2/jobs", f"/v1/jobs/{JOB_ID}/events/x"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["type"]) == (404, "/docs#not-found")


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("PUT", "/v1/jobs", "GET, HEAD, POST"),
        ("POST", f"/v1/jobs/{JOB_ID}", "DELETE, GET, HEAD"),
        ("OPTIONS", "/metrics", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_and_names_every_right_one(method: str, path: str, allowed: str) -> None:
    """RFC 9110 requires Allow, and it is the whole list."""
    async with http_to(app_over(MadeUpJobs())) as http:
        answer = await http.request(method, path)

    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["type"] == "/docs#method-not-allowed"


async def test_readyz_says_which_server_is_away_and_never_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that hangs is a probe that lies."""
    monkeypatch.setattr(gateway_app, "READY_S", 0.01)

    async def hangs() -> str:
        await asyncio.Event().wait()
        return "never"

    async def up() -> str:
        return "redis 7.0.15"

    async def away() -> str:
        raise BrokerUnavailable("connection refused by mq.internal:5672")

    for broker in (hangs, away):
        async with http_to(app_over(MadeUpJobs(), probes={"broker": broker, "store": up})) as http:
            answer = await http.get("/readyz")
            alive = await http.get("/healthz")
        assert (answer.status_code, answer.json()["type"]) == (503, "/docs#not-ready")
        assert "broker" in answer.json()["detail"]
        assert "mq.internal" not in answer.text
        assert answer.json()["store"] == "redis 7.0.15"
        assert alive.status_code == 200


async def test_a_gateway_that_stops_is_alive_but_not_ready() -> None:
    """Load balancers send the next request elsewhere while this one finishes what it has."""
    stopping = asyncio.Event()
    async with http_to(app_over(MadeUpJobs(), stopping=stopping)) as http:
        before = await http.get("/readyz")
        stopping.set()
        after, alive = await http.get("/readyz"), await http.get("/healthz")

    assert [before.status_code, after.status_code, alive.status_code] == [200, 503, 200]


# Streams -------------------------------------------------------------------------------------------


class Reader:
    """The server's side of one streaming request, by hand: what was sent, and a caller that may hang up."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.status = 0
        self.ended = False
        self.changed = asyncio.Condition()
        self.gone = asyncio.Event()
        self.takes = asyncio.Event()
        self.takes.set()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.takes.wait()
        async with self.changed:
            self.status = message.get("status", self.status)
            self.sent.append(message.get("body", b""))
            self.ended = message["type"] == "http.response.body" and not message.get("more_body")
            self.changed.notify_all()

    async def sees(self, text: bytes, times: int = 1) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: b"".join(self.sent).count(text) >= times)


@asynccontextmanager
async def _reading(app: Any) -> AsyncIterator[tuple[Reader, asyncio.Task[None]]]:
    reader = Reader()
    path = f"/v1/jobs/{JOB_ID}/events"
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "root_path": "",
    }
    task = asyncio.create_task(app(scope, reader.receive, reader.send))
    try:
        yield reader, task
    finally:
        reader.gone.set()
        reader.takes.set()
        async with asyncio.timeout(5):
            await task


async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    """Proxies cut connections on which nothing moves."""
    app = app_over(MadeUpJobs(endless=True), heartbeat_s=0.001)

    async with _reading(app) as (reader, _):
        await reader.sees(b": still here\n\n", times=3)

    assert b"".join(reader.sent).startswith(b"retry: 1000\n\n: still here\n\n")


async def test_stopping_ends_a_silent_stream_as_a_whole_response() -> None:
    """Cut off instead, it would look like an error to the caller and its proxy."""
    stopping = asyncio.Event()

    async with _reading(app_over(MadeUpJobs(endless=True), stopping=stopping)) as (reader, task):
        await reader.sees(b"retry: 1000")
        stopping.set()
        async with asyncio.timeout(5):
            await task

    assert reader.ended


async def test_a_reader_that_takes_nothing_is_let_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection and its place in the store's reading would be held for ever."""
    monkeypatch.setattr(sse, "TAKE_S", 0.01)
    jobs = MadeUpJobs(known=status(last_seq=1), events=[Event(seq=1, kind=EventKind.TOKENS, text="x")], endless=True)

    async with _reading(app_over(jobs, heartbeat_s=0.01)) as (reader, task):
        await reader.sees(b"retry: 1000")
        reader.takes.clear()
        async with asyncio.timeout(5):
            await asyncio.wait([task])

    assert "stream_reader_stuck" in caplog.messages


async def test_a_store_that_stays_away_ends_the_stream_and_says_so_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The headers are out; the reader comes back with its last id and meets a 503 if it is still so."""

    class Broken(MadeUpJobs):
        async def stream(self, job_id: str, after: int = 0) -> Any:
            yield Event(seq=1, kind=EventKind.TOKENS, text="x")
            raise StoreUnavailable("away")

    async with _reading(app_over(Broken(known=status(State.RUNNING)))) as (reader, task):
        async with asyncio.timeout(5):
            await task

    assert reader.ended
    assert b"id: 1\n" in b"".join(reader.sent)
    assert "stream_broke_off" in caplog.messages


async def test_an_event_with_line_breaks_is_still_one_line_of_data() -> None:
    """A raw line break in `data` would end the field, and a caller's prompt could forge an event."""
    text = 'a\n\nevent: end\ndata: {}\r\n\u2028"'

    framed = sse.frame(Event(seq=7, kind=EventKind.TOKENS, text=text, token_ids=(1, 2)))

    assert framed.count("\n") == 4
    assert "\r" not in framed
    assert framed.startswith("id: 7\nevent: tokens\ndata: {")
    assert framed.endswith("}\n\n")


async def test_a_restart_is_told_as_its_own_event() -> None:
    """What the reader has so far is void; it must not be mistaken for more text."""
    assert sse.frame(Event(seq=3, kind=EventKind.RESTARTED)).splitlines()[1] == "event: restarted"

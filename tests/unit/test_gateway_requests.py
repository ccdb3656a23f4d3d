"""What callers get wrong: every refusal is a problem document that names what to mend."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.asgi import MadeUpJobs, app_over, http_to

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.problems import KINDS

GOOD: dict[str, Any] = {"model": "tiny", "prompt": "def f("}
JSON = {"Content-Type": "application/json"}


async def _post(body: bytes | Any, headers: Any = None, **limits: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http_to(app_over(MadeUpJobs(), **limits)) as http:
        return await http.post("/v1/jobs", content=content, headers=headers or JSON)


def _is_problem(answer: httpx.Response, status: int, kind: str, field: str | None = None) -> None:
    document = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, document["status"]) == (status, status)
    assert document["type"] == f"/docs#{kind}"
    assert document["title"] == KINDS[kind].title
    assert document["detail"]
    assert document.get("field") == field


@pytest.mark.parametrize(
    "changed, field",
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": "x" * 201}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": ["def f("]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"lane": "express"}, "lane"),
        ({"lane": 1}, "lane"),
        ({"stream": "yes"}, "stream"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "60"}, "timeout_s"),
        ({"timeout_s": 604_801}, "timeout_s"),
        ({"metadata": []}, "metadata"),
        ({"sampling": {"temperature": 2.1}}, "sampling.temperature"),
        ({"sampling": {"max_tokens": -1}}, "sampling.max_tokens"),
        ({"sampling": {"stop": ["ok", ""]}}, "sampling.stop.1"),
        ({"sampling": {"temprature": 1}}, "sampling.temprature"),
        ({"sampling": "greedy"}, "sampling"),
        ({"temperature": 1}, "temperature"),
        ({"id": "mine"}, "id"),
    ],
)
async def test_a_wrong_field_is_422_and_named(changed: dict[str, Any], field: str) -> None:
    """The caller mends one thing, and knows which."""
    _is_problem(await _post({**GOOD, **changed}), 422, "invalid-job", field)


async def test_all_wrong_fields_are_listed_at_once() -> None:
    """Mending a request field by field, one answer each, is tedious."""
    answer = await _post({"lane": "express", "prompt": 1, "sampling": {"top_p": 7, "top_k": 0}})

    listed = {error["field"] for error in answer.json()["errors"]}
    assert listed == {"model", "prompt", "lane", "sampling.top_p", "sampling.top_k"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny"',
        b'{"model": tiny}',
        b"\xff\xfe{}",
        b'{"model":"tiny","prompt":"\\ud800"}',
        b"[" * 100_000,
        b'{"model":"tiny","prompt":"x"} trailing',
    ],
)
async def test_what_is_not_json_is_400(body: bytes) -> None:
    """Not a field that is wrong, but the whole."""
    _is_problem(await _post(body), 400, "malformed-json")


@pytest.mark.parametrize("body", [b"[]", b"null", b"7", b'"def f("'])
async def test_json_that_is_not_an_object_is_422(body: bytes) -> None:
    """JSON it is, but not a job."""
    _is_problem(await _post(body), 422, "invalid-job", "body")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
async def test_a_number_that_json_cannot_say_does_not_get_in(number: str) -> None:
    """It could be stored here and read by nobody else."""
    body = f'{{"model":"tiny","prompt":"x","metadata":{{"n":{number}}}}}'.encode()

    answer = await _post(body)

    assert answer.status_code in (400, 422)
    assert answer.json()["type"] in ("/docs#malformed-json", "/docs#invalid-job")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": ""},
    ],
)
async def test_another_media_type_is_415(headers: dict[str, str]) -> None:
    """curl sends a form unless told otherwise; guessing would hide it."""
    _is_problem(await _post(GOOD, headers), 415, "unsupported-media-type", "Content-Type")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=UTF-8"])
async def test_json_in_utf_8_is_taken_however_it_is_written(content_type: str) -> None:
    """Media types are case-insensitive."""
    assert (await _post(GOOD, {"Content-Type": content_type})).status_code == 202


async def test_a_body_over_the_limit_is_413_and_the_connection_ends() -> None:
    """Its rest would be taken for the next request."""
    answer = await _post({**GOOD, "prompt": "x" * 2_000}, max_body_bytes=1_000)

    _is_problem(answer, 413, "too-large", "body")
    assert answer.headers["connection"] == "close"


async def test_a_chunked_body_is_counted_while_it_comes() -> None:
    """It declares no length at all."""

    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 100

    async with http_to(app_over(MadeUpJobs(), max_body_bytes=1_000)) as http:
        answer = await http.post("/v1/jobs", content=chunks(), headers=JSON)

    _is_problem(answer, 413, "too-large", "body")


@pytest.mark.parametrize("key", ["", " ", "a b ", "x" * 201, "tab\there", "snow\u2603man", "nul\x00"])
async def test_an_idempotency_key_that_cannot_be_kept_as_sent_is_400(key: str) -> None:
    """Trimmed or transcoded, it would name another job."""
    answer = await _post(GOOD, [*JSON.items(), (b"Idempotency-Key", key.encode())])

    _is_problem(answer, 400, "invalid-header", "Idempotency-Key")


async def test_two_idempotency_keys_are_400() -> None:
    """Which of them is meant?"""
    answer = await _post(GOOD, [*JSON.items(), ("Idempotency-Key", "a"), ("Idempotency-Key", "b")])

    _is_problem(answer, 400, "invalid-header", "Idempotency-Key")


@pytest.mark.parametrize(
    "prefer, applied",
    [
        ("wait=5", "wait=5"),
        ("respond-async, wait=5", "wait=5"),
        ('wait="5"; foo=bar', "wait=5"),
        ("WAIT = 5", "wait=5"),
        ("wait=100000", "wait=60"),
        ("wait=soon", None),
        ("wait=-1", None),
        ("wait", None),
        ("handling=lenient; wait=5", None),
        ("", None),
    ],
)
async def test_a_preference_is_applied_or_ignored_but_never_refused(prefer: str, applied: str | None) -> None:
    """RFC 7240: preferences are wishes."""
    answer = await _post(GOOD, {**JSON, "Prefer": prefer})

    assert answer.status_code == 202
    assert answer.headers.get("preference-applied") == applied


@pytest.mark.parametrize(
    "given_, passed_on",
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-XYZ-b7ad6b7169203331-01", False),
        ("x" * 5_000, False),
    ],
)
async def test_a_trace_context_travels_with_the_job_if_it_is_one(given_: str, passed_on: bool) -> None:
    """It becomes a message header; junk stays outside."""
    jobs = MadeUpJobs()
    async with http_to(app_over(jobs)) as http:
        await http.post("/v1/jobs", json=GOOD, headers={"traceparent": given_})

    assert jobs.submitted[0]["traceparent"] == (given_ if passed_on else None)


async def test_a_slow_body_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that sends a byte now and then would hold a connection for ever."""
    monkeypatch.setattr(requests, "BODY_S", 0.01)
    sent: list[Any] = []
    app = app_over(MadeUpJobs())

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await app(_scope("POST", "/v1/jobs"), receive, send)

    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["type"] == "/docs#body-timeout"


async def test_a_caller_that_hangs_up_in_its_body_is_answered_nothing() -> None:
    """Nobody is there to read it, and nothing was submitted."""
    sent: list[Any] = []
    jobs = MadeUpJobs()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app_over(jobs)(_scope("POST", "/v1/jobs"), receive, send)

    assert (sent, jobs.submitted) == ([], [])


def _scope(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "server": ("gateway", 80),
    }


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = st.sampled_from(["model", "prompt", "lane", "sampling", "stream", "timeout_s", "metadata", "x"])
_SAMPLING = st.dictionaries(st.sampled_from(["max_tokens", "temperature", "stop", "seed", "top_k", "y"]), _VALUES)


@settings(max_examples=200, deadline=None)
@given(body=st.dictionaries(_FIELDS, _VALUES), sampling=_SAMPLING, cut=st.integers(0, 400))
def test_no_body_whatever_is_a_server_error(body: dict[str, Any], sampling: dict[str, Any], cut: int) -> None:
    """Whatever a caller sends, the fault is named as the caller's."""
    whole = {**GOOD, **body, "sampling": body.get("sampling", sampling)}
    for content in (json.dumps(whole).encode(), json.dumps(whole).encode()[:cut]):
        answer = asyncio.run(_post(content))
        assert answer.status_code in (202, 400, 422)
        if answer.status_code != 202:
            assert answer.json()["type"].removeprefix("/docs#") in KINDS

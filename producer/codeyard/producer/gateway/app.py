"""The native routes: submit, read, follow and cancel jobs. A thin shell over AsyncClient.

    POST   /v1/jobs              202 + Location | 200 with the outcome (Prefer: wait=N, or attached and final)
    GET    /v1/jobs/{id}         status and result
    GET    /v1/jobs/{id}/events  server-sent events, resumed with Last-Event-ID
    DELETE /v1/jobs/{id}         cancel
    GET    /v1/jobs              the newest
    GET    /healthz /readyz /metrics /openapi.json /docs

docs/http-api.md is the reference. Called by: gateway.serve, tests.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from codeyard.producer.async_client import AsyncClient
from codeyard.producer.gateway import problems
from codeyard.producer.gateway.limits import Measured, read_body
from codeyard.producer.gateway.openapi import describe, reference_page
from codeyard.producer.gateway.problems import BadRequest, problem_kind
from codeyard.shared.errors import FleetError, InvalidJob, JobNotFound, ResultTimeout
from codeyard.shared.job import JobId
from codeyard.shared.record import EventKind, JobStatus
from codeyard.shared.settings import GatewaySettings
from codeyard.shared.telemetry import Metrics

FIELDS = frozenset({"model", "prompt", "lane", "sampling", "stream", "timeout_s", "metadata"})
HEARTBEAT_S = 15.0  # between comments on a silent event stream: proxies close idle connections
RECONNECT_MS = 1_000  # what an EventSource waits before it resumes
READY_S = 2.0  # for broker and store to answer a readiness probe
MAX_RECENT = 1_000
WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,5})\"?")


def create_app(client: AsyncClient, settings: GatewaySettings, metrics: Metrics, stopping: asyncio.Event) -> FastAPI:
    """The app. `stopping` ends event streams politely, so that their readers resume elsewhere."""
    app = FastAPI(title="codeyard", docs_url=None, redoc_url=None, openapi_url=None)
    problems.install(app)
    app.add_middleware(Measured, max_body_bytes=settings.max_body_bytes, metrics=metrics)

    @app.post("/v1/jobs")
    async def submit(request: Request) -> Response:
        fields = _fields(request, await read_body(request))
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= 200:
            raise BadRequest("Idempotency-Key has 1 to 200 characters", field="Idempotency-Key")
        wait_s = _wait_s(request, settings.max_wait_s)
        lane = str(fields.get("lane", "standard"))
        try:
            job = await client.submit(**fields, idempotency_key=key, traceparent=request.headers.get("traceparent"))
        except FleetError as error:
            metrics.submissions.labels(lane=_known(lane), outcome=problem_kind(error)).inc()
            raise
        metrics.submissions.labels(lane=_known(lane), outcome="attached" if job.attached else "accepted").inc()
        status = job.accepted_status
        if wait_s is not None and not status.state.final:
            try:
                status = await client.wait(job.id, wait_s)
            except ResultTimeout:
                status = await client.status(job.id)
        headers = {"Location": f"/v1/jobs/{job.id}"}
        if wait_s is not None:
            headers["Preference-Applied"] = f"wait={wait_s:g}"
        return _json(_view(status, attached=job.attached), 200 if status.state.final else 202, headers)

    @app.get("/v1/jobs")
    async def recent(limit: int = 20) -> Response:
        if not 1 <= limit <= MAX_RECENT:
            raise BadRequest(f"limit is 1 to {MAX_RECENT}", field="limit")
        return _json({"jobs": [_view(status) for status in await client.recent(limit)]})

    @app.get("/v1/jobs/{job_id}")
    async def status(job_id: JobId) -> Response:
        return _json(_view(await client.status(_checked(job_id))))

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(job_id: JobId) -> Response:
        verdict = await client.cancel(_checked(job_id))
        return _json({"id": job_id, "outcome": str(verdict)})

    @app.get("/v1/jobs/{job_id}/events")
    async def events(request: Request, job_id: JobId, after: int = 0) -> Response:
        after = _after(request, after)
        status = await client.status(_checked(job_id))
        if status.state.final and (await _last_seq(client, job_id)) <= after:
            return Response(status_code=204)  # tells an EventSource to stop
        stream = _sse(client, job_id, after, stopping, metrics)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @app.get("/healthz")
    async def healthz() -> Response:
        return _json({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        async with asyncio.timeout(READY_S):
            store = await client.store.ping()
            ping = getattr(client.publisher, "ping", None)
            broker = await ping() if ping is not None else "unknown"
        return _json({"status": "ready", "broker": broker, "store": store})

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return _json(describe())

    @app.get("/docs")
    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(reference_page())

    async def not_ready(_: Request, error: Exception) -> Response:
        return problems.problem(
            503, "not-ready", "broker or store did not answer in time", headers={"Retry-After": "2"}
        )

    app.add_exception_handler(TimeoutError, not_ready)
    return app


# Reading a request ---------------------------------------------------------------------------------


def _fields(request: Request, body: bytes) -> dict[str, Any]:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"send application/json, not {kind}", status=415, field="Content-Type")
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}"[:300]) from None
    if not isinstance(fields, dict):
        raise BadRequest("the body is not a JSON object")
    unknown = sorted(set(fields) - FIELDS)
    if unknown:
        raise InvalidJob(f"unknown field; there are {', '.join(sorted(FIELDS))}", field=unknown[0][:100])
    for field in ("model", "prompt"):
        if field not in fields:
            raise InvalidJob("this field is required", field=field)
    _check_types(fields)
    return fields


def _check_types(fields: dict[str, Any]) -> None:
    """What the client would otherwise trip over before the job's own validation."""
    expected: dict[str, tuple[type, ...]] = {
        "model": (str,),
        "prompt": (str, list),
        "sampling": (dict,),
        "metadata": (dict,),
    }
    for field, types in expected.items():
        if field in fields and not isinstance(fields[field], types):
            raise InvalidJob(f"not a {' or '.join(kind.__name__ for kind in types)}", field=field)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _wait_s(request: Request, most: float) -> float | None:
    """Of `Prefer: wait=N` (RFC 7240): at most `most`; None if it was not asked."""
    found = WAIT.search(request.headers.get("prefer", ""))
    return min(float(found[1]), most) if found else None


def _after(request: Request, after: int) -> int:
    text = request.headers.get("last-event-id")
    if text is None:
        text = str(after)
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise BadRequest(f"Last-Event-ID is a sequence number, not {text[:40]!r}", field="Last-Event-ID")
    return int(text)


def _checked(job_id: str) -> JobId:
    if not re.fullmatch(r"[0-9a-f-]{36}", job_id):
        raise JobNotFound(job_id[:40])
    return job_id


def _known(lane: str) -> str:
    return lane if lane in ("interactive", "standard", "bulk") else "unknown"


# Writing an answer ---------------------------------------------------------------------------------


def _view(status: JobStatus, *, attached: bool | None = None) -> dict[str, Any]:
    view = status.model_dump(mode="json", exclude_none=True)
    if attached is not None:
        view["attached"] = attached
    return view


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(document), status_code=status, media_type="application/json", headers=headers)


async def _last_seq(client: AsyncClient, job_id: JobId) -> int:
    [record] = await client.store.read([job_id])
    return record.last_seq if record is not None else 0


async def _sse(
    client: AsyncClient, job_id: JobId, after: int, stopping: asyncio.Event, metrics: Metrics
) -> AsyncGenerator[str, None]:
    """One event per entry of the job's stream, its sequence number as the SSE id; comments while silent."""
    metrics.streams_open.inc()
    stopped = asyncio.ensure_future(stopping.wait())
    stream = client.stream(job_id, after)
    following = asyncio.ensure_future(anext(stream))
    try:
        yield f"retry: {RECONNECT_MS}\n\n"
        while True:
            await asyncio.wait({following, stopped}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                if stopped.done():
                    return
                yield ": still here\n\n"
                continue
            try:
                event = following.result()
            except (StopAsyncIteration, FleetError):
                return
            body = event.model_dump(mode="json", exclude={"v"}, exclude_none=True)
            yield f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps(body)}\n\n"
            if event.kind is EventKind.END:
                return
            following = asyncio.ensure_future(anext(stream))
    finally:
        metrics.streams_open.dec()
        following.cancel()
        stopped.cancel()
        await asyncio.gather(following, stopped, return_exceptions=True)
        await stream.aclose()

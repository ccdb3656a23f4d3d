"""The native routes: submit, read, follow and cancel jobs. A thin shell over the client.

    POST   /v1/jobs              202 + Location | 200 with the outcome (attached and final, or `Prefer: wait=N`)
    GET    /v1/jobs              the newest
    GET    /v1/jobs/{id}         status and result; `Prefer: wait=N` waits for the end
    GET    /v1/jobs/{id}/events  server-sent events, resumed with Last-Event-ID
    DELETE /v1/jobs/{id}         cancel
           /v1/admin/models...   see models_admin.py
           /v1/...               further APIs over the same jobs, each a `Surface`
    GET    / /docs /openapi.json /healthz /readyz /metrics

The first five ask who is calling, and show each caller the jobs of its own tenant: a handler of theirs gets
them as `TenantJobs` and never sees another's. The others are open to all, /metrics by a setting.
Handlers take the bare request and answer with encoded JSON: `requests` checks what comes in, so that every
refusal names its field in one way, and nothing is validated twice. docs/http-api.md is the reference.
Called by: gateway.serve, tests.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Match

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.auth import Authenticator
from codeyard.producer.gateway.edge import CALLER, Edge
from codeyard.producer.gateway.jobs import Jobs
from codeyard.producer.gateway.limits import Limits, openai_headers
from codeyard.producer.gateway.models_admin import ModelsAdmin
from codeyard.producer.gateway.openapi import describe
from codeyard.producer.gateway.pages import landing_page, reference_page
from codeyard.producer.gateway.problems import Refused, kind_of, problem, problem_of
from codeyard.producer.gateway.sse import EventStream, native_frames
from codeyard.producer.gateway.surface import Kit, Route, Surface
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import BrokerUnavailable, FleetError, StoreUnavailable
from codeyard.shared.record import JobStatus
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

STOOD_IN = "x-codeyard-fallback-model"  # of an answer: it took the job, percent-encoded; docs/degradation.md
READY_S = 2.0  # for a server to answer a readiness probe

Probe = Callable[[], Awaitable[str]]
"""Name and version of a server. Raises BrokerUnavailable or StoreUnavailable."""

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    jobs: Jobs,
    kit: Kit,
    *,
    auth: Authenticator,
    limits: Limits,
    probes: Mapping[str, Probe],
    surfaces: Sequence[Surface] = (),
    open_metrics: bool = True,
) -> FastAPI:
    """The app: the native routes and those of `surfaces`. `open_metrics`: /metrics needs no credentials. `probes`
    are asked by /readyz."""
    app = FastAPI(title="codeyard", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    leaving = kit.leaving or kit.stopping
    app.add_middleware(Edge, metrics=kit.metrics, leaving=leaving)
    _answer_errors(app)
    operations = _Operations(probes, kit.metrics, leaving)

    def for_callers(route: Route, refuse: Callable[[Refused | FleetError], Response]) -> Handler:
        async def answered(request: Request) -> Response:
            try:
                given = request.headers.getlist
                caller = await auth.caller(given("authorization"), given("x-api-key"))
                request.scope[CALLER] = caller
                caller.require(route.scope)
                mine = TenantJobs(jobs, caller.tenant, limits)
                answer = await route.handler(request, mine)
                if mine.stood_in is not None:
                    answer.headers[STOOD_IN] = quote(mine.stood_in, safe="@/:+ ")
                return answer
            except (Refused, FleetError) as error:
                if kind_of(error) == "internal-error":
                    raise
                return refuse(error)

        return answered

    async def metrics_for_callers(request: Request, _: TenantJobs) -> Response:
        return await operations.exposition(request)

    guarded = Route("/metrics", "GET", Scope.ADMIN, metrics_for_callers)
    for path, handler in (
        ("/", operations.landing),
        ("/docs", operations.reference),
        ("/openapi.json", operations.openapi),
        ("/healthz", operations.healthz),
        ("/readyz", operations.readyz),
        ("/metrics", operations.exposition if open_metrics else for_callers(guarded, problem_of)),
    ):
        app.router.add_route(path, handler, methods=["GET"])
    for surface in (Surface([*_Native(kit).routes(), *ModelsAdmin(kit.store).routes()], problem_of), *surfaces):
        for route in surface.routes:
            app.router.add_route(route.path, for_callers(route, surface.refuse), methods=[route.method])
    return app


class _Native:
    """The life of a job over HTTP."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._settings = kit.settings
        self._metrics = kit.metrics

    def routes(self) -> list[Route]:
        return [
            Route("/v1/jobs", "POST", Scope.SUBMIT, self.submit),
            Route("/v1/jobs", "GET", Scope.READ, self.recent),
            Route("/v1/jobs/{job_id}", "GET", Scope.READ, self.status),
            Route("/v1/jobs/{job_id}", "DELETE", Scope.CANCEL, self.cancel),
            Route("/v1/jobs/{job_id}/events", "GET", Scope.READ, self.events),
        ]

    async def submit(self, request: Request, jobs: TenantJobs) -> Response:
        lane = "unknown"  # until the body is read
        try:
            key = requests.idempotency_key(request.headers)
            asked = await requests.read_submission(request, jobs.body_bytes(self._settings.max_body_bytes))
            lane = asked.lane.value
            if asked.callback_url is not None:
                self._kit.callbacks.check(asked.callback_url, jobs.tenant)
            submitted = await jobs.submit(
                asked.prompt,
                model=asked.model,
                lane=asked.lane,
                idempotency_key=key,
                sampling=asked.sampling,
                stream=asked.stream,
                timeout_s=asked.timeout_s,
                metadata=asked.metadata,
                traceparent=requests.traceparent(request.headers),
                callback_url=asked.callback_url,
                share=asked.share,
            )
        except (Refused, FleetError) as error:
            self._metrics.submissions.labels(lane=lane, outcome=kind_of(error)).inc()
            raise
        job = submitted.job
        self._metrics.submissions.labels(lane=lane, outcome="attached" if job.attached else "accepted").inc()
        status, headers = await self._awaited(request, jobs, job.accepted_status)
        headers |= openai_headers(submitted.standing)
        headers["Location"] = f"/v1/jobs/{job.id}"
        code = 200 if status.state.final else 202
        view = {**_view(status), "attached": job.attached}
        if job.estimated_start_s is not None and not status.state.final:
            view["estimated_start_s"] = round(job.estimated_start_s, 3)
        return _json(view, code, headers)

    async def recent(self, request: Request, jobs: TenantJobs) -> Response:
        limit = requests.whole_number(request, "limit", default=20, least=1, most=requests.MAX_RECENT)
        return _json({"jobs": [_view(status) for status in await jobs.recent(limit)]})

    async def status(self, request: Request, jobs: TenantJobs) -> Response:
        job_id = requests.path_job_id(request)
        status, headers = await self._awaited(request, jobs, await jobs.status(job_id))
        return _json(_view(status), 200, headers)

    async def cancel(self, request: Request, jobs: TenantJobs) -> Response:
        job_id = requests.path_job_id(request)
        return _json({"id": job_id, "outcome": (await jobs.cancel(job_id)).value})

    async def events(self, request: Request, jobs: TenantJobs) -> Response:
        job_id = requests.path_job_id(request)
        status = await jobs.status(job_id)
        after = requests.resume_after(request, status.last_seq)
        if status.state.final and after == status.last_seq:
            return Response(status_code=204)  # tells an EventSource to stop
        if request.method == "HEAD":
            return Response(media_type=EventStream.media_type)
        return self._kit.event_stream(native_frames(jobs.stream(job_id, after)), resumable=True)

    async def _awaited(self, request: Request, jobs: TenantJobs, status: JobStatus) -> tuple[JobStatus, dict[str, str]]:
        """The status after the wait the caller prefers, if any, and the headers that say so."""
        wait_s = requests.preferred_wait_s(request.headers, self._settings.max_wait_s)
        if wait_s is None:
            return status, {}
        if not status.state.final:
            final = await self._kit.final_within(request, jobs, status.id, wait_s, resumable=True)
            status = final or await jobs.status(status.id)
        return status, {"Preference-Applied": f"wait={requests.seconds(wait_s)}"}


class _Operations:
    """What the people and machines that run the gateway ask."""

    def __init__(self, probes: Mapping[str, Probe], metrics: Metrics, leaving: asyncio.Event) -> None:
        self._probes = probes
        self._metrics = metrics
        self._leaving = leaving

    async def healthz(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        versions = await asyncio.gather(*(_asked(probe) for probe in self._probes.values()))
        answers: dict[str, Any] = dict(zip(self._probes, versions, strict=True))
        away = [name for name, version in answers.items() if version is None]
        if away or self._leaving.is_set():
            detail = f"no answer from the {' and the '.join(away)}" if away else "the gateway is stopping"
            return problem("not-ready", detail, **answers)
        return _json({"status": "ready", **answers})

    async def exposition(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        return _json(describe())

    async def reference(self, request: Request) -> Response:
        return _page(reference_page())

    async def landing(self, request: Request) -> Response:
        return _page(landing_page())


async def _asked(probe: Probe) -> str | None:
    """None: no answer in time; the reason is in the log, as it may name hosts."""
    try:
        async with asyncio.timeout(READY_S):
            return await probe()
    except (TimeoutError, BrokerUnavailable, StoreUnavailable) as error:
        log.warning("not_ready", extra={"error": str(error) or f"no answer within {READY_S:g} s"})
        return None


def _view(status: JobStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", exclude_none=True)


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        json.dumps(document, separators=(",", ":")), status_code=status, media_type="application/json", headers=headers
    )


def _page(html: str) -> Response:
    return HTMLResponse(html, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _answer_errors(app: FastAPI) -> None:
    """Ours and the framework's as problem documents. What is neither passes on to `Edge`."""

    async def ours(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused | FleetError)
        if kind_of(error) == "internal-error":
            raise error
        return problem_of(error)

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            allowed = ", ".join(_allowed(app, request))
            return problem("method-not-allowed", f"this route answers {allowed}", headers={"Allow": allowed})
        if error.status_code == 404:
            return problem("not-found", "there is no such route; see /docs")
        raise error

    app.add_exception_handler(Refused, ours)
    app.add_exception_handler(FleetError, ours)
    app.add_exception_handler(HTTPException, framework)


def _allowed(app: FastAPI, request: Request) -> list[str]:
    """Of all routes with this path: the framework names those of the first only."""
    methods: set[str] = set()
    for route in app.router.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods)

"""The outermost layer of the app: time every request, and let nothing unexpected out.

An exception that no handler knows becomes a 500 problem with an incident number, logged once under the
same number. A caller that hung up gets nothing, and costs nothing but a count under status 499. Log lines
say who was calling, where that is known. While the gateway leaves, each answer is the last of its connection: a
caller that keeps connections opens the next one elsewhere, and sends nothing into one that is about to be closed.
"""

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codeyard.producer.gateway.auth import Caller
from codeyard.producer.gateway.problems import problem
from codeyard.shared.envelope import new_nonce
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

HUNG_UP = 499  # what nginx calls it; never sent
CALLER = "codeyard.caller"  # in a request's scope, once it is known


class Edge:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, leaving: asyncio.Event) -> None:
        self._app = app
        self._metrics = metrics
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                if self._leaving.is_set() and (b"connection", b"close") not in headers:
                    message = {**message, "headers": [*headers, (b"connection", b"close")]}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            status = status or HUNG_UP
        except Exception:
            incident = new_nonce()[:12]
            log.exception("request_failed", extra={"incident": incident, "route": _route(scope), **_who(scope)})
            if status == 0:
                detail = f"something went wrong here; the gateway's log has it as {incident}"
                await problem("internal-error", detail, incident=incident)(scope, receive, noted)
        finally:
            self._count(scope, status, time.monotonic() - started_s)

    def _count(self, scope: Scope, status: int, took_s: float) -> None:
        route = _route(scope)
        self._metrics.http_requests.labels(route=route, status=str(status)).inc()
        self._metrics.http_request.labels(route=route).observe(took_s)
        log.debug("http_request", extra={"route": route, "status": status, "took_s": took_s, **_who(scope)})


def _who(scope: Scope) -> dict[str, str]:
    caller: Caller | None = scope.get(CALLER)
    return {"tenant": caller.tenant, "caller": caller.name} if caller else {}


def _route(scope: Scope) -> str:
    """Method and template, e.g. "GET /v1/jobs/{job_id}": a label must not carry ids, nor what callers made up."""
    route = scope.get("route")
    path: str = getattr(route, "path", "unmatched")
    return f"{scope['method']} {path}" if scope["method"] in (getattr(route, "methods", None) or ()) else path

"""Count a body while it comes in, and time the whole request: an ASGI wrapper around the app.

A body over the limit is answered 413 as soon as it is over, whatever its Content-Length says.
"""

import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codeyard.producer.gateway.problems import problem
from codeyard.shared.telemetry import Metrics


class TooLarge(Exception):
    """The body passed the limit."""


class Measured:
    """Installed as middleware. `max_body_bytes` bounds every request's body."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._max = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        status = 500
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except TooLarge:
            text = f"the body is over {self._max} bytes"
            await problem(413, "too-large", text, headers={"Connection": "close"})(scope, receive, noted)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "unmatched")
            self._metrics.http_requests.labels(route=path, status=str(status)).inc()
            self._metrics.http_request.labels(route=path).observe(time.monotonic() - started_s)


async def read_body(request: Request) -> bytes:
    """The whole body; TooLarge goes through to `Measured`."""
    return b"".join([chunk async for chunk in request.stream()])

"""Every error as a problem document (RFC 9457), never a traceback.

`problem_of` maps our errors to status codes once for all routes; the handlers installed here cover what
the framework itself refuses. Called by: app.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from codeyard.shared.envelope import new_nonce
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

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5  # of 503
STATUS: dict[type[FleetError], int] = {
    JobTooLarge: 413,
    InvalidJob: 422,
    IdempotencyConflict: 409,
    QueueFull: 429,
    UnknownModel: 404,
    JobNotFound: 404,
    Unauthorized: 401,
    Forbidden: 403,
    BrokerUnavailable: 503,
    StoreUnavailable: 503,
}
TITLES = {
    400: "Bad request",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    422: "Invalid field",
    429: "Too many requests",
    500: "Internal error",
    503: "Unavailable",
}


class BadRequest(FleetError):
    """A header or parameter of the HTTP request itself is wrong."""

    def __init__(self, detail: str, *, status: int = 400, field: str | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.field = field


def problem(status: int, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> Response:
    """An application/problem+json response. `extra` members that are None are left out."""
    document = {
        "type": f"urn:codeyard:problem:{kind}",
        "title": TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
        **{name: value for name, value in extra.items() if value is not None},
    }
    return Response(
        json.dumps(document), status_code=status, media_type="application/problem+json", headers=dict(headers or {})
    )


def problem_of(error: FleetError) -> Response:
    """The answer for one of our errors."""
    if isinstance(error, BadRequest):
        return problem(error.status, "bad-request", str(error), field=error.field)
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    elif status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return problem(
        status,
        problem_kind(error),
        error.reason if isinstance(error, InvalidJob) else str(error),
        headers=headers,
        field=getattr(error, "field", None),
        job_id=getattr(error, "job_id", None),
        maybe_accepted=getattr(error, "maybe_accepted", None) or None,
    )


def problem_kind(error: FleetError) -> str:
    """`QueueFull` -> `queue-full`: the last part of the problem's type, and the metric's label."""
    name = type(error).__name__
    return "".join(f"-{char.lower()}" if char.isupper() else char for char in name).lstrip("-")


def install(app: FastAPI) -> None:
    """Make every refusal of the framework a problem document too."""

    async def ours(_: Request, error: Exception) -> Response:
        assert isinstance(error, FleetError)
        return problem_of(error)

    async def framework(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = TITLES.get(error.status_code, "error").lower().replace(" ", "-")
        return problem(error.status_code, kind, str(error.detail), headers=error.headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return problem(422, "invalid-field", first["msg"], field=".".join(str(part) for part in first["loc"]))

    async def unexpected(_: Request, error: Exception) -> Response:
        incident = new_nonce()[:12]
        log.error("request_failed", extra={"incident": incident}, exc_info=error)
        return problem(500, "internal-error", f"something went wrong here; the log has it as {incident}")

    app.add_exception_handler(FleetError, ours)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)

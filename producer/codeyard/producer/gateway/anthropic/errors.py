"""No, in Anthropic's words: {"type": "error", "error": {"type", "message"}, "request_id"}.

A refusal keeps the status of `problems.KINDS`, but where Anthropic's clients tell two things apart by another
one (`STATUS_OF`). A job that failed is answered with an error too; `ENDINGS` says which, by the code of its
failure. `x-should-retry: false` keeps the official SDKs from repeating what would end in the same way.
Called by: handlers, stream, the batches API.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response

from codeyard.producer.gateway.limits import anthropic_headers
from codeyard.producer.gateway.problems import (
    CHALLENGE,
    CHALLENGE_SCOPE,
    KINDS,
    UNAVAILABLE_RETRY_S,
    Refused,
    kind_of,
)
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import FleetError, Forbidden, InvalidJob, LimitReached, Unauthorized
from codeyard.shared.job import JobId
from codeyard.shared.record import JobStatus, State

log = logging.getLogger(__name__)

REQUEST_ID = "req_"  # before the job's id, or a name that the log has
NEVER = {"x-should-retry": "false"}

STATUS_OF = {"invalid-job": 400, "queue-full": 529, "deadline-too-soon": 529}
"""By kind of problem: what is wrong with a request is 400 there, and 529 is a fleet that has too much to do."""

FINAL_KINDS = ("idempotency-conflict",)  # the SDKs repeat every 409

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""By status. What has none here is the caller's fault below 500, and ours from there on."""

ENDINGS = {
    "invalid_prompt": 400,
    "prompt_too_long": 400,
    "no_chat_template": 400,
    "unsupported": 400,
    "cancelled": 409,
    "deadline_exceeded": 504,
}
"""Status of a job that did not succeed, by its failure's code; any other is 500: nothing the caller did."""


@dataclass(frozen=True, slots=True)
class Failed:
    """`error` is what stands under that name in a body, an event, or a batch's result."""

    status: int
    error: Mapping[str, str]

    @classmethod
    def of(cls, status: int, message: str) -> "Failed":
        kind = TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
        return cls(status, {"type": kind, "message": message})


def refuse(error: Refused | FleetError) -> Response:
    """The answer to one of our own errors; its `kind_of` must not be "internal-error"."""
    failed, kind = failed_by(error), kind_of(error)
    headers = dict(NEVER) if kind in FINAL_KINDS else {}
    if failed.status == 503:
        headers["Retry-After"] = str(UNAVAILABLE_RETRY_S)
    if (after_s := getattr(error, "retry_after_s", None)) is not None:
        headers["Retry-After"] = str(max(1, math.ceil(after_s)))
    if isinstance(error, LimitReached):
        headers |= anthropic_headers(error.standing, time.time())
    if isinstance(error, Unauthorized | Forbidden):
        headers["WWW-Authenticate"] = CHALLENGE if isinstance(error, Unauthorized) else CHALLENGE_SCOPE
    if isinstance(error, Refused):
        headers |= error.headers or {}
    job_id = getattr(error, "job_id", None)
    request_id = REQUEST_ID + (job_id or new_nonce())
    log.info("anthropic_request_refused", extra={"request_id": request_id, "kind": kind})
    return _answer(failed, request_id, headers)


def refuse_ended(status: JobStatus) -> Response:
    """The answer for a job that did not succeed."""
    return _answer(failed_as(status), request_id_of(status.id), NEVER)


def refuse_waiting(job_id: JobId, reason: str, *, keyed: bool) -> Response:
    """The answer while the job goes on. The SDKs' own second try would be a second job, unless a key says which
    it is."""
    how = "send the request again with its Idempotency-Key, or read it" if keyed else "read it"
    failed = Failed.of(503, f"{reason}; the job goes on: {how} at /v1/jobs/{job_id}")
    headers = {"Retry-After": str(UNAVAILABLE_RETRY_S), "x-should-retry": "true" if keyed else "false"}
    return _answer(failed, request_id_of(job_id), headers)


def failed_by(error: Refused | FleetError) -> Failed:
    kind = kind_of(error)
    field = getattr(error, "field", None) or (error.members.get("field") if isinstance(error, Refused) else None)
    reason = error.reason if isinstance(error, InvalidJob) else str(error)
    return Failed.of(STATUS_OF.get(kind, KINDS[kind].status), f"{field}: {reason}" if field else reason)


def failed_as(status: JobStatus) -> Failed:
    """What a job that is final, and did not succeed, ended with."""
    failure = status.result.error if status.result else None
    code = failure.code if failure else status.state.value
    number = ENDINGS.get(
        code, 504 if status.state is State.EXPIRED else 409 if status.state is State.CANCELLED else 500
    )
    return Failed.of(number, f"{failure.message} ({code})" if failure else f"the job is {status.state}")


def body_of(failed: Failed, request_id: str | None = None) -> dict[str, Any]:
    return {"type": "error", "error": dict(failed.error), "request_id": request_id}


def request_id_of(job_id: JobId) -> str:
    return REQUEST_ID + job_id


def _answer(failed: Failed, request_id: str, headers: Mapping[str, str]) -> Response:
    return Response(
        json.dumps(body_of(failed, request_id)),
        status_code=failed.status,
        media_type="application/json",
        headers={"request-id": request_id, **headers},
    )

"""Every refusal in OpenAI's error body: `{"error": {"message", "type", "param", "code"}}`.

Statuses are those of `problems.KINDS`, but for an invalid job, which OpenAI's SDKs expect as 400; headers are those
of the problem. The SDKs retry 409, 429 and 5xx by themselves: `x-should-retry` says where that can never help.
Called by: routes, response_routes, chunks, batches.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response

from codeyard.producer.gateway.problems import Refused, kind_of, problem_of
from codeyard.shared.errors import FleetError, InvalidJob, LimitReached, UnknownModel
from codeyard.shared.record import JobStatus, Result, State

REQUEST, SERVER = "invalid_request_error", "server_error"

CODES = {
    "malformed-json": "invalid_json",
    "invalid-header": "invalid_header",
    "invalid-parameter": "invalid_value",
    "unauthorized": "invalid_api_key",
    "forbidden": "insufficient_permissions",
    "job-not-found": "not_found",
    "unknown-model": "model_not_found",
    "too-large": "request_too_large",
    "invalid-job": "invalid_value",
    "rate-limited": "rate_limit_exceeded",
    "quota-exceeded": "rate_limit_exceeded",
}  # by kind of problem; the others are called as the problem is, with underscores

LIMIT_TYPES = {"requests": "requests", "jobs": "requests", "tokens": "tokens", "enqueued": "tokens"}

PARAMS = {"sampling.max_tokens": "max_tokens", "sampling": "max_tokens"}  # ours: a job that could never be let in

# Of failed jobs: what the caller asked cannot be done, whoever tries. Others are ours.
CALLERS_FAULT = {
    "prompt_too_long": "context_length_exceeded",
    "invalid_prompt": "invalid_prompt",
    "no_chat_template": "no_chat_template",
    "unsupported": "unsupported_parameter",
}


@dataclass(frozen=True, slots=True)
class ApiError:
    """`retry`: whether the same request can go better; None leaves it to the status."""

    status: int
    message: str
    type: str
    code: str | None
    param: str | None = None
    retry: bool | None = None

    def body(self) -> dict[str, Any]:
        about = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": about}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        said = {} if self.retry is None else {"x-should-retry": "true" if self.retry else "false"}
        return Response(
            json.dumps(self.body()),
            status_code=self.status,
            media_type="application/json",
            headers={**(headers or {}), **said},
        )


def refuse(error: Refused | FleetError) -> Response:
    """The answer to one of our own errors; its `kind_of` must not be "internal-error"."""
    headers = {name: value for name, value in problem_of(error).headers.items() if not name.startswith("content-")}
    return of_error(error).response(headers)


def of_error(error: Refused | FleetError) -> ApiError:
    """Of what is answered before there is a job, or without it."""
    kind, status = kind_of(error), problem_of(error).status_code
    members = error.members if isinstance(error, Refused) else {}
    code = members.get("code") or CODES.get(kind, kind.replace("-", "_"))
    param = members.get("field") or getattr(error, "field", None)
    if isinstance(error, UnknownModel):
        param = "model"
    about = (
        LIMIT_TYPES.get(error.limit, REQUEST)
        if isinstance(error, LimitReached)
        else SERVER
        if status >= 500
        else REQUEST
    )
    return ApiError(
        status=400 if status == 422 else status,
        message=error.reason if isinstance(error, InvalidJob) else str(error),
        type=about,
        code=code,
        param=PARAMS.get(param, param) if param else None,
        retry=False if status == 409 else None,
    )


def of_job(status: JobStatus) -> ApiError | None:
    """Why a final job has no answer; None if it has one."""
    said = job_code(status.state, status.result)
    if said is None:
        return None
    code, text = said
    if code in CALLERS_FAULT.values():
        return ApiError(400, text, REQUEST, code, retry=False)
    message = f"{text} (job {status.id})"
    if status.state is State.FAILED:
        return ApiError(500, message, SERVER, code)
    return ApiError(503, message, SERVER, code, retry=False if status.state is State.CANCELLED else None)


def job_code(state: State, result: Result | None) -> tuple[str, str] | None:
    """The code and the words for a final job without an answer; None if it has one."""
    if state is State.SUCCEEDED:
        return None
    failure = result.error if result is not None else None
    text = failure.message if failure is not None else f"the job ended as {state}"
    if state is not State.FAILED or failure is None:
        return f"job_{state}", text
    return CALLERS_FAULT.get(failure.code, failure.code), text

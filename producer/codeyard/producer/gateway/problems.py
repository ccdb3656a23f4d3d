"""Every refusal as a problem document (RFC 9457), never a traceback.

`KINDS` is the whole list: the last part of each document's `type`, its status, and what the caller does
about it. The page at /docs and docs/http-api.md show the same list. Called by: app, edge, requests.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response

from codeyard.producer.gateway.limits import openai_headers
from codeyard.shared.errors import (
    AuthUnavailable,
    BlobMissing,
    BrokerUnavailable,
    DeadlineTooSoon,
    FleetError,
    Forbidden,
    IdempotencyConflict,
    InvalidJob,
    JobNotFound,
    JobTooLarge,
    LimitReached,
    ModelUnavailable,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    RolloutRefused,
    StorageQuotaExceeded,
    StoreUnavailable,
    Unauthorized,
    UnknownModel,
)

UNAVAILABLE_RETRY_S = 2  # of 503: about how long a server takes to come back, or a proxy to look elsewhere

CHALLENGE = 'Bearer realm="codeyard"'  # RFC 6750, 3
CHALLENGE_SCOPE = f'{CHALLENGE}, error="insufficient_scope"'


@dataclass(frozen=True, slots=True)
class Kind:
    status: int
    title: str
    remedy: str  # what the caller does next


KINDS = {
    "malformed-json": Kind(400, "Malformed JSON", "Send one JSON object in UTF-8."),
    "invalid-header": Kind(400, "Invalid header", "`field` names the header; `detail` says what it may hold."),
    "invalid-parameter": Kind(400, "Invalid parameter", "`field` names the query parameter."),
    "unauthorized": Kind(
        401, "Unauthorized", "Send a valid API key or token; `detail` says what is wrong with this one."
    ),
    "forbidden": Kind(403, "Forbidden", "Use credentials with the scope that `detail` names."),
    "not-found": Kind(404, "No such route", "See /docs for the routes there are."),
    "job-not-found": Kind(404, "No such job", "It was never accepted here, or its record has expired."),
    "no-such-document": Kind(404, "No such file or batch", "It was never made here, or it has ended."),
    "unknown-model": Kind(404, "Unknown model", "Check the name, or start a worker that serves it."),
    "method-not-allowed": Kind(405, "Method not allowed", "`Allow` names the methods of this route."),
    "body-timeout": Kind(408, "Body too slow", "Send the whole body in one go."),
    "idempotency-conflict": Kind(
        409, "Idempotency key in use", "The key names a job with another body: send that body, or choose a new key."
    ),
    "rollout-refused": Kind(409, "Rollout refused", "`detail` says where the rollout is and what can be done there."),
    "gone": Kind(410, "Gone", "The stored bytes have ended: upload them again."),
    "too-large": Kind(413, "Too large", "Shorten the prompt."),
    "storage-full": Kind(413, "Storage full", "Delete files that are not needed, or wait until some end."),
    "unsupported-media-type": Kind(415, "Unsupported media type", "Send `Content-Type: application/json`, not packed."),
    "invalid-job": Kind(422, "Invalid job", "`field` names what to mend; `errors` lists all that is wrong."),
    "queue-full": Kind(429, "Queue full", "Try again after `Retry-After` seconds, with the same key."),
    "deadline-too-soon": Kind(
        429, "Deadline too soon", "Allow more time, use another lane, or try again after `Retry-After` seconds."
    ),
    "rate-limited": Kind(429, "Rate limited", "Try again after `Retry-After` seconds; `limit`: requests or tokens."),
    "quota-exceeded": Kind(
        429, "Quota exceeded", "Wait until jobs under way have ended; `limit`: jobs or enqueued (their tokens)."
    ),
    "internal-error": Kind(500, "Internal error", "Report `incident`: the gateway's log has it."),
    "broker-unavailable": Kind(
        503, "Broker unavailable", "Try again with the same key; `maybe_accepted`: that attaches to the job."
    ),
    "store-unavailable": Kind(
        503, "Store unavailable", "Try again with the same key; `maybe_accepted`: that attaches to the job."
    ),
    "auth-unavailable": Kind(503, "Auth unavailable", "Try again: credentials cannot be checked now."),
    "model-unavailable": Kind(
        503, "Model unavailable", "Try again after `Retry-After` seconds with the same key, or name another model."
    ),
    "not-ready": Kind(503, "Not ready", "Wait: broker or store does not answer, or the gateway is stopping."),
}

KIND_OF: dict[type[FleetError], str] = {  # most special first
    BlobMissing: "gone",
    JobTooLarge: "too-large",
    StorageQuotaExceeded: "storage-full",
    InvalidJob: "invalid-job",
    IdempotencyConflict: "idempotency-conflict",
    QueueFull: "queue-full",
    RolloutRefused: "rollout-refused",
    DeadlineTooSoon: "deadline-too-soon",
    UnknownModel: "unknown-model",
    JobNotFound: "job-not-found",
    Unauthorized: "unauthorized",
    Forbidden: "forbidden",
    RateLimited: "rate-limited",
    QuotaExceeded: "quota-exceeded",
    LimitReached: "rate-limited",
    AuthUnavailable: "auth-unavailable",
    ModelUnavailable: "model-unavailable",
    BrokerUnavailable: "broker-unavailable",
    StoreUnavailable: "store-unavailable",
}


class Refused(Exception):
    """The HTTP request itself is wrong. `kind` is one of KINDS; members go into the document."""

    def __init__(
        self, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, field: str | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.headers = headers
        self.members = {"field": field, **more}


def problem(kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """The response. Members that are None are left out; every 503 says when to try again."""
    about = KINDS[kind]
    retry = {"Retry-After": str(UNAVAILABLE_RETRY_S)} if about.status == 503 else {}
    document = {
        "type": f"/docs#{kind}",
        "title": about.title,
        "status": about.status,
        "detail": detail,
        **{name: value for name, value in members.items() if value is not None},
    }
    return Response(
        json.dumps(document),
        status_code=about.status,
        media_type="application/problem+json",
        headers={**retry, **(headers or {})},
    )


def kind_of(error: Exception) -> str:
    """The problem an exception is answered with; "internal-error" where it should never have come this far."""
    if isinstance(error, Refused):
        return error.kind
    return next((kind for of, kind in KIND_OF.items() if isinstance(error, of)), "internal-error")


def problem_of(error: Refused | FleetError) -> Response:
    """The answer to one of our own errors; its `kind_of` must not be "internal-error"."""
    if isinstance(error, Refused):
        return problem(error.kind, str(error), headers=error.headers, **error.members)
    headers = {}
    if (retry_after_s := getattr(error, "retry_after_s", None)) is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(error, LimitReached):
        headers |= openai_headers(error.standing)
    if isinstance(error, Unauthorized | Forbidden):
        headers["WWW-Authenticate"] = CHALLENGE if isinstance(error, Unauthorized) else CHALLENGE_SCOPE
    return problem(
        kind_of(error),
        error.reason if isinstance(error, InvalidJob) else str(error),
        headers=headers,
        field=getattr(error, "field", None),
        job_id=getattr(error, "job_id", None),
        limit=getattr(error, "limit", None),
        estimated_start_s=getattr(error, "estimated_start_s", None),
        maybe_accepted=getattr(error, "maybe_accepted", None) or None,
    )

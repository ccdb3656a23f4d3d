"""Why a call came to nothing: our errors as gRPC statuses with metadata, and back.

The status follows from the HTTP status of the error's kind (gateway.problems.KINDS), so that both protocols say
one thing. Programs should look at `codeyard-kind`, which is finer. Called by: rpc.server, rpc.inference, rpc.client.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from codeyard.producer.rpc import codeyard_pb2 as pb
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
from codeyard.shared.limits.standing import Standing

Code = grpc.StatusCode

CODES: Mapping[int, grpc.StatusCode] = {  # of HTTP statuses
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    405: Code.UNIMPLEMENTED,
    408: Code.DEADLINE_EXCEEDED,
    409: Code.ALREADY_EXISTS,
    410: Code.NOT_FOUND,
    413: Code.INVALID_ARGUMENT,  # RESOURCE_EXHAUSTED would ask for another try
    415: Code.INVALID_ARGUMENT,
    422: Code.INVALID_ARGUMENT,
    429: Code.RESOURCE_EXHAUSTED,
    500: Code.INTERNAL,
    503: Code.UNAVAILABLE,
}
CODE_OF_KIND: Mapping[str, grpc.StatusCode] = {  # where the HTTP status says less
    "rollout-refused": Code.FAILED_PRECONDITION,
    "storage-full": Code.RESOURCE_EXHAUSTED,
}

ERROR_OF_KIND: Mapping[str, type[FleetError]] = {
    "invalid-job": InvalidJob,
    "invalid-parameter": InvalidJob,
    "too-large": JobTooLarge,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "job-not-found": JobNotFound,
    "unknown-model": UnknownModel,
    "idempotency-conflict": IdempotencyConflict,
    "queue-full": QueueFull,
    "deadline-too-soon": DeadlineTooSoon,
    "rate-limited": RateLimited,
    "quota-exceeded": QuotaExceeded,
    "broker-unavailable": BrokerUnavailable,
    "store-unavailable": StoreUnavailable,
    "auth-unavailable": AuthUnavailable,
    "model-unavailable": ModelUnavailable,
    "storage-full": StorageQuotaExceeded,
    "gone": BlobMissing,
    "rollout-refused": RolloutRefused,
}

KIND, RETRY_AFTER = "codeyard-kind", "retry-after"
MEMBERS = ("field", "job_id", "limit", "estimated_start_s", "maybe_accepted")  # of a problem document, as metadata
_STATUS_OF = {code.value[0]: code for code in Code}


class GatewayUnavailable(FleetError):
    """No gateway answered, or it went away in between. What was asked may have happened: submit again with the
    same key, read on from the last sequence number. `maybe_accepted` is true of every submission."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"gateway unavailable: {reason}")
        self.maybe_accepted = True


def code_of(kind: str, http_status: int) -> grpc.StatusCode:
    return CODE_OF_KIND.get(kind) or CODES[http_status]


@dataclass(frozen=True, slots=True)
class Told:
    """A refusal on its way. `members`: of MEMBERS, those there are; `headers`: x-ratelimit-*."""

    code: grpc.StatusCode
    kind: str
    message: str
    retry_after_s: float | None = None
    members: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Trailing metadata. gRPC's own retry policies heed the pushback."""
        given = [(KIND, self.kind), *self.headers.items()]
        given += [(_key(name), _value(value)) for name, value in self.members.items()]
        if self.retry_after_s is not None:
            given.append((RETRY_AFTER, f"{self.retry_after_s:g}"))
            given.append(("grpc-retry-pushback-ms", str(round(self.retry_after_s * 1_000))))
        return tuple(given)

    def refusal(self) -> pb.Refusal:
        return pb.Refusal(
            code=self.code.value[0],
            kind=self.kind,
            message=self.message,
            retry_after_s=self.retry_after_s,
            field=self.members.get("field"),
            maybe_accepted=bool(self.members.get("maybe_accepted")),
        )

    def error(self) -> FleetError:
        """The error that the other side had, with what the caller of a client may ask it for."""
        kind = ERROR_OF_KIND.get(self.kind)
        if kind is None:
            return _without_kind(self)
        error = kind.__new__(kind)  # with the message that was sent: their constructors write another
        error.args = (self.message,)
        known = {name: self.members.get(name) for name in MEMBERS}
        known |= {"retry_after_s": self.retry_after_s, "reason": self.message, "standing": Standing()}
        known["maybe_accepted"] = bool(known["maybe_accepted"])
        for name in _ATTRIBUTES.get(kind, ()):
            setattr(error, name, known.get(name))
        return error


_ATTRIBUTES: Mapping[type[FleetError], tuple[str, ...]] = {
    InvalidJob: ("field", "reason"),
    JobTooLarge: ("field", "reason"),
    JobNotFound: ("job_id",),
    IdempotencyConflict: ("job_id",),
    QueueFull: ("retry_after_s",),
    ModelUnavailable: ("retry_after_s",),
    DeadlineTooSoon: ("estimated_start_s", "retry_after_s"),
    RateLimited: ("limit", "retry_after_s", "standing"),
    QuotaExceeded: ("limit", "retry_after_s", "standing"),
    BrokerUnavailable: ("job_id", "maybe_accepted", "retry_after_s"),
    StoreUnavailable: ("job_id", "maybe_accepted", "retry_after_s"),
}


def told_by(error: grpc.aio.AioRpcError) -> Told:
    """What a call ended with, on the caller's side."""
    pairs: Iterable[tuple[str, Any]] = error.trailing_metadata() or ()  # type: ignore[assignment]  # as it is iterated
    trailing = {name: value for name, value in pairs if isinstance(value, str)}
    members: dict[str, Any] = {name: trailing[_key(name)] for name in MEMBERS if _key(name) in trailing}
    if "estimated_start_s" in members:
        members["estimated_start_s"] = float(members["estimated_start_s"])
    members["maybe_accepted"] = members.get("maybe_accepted") == "true"
    retry_after = trailing.get(RETRY_AFTER)
    return Told(
        error.code(),
        trailing.get(KIND, ""),
        error.details() or error.code().name,
        float(retry_after) if retry_after is not None else None,
        members,
    )


def told_in(refusal: pb.Refusal, job_id: str) -> Told:
    """The refusal of one request of many."""
    members = {"job_id": job_id or None, "maybe_accepted": refusal.maybe_accepted}
    if refusal.HasField("field"):
        members["field"] = refusal.field
    retry_after_s = refusal.retry_after_s if refusal.HasField("retry_after_s") else None
    code = _STATUS_OF.get(refusal.code, Code.UNKNOWN)
    return Told(code, refusal.kind, refusal.message, retry_after_s, members)


def _without_kind(told: Told) -> FleetError:
    """Said by gRPC itself, or by a proxy in between."""
    if told.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.ABORTED):
        return GatewayUnavailable(told.message)
    if told.code is Code.RESOURCE_EXHAUSTED and "larger than max" in told.message:
        return JobTooLarge(told.message, field="body")
    if told.code is Code.UNAUTHENTICATED:
        return Unauthorized(told.message)
    return FleetError(f"{told.code.name}: {told.message}")


def _key(member: str) -> str:
    return f"codeyard-{member.replace('_', '-')}"


def _value(value: Any) -> str:
    """Metadata is printable ASCII; anything else would end the call in an error of gRPC's."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "".join(sign if " " <= sign <= "~" else "?" for sign in text)[:200]


def headers_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of HTTP headers, those that gRPC callers get too."""
    return {name.lower(): value for name, value in pairs if name.lower().startswith("x-ratelimit-")}

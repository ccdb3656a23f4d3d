"""What callers send: bodies and headers, read and checked once, at the edge.

Promise: whatever comes, these raise only `Refused` or `InvalidJob`, naming what is wrong. Called by: app.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.functional_validators import AfterValidator
from starlette.datastructures import Headers
from starlette.requests import Request

from codeyard.producer.gateway.problems import Refused
from codeyard.shared.errors import JobNotFound
from codeyard.shared.job import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, CallbackUrl, JobId, Lane, Name, Prompt, Sampling

BODY_S = 30.0  # for a whole body to arrive
DISCARD_S = 2.0  # an over-long body is read on for so long, and to so many times the limit, ...
DISCARD_LIMITS = 16  # ... because a caller that still sends does not see an answer before a closed connection
MAX_ERRORS = 10  # listed in one document
MAX_RECENT = 1_000

_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,198}[\x21-\x7e])?")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C trace context
_SEQ = re.compile(r"\d{1,15}", re.ASCII)


def _is_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """A number too large for a float was read as infinity, which is not JSON."""
    if metadata:
        json.dumps(metadata, allow_nan=False)
    return metadata


class SubmitBody(BaseModel):
    """A job to submit. Unknown fields are refused: a typo must not change what is generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[Name, Field(description="Alias of a model that a worker serves.")]
    prompt: Annotated[
        Prompt, Field(description="Text, token ids of the model's own vocabulary, or a conversation (`messages`).")
    ]
    lane: Annotated[Lane, Field(description="Priority class: interactive before standard before bulk.")] = Lane.STANDARD
    sampling: Annotated[Sampling, Field(description="How to generate; what is left out is the engine's default.")] = (
        Sampling()
    )
    stream: Annotated[
        bool, Field(description="Publish tokens as they come. Without it the events arrive in one piece.")
    ] = False
    share: Annotated[
        bool, Field(description="Without an Idempotency-Key, equal deterministic jobs share one generation.")
    ] = False
    timeout_s: Annotated[
        float, Field(gt=0, le=MAX_TIMEOUT_S, description="The job expires if it is not final in so many seconds.")
    ] = DEFAULT_TIMEOUT_S
    callback_url: Annotated[
        CallbackUrl | None, Field(description="Told the job's end, signed; see docs/webhooks.md.")
    ] = None
    metadata: Annotated[
        dict[str, Any], AfterValidator(_is_json), Field(description="Yours, up to 8 KiB; kept with the job.")
    ] = Field(default_factory=dict)


async def read_submission(request: Request, max_body_bytes: int) -> SubmitBody:
    body = await read_body(request, max_body_bytes)
    try:
        return SubmitBody.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise refusal_of(error) from None


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """Of a request that says it sends JSON; whether it does is the reader's to see."""
    check_media_type(request.headers)
    return await _read_body(request, max_body_bytes)


def idempotency_key(headers: Headers) -> str | None:
    """The key exactly as sent; None if there is none."""
    given = headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        raise Refused("invalid-header", "one key of 1 to 200 printable ASCII characters", field="Idempotency-Key")
    return given[0]


def preferred_wait_s(headers: Headers, most: float) -> float | None:
    """Of `Prefer: wait=N` (RFC 7240), at most `most`. A preference that cannot be read is none."""
    for preference in ",".join(headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait" and _SEQ.fullmatch(seconds := value.strip().strip('"')):
            return min(float(seconds), most)
    return None


def traceparent(headers: Headers) -> str | None:
    return trace_of(headers.get("traceparent", ""))


def trace_of(given: str) -> str | None:
    """A malformed one is dropped, as the standard asks."""
    return given if _TRACEPARENT.fullmatch(given) else None


def resume_after(request: Request, newest: int) -> int:
    """The sequence number a stream goes on after, at most `newest`: a later one is of another job.

    The header wins over `?after=`: an EventSource that comes back repeats its first query.
    """
    given = request.headers.get("last-event-id")
    if given is None:
        return whole_number(request, "after", default=0, least=0, most=newest)
    if not _SEQ.fullmatch(given) or int(given) > newest:
        detail = f"not the id of an event of this stream; the newest is {newest}"
        raise Refused("invalid-header", detail, field="Last-Event-ID")
    return int(given)


def whole_number(request: Request, name: str, *, default: int, least: int, most: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not _SEQ.fullmatch(given) or not least <= int(given) <= most:
        raise Refused("invalid-parameter", f"a whole number from {least} to {most}", field=name)
    return int(given)


def path_job_id(request: Request) -> JobId:
    return known_form(request.path_params["job_id"])


def known_form(given: str) -> JobId:
    """Anything that cannot be an id names no job, and no server is asked. Raises JobNotFound."""
    if not _JOB_ID.fullmatch(given):
        raise JobNotFound(given[:36])
    return given


# The body ------------------------------------------------------------------------------------------


def check_media_type(headers: Headers) -> None:
    media_type, _, parameters = headers.get("content-type", "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([\w-]+)", parameters, re.IGNORECASE)
    if (
        media_type.strip().lower() != "application/json"
        or (charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"))
        or headers.get("content-encoding", "identity").lower() != "identity"
    ):
        raise Refused(
            "unsupported-media-type",
            "the body must be application/json in UTF-8, without Content-Encoding",
            headers={"Accept": "application/json"},
            field="Content-Type",
        )


async def _read_body(request: Request, most: int) -> bytes:
    """At most `most` bytes, counted as they come: Content-Length is what the caller says, not what it sends."""
    declared = request.headers.get("content-length", "")
    body = bytearray()
    chunks = request.stream()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in chunks:
                body += chunk
                if len(body) > most or (declared.isdigit() and int(declared[:20]) > most):
                    await _discard(chunks, most * DISCARD_LIMITS)
                    detail = f"the body is over the limit of {most} bytes"
                    raise Refused("too-large", detail, headers={"Connection": "close"}, field="body")
    except TimeoutError:
        detail = f"the body did not arrive within {BODY_S:g} s"
        raise Refused("body-timeout", detail, headers={"Connection": "close"}) from None
    return bytes(body)


async def _discard(chunks: AsyncIterator[bytes], most: int) -> None:
    try:
        async with asyncio.timeout(DISCARD_S):
            async for chunk in chunks:
                most -= len(chunk)
                if most < 0:
                    return
    except TimeoutError:
        pass


def refusal_of(error: ValidationError) -> Refused:
    """The first thing that is wrong, and all of them."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return Refused("malformed-json", errors[0]["msg"])
    found: dict[str, str] = {}
    for one in errors:
        where = [str(part) for part in one["loc"]]
        if where[:1] == ["prompt"] and one["type"] != "missing":  # it may be two things, and pydantic reports on both
            found["prompt"] = "text, a list of token ids from 0 to 2147483647, or a conversation; not empty"
        else:
            found[".".join(where)[:200] or "body"] = one["msg"]
    listed = [{"field": field, "detail": detail} for field, detail in found.items()][:MAX_ERRORS]
    return Refused("invalid-job", listed[0]["detail"], field=listed[0]["field"], errors=listed)


def seconds(value: float) -> str:
    """For `Preference-Applied`: whole seconds where it was whole."""
    return str(math.floor(value)) if value == math.floor(value) else f"{value:g}"

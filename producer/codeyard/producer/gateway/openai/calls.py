"""What every call that generates does: submit its jobs, wait for their ends. Called by: routes, response_routes."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.limits import openai_headers
from codeyard.producer.gateway.merged import Merged
from codeyard.producer.gateway.openai.convert import Asked, Wanted, key_of
from codeyard.producer.gateway.openai.errors import SERVER, ApiError, of_job
from codeyard.producer.gateway.problems import Refused, kind_of
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.gateway.tenancy import Submitted, TenantJobs
from codeyard.producer.gateway.waiting import hung_up, unless
from codeyard.shared.errors import FleetError
from codeyard.shared.job import DEFAULT_TIMEOUT_S
from codeyard.shared.record import EventKind, JobStatus

FIRST_S = 5.0  # a stream begins after so long without a word; until then a job that fails is a status, not an event
LET_GO_S = 5.0  # to cancel jobs that nobody was told of

AGAIN = "send the same request again, with the same Idempotency-Key, to get its answer"


@dataclass(frozen=True, slots=True)
class Call:
    """A request and its jobs, in the order of its choices. `key`: the caller's own."""

    asked: Asked
    jobs: Sequence[Submitted]
    key: str | None

    @property
    def statuses(self) -> list[JobStatus]:
        return [one.job.accepted_status for one in self.jobs]

    @property
    def headers(self) -> dict[str, str]:
        """The request id is the first job's: /v1/jobs/{id} has it too."""
        return {"x-request-id": self.jobs[0].job.id, **openai_headers(self.jobs[-1].standing)}

    def error_of(self, status: JobStatus) -> ApiError | None:
        """Why a final job has no answer. Under a key that job is the answer for ever: trying again cannot help."""
        error = of_job(status)
        return replace(error, retry=False) if error is not None and self.key is not None else error


async def submitted(kit: Kit, request: Request, jobs: TenantJobs, read: Callable[[bytes], Awaitable[Asked]]) -> Call:
    """The request, with all its jobs accepted. Raises Refused, and what `TenantJobs.submit` raises."""
    lane = "unknown"  # until the body is read
    try:
        key = requests.idempotency_key(request.headers)
        asked = await read(await requests.read_body(request, jobs.body_bytes(kit.settings.max_body_bytes)))
    except (Refused, FleetError) as error:
        kit.metrics.submissions.labels(lane=lane, outcome=kind_of(error)).inc()
        raise
    trace = requests.traceparent(request.headers)

    async def submit(place: int, wanted: Wanted) -> Submitted:
        try:
            accepted = await jobs.submit(
                wanted.prompt,
                model=asked.model,
                lane=asked.lane,
                idempotency_key=None if key is None else key_of(key, place),
                sampling=wanted.sampling,
                stream=asked.stream or asked.background,
                timeout_s=DEFAULT_TIMEOUT_S,
                metadata=asked.metadata,
                traceparent=trace,
            )
        except FleetError as error:
            kit.metrics.submissions.labels(lane=asked.lane.value, outcome=kind_of(error)).inc()
            raise
        outcome = "attached" if accepted.job.attached else "accepted"
        kit.metrics.submissions.labels(lane=asked.lane.value, outcome=outcome).inc()
        return accepted

    outcomes = await asyncio.gather(
        *(submit(place, wanted) for place, wanted in enumerate(asked.jobs)), return_exceptions=True
    )
    accepted = [one for one in outcomes if isinstance(one, Submitted)]
    for one in outcomes:
        if isinstance(one, BaseException):
            if key is None:
                await _let_go(jobs, accepted)
            raise one
    return Call(asked, accepted, key)


async def finals(kit: Kit, request: Request, jobs: TenantJobs, call: Call) -> list[JobStatus] | ApiError:
    """The statuses of the jobs once all have succeeded, or why there is no answer. Raises ClientDisconnect."""
    until_s = time.monotonic() + kit.settings.answer_wait_s
    statuses = []
    for status in call.statuses:
        final: JobStatus | None = status
        if not status.state.final:
            left_s = max(0.0, until_s - time.monotonic())
            final = await kit.final_within(request, jobs, status.id, left_s, resumable=False)
        if final is None:
            return _not_yet(kit, call, status)
        if (error := call.error_of(final)) is not None:
            return error
        statuses.append(final)
    return statuses


async def early_error(kit: Kit, request: Request, jobs: TenantJobs, call: Call, events: Merged) -> ApiError | None:
    """Why there is no answer, if that is known before anything is told. Raises ClientDisconnect."""
    gone = False

    async def caller_gone() -> None:
        nonlocal gone
        await hung_up(request.receive)
        gone = True

    try:
        async with asyncio.timeout(FIRST_S):
            first = await unless(events.first(), caller_gone(), kit.until(resumable=False).wait())
    except TimeoutError:
        return None
    if gone:
        raise ClientDisconnect
    if first is None or first[1].kind is not EventKind.END:
        return None
    return call.error_of(await jobs.status(call.jobs[first[0]].job.id))


def as_json(document: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(document, separators=(",", ":")), media_type="application/json", headers=headers)


def _not_yet(kit: Kit, call: Call, status: JobStatus) -> ApiError:
    """An SDK's own second try would be a second job, unless a key says which it is."""
    keyed = call.key is not None
    how = f"{AGAIN}, or read it at" if keyed else "read it at"
    where = f"job {status.id} goes on: {how} /v1/jobs/{status.id}"
    if kit.until(resumable=False).is_set():
        return ApiError(503, f"the gateway is stopping; {where}", SERVER, "gateway_stopping", retry=keyed)
    waited = f"there is no answer after {kit.settings.answer_wait_s:g} s; {where}"
    return ApiError(504, waited, SERVER, "answer_timeout", retry=keyed)


async def _let_go(jobs: TenantJobs, accepted: Sequence[Submitted]) -> None:
    """Of a request that was refused half way; best effort, they would only run for nothing."""
    try:
        async with asyncio.timeout(LET_GO_S):
            await asyncio.gather(*(jobs.cancel(one.job.id) for one in accepted), return_exceptions=True)
    except TimeoutError:
        pass

"""The routes of Anthropic's API. A thin shell: `convert` and `legacy` read and answer, `stream` tells.

    POST /v1/messages                a message, whole or as a stream
    POST /v1/messages/count_tokens   the tokens of one, counted by the model's own template and tokenizer
    POST /v1/complete                the old text form

Each call is a job, and outlives it: who hangs up can send the same request again under its `Idempotency-Key`,
to any gateway, and gets the same answer. Called by: gateway.surfaces.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.anthropic.convert import Asked, message_of, read_count, read_message
from codeyard.producer.gateway.anthropic.errors import refuse, refuse_ended, refuse_waiting, request_id_of
from codeyard.producer.gateway.anthropic.legacy import CompletionTeller, completion_of, read_completion
from codeyard.producer.gateway.anthropic.stream import PING, MessageTeller, Teller, farewell, told
from codeyard.producer.gateway.limits import anthropic_headers
from codeyard.producer.gateway.merged import Merged, without_taken_back
from codeyard.producer.gateway.problems import Refused, kind_of
from codeyard.producer.gateway.surface import Kit, Route, Surface
from codeyard.producer.gateway.tenancy import Submitted, TenantJobs
from codeyard.producer.gateway.waiting import hung_up, unless
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import FleetError
from codeyard.shared.job import DEFAULT_TIMEOUT_S, Lane
from codeyard.shared.record import EventKind, JobStatus, State

LANE = "x-codeyard-lane"  # header; over the lane that the body's service_tier means
WAITED_S = 3_600.0  # for a job somebody waits for; the SDKs give up after 600 s, and may come back
COUNT_S = 60.0
FIRST_S = 5.0  # a stream begins after so long without a word; until then a job that fails is a status, not an event


@dataclass(frozen=True, slots=True)
class Form:
    """One way of asking and answering."""

    read: Callable[[bytes], Asked]
    answer: Callable[[Asked, JobStatus], dict[str, Any]]
    teller: Callable[[Asked, JobStatus], Teller]


MESSAGE = Form(read_message, message_of, MessageTeller)
COMPLETION = Form(
    read_completion, lambda _, status: completion_of(status), lambda _, accepted: CompletionTeller(accepted)
)


def anthropic_surface(kit: Kit) -> Surface:
    handlers = _Handlers(kit)
    return Surface(
        [
            Route("/v1/messages", "POST", Scope.SUBMIT, handlers.messages),
            Route("/v1/messages/count_tokens", "POST", Scope.SUBMIT, handlers.count_tokens),
            Route("/v1/complete", "POST", Scope.SUBMIT, handlers.complete),
        ],
        refuse,
    )


class _Handlers:
    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    async def messages(self, request: Request, jobs: TenantJobs) -> Response:
        return await self._answered(request, jobs, MESSAGE)

    async def complete(self, request: Request, jobs: TenantJobs) -> Response:
        return await self._answered(request, jobs, COMPLETION)

    async def count_tokens(self, request: Request, jobs: TenantJobs) -> Response:
        _, submitted = await self._submitted(request, jobs, read_count, key=None, timeout_s=COUNT_S)
        ended = await self._ended(request, jobs, submitted, keyed=True)  # to count twice does no harm
        if isinstance(ended, Response):
            return ended
        assert ended.result is not None
        return _json({"input_tokens": ended.result.usage.prompt_tokens}, _headers(submitted))

    async def _answered(self, request: Request, jobs: TenantJobs, form: Form) -> Response:
        key = requests.idempotency_key(request.headers)
        asked, submitted = await self._submitted(request, jobs, form.read, key=key)
        if asked.stream:
            return await self._streamed(request, jobs, submitted, form.teller(asked, submitted.job.accepted_status))
        ended = await self._ended(request, jobs, submitted, keyed=key is not None)
        if isinstance(ended, Response):
            return ended
        return _json(form.answer(asked, ended), _headers(submitted))

    async def _streamed(self, request: Request, jobs: TenantJobs, submitted: Submitted, teller: Teller) -> Response:
        accepted = submitted.job.accepted_status

        async def final() -> JobStatus:
            return await jobs.status(accepted.id)

        events = Merged([without_taken_back(jobs.stream(accepted.id), accepted.last_seq)])
        try:
            over = accepted.state.final or await self._over_at_once(request, events)
            status = await final() if over else accepted
        except BaseException:
            await events.aclose()
            raise
        if over and status.state is not State.SUCCEEDED:
            await events.aclose()
            return refuse_ended(status)
        frames = told(teller, events, accepted, final)
        answer = self._kit.event_stream(
            frames, resumable=False, beat=PING, farewell=farewell(request_id_of(accepted.id))
        )
        answer.headers.update(_headers(submitted))
        return answer

    async def _over_at_once(self, request: Request, events: Merged) -> bool:
        """Whether the end is the first thing to tell: then it can still be a status. Raises ClientDisconnect."""
        gone = False

        async def caller_gone() -> None:
            nonlocal gone
            await hung_up(request.receive)
            gone = True

        try:
            async with asyncio.timeout(FIRST_S):
                ended = self._kit.until(resumable=False)
                first = await unless(events.first(), caller_gone(), ended.wait())
        except TimeoutError:
            return False
        if gone:
            raise ClientDisconnect
        return first is not None and first[1].kind is EventKind.END

    async def _ended(
        self, request: Request, jobs: TenantJobs, submitted: Submitted, *, keyed: bool
    ) -> JobStatus | Response:
        """The job once it has succeeded, or the answer if it does not. Raises ClientDisconnect."""
        accepted, wait_s = submitted.job.accepted_status, self._kit.settings.answer_wait_s
        status: JobStatus | None = accepted
        if not accepted.state.final:
            status = await self._kit.final_within(request, jobs, accepted.id, wait_s, resumable=False)
        if status is None:
            stopping = self._kit.until(resumable=False).is_set()
            reason = "the gateway is stopping" if stopping else f"there is no answer after {wait_s:g} s"
            return refuse_waiting(accepted.id, reason, keyed=keyed)
        return status if status.state is State.SUCCEEDED else refuse_ended(status)

    async def _submitted(
        self,
        request: Request,
        jobs: TenantJobs,
        read: Callable[[bytes], Asked],
        *,
        key: str | None,
        timeout_s: float | None = None,
    ) -> tuple[Asked, Submitted]:
        lane = "unknown"  # until the body is read
        try:
            body = await requests.read_body(request, jobs.body_bytes(self._kit.settings.max_body_bytes))
            asked = _in_lane(read(body), request)
            lane = asked.lane.value
            submitted = await jobs.submit(
                asked.prompt,
                model=asked.model,
                lane=asked.lane,
                idempotency_key=key,
                sampling=asked.sampling,
                stream=asked.stream,
                timeout_s=timeout_s or _timeout_s(asked),
                metadata=asked.metadata or {},
                traceparent=requests.traceparent(request.headers),
            )
        except (Refused, FleetError) as error:
            self._kit.metrics.submissions.labels(lane=lane, outcome=kind_of(error)).inc()
            raise
        outcome = "attached" if submitted.job.attached else "accepted"
        self._kit.metrics.submissions.labels(lane=lane, outcome=outcome).inc()
        return asked, submitted


def _in_lane(asked: Asked, request: Request) -> Asked:
    given = request.headers.get(LANE)
    if given is None:
        return asked
    try:
        return replace(asked, lane=Lane(given))
    except ValueError:
        raise Refused("invalid-header", f"one of {', '.join(Lane)}", field=LANE) from None


def _timeout_s(asked: Asked) -> float:
    return DEFAULT_TIMEOUT_S if asked.lane is Lane.BULK else WAITED_S


def _headers(submitted: Submitted) -> dict[str, str]:
    return {
        "request-id": request_id_of(submitted.job.id),
        **anthropic_headers(submitted.standing, time.time()),
    }


def _json(document: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return Response(json.dumps(document, separators=(",", ":")), media_type="application/json", headers=dict(headers))

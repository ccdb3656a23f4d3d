"""The routes of Anthropic's API. A thin shell: `convert` and `legacy` read and answer, `stream` tells.

    POST /v1/messages                a message, whole or as a stream
    POST /v1/messages/count_tokens   the tokens of one, counted by the model's own template and tokenizer
    POST /v1/complete                the old text form

Each call is a job, and outlives it: who hangs up can send the same request again under its `Idempotency-Key`,
to any gateway, and gets the same answer. Called by: gateway.surfaces.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.anthropic.convert import Asked, message_of, read_count, read_message
from codeyard.producer.gateway.anthropic.errors import refuse, refuse_ended, request_id_of
from codeyard.producer.gateway.anthropic.legacy import CompletionTeller, completion_of, read_completion
from codeyard.producer.gateway.anthropic.stream import PING, MessageTeller, Teller, farewell, told
from codeyard.producer.gateway.limits import anthropic_headers
from codeyard.producer.gateway.problems import Refused, kind_of
from codeyard.producer.gateway.surface import Kit, Route, Surface
from codeyard.producer.gateway.tenancy import Submitted, TenantJobs
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import FleetError
from codeyard.shared.job import DEFAULT_TIMEOUT_S, Lane
from codeyard.shared.record import JobStatus, State

LANE = "codeyard-lane"  # header; over the lane that the body's service_tier means
WAITED_S = 3_600.0  # for a job somebody waits for; the SDKs give up after 600 s, and may come back
COUNT_S = 60.0
MARGIN_S = 5.0  # past a job's deadline: by then it has expired


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
        status = await self._final(request, jobs, submitted, COUNT_S)
        if status.state is not State.SUCCEEDED:
            return refuse_ended(status)
        assert status.result is not None
        return _json({"input_tokens": status.result.usage.prompt_tokens}, _headers(submitted))

    async def _answered(self, request: Request, jobs: TenantJobs, form: Form) -> Response:
        key = requests.idempotency_key(request.headers)
        asked, submitted = await self._submitted(request, jobs, form.read, key=key)
        accepted = submitted.job.accepted_status
        if not asked.stream:
            status = await self._final(request, jobs, submitted, _timeout_s(asked))
            if status.state is not State.SUCCEEDED:
                return refuse_ended(status)
            return _json(form.answer(asked, status), _headers(submitted))

        async def final() -> JobStatus:
            return await jobs.status(accepted.id)

        frames = told(form.teller(asked, accepted), jobs.stream(accepted.id), accepted, final)
        answer = self._kit.event_stream(frames, beat=PING, farewell=farewell(request_id_of(accepted.id)))
        answer.headers.update(_headers(submitted))
        return answer

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

    async def _final(self, request: Request, jobs: TenantJobs, submitted: Submitted, timeout_s: float) -> JobStatus:
        """Raises Refused if the job goes on without this gateway, ClientDisconnect without its caller."""
        status: JobStatus | None = submitted.job.accepted_status
        assert status is not None
        if not status.state.final:
            status = await self._kit.final_within(request, jobs, submitted.job.id, timeout_s + MARGIN_S)
        if status is None:
            raise Refused("not-ready", "the job goes on; send the request again, with the same Idempotency-Key")
        return status


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

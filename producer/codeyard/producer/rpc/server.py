"""The service `codeyard.v1.Fleet`: submit, read, follow and cancel jobs. A thin shell over `TenantJobs`.

Handlers read a message, ask, and write messages; `calls` says who is calling and what a refusal looks like. A
submission that was begun is finished, whoever hangs up: half of one would be a job that nobody knows of.
codeyard.proto is the reference. Called by: rpc.serving, tests.
"""

import asyncio
import logging
import math
from collections.abc import Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message
from pydantic import TypeAdapter, ValidationError

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.limits import openai_headers
from codeyard.producer.gateway.problems import Refused, kind_of
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.gateway.tenancy import Submitted, TenantJobs
from codeyard.producer.gateway.waiting import unless
from codeyard.producer.rpc import asking, wire
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.calls import Call, Calls, Context
from codeyard.producer.rpc.codeyard_pb2_grpc import FleetServicer
from codeyard.producer.rpc.inference import Inference, check_sequence, checked
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import FleetError, InvalidJob, ResultTimeout
from codeyard.shared.job import Name
from codeyard.shared.record import JobStatus

log = logging.getLogger(__name__)

STOPPING = "the gateway is stopping; go on here in a moment, or at another"
MAX_MARGIN_S = 1.0  # that a wait ends before the caller's deadline, and a quarter of what is left where that is less

_KEY: TypeAdapter[str] = TypeAdapter(Name)


class Fleet(FleetServicer):
    def __init__(self, kit: Kit, calls: Calls) -> None:
        self._kit = kit
        self._calls = calls
        self._begun: set[asyncio.Task[Any]] = set()  # submissions, and cancellations of jobs that were left behind

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        async with self._calls.answering(context, "Submit") as call:
            checked(request)
            wait_s = self._wait_s(request.wait_s, context)
            jobs = await call.jobs(Scope.SUBMIT)
            submitted = await self.finished(self.submit(call, jobs, request.submission))
            context.set_trailing_metadata(tuple(openai_headers(submitted.standing).items()))
            job = submitted.job
            status = await self._final_within(jobs, job.accepted_status, wait_s)
            return pb.SubmitResponse(
                status=wire.status_message(status), attached=job.attached, estimated_start_s=job.estimated_start_s
            )
        raise AssertionError("a call is answered or aborted")

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.JobStatus:
        async with self._calls.answering(context, "Get") as call:
            checked(request)
            wait_s = self._wait_s(request.wait_s, context)
            jobs = await call.jobs(Scope.READ)
            status = await jobs.status(requests.known_form(request.job_id))
            return wire.status_message(await self._final_within(jobs, status, wait_s))
        raise AssertionError("a call is answered or aborted")

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        async with self._calls.answering(context, "Cancel") as call:
            checked(request)
            jobs = await call.jobs(Scope.CANCEL)
            verdict = await jobs.cancel(requests.known_form(request.job_id))
            return pb.CancelResponse(outcome=wire.OUTCOMES[verdict])
        raise AssertionError("a call is answered or aborted")

    async def Stream(self, request: pb.StreamRequest, context: Context) -> None:
        async with self._calls.answering(context, "Stream") as call:
            checked(request)
            jobs = await call.jobs(Scope.READ)
            job_id = requests.known_form(request.job_id)
            check_sequence(request.from_sequence, await jobs.status(job_id))
            await context.send_initial_metadata(())  # the stream stands, though its job may be silent for long

            async def tell() -> bool:
                async with aclosing(jobs.stream(job_id, request.from_sequence)) as events:
                    async for event in events:
                        await context.write(wire.event_message(event))
                return True

            with self._kit.metrics.streams_open.track_inprogress():
                if await unless(tell(), self._kit.stopping.wait()) is None:
                    raise Refused("not-ready", STOPPING)

    async def StreamInference(self, _: Any, context: Context) -> None:
        async with self._calls.answering(context, "StreamInference") as call:
            await call.jobs(Scope.SUBMIT, Scope.READ)
            await context.send_initial_metadata(())
            with self._kit.metrics.streams_open.track_inprogress():
                inference = Inference(self, call, self._kit.stopping)
                if await unless(inference.run(), self._kit.stopping.wait()) is None:
                    raise Refused("not-ready", STOPPING)

    # For Inference too -----------------------------------------------------------------------------

    async def submit(self, call: Call, jobs: TenantJobs, message: pb.Submission, *, stream: bool = False) -> Submitted:
        """Raises Refused, and what `TenantJobs.submit` raises."""
        lane = "unknown"  # until the message is read
        try:
            most = jobs.body_bytes(self._kit.settings.max_body_bytes)
            if message.ByteSize() > most:
                raise Refused("too-large", f"the submission is over the limit of {most} bytes", field="submission")
            asked, key = _asked(message)
            lane = asked.lane.value
            if asked.callback_url is not None:
                self._kit.callbacks.check(asked.callback_url, jobs.tenant)
            submitted = await jobs.submit(
                asked.prompt,
                model=asked.model,
                lane=asked.lane,
                idempotency_key=key,
                sampling=asked.sampling,
                stream=asked.stream or stream,
                timeout_s=asked.timeout_s,
                metadata=asked.metadata,
                traceparent=requests.trace_of(next(iter(call.values("traceparent")), "")),
                callback_url=asked.callback_url,
                share=asked.share,
            )
        except (Refused, FleetError) as error:
            self._kit.metrics.submissions.labels(lane=lane, outcome=kind_of(error)).inc()
            raise
        outcome = "attached" if submitted.job.attached else "accepted"
        self._kit.metrics.submissions.labels(lane=lane, outcome=outcome).inc()
        return submitted

    async def finished(self, begun: Coroutine[Any, Any, Submitted]) -> Submitted:
        """Its outcome; it goes on if who waits for it is cancelled."""
        return await asyncio.shield(self.begin(begun))

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._begun.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._begun.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("begun_and_refused", extra={"error": str(error)})  # whoever waited for it was told

    async def settled(self) -> None:
        """Return when all that was begun is over."""
        while self._begun:
            await asyncio.gather(*self._begun, return_exceptions=True)

    async def close(self) -> None:
        """End what was begun and is not over."""
        for task in self._begun:
            task.cancel()
        await self.settled()

    # -----------------------------------------------------------------------------------------------

    def _wait_s(self, asked_s: float, context: Context) -> float:
        """As asked, but no longer than the gateway allows, and the caller's deadline."""
        if not 0 <= asked_s < math.inf:
            raise Refused("invalid-parameter", "0 or a number of seconds", field="wait_s")
        left_s = context.time_remaining()
        most_s = math.inf if left_s is None else left_s - min(MAX_MARGIN_S, left_s / 4)
        return max(0.0, min(asked_s, self._kit.settings.max_wait_s, most_s))

    async def _final_within(self, jobs: TenantJobs, status: JobStatus, wait_s: float) -> JobStatus:
        """The status once the job is final; as it is when the time has passed, or the gateway stops."""
        if wait_s == 0 or status.state.final:
            return status
        try:
            with self._kit.metrics.waits_open.track_inprogress():
                final = await unless(jobs.wait(status.id, wait_s), self._kit.stopping.wait())
        except ResultTimeout:
            final = None
        return final or await jobs.status(status.id)


def handlers_of(fleet: Fleet) -> dict[str, Any]:
    """Its methods, as gRPC serves them. The generated ones end the call in a traceback if a message cannot be read;
    here it is None."""
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    handlers = {}
    for method in pb.DESCRIPTOR.services_by_name["Fleet"].methods:
        sent = message_factory.GetMessageClass(method.output_type)
        handlers[method.name] = kinds[method.client_streaming, method.server_streaming](
            getattr(fleet, method.name),
            request_deserializer=partial(_read, message_factory.GetMessageClass(method.input_type)),
            response_serializer=sent.SerializeToString,
        )
    return handlers


def _read(kind: type[Message], sent: bytes) -> Message | None:
    try:
        return kind.FromString(sent)
    except DecodeError:
        return None


def _asked(message: pb.Submission) -> tuple[requests.SubmitBody, str | None]:
    """Raises InvalidJob."""
    try:
        asked = requests.SubmitBody.model_validate(asking.fields_of(message))
    except ValidationError as error:
        raise requests.refusal_of(error) from None
    try:
        return asked, _KEY.validate_python(message.key) if message.HasField("key") else None
    except ValidationError:
        raise InvalidJob("1 to 200 characters, none of them a control character", field="key") from None

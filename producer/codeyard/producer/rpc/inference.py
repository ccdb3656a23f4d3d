"""One `StreamInference` call: many jobs over one connection.

    requests --> admitted as they come, at most MAX_OPEN at once --> one task each --> responses, one at a time

Each task reads its job's events as the caller takes responses: a slow reader makes these tasks wait, and nobody
else. Closing the stream leaves the jobs as they are, except those that asked for `cancel_on_disconnect`; a
gateway that stops cancels none, for its callers go on at another.
Called by: rpc.server.
"""

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.tenancy import Submitted, TenantJobs
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc import wire
from codeyard.producer.rpc.calls import Call, told_of
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import FleetError
from codeyard.shared.record import Event, EventKind, JobStatus

if TYPE_CHECKING:
    from codeyard.producer.rpc.server import Fleet

MAX_OPEN = 1_000  # requests under way on one call; codeyard.proto and docs/grpc.md say so
MAX_CORRELATION_CHARS = 200


class Inference:
    def __init__(self, fleet: "Fleet", call: Call, stopping: asyncio.Event) -> None:
        self._fleet = fleet
        self._call = call
        self._stopping = stopping
        self._room = asyncio.Semaphore(MAX_OPEN)
        self._writing = asyncio.Lock()  # fair: jobs take turns
        self._open: set[str] = set()  # correlation ids under way

    async def run(self) -> bool:
        """True when the caller has sent its last request and every job has ended."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._room.acquire()
                request = await self._call.context.read()
                if request is not None and not isinstance(request, pb.InferenceRequest):  # grpc.aio.EOF
                    return True
                tasks.create_task(self._answer(request))
        raise AssertionError("a task group does not swallow")

    async def _answer(self, sent: pb.InferenceRequest | None) -> None:
        request, mine = sent or pb.InferenceRequest(), False
        try:
            checked(sent)
            self._check(request)
            self._open.add(request.correlation_id)
            mine = True
            await self._infer(request)
        except (Refused, FleetError) as error:
            if (told := told_of(error)) is None:
                raise
            job_id = str(told.members.get("job_id", ""))
            await self._write(
                pb.InferenceResponse(
                    correlation_id=request.correlation_id, job_id=job_id, is_end=True, refusal=told.refusal()
                )
            )
        finally:
            if mine:
                self._open.discard(request.correlation_id)
            self._room.release()

    def _check(self, request: pb.InferenceRequest) -> None:
        if not 1 <= len(request.correlation_id) <= MAX_CORRELATION_CHARS:
            detail = f"1 to {MAX_CORRELATION_CHARS} characters"
            raise Refused("invalid-parameter", detail, field="correlation_id")
        if request.correlation_id in self._open:
            raise Refused("invalid-parameter", "a request with this one is under way", field="correlation_id")

    async def _infer(self, request: pb.InferenceRequest) -> None:
        scopes = [Scope.CANCEL] if request.cancel_on_disconnect else []
        jobs = await self._call.jobs(Scope.SUBMIT, Scope.READ, *scopes)
        submitting = self._fleet.begin(self._fleet.submit(self._call, jobs, request.submission, stream=True))
        try:
            submitted: Submitted = await asyncio.shield(submitting)
            await self._tell(request, jobs, submitted)
        except (Refused, FleetError):
            raise  # told to a caller who is there
        except BaseException:
            if request.cancel_on_disconnect and not self._stopping.is_set():
                self._fleet.begin(_cancel(jobs, submitting))
            raise

    async def _tell(self, request: pb.InferenceRequest, jobs: TenantJobs, submitted: Submitted) -> None:
        job, name, seq = submitted.job, request.correlation_id, request.from_sequence
        check_sequence(seq, job.accepted_status)
        accepted = pb.Accepted(attached=job.attached, estimated_start_s=job.estimated_start_s, model=jobs.stood_in)
        await self._write(pb.InferenceResponse(correlation_id=name, job_id=job.id, accepted=accepted))
        async with aclosing(jobs.stream(job.id, seq)) as events:
            async for event in events:
                seq = event.seq
                if event.kind is not EventKind.END:
                    await self._write(_piece(name, job.id, event))
        result = (await jobs.status(job.id)).result
        await self._write(
            pb.InferenceResponse(
                correlation_id=name,
                job_id=job.id,
                sequence_id=seq,
                is_end=True,
                result=wire.result_message(result, streamed=True) if result is not None else None,
            )
        )

    async def _write(self, response: pb.InferenceResponse) -> None:
        async with self._writing:
            await self._call.context.write(response)


def checked(request: Message | None) -> None:
    """None: what was sent could not be read."""
    if request is None:
        raise Refused("invalid-parameter", "this is no message of this method", field="message")


def check_sequence(asked: int, status: JobStatus) -> None:
    """A later one than there is was of another job: replaying everything would show its tokens twice."""
    if asked > status.last_seq:
        detail = f"not the number of an event of this job; the newest is {status.last_seq}"
        raise Refused("invalid-parameter", detail, field="from_sequence")


def _piece(name: str, job_id: str, event: Event) -> pb.InferenceResponse:
    return pb.InferenceResponse(
        correlation_id=name,
        job_id=job_id,
        sequence_id=event.seq,
        delta=event.text.encode(),
        restarted=event.kind is EventKind.RESTARTED,
        token_ids=event.token_ids,
        content=event.content,
        tool_calls=wire.delta_messages(event.tool_calls),
        logprobs=wire.logprob_messages(event.logprobs),
    )


async def _cancel(jobs: TenantJobs, submitting: "asyncio.Task[Submitted]") -> None:
    """The job of a caller that hung up, also if it was still being submitted."""
    submitted = await submitting
    await jobs.cancel(submitted.job.id)

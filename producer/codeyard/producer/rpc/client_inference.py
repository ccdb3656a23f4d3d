"""The client's side of `StreamInference`: what is under way, sent again when the connection is lost.

    caller's requests --> a queue of one --> the call of the moment --> answers to the caller

Each request under way is remembered with the last sequence number its caller has; a new call begins with all of
them, which attach to their jobs by their keys. Called by: rpc.client.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from codeyard.producer.rpc import asking, wire
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.link import COME_BACK, Link, Patience, translated
from codeyard.producer.rpc.refusals import told_in
from codeyard.producer.submission import Submission
from codeyard.shared.chat import TokenLogprob, ToolCallDelta
from codeyard.shared.errors import FleetError
from codeyard.shared.job import JobId, new_job_id
from codeyard.shared.record import Result


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request. `correlation_id`: yours, of none that is under way. `cancel_on_disconnect`: also when this
    client loses its connection for a moment."""

    correlation_id: str
    submission: Submission
    cancel_on_disconnect: bool = False


@dataclass(frozen=True, slots=True)
class Inferred:
    """A piece of an answer. The last one of a request has `is_end`, and `result` (without the texts that came
    before) or `error`. `restarted`: drop what came so far."""

    correlation_id: str
    job_id: JobId
    sequence_id: int = 0
    delta: bytes = b""
    is_end: bool = False
    restarted: bool = False
    token_ids: tuple[int, ...] = ()
    content: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    result: Result | None = None
    error: FleetError | None = None


class Inferring:
    """One `infer`. `_open` belongs to the task that runs `run`, and to the sender that it starts."""

    def __init__(self, link: Link, wanted: AsyncIterable[Wanted] | Iterable[Wanted], *, away_s: float) -> None:
        self._link = link
        self._wanted = wanted
        self._patience = Patience(away_s)
        self._next: asyncio.Queue[Wanted | None] = asyncio.Queue(maxsize=1)  # None: there are no more
        self._all_taken = False
        self._open: dict[str, pb.InferenceRequest] = {}

    async def run(self) -> AsyncGenerator[Inferred, None]:
        source = asyncio.create_task(self._take(), name="requests to infer")
        try:
            while self._open or not self._all_taken:
                self._patience.calling()
                try:
                    async with contextlib.aclosing(self._one_call(source)) as answers:
                        async for answer in answers:
                            yield answer
                except COME_BACK:
                    if not await self._patience.pause():
                        raise
        finally:
            source.cancel()
            await asyncio.gather(source, return_exceptions=True)

    async def _take(self) -> None:
        """A task of its own, so that a lost connection does not end the caller's generator."""
        async for one in _each(self._wanted):
            await self._next.put(one)
        await self._next.put(None)

    async def _one_call(self, source: "asyncio.Task[None]") -> AsyncGenerator[Inferred, None]:
        call = self._link.stub.StreamInference(metadata=self._link.metadata)
        sending = asyncio.create_task(self._send(call, source), name="requests sent")
        try:
            with translated():
                async for message in call:
                    if (answer := self._read(message)) is not None:
                        yield answer
        except asyncio.CancelledError:
            if sending.done() and not sending.cancelled():
                sending.result()  # it cancelled the call: what the caller's requests raised, or is wrong with one
            raise
        finally:
            sending.cancel()
            call.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, call: Any, source: "asyncio.Task[None]") -> None:
        """Errors of the call itself are the reader's to meet; all others end it."""
        try:
            for request in list(self._open.values()):
                await call.write(request)
            while not self._all_taken:
                one = await _unless_failed(self._next, source)
                if one is None:
                    self._all_taken = True
                    break
                request = _request(one)
                self._open[one.correlation_id] = request
                await call.write(request)
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            pass  # the call is over
        except BaseException:
            call.cancel()
            raise

    def _read(self, message: pb.InferenceResponse) -> Inferred | None:
        self._patience.heard()
        request = self._open.get(message.correlation_id)
        if request is None or message.HasField("accepted"):
            return None
        if message.is_end:
            del self._open[message.correlation_id]
        elif message.sequence_id <= request.from_sequence:
            return None
        else:
            request.from_sequence = message.sequence_id
        refused = message.HasField("refusal")
        return Inferred(
            correlation_id=message.correlation_id,
            job_id=message.job_id,
            sequence_id=message.sequence_id,
            delta=message.delta,
            is_end=message.is_end,
            restarted=message.restarted,
            token_ids=tuple(message.token_ids),
            content=message.content if message.HasField("content") else None,
            tool_calls=wire.deltas_of(message.tool_calls),
            logprobs=wire.logprobs_of(message.logprobs),
            result=wire.result_of(message.result) if message.HasField("result") else None,
            error=told_in(message.refusal, message.job_id).error() if refused else None,
        )


def keyed(submission: Submission) -> Submission:
    """With a key, so that sending it again is not another job; one that is shared has that of all its equals."""
    if submission.idempotency_key is not None or submission.share:
        return submission
    return replace(submission, idempotency_key=new_job_id())


def _request(wanted: Wanted) -> pb.InferenceRequest:
    return pb.InferenceRequest(
        correlation_id=wanted.correlation_id,
        submission=asking.message_of(keyed(wanted.submission)),
        cancel_on_disconnect=wanted.cancel_on_disconnect,
    )


async def _each(wanted: AsyncIterable[Wanted] | Iterable[Wanted]) -> AsyncIterator[Wanted]:
    if isinstance(wanted, AsyncIterable):
        async for one in wanted:
            yield one
    else:
        for one in wanted:
            yield one


async def _unless_failed(queue: "asyncio.Queue[Wanted | None]", source: "asyncio.Task[None]") -> Wanted | None:
    """The next item; raises what ended the source."""
    getting = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait([getting, source], return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and source.done():
            source.result()
        return await getting
    finally:
        getting.cancel()

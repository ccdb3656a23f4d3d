"""The client's side of `StreamInference`: what is under way, sent again when the connection is lost.

    caller's requests --> a queue of one --> the call of the moment --> answers to the caller

Each request under way is remembered with the last sequence number its caller has; a new call begins with all of
them, which attach to their jobs by their keys. One that is refused because a server is away is sent again on the
same call, so that its neighbours are not disturbed. Called by: rpc.client.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from codeyard.producer.rpc import asking, wire
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.link import COME_BACK, PAUSE_S, Link, Patience, translated
from codeyard.producer.rpc.refusals import Told, told_in
from codeyard.producer.submission import Submission
from codeyard.shared.chat import TokenLogprob, ToolCallDelta
from codeyard.shared.errors import FleetError, InvalidJob
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
    """One `infer`. Its state belongs to the task that runs `run`, and to the sender that this starts."""

    def __init__(self, link: Link, wanted: AsyncIterable[Wanted] | Iterable[Wanted], *, away_s: float) -> None:
        self._link = link
        self._wanted = wanted
        self._away_s = away_s
        self._patience = Patience(away_s)
        self._next: asyncio.Queue[Wanted | None] = asyncio.Queue(maxsize=1)  # None: there are no more
        self._all_taken = False
        self._open: dict[str, pb.InferenceRequest] = {}
        self._to_send: list[pb.InferenceRequest] = []
        self._refused_s: dict[str, float] = {}  # since when, by correlation id
        self._num_calls = 0
        self._wake = asyncio.Event()  # for the sender: something to send, or nothing is under way any more

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
        self._num_calls += 1
        self._to_send = list(self._open.values())
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
            while self._to_send or self._open or not self._all_taken:
                while self._to_send:
                    await call.write(self._to_send.pop(0))
                if (one := await self._next_wanted(source)) is not None:
                    if one.correlation_id in self._open:
                        raise InvalidJob("a request with this one is under way", field="correlation_id")
                    self._open[one.correlation_id] = request = _request(one)
                    self._to_send.append(request)
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            pass  # the call is over
        except BaseException:
            call.cancel()
            raise

    async def _next_wanted(self, source: "asyncio.Task[None]") -> Wanted | None:
        """The caller's next request; None if there is something else to do. Raises what its requests raised."""
        self._wake.clear()
        if self._to_send or (self._all_taken and not self._open):
            return None
        waking = asyncio.ensure_future(self._wake.wait())
        getting = asyncio.ensure_future(self._next.get()) if not self._all_taken else None
        failing = source if not source.done() or source.exception() is not None else None
        try:
            watched = [one for one in (waking, getting, failing) if one is not None]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if getting is not None and getting.done():
                self._all_taken = getting.result() is None
                return getting.result()
            if source.done():
                source.result()
            return None
        finally:
            waking.cancel()
            if getting is not None:
                getting.cancel()

    def _read(self, message: pb.InferenceResponse) -> Inferred | None:
        request = self._open.get(message.correlation_id)
        if request is None or message.HasField("accepted"):
            self._patience.heard()
            return None
        told = told_in(message.refusal, message.job_id) if message.HasField("refusal") else None
        if told is not None and self._comes_back(request, told):
            return None
        self._patience.heard()
        if message.is_end:
            del self._open[message.correlation_id]
            self._wake.set()
        elif message.sequence_id <= request.from_sequence:
            return None
        else:
            request.from_sequence = message.sequence_id
            self._refused_s.pop(message.correlation_id, None)
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
            error=told.error() if told is not None else None,
        )

    def _comes_back(self, request: pb.InferenceRequest, told: Told) -> bool:
        """Whether it is sent again, a little later, on this call."""
        now_s = time.monotonic()
        since_s = self._refused_s.setdefault(request.correlation_id, now_s)
        if not isinstance(told.error(), COME_BACK) or now_s - since_s >= self._away_s:
            del self._refused_s[request.correlation_id]
            return False
        delay_s = told.retry_after_s if told.retry_after_s is not None else PAUSE_S[1]
        asyncio.get_running_loop().call_later(min(delay_s, self._away_s), self._send_again, request, self._num_calls)
        return True

    def _send_again(self, request: pb.InferenceRequest, number: int) -> None:
        """Unless another call has begun meanwhile, and with all that is under way."""
        if number == self._num_calls and self._open.get(request.correlation_id) is request:
            self._to_send.append(request)
            self._wake.set()


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

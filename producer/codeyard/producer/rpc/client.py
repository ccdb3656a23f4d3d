"""A client for programs that reach the gateways over gRPC, and nothing behind them.

    async with RpcClient("gateway:9090", credential="cy_...") as client:
        job = await client.submit("def add(a, b):", model="starter", idempotency_key="add-1", stream=True)
        async for event in client.stream(job.id):
            print(event.text, end="")

The types and errors are those of codeyard.shared, as of `AsyncClient`; one more is `GatewayUnavailable`. Calls
are tried again for `timeout_s`, a submission always under one key; streams go on by themselves after a lost
connection, at whatever gateway answers, without gap or repeat. Needs the extra `grpc`. docs/grpc.md is the page.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc

from codeyard.producer.rpc import asking, wire
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.client_inference import Inferred, Inferring, Wanted, keyed
from codeyard.producer.rpc.link import COME_BACK, Link, Patience, translated
from codeyard.producer.rpc.refusals import GatewayUnavailable
from codeyard.producer.submission import Submission
from codeyard.shared.chat import Chat
from codeyard.shared.errors import ResultTimeout
from codeyard.shared.job import DEFAULT_TIMEOUT_S, JobId, Lane, Sampling
from codeyard.shared.record import Event, EventKind, JobStatus, Result
from codeyard.shared.store.port import CancelVerdict

__all__ = ["GatewayUnavailable", "Inferred", "RpcClient", "RpcJob", "Wanted"]

MAX_WAIT_S = 30.0  # of one `Get`; longer waits are several
ANSWER_S = 10.0  # for an answer, on top of what was asked to wait
AWAY_S = 60.0  # a stream that nobody continues for this long ends with the error


@dataclass(frozen=True, slots=True)
class RpcJob:
    """An accepted job. `attached`: it was there before, under the same key."""

    id: JobId
    status: JobStatus
    attached: bool
    estimated_start_s: float | None


class RpcClient:
    """Any number of tasks may use one client at once; it belongs to one event loop.

    `target`: what gRPC calls one, e.g. `gateway:9090`, `dns:///gateways:9090` or `ipv4:10.0.0.1:9090,10.0.0.2:9090`.
    `credential`: an API key or a JWT. `tls`: without it the line is not encrypted. `options`: channel arguments.
    """

    def __init__(
        self,
        target: str,
        *,
        credential: str | None = None,
        tls: grpc.ChannelCredentials | None = None,
        timeout_s: float = 15.0,
        away_s: float = AWAY_S,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._link = Link(target, credential=credential, tls=tls, options=dict(options or {}))
        self._timeout_s = timeout_s
        self._away_s = away_s

    async def close(self) -> None:
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def submit(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        model: str = "starter",
        lane: Lane | str = Lane.STANDARD,
        idempotency_key: str | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        stream: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        metadata: Mapping[str, Any] | None = None,
        share: bool = False,
        callback_url: str | None = None,
    ) -> RpcJob:
        """Return once the job is accepted. Raises IdempotencyConflict, QueueFull, DeadlineTooSoon, RateLimited,
        QuotaExceeded, UnknownModel, InvalidJob, Unauthorized, Forbidden, and after `timeout_s` of further tries
        GatewayUnavailable, BrokerUnavailable, StoreUnavailable, AuthUnavailable."""
        submission = Submission(
            prompt=prompt,
            model=model,
            lane=lane,
            idempotency_key=idempotency_key,
            sampling=sampling if sampling is not None else Sampling(),
            stream=stream,
            timeout_s=timeout_s,
            metadata=metadata or {},
            share=share,
            callback_url=callback_url,
        )
        request = pb.SubmitRequest(submission=asking.message_of(keyed(submission)))
        answer = await self._link.call(self._link.stub.Submit, request, timeout_s=self._timeout_s)
        return RpcJob(
            answer.status.id,
            wire.status_of(answer.status),
            answer.attached,
            answer.estimated_start_s if answer.HasField("estimated_start_s") else None,
        )

    async def get(self, job_id: JobId, *, wait_s: float = 0.0) -> JobStatus:
        """The job as it is; with `wait_s` once it is final, or as it is after so many seconds.
        Raises JobNotFound, Unauthorized, Forbidden; GatewayUnavailable, StoreUnavailable, AuthUnavailable."""
        until_s = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, until_s - time.monotonic())
            request = pb.GetRequest(job_id=job_id, wait_s=min(MAX_WAIT_S, left_s))
            timeout_s = max(self._timeout_s, request.wait_s + ANSWER_S)
            status = wire.status_of(await self._link.call(self._link.stub.Get, request, timeout_s=timeout_s))
            if status.state.final or time.monotonic() >= until_s:
                return status

    async def result(self, job_id: JobId, timeout: float = 60.0) -> Result:
        """The committed result, whatever the final state is. Raises ResultTimeout, and as `get`."""
        status = await self.get(job_id, wait_s=timeout)
        if status.result is None:
            raise ResultTimeout(job_id, waited_s=timeout)
        return status.result

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        """Ask for a job's end. Raises as `get`."""
        request = pb.CancelRequest(job_id=job_id)
        answer = await self._link.call(self._link.stub.Cancel, request, timeout_s=self._timeout_s)
        return wire.OUTCOME_OF[answer.outcome]

    async def stream(self, job_id: JobId, from_sequence: int = 0) -> AsyncGenerator[Event, None]:
        """Events after `from_sequence`, the last one you saw, to the END event. It goes on after a lost
        connection; nobody to go on with for `away_s` raises GatewayUnavailable or StoreUnavailable. Raises
        JobNotFound, InvalidJob if there never was such a sequence number."""
        seen, ended, patience = from_sequence, False, Patience(self._away_s)
        while not ended:
            request = pb.StreamRequest(job_id=job_id, from_sequence=seen)
            patience.calling()
            call = self._link.stub.Stream(request, metadata=self._link.metadata)
            try:
                with translated():
                    async for message in call:
                        patience.heard()
                        event = wire.event_of(message)
                        seen, ended = event.seq, event.kind is EventKind.END
                        yield event
                return
            except COME_BACK:
                if not ended and not await patience.pause():
                    raise
            finally:
                call.cancel()

    async def infer(self, wanted: AsyncIterable[Wanted] | Iterable[Wanted]) -> AsyncGenerator[Inferred, None]:
        """Submit many and read what they generate, over one connection; requests go out while answers come in.
        It goes on after a lost connection: each request is sent again under its key, from where it was read to.
        What a single request came to is `Inferred.error`. Raises Unauthorized, Forbidden, and as `stream`."""
        inferring = Inferring(self._link, wanted, away_s=self._away_s)
        async for one in inferring.run():
            yield one

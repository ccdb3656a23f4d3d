"""Gateways and a worker as processes, and a client that loses them: what it has read is the result all the same."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from support.fleet import Backend, WorkerProcess
from support.rpc import GatewayProcess, gateways

from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.client import Inferred, RpcClient, Wanted
from codeyard.producer.rpc.codeyard_pb2_grpc import FleetStub
from codeyard.producer.submission import Submission
from codeyard.shared.record import EventKind, State

pytestmark = pytest.mark.process

PATIENCE_S = 60.0


@asynccontextmanager
async def fleet(backend: Backend, num_gateways: int, **engine: Any) -> AsyncIterator[list[GatewayProcess]]:
    """A worker and so many gateways, each a process."""
    settings = backend.settings(engine=engine)
    worker = WorkerProcess(settings, backend.folder)
    await worker.start()
    try:
        async with gateways(settings, backend.folder, num_gateways) as started:
            yield started
    finally:
        worker.signal(signal.SIGKILL)
        await worker.ended()


class Reader:
    """One stream, read as a caller reads it. `begun` is set at its first event."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.seqs: list[int] = []
        self.text = ""

    async def follow(self, client: RpcClient, job_id: str) -> None:
        async for event in client.stream(job_id):
            self.begun.set()
            self.seqs.append(event.seq)
            self.text = "" if event.kind is EventKind.RESTARTED else self.text + event.text


async def test_a_gateway_killed_mid_stream_costs_no_token_and_repeats_none(backend: Backend) -> None:
    """Another takes over at the last sequence number: the texts are the results, byte for byte."""
    readers = [Reader() for _ in range(8)]
    async with (
        fleet(backend, 2, max_running=16, time_scale=1.0) as (first, second),
        RpcClient(f"ipv4:{first.grpc},{second.grpc}") as client,
        asyncio.timeout(PATIENCE_S),
    ):
        prompts = [f"def f{n}(" for n in range(len(readers))]
        jobs = [await client.submit(prompt, sampling={"max_tokens": 96}, stream=True) for prompt in prompts]
        async with asyncio.TaskGroup() as tasks:
            for job, reader in zip(jobs, readers, strict=True):
                tasks.create_task(reader.follow(client, job.id))
            for reader in readers:
                await reader.begun.wait()
            unfinished = [await client.get(job.id) for job in jobs]
            await first.kill()
        results = [await client.result(job.id) for job in jobs]
        taken_over = await second.num_calls("Stream")

    assert State.RUNNING in {status.state for status in unfinished}
    assert taken_over > 0
    assert {result.state for result in results} == {State.SUCCEEDED}
    assert [reader.text for reader in readers] == [result.text for result in results]
    for reader in readers:
        assert reader.seqs == list(range(1, len(reader.seqs) + 1))


async def test_a_hundred_inferences_on_one_connection_survive_the_gateway_that_had_it(backend: Backend) -> None:
    """The client sends what is under way again under its keys, from where each was read to; nothing is lost,
    nothing is generated twice."""
    names = [f"job-{n}" for n in range(100)]

    async def wanted() -> AsyncIterator[Wanted]:
        for name in names:
            submission = Submission(f"def {name[4:]}(", sampling={"max_tokens": 24}, idempotency_key=name)
            yield Wanted(name, submission)

    pieces: list[Inferred] = []
    async with (
        fleet(backend, 2, max_running=64, time_scale=0.5) as (first, second),
        RpcClient(f"ipv4:{first.grpc},{second.grpc}") as client,
        asyncio.timeout(PATIENCE_S),
    ):
        async for piece in client.infer(wanted()):
            pieces.append(piece)
            if len(pieces) == 150:
                await first.kill()
        ids = {piece.correlation_id: piece.job_id for piece in pieces}
        results = {name: await client.result(job_id) for name, job_id in ids.items()}
        taken_over = await second.num_calls("StreamInference")

    assert taken_over == 1
    assert set(ids) == set(names)
    for name in names:
        mine = [piece for piece in pieces if piece.correlation_id == name]
        assert [piece.sequence_id for piece in mine] == list(range(1, len(mine) + 1))
        assert [piece.is_end for piece in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].error is None
        assert b"".join(piece.delta for piece in mine).decode() == results[name].text
        assert mine[-1].result == results[name].model_copy(update={"text": ""})


async def test_a_gateway_told_to_stop_ends_its_streams_and_itself(embedded: Backend) -> None:
    """Exit status 0, though a job hangs; the stream says that it can be gone on with elsewhere."""
    async with (
        fleet(embedded, 1, max_running=4) as [gateway],
        grpc.aio.insecure_channel(gateway.grpc) as channel,
        asyncio.timeout(PATIENCE_S),
    ):
        stub = FleetStub(channel)
        submission = pb.Submission(text="!hang", model="starter", stream=True)
        submitted = await stub.Submit(pb.SubmitRequest(submission=submission))
        call = stub.Stream(pb.StreamRequest(job_id=submitted.status.id))
        await call.initial_metadata()  # the call has reached the gateway
        status = await gateway.stop()
        code = await call.code()

    assert (status, code) == (0, grpc.StatusCode.UNAVAILABLE)

"""The service over real sockets, in a real gateway, on both back ends; the test is the worker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import grpc
import pytest
import pytest_asyncio
from support.brokers import comes_to
from support.fleet import Backend
from support.gateway import MODEL, PATIENCE_S, GatewayUnderTest, gateway_running, settings_for
from support.rpc import status_and_kind

from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.client import RpcClient, Wanted
from codeyard.producer.rpc.codeyard_pb2_grpc import FleetStub
from codeyard.producer.submission import Submission
from codeyard.shared.errors import IdempotencyConflict, JobNotFound, ResultTimeout, UnknownModel
from codeyard.shared.job import job_id_for_key, new_job_id
from codeyard.shared.record import EventKind, State
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import CancelVerdict


def settings_of(backend: Backend, **gateway: Any) -> Settings:
    return settings_for(backend.broker_url, backend.store_url, backend.namespace, grpc_port=0, **gateway)


@pytest_asyncio.fixture
async def gateway(backend: Backend) -> AsyncIterator[GatewayUnderTest]:
    async with gateway_running(settings_of(backend)) as running:
        yield running


@asynccontextmanager
async def stub_to(gateway: GatewayUnderTest, **options: Any) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.grpc, [(f"grpc.{name}", n) for name, n in options.items()]) as channel:
        yield FleetStub(channel)


def asked(correlation_id: str, **more: Any) -> pb.InferenceRequest:
    submission = pb.Submission(text="def f(", model=MODEL, key=correlation_id)
    return pb.InferenceRequest(correlation_id=correlation_id, submission=submission, **more)


async def test_a_job_is_submitted_followed_and_read_and_its_text_is_the_result(gateway: GatewayUnderTest) -> None:
    """The whole way over gRPC, and what HTTP shows of the job is the same."""
    async with RpcClient(gateway.grpc) as client:
        accepted = await client.submit("def f(", model=MODEL, idempotency_key="a", metadata={"n": 1}, stream=True)
        job = await gateway.claimed(accepted.id)
        await job.says("one ", "two")
        following = client.stream(accepted.id)
        first = await anext(following)
        await job.succeeds()
        rest = [event async for event in following]
        status = await client.get(accepted.id)
        again = await client.submit("def f(", model=MODEL, idempotency_key="a")

    assert (accepted.status.state, accepted.attached, again.attached) == (State.QUEUED, False, True)
    assert [event.seq for event in (first, *rest)] == [1, 2, 3]
    assert "".join(event.text for event in (first, *rest)) == "one two"
    assert rest[-1].kind is EventKind.END
    assert status.result is not None
    assert status.result.text == "one two"
    over_http = (await gateway.http.get(f"/v1/jobs/{accepted.id}")).json()
    assert status.model_dump(mode="json", exclude_none=True) == over_http
    assert again.status == status


async def test_the_same_key_and_body_over_http_and_grpc_is_one_job(gateway: GatewayUnderTest) -> None:
    """A caller may change its protocol, in the middle of its retries too."""
    sampling = {"temperature": 0.7, "stop": ["\n\n"], "seed": 7, "output_format": {"type": "regex", "regex": "a+"}}
    first = (await gateway.submit("key-1", sampling=sampling)).json()
    async with RpcClient(gateway.grpc) as client:
        second = await client.submit("def f(", model=MODEL, idempotency_key="key-1", sampling=sampling)
        with pytest.raises(IdempotencyConflict) as conflict:
            await client.submit("def g(", model=MODEL, idempotency_key="key-1")

    assert (second.id, second.attached) == (first["id"], True)
    assert conflict.value.job_id == first["id"]


async def test_what_cannot_be_is_refused_as_over_http(gateway: GatewayUnderTest) -> None:
    """In errors of ours, made again at the caller's side."""
    async with RpcClient(gateway.grpc) as client:
        with pytest.raises(UnknownModel):
            await client.submit("def f(", model="nobody's")
        for unknown in (new_job_id(), "no id", "x" * 10_000):
            with pytest.raises(JobNotFound):
                await client.get(unknown)
            with pytest.raises(JobNotFound):
                await client.cancel(unknown)
            with pytest.raises(JobNotFound):
                await anext(client.stream(unknown))


async def test_a_queued_job_is_cancelled_and_a_final_one_says_so(gateway: GatewayUnderTest) -> None:
    """Both are answers, not errors."""
    async with RpcClient(gateway.grpc) as client:
        job = await client.submit("def f(", model=MODEL)
        assert await client.cancel(job.id) is CancelVerdict.CANCELLED
        assert await client.cancel(job.id) is CancelVerdict.ALREADY_FINAL
        assert (await client.get(job.id)).state is State.CANCELLED


async def test_a_get_that_waits_answers_when_the_job_ends(gateway: GatewayUnderTest) -> None:
    """And a wait that is over before says how the job is."""
    async with RpcClient(gateway.grpc) as client:
        accepted = await client.submit("def f(", model=MODEL)
        with pytest.raises(ResultTimeout):
            await client.result(accepted.id, timeout=0.1)
        job = await gateway.claimed(accepted.id)
        waiting = asyncio.create_task(client.result(accepted.id, timeout=PATIENCE_S))
        assert await comes_to(lambda: gateway.metric("codeyard_waits_open"), 1.0) == 1
        await job.says("x")
        await job.succeeds()
        result = await waiting

    assert result.text == "x"


async def test_a_wait_ends_before_the_callers_deadline(gateway: GatewayUnderTest) -> None:
    """The job as it is, instead of DEADLINE_EXCEEDED, which would say nothing."""
    async with stub_to(gateway) as stub:
        request = pb.SubmitRequest(submission=pb.Submission(text="x", model=MODEL), wait_s=60)
        submitted = await stub.Submit(request, timeout=2)
        status = await stub.Get(pb.GetRequest(job_id=submitted.status.id, wait_s=60), timeout=2)

    assert (submitted.status.state, status.state) == (pb.STATE_QUEUED, pb.STATE_QUEUED)


async def test_a_stream_goes_on_behind_the_last_event_that_was_seen(gateway: GatewayUnderTest) -> None:
    """Nothing twice, nothing left out; a number that never was is refused."""
    job = await gateway.finished(*(f"piece{n}\n" for n in range(10)))
    async with RpcClient(gateway.grpc) as client, stub_to(gateway) as stub:
        whole = [event async for event in client.stream(job.job_id)]
        for seen in range(len(whole) + 1):
            assert [event async for event in client.stream(job.job_id, seen)] == whole[seen:]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(stub.Stream(pb.StreamRequest(job_id=job.job_id, from_sequence=12))))

    assert [event.seq for event in whole] == list(range(1, 12))
    assert status_and_kind(refused.value) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-parameter")


async def test_a_slow_reader_holds_nobody_and_gets_everything(gateway: GatewayUnderTest) -> None:
    """The worker is done, and another reader has had all of it, while the gateway still holds what this one does
    not take: it reads the store no faster than its reader reads it."""
    job = await gateway.submit_and_claim()
    async with stub_to(gateway, **{"http2.lookahead_bytes": 65_536, "http2.bdp_probe": 0}) as stub:
        events = aiter(stub.Stream(pb.StreamRequest(job_id=job.job_id)))
        await job.says("0" * 1_000)
        assert (await anext(events)).seq == 1
        for start in range(1, 4_001, 500):
            await job.says(*(f"{number:0>1000}" for number in range(start, start + 500)))
        await job.succeeds()
        async with RpcClient(gateway.grpc) as other:
            fast = [event.seq async for event in other.stream(job.job_id)]
        ended = 'codeyard_grpc_calls_total{route="Stream",status="OK"}'
        assert await comes_to(lambda: gateway.metric(ended), 1.0) == 1  # the fast one
        assert await gateway.metric("codeyard_streams_open") == 1
        rest = [event.seq async for event in events]
        assert await comes_to(lambda: gateway.metric("codeyard_streams_open"), 0.0) == 0

    assert fast == [1, *rest] == list(range(1, 4_003))


async def test_a_hundred_jobs_are_interleaved_on_one_connection(gateway: GatewayUnderTest) -> None:
    """Each response names its request; every job's text arrives whole and in order, whoever is first."""
    names = [f"job-{n}" for n in range(100)]
    async with stub_to(gateway) as stub:
        call = stub.StreamInference()
        responses = aiter(call)
        for name in names:
            await call.write(asked(name))
        accepted: dict[str, str] = {}
        while len(accepted) < len(names):
            response = await anext(responses)
            assert response.HasField("accepted")
            accepted[response.correlation_id] = response.job_id
        jobs = {name: await gateway.claimed(job_id) for name, job_id in accepted.items()}
        for turn in range(3):
            for name, job in jobs.items():
                await job.says(f"{name}:{turn} ")
        for job in jobs.values():
            await job.succeeds()
        await call.done_writing()
        rest = [response async for response in responses]

    assert set(accepted) == set(names)
    for name in names:
        mine = [response for response in rest if response.correlation_id == name]
        assert [response.sequence_id for response in mine] == [1, 2, 3, 4]
        assert [response.is_end for response in mine] == [False, False, False, True]
        assert b"".join(response.delta for response in mine).decode() == jobs[name].text
        assert mine[-1].result.usage.completion_tokens == 3
    order = [response.correlation_id for response in rest]
    assert sum(before != after for before, after in pairwise(order)) > 99


async def test_one_bad_request_does_not_end_its_neighbours(gateway: GatewayUnderTest) -> None:
    """A refusal is the answer to one request: a wrong field, a model that is not there, a name under way."""
    async with stub_to(gateway) as stub:
        call = stub.StreamInference()
        responses = aiter(call)
        await call.write(asked("good"))
        first = await anext(responses)
        for wrong in (
            pb.InferenceRequest(correlation_id="empty", submission=pb.Submission(model=MODEL)),
            pb.InferenceRequest(correlation_id="model", submission=pb.Submission(model="nobody's", text="x")),
            asked("good"),
            asked("", from_sequence=0),
            asked("ahead", from_sequence=3),
        ):
            await call.write(wrong)
        refusals = [await anext(responses) for _ in range(5)]
        job = await gateway.claimed(first.job_id)
        await job.says("x")
        await job.succeeds()
        await call.done_writing()
        rest = [response async for response in responses]

    assert all(refusal.is_end for refusal in refusals)
    kinds = {(refusal.correlation_id, refusal.refusal.kind, refusal.refusal.field) for refusal in refusals}
    assert kinds == {
        ("empty", "invalid-job", "prompt"),
        ("model", "unknown-model", ""),
        ("good", "invalid-parameter", "correlation_id"),
        ("", "invalid-parameter", "correlation_id"),
        ("ahead", "invalid-parameter", "from_sequence"),
    }
    assert [(response.delta, response.is_end) for response in rest] == [(b"x", False), (b"", True)]


async def test_closing_the_stream_leaves_jobs_alone_unless_they_asked_for_it(gateway: GatewayUnderTest) -> None:
    """A job is durable: a lost connection is no reason to throw its work away, if its caller does not say so."""
    async with stub_to(gateway) as stub:
        call = stub.StreamInference()
        responses = aiter(call)
        await call.write(asked("stays"))
        await call.write(asked("goes", cancel_on_disconnect=True))
        ids = {
            response.correlation_id: response.job_id for response in [await anext(responses), await anext(responses)]
        }
        call.cancel()

        async def state(name: str) -> str:
            return str((await gateway.http.get(f"/v1/jobs/{ids[name]}")).json()["state"])

        assert await comes_to(lambda: state("goes"), "cancelled") == "cancelled"
        assert await state("stays") == "queued"


async def test_a_reader_that_comes_back_gets_the_rest_by_its_key(gateway: GatewayUnderTest) -> None:
    """The same request with the last sequence number: it attaches, and nothing comes twice."""
    async with stub_to(gateway) as stub:
        call = stub.StreamInference()
        responses = aiter(call)
        await call.write(asked("a"))
        job = await gateway.claimed((await anext(responses)).job_id)
        await job.says("one ", "two ")
        seen = [await anext(responses), await anext(responses)]
        call.cancel()
        await job.says("three")
        await job.succeeds()

        again = stub.StreamInference()
        await again.write(asked("a", from_sequence=2))
        await again.done_writing()
        accepted, *rest = [response async for response in again]

    assert accepted.accepted.attached
    assert [response.sequence_id for response in (*seen, *rest)] == [1, 2, 3, 4]
    assert b"".join(response.delta for response in (*seen, *rest)) == b"one two three"


async def test_a_stopping_gateway_hands_its_streams_to_another_and_cancels_nothing(gateway: GatewayUnderTest) -> None:
    """A rollout: streams end with UNAVAILABLE, and the client goes on elsewhere by itself."""
    async with gateway_running(gateway.settings) as other:
        target = f"ipv4:{other.grpc},{gateway.grpc}"
        async with RpcClient(target) as client:
            accepted = await client.submit("def f(", model=MODEL, stream=True)
            following = client.stream(accepted.id)
            wanted = Wanted("w", Submission("def g(", model=MODEL, idempotency_key="w"), cancel_on_disconnect=True)
            inferring = client.infer([wanted])
            job = await gateway.claimed(accepted.id)
            await job.says("one ")
            seen = [await anext(following)]
            first_piece = asyncio.create_task(anext(inferring))
            other_id = await _submitted(gateway, "w")
            inferred_job = await gateway.claimed(other_id)
            await inferred_job.says("a ")
            pieces = [await first_piece]

            other.stop.set()
            async with asyncio.timeout(PATIENCE_S):
                await other.ended
            await job.says("two")
            await job.succeeds()
            await inferred_job.says("b")
            await inferred_job.succeeds()
            seen += [event async for event in following]
            pieces += [piece async for piece in inferring]

    assert [event.seq for event in seen] == [1, 2, 3]
    assert "".join(event.text for event in seen) == "one two"
    assert b"".join(piece.delta for piece in pieces) == b"a b"
    assert [piece.sequence_id for piece in pieces] == [1, 2, 3]
    assert pieces[-1].result is not None
    assert pieces[-1].result.state is State.SUCCEEDED


async def _submitted(gateway: GatewayUnderTest, key: str) -> str:
    """The id of the job under this key, once it is there."""
    job_id = job_id_for_key("default", key)

    async def state() -> int:
        return (await gateway.http.get(f"/v1/jobs/{job_id}")).status_code

    assert await comes_to(state, 200) == 200
    return job_id

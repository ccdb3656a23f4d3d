"""The service over jobs that a test makes up: what happens when callers go, hold back, or come at a bad moment."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from support.asgi import JOB_ID, MadeUpJob, MadeUpJobs, status
from support.brokers import comes_to
from support.rpc import Service, service_over, status_and_kind

from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc import inference
from codeyard.shared.job import JobId, job_id_for_key
from codeyard.shared.record import Event, EventKind, State
from codeyard.shared.store.port import CancelVerdict

PATIENCE_S = 15.0  # for what must happen; reached only by a failing test


class SlowJobs(MadeUpJobs):
    """Submissions wait for `gate`; each key is a job, whose events come when `go` is set."""

    def __init__(self) -> None:
        super().__init__(known=status(last_seq=3))
        self.gate, self.go = asyncio.Event(), asyncio.Event()
        self.begun = asyncio.Queue[str]()
        self.finished: list[str] = []
        self.cancelled = asyncio.Queue[JobId]()
        self.num_pieces = 2

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        key = fields["idempotency_key"]
        self.begun.put_nowait(key)
        await self.gate.wait()
        self.finished.append(key)
        return MadeUpJob(job_id_for_key("default", key), False, self.known)

    async def status(self, job_id: JobId) -> Any:
        return self.known.model_copy(update={"id": job_id})

    async def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]:
        for seq in range(1, self.num_pieces + 1):
            await self.go.wait()
            yield Event(seq=seq, kind=EventKind.TOKENS, text=f"{seq} ")
        yield Event(seq=self.num_pieces + 1, kind=EventKind.END, state=State.SUCCEEDED)

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        self.cancelled.put_nowait(job_id)
        return CancelVerdict.REQUESTED


def asked(key: str, **more: Any) -> pb.InferenceRequest:
    return pb.InferenceRequest(correlation_id=key, submission=pb.Submission(text="x", model="tiny", key=key), **more)


async def counted(service: Service, method: str, *codes: str, times: float = 1.0) -> None:
    """Return when so many calls of the method have ended in one of these."""

    async def now() -> float:
        await asyncio.sleep(0)
        return sum(service.counted(method, code) for code in codes)

    assert await comes_to(now, times) == times


async def test_a_submission_is_finished_though_its_caller_has_hung_up() -> None:
    """Half of one would be a job that took its tenant's limits, and that nobody knows of."""
    jobs = SlowJobs()
    async with service_over(jobs) as service:
        request = pb.SubmitRequest(submission=pb.Submission(text="x", model="tiny", key="a"))
        call = service.stub.Submit(request)
        await jobs.begun.get()
        call.cancel()
        await counted(service, "Submit", "CANCELLED")
        assert jobs.finished == []
        jobs.gate.set()

    assert jobs.finished == ["a"]


async def test_a_job_whose_caller_hung_up_while_it_was_submitted_is_cancelled_if_it_asked() -> None:
    """Nobody has its id by then, but it is there."""
    jobs = SlowJobs()
    async with service_over(jobs) as service:
        call = service.stub.StreamInference()
        await call.write(asked("stays"))
        await call.write(asked("goes", cancel_on_disconnect=True))
        assert {await jobs.begun.get(), await jobs.begun.get()} == {"stays", "goes"}
        call.cancel()
        await counted(service, "StreamInference", "CANCELLED")
        jobs.gate.set()

    assert set(jobs.finished) == {"stays", "goes"}
    assert jobs.cancelled.get_nowait() == job_id_for_key("default", "goes")
    assert jobs.cancelled.empty()


async def test_a_job_that_has_ended_is_not_cancelled_when_its_caller_goes() -> None:
    """It would be a round trip for nothing, and a word in the log."""
    jobs = SlowJobs()
    jobs.gate.set()
    jobs.go.set()
    async with service_over(jobs) as service:
        call = service.stub.StreamInference()
        responses = aiter(call)
        await call.write(asked("done", cancel_on_disconnect=True))
        while not (await anext(responses)).is_end:
            pass
        call.cancel()
        await counted(service, "StreamInference", "CANCELLED", "OK")  # nothing was under way: it may pass for an end

    assert jobs.cancelled.empty()


async def test_a_stopping_gateway_cancels_no_job_of_its_callers() -> None:
    """They come back elsewhere, with the same keys."""
    jobs = SlowJobs()
    jobs.gate.set()
    async with service_over(jobs) as service:
        call = service.stub.StreamInference()
        await call.write(asked("a", cancel_on_disconnect=True))
        assert (await anext(aiter(call))).HasField("accepted")
        service.stopping.set()
        assert await call.code() is grpc.StatusCode.UNAVAILABLE

    assert jobs.cancelled.empty()


async def test_a_caller_that_goes_while_a_hundred_jobs_write_to_it_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Callers go all the time; the log is for what somebody can mend."""
    jobs = SlowJobs()
    jobs.gate.set()
    jobs.num_pieces = 1_000
    async with service_over(jobs) as service:
        for _ in range(5):
            call = service.stub.StreamInference()
            for n in range(100):
                await call.write(asked(f"job-{n}"))
            responses = aiter(call)
            jobs.go.set()
            for _ in range(300):
                await anext(responses)
            call.cancel()
        await counted(service, "StreamInference", "CANCELLED", times=5.0)

    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_no_further_request_is_taken_while_too_many_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a caller can make the gateway hold is bounded."""
    monkeypatch.setattr(inference, "MAX_OPEN", 2)
    jobs = SlowJobs()
    jobs.gate.set()
    async with service_over(jobs) as service:
        call = service.stub.StreamInference()
        for key in ("a", "b", "c", "d"):
            await call.write(asked(key))
        responses = aiter(call)
        assert {(await anext(responses)).correlation_id for _ in range(2)} == {"a", "b"}
        before = [jobs.begun.get_nowait() for _ in range(jobs.begun.qsize())]
        jobs.go.set()
        await call.done_writing()
        rest = [response async for response in responses]

    assert before == ["a", "b"]
    assert {response.correlation_id for response in rest if response.is_end} == {"a", "b", "c", "d"}


async def test_a_name_can_be_used_again_once_its_request_is_over() -> None:
    """Callers count from 1 again and again."""
    jobs = SlowJobs()
    jobs.gate.set()
    jobs.go.set()
    async with service_over(jobs) as service:
        call = service.stub.StreamInference()
        responses = aiter(call)
        for _ in range(3):
            await call.write(asked("again"))
            seen = [await anext(responses)]
            while not seen[-1].is_end:
                seen.append(await anext(responses))
            assert not seen[-1].HasField("refusal")
        await call.done_writing()


async def test_an_event_stream_that_breaks_is_refused_for_its_request_alone() -> None:
    """The store may lose one job's record and have all others."""
    jobs = MadeUpJobs(known=status(last_seq=1))
    async with service_over(jobs) as service:
        call = service.stub.StreamInference()
        responses = aiter(call)
        jobs.knows_only = "another"
        await call.write(asked("lost"))
        answers = [await anext(responses), await anext(responses)]
        call.cancel()

    assert answers[0].HasField("accepted")
    assert (answers[1].is_end, answers[1].refusal.kind, answers[1].job_id) == (True, "job-not-found", JOB_ID)


async def test_a_malformed_wait_is_refused() -> None:
    """Not a number is no time."""
    async with service_over(MadeUpJobs()) as service:
        for wait_s in (-1.0, float("nan"), float("inf")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await service.stub.Get(pb.GetRequest(job_id=JOB_ID, wait_s=wait_s))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_is_no_message_is_refused_and_not_an_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A caller with another protocol, or a scanner: no traceback, and a stream's other requests go on."""
    jobs = SlowJobs()
    jobs.gate.set()
    jobs.go.set()
    async with service_over(jobs) as service:
        raw: Any = service.channel  # sends bytes as they are
        for method in ("Submit", "Get", "Cancel"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await raw.unary_unary(f"/codeyard.v1.Fleet/{method}")(b"\xff\xff")
            assert status_and_kind(refused.value) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-parameter")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(raw.unary_stream("/codeyard.v1.Fleet/Stream")(b"\xff\xff")))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        call = raw.stream_stream("/codeyard.v1.Fleet/StreamInference")()
        for sent in (b"\xff\xff", asked("a").SerializeToString(), b"\x08"):
            await call.write(sent)
        await call.done_writing()
        responses = [pb.InferenceResponse.FromString(response) async for response in call]
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await raw.unary_unary("/codeyard.v1.Fleet/Delete")(b"")

    ends = sorted((response.correlation_id, response.refusal.field) for response in responses if response.is_end)
    assert ends == [("", "message"), ("", "message"), ("a", "")]
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_what_is_no_http_at_all_ends_its_connection_and_nothing_else() -> None:
    """Bytes at random, and HTTP/1.1 from a browser at the wrong port."""
    async with service_over(MadeUpJobs()) as service:
        host, port = service.address.split(":")
        for sent in (b"\x00" * 100, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff" * 9):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            writer.write_eof()
            async with asyncio.timeout(PATIENCE_S):
                await reader.read()
            writer.close()
        assert (await service.stub.Get(pb.GetRequest(job_id=JOB_ID))).id == JOB_ID


async def test_the_trace_of_a_caller_travels_with_its_job() -> None:
    """A malformed one is dropped, as the standard asks."""
    jobs = MadeUpJobs()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with service_over(jobs) as service:
        request = pb.SubmitRequest(submission=pb.Submission(text="x", model="tiny"))
        for sent in (trace, "00-nonsense"):
            await service.stub.Submit(request, metadata=[("traceparent", sent)])

    assert [fields["traceparent"] for fields in jobs.submitted] == [trace, None]

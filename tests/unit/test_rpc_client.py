"""What the client does by itself, and what it leaves to its caller."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from support.asgi import MadeUpJob, MadeUpJobs, status
from support.rpc import service_over

from codeyard.producer.rpc.client import Inferred, RpcClient, Wanted
from codeyard.producer.submission import Submission
from codeyard.shared.errors import BrokerUnavailable, FleetError, InvalidJob, QueueFull, StoreUnavailable
from codeyard.shared.job import JobId, job_id_for_key
from codeyard.shared.record import Event, EventKind, JobStatus, State
from codeyard.shared.store.port import CancelVerdict


class SomeJobs(MadeUpJobs):
    """A job for each key, with two pieces. `refusals`: what the next submissions of a key meet; `breaks`: what the
    next streams of a job break off with, after one piece."""

    def __init__(self) -> None:
        super().__init__(known=status(last_seq=3))
        self.keys: list[str] = []
        self.refusals: dict[str, list[Exception]] = {}
        self.breaks: dict[str, list[Exception]] = {}
        self.cancelled: list[JobId] = []

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        key = fields["idempotency_key"]
        self.keys.append(key)
        if self.refusals.get(key):
            raise self.refusals[key].pop(0)
        return MadeUpJob(job_id_for_key("default", key), False, self.known)

    async def status(self, job_id: JobId) -> JobStatus:
        return self.known.model_copy(update={"id": job_id})

    async def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]:
        events = [
            Event(seq=1, kind=EventKind.TOKENS, text="one "),
            Event(seq=2, kind=EventKind.TOKENS, text="two"),
            Event(seq=3, kind=EventKind.END, state=State.SUCCEEDED),
        ]
        for event in events[after:]:
            if event.seq == 2 and self.breaks.get(job_id):
                raise self.breaks[job_id].pop(0)
            yield event

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        self.cancelled.append(job_id)
        return CancelVerdict.REQUESTED


def wanted(key: str, **more: Any) -> Wanted:
    return Wanted(key, Submission("x", model="tiny", idempotency_key=key), **more)


def texts_of(pieces: list[Inferred]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for piece in pieces:
        texts[piece.correlation_id] = texts.get(piece.correlation_id, "") + piece.delta.decode()
    return texts


async def test_a_submission_is_tried_again_under_the_same_key_though_its_caller_gave_none() -> None:
    """A server was away for a moment; two jobs would be two bills."""

    class Once(SomeJobs):
        async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
            if not self.keys:
                self.refusals[fields["idempotency_key"]] = [BrokerUnavailable("away", maybe_accepted=True)]
            return await super().submit(prompt, **fields)

    jobs = Once()
    async with service_over(jobs) as service, RpcClient(service.address) as client:
        await client.submit("x", model="tiny")

    assert len(jobs.keys) == 2
    assert len(set(jobs.keys)) == 1


async def test_what_trying_again_cannot_mend_is_told_at_once() -> None:
    """A full queue says when to come back, and that is the caller's to decide."""
    jobs = SomeJobs()
    jobs.refusals["a"] = [QueueFull("q", retry_after_s=9.0)]
    async with service_over(jobs) as service, RpcClient(service.address) as client:
        with pytest.raises(QueueFull) as refused:
            await client.submit("x", model="tiny", idempotency_key="a")

    assert refused.value.retry_after_s == 9.0
    assert jobs.keys == ["a"]


async def test_a_request_whose_server_was_away_is_sent_again_and_its_neighbours_are_not_disturbed() -> None:
    """Neither at its start nor in the middle of its stream; and nobody is cancelled for it."""
    jobs = SomeJobs()
    jobs.refusals["b"] = [StoreUnavailable("away")]
    jobs.breaks[job_id_for_key("default", "c")] = [StoreUnavailable("away")]
    async with service_over(jobs) as service, RpcClient(service.address) as client:
        pieces = [piece async for piece in client.infer(wanted(key, cancel_on_disconnect=True) for key in "abc")]
        calls = service.counted("StreamInference", "OK")

    assert texts_of(pieces) == dict.fromkeys("abc", "one two")
    assert [piece.sequence_id for piece in pieces if piece.correlation_id == "c"] == [1, 2, 3]
    assert sorted(jobs.keys) == ["a", "b", "b", "c", "c"]
    assert jobs.cancelled == []
    assert calls == 1


async def test_a_server_that_stays_away_is_the_requests_error_in_the_end() -> None:
    """And only of that request."""
    jobs = SomeJobs()
    jobs.refusals["b"] = [StoreUnavailable("away") for _ in range(100)]
    async with service_over(jobs) as service, RpcClient(service.address, away_s=0.2) as client:
        pieces = [piece async for piece in client.infer([wanted("a"), wanted("b")])]

    [ended] = [piece for piece in pieces if piece.correlation_id == "b"]
    assert isinstance(ended.error, StoreUnavailable)
    assert texts_of(pieces)["a"] == "one two"


async def test_requests_can_wait_for_answers() -> None:
    """A program that asks the next question when it has the last answer: nothing is held back until the end."""
    answered = asyncio.Event()

    async def conversation() -> AsyncIterator[Wanted]:
        for key in "abc":
            yield wanted(key)
            await answered.wait()
            answered.clear()

    jobs = SomeJobs()
    async with service_over(jobs) as service, RpcClient(service.address) as client:
        pieces = []
        async for piece in client.infer(conversation()):
            pieces.append(piece)
            if piece.is_end:
                answered.set()

    assert texts_of(pieces) == dict.fromkeys("abc", "one two")
    assert [piece.correlation_id for piece in pieces if piece.is_end] == list("abc")


async def test_what_the_callers_own_requests_raise_comes_out_of_infer() -> None:
    """Not a lost connection, not a cancellation: its own error."""

    async def failing() -> AsyncIterator[Wanted]:
        yield wanted("a")
        raise LookupError("no more prompts")

    async with service_over(SomeJobs()) as service, RpcClient(service.address) as client:
        with pytest.raises(LookupError, match="no more prompts"):
            async for _ in client.infer(failing()):
                pass


@pytest.mark.parametrize(
    "requests, field",
    [
        ([Wanted("a", Submission("x", sampling={"temperatur": 1}))], "sampling.temperatur"),
        ([Wanted("a", Submission("x", lane="urgent"))], "body"),
    ],
)
async def test_a_request_that_cannot_be_sent_ends_infer_with_what_is_wrong(requests: list[Wanted], field: str) -> None:
    """It is a mistake of the program, found before anything was asked."""
    async with service_over(SomeJobs()) as service, RpcClient(service.address) as client:
        with pytest.raises(InvalidJob) as wrong:
            [piece async for piece in client.infer(requests)]

    assert wrong.value.field == field


async def test_two_requests_of_one_name_at_once_are_a_mistake() -> None:
    """Nobody could tell their answers apart."""
    jobs = SomeJobs()
    jobs.refusals["a"] = [StoreUnavailable("away")]  # so that it is still under way
    async with service_over(jobs) as service, RpcClient(service.address) as client:
        with pytest.raises(InvalidJob, match="correlation_id"):
            [piece async for piece in client.infer([wanted("a"), wanted("a")])]


async def test_no_requests_are_no_answers() -> None:
    """An empty list is a list."""
    async with service_over(SomeJobs()) as service, RpcClient(service.address) as client:
        assert [piece async for piece in client.infer([])] == []


async def test_a_client_that_was_closed_says_so() -> None:
    """In an error of ours."""
    async with service_over(SomeJobs()) as service:
        client = RpcClient(service.address)
        await client.close()
        with pytest.raises(FleetError, match="not open"):
            await client.submit("x", model="tiny")

"""When streamed tokens are written: none may be forgotten, none twice, and many share a round trip."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from support.store_calls import make_job

from codeyard.shared.broker.port import Delivery
from codeyard.shared.envelope import Envelope
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.store.port import Append, AppendVerdict, Store
from codeyard.worker import events
from codeyard.worker.engines.port import Delta
from codeyard.worker.events import EventWriter
from codeyard.worker.held import HeldJob, TokenLog

FLUSH_S = 0.02
LATE_S = 20.0  # a wait that takes this long was forgotten


class Events:
    """A store of events: the one method the writer calls. `writes`: by group, how many events each job had."""

    def __init__(self) -> None:
        self.writes: asyncio.Queue[dict[JobId, int]] = asyncio.Queue()
        self.away = 0  # so many calls fail first
        self.verdict = AppendVerdict.APPENDED

    async def append(self, group: Sequence[Append]) -> list[AppendVerdict]:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")
        self.writes.put_nowait({one.job_id: len(one.events) for one in group})
        return [self.verdict] * len(group)

    async def written(self) -> dict[JobId, int]:
        async with asyncio.timeout(LATE_S):
            return await self.writes.get()


@asynccontextmanager
async def writing(
    store: Events, *, flush_s: float = FLUSH_S, fenced: asyncio.Queue[JobId] | None = None
) -> AsyncIterator[Callable[[HeldJob], None]]:
    """A running writer; yields what tells it of a token."""
    on_fenced = fenced.put_nowait if fenced is not None else _not_expected
    writer = EventWriter(cast(Store, store), flush_s=flush_s, on_fenced=on_fenced)
    task = asyncio.create_task(writer.run())

    def generate(held: HeldJob) -> None:
        held.log.add(Delta(text="x", token_ids=(1,)))
        writer.touch(held)

    yield generate
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_lone_stream_is_written_again_and_again() -> None:
    """Its first token wakes the writer; the ones after it must, too, when the writer had nothing left to do."""
    store, job = Events(), held()
    async with writing(store) as generate:
        for _ in range(5):
            generate(job)
            assert await store.written() == {job.id: 1}


async def test_a_stream_is_not_late_because_the_writer_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps until the first of the jobs it knows is due; one that is due before that may come meanwhile."""
    clock = Clock(monkeypatch)
    store, early, late = Events(), held(), held()
    async with writing(store, flush_s=1_000.0) as generate:
        generate(early)
        assert await store.written() == {early.id: 1}
        clock.now_s = 999.99
        generate(late)
        assert await store.written() == {late.id: 1}
        generate(late)  # due 1,000 s from now: the writer sleeps
        await _settled()

        generate(early)  # due in 10 ms

        assert await store.written() == {early.id: 1}


async def test_streams_that_are_due_about_the_same_time_share_a_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream began at a moment of its own; a round trip for each, five times a second, would add up."""
    clock = Clock(monkeypatch)
    store, jobs = Events(), [held() for _ in range(5)]
    async with writing(store, flush_s=100.0) as generate:
        for number, job in enumerate(jobs):
            clock.now_s = 5.0 * number
            generate(job)
            assert await store.written() == {job.id: 1}

        clock.now_s = 104.0
        for job in jobs:
            generate(job)

        assert await store.written() == {job.id: 1 for job in jobs}


async def test_a_store_that_is_away_delays_tokens_and_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader sees a pause, never a gap: what was not confirmed is sent again with what came since."""
    monkeypatch.setattr(events, "RETRY_S", 0.0)
    store, job = Events(), held()
    store.away = 2
    async with writing(store) as generate:
        generate(job)
        assert await store.written() == {job.id: 1}
        assert not job.log.unsent


async def test_a_job_whose_fence_is_old_is_given_up() -> None:
    """Somebody else writes its events now."""
    store, job, fenced = Events(), held(), asyncio.Queue[JobId]()
    store.verdict = AppendVerdict.FENCED
    async with writing(store, fenced=fenced) as generate:
        generate(job)

        async with asyncio.timeout(LATE_S):
            assert await fenced.get() == job.id


class Clock:
    """The writer's clock, standing still; what it waits for is the event loop's business."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(events, "time", self)

    def monotonic(self) -> float:
        return self.now_s


def held() -> HeldJob:
    job = make_job()
    envelope = Envelope(job, job.digest(), "p1", "i", deadline_at=None, published_at=None, traceparent=None)
    delivery = Delivery("q", job.id, b"", {}, redelivered=False, timestamp=None, tag=None)
    times: dict[str, Any] = {"claimed_s": 0.0, "submitted_s": 0.0, "deadline_s": math.inf}
    return HeldJob(envelope, delivery, "i.1", attempt=1, suspect=False, log=TokenLog(last_seq=0), **times)


def _not_expected(job_id: JobId) -> None:
    raise AssertionError(f"{job_id} was fenced")


async def _settled() -> None:
    """Everything that can run without time going by has run."""
    for _ in range(10):
        await asyncio.sleep(0)

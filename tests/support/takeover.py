"""A job that is killed in the middle and taken over, as often as a test likes: real `execute`, real engine, and a
store of nothing but its events. A kill is what it is to the next owner: no line runs any more, and what was not
in the store is lost."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

from codeyard.shared.broker.port import Delivery
from codeyard.shared.envelope import Envelope
from codeyard.shared.job import Job
from codeyard.shared.record import Event, EventKind
from codeyard.shared.store.port import Claimed, ClaimVerdict, Store
from codeyard.worker.engines.port import Delta, Engine
from codeyard.worker.execution import Attempt, execute
from codeyard.worker.held import HeldJob, Said


class Killed(BaseException):
    """The process is gone."""


class Taken:
    """One job's way through several workers. `kills`: after so many deltas of each run the worker dies; the run
    after the last one is left alone. `flush`: events are in the store after every so many deltas."""

    def __init__(self, job: Job, *, flush: int = 1, save_tokens: int = 1_000_000) -> None:
        self._job = job
        self._save_tokens = save_tokens
        self._flush = flush
        self.events: list[Event] = []
        self.num_deltas = 0  # of all runs
        self.num_ids = 0  # token ids that engines gave, those given again counted again

    async def run(self, engine: Engine, kills: Sequence[int] = ()) -> Attempt:
        for kill in [*kills, math.inf]:
            try:
                return await self._attempt(engine, kill)
            except Killed:
                continue
        raise AssertionError("the last run was not left alone")

    @property
    def seen(self) -> Said:
        """By a reader who was there all the time."""
        said = Said()
        for event in self.events:
            said = Said() if event.kind is EventKind.RESTARTED else said
            said.add(event)
        return said

    async def _attempt(self, engine: Engine, kill: float) -> Attempt:
        counter = itertools.count(1)

        def on_delta(held: HeldJob, delta: Delta) -> None:
            self.num_deltas += 1
            self.num_ids += len(delta.token_ids)
            number = next(counter)
            if number % self._flush == 0:
                self._write(held)
            if number >= kill and delta.finish_reason is None:
                raise Killed

        held = _held(self._job, self.events[-1].seq if self.events else 0)
        store = cast(Store, _Events(self.events))
        options: dict[str, Any] = {"adapters": {self._job.revision: None}, "batch_size": 1, "on_delta": on_delta}
        attempt = await execute(held, engine, store, None, save_tokens=self._save_tokens, **options)
        self._write(held)
        return attempt

    def _write(self, held: HeldJob) -> None:
        events = held.log.flush()
        self.events.extend(events)
        held.log.confirmed(events)


class _Events:
    """A store as `execute` reads it."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    async def events(self, job_id: str, *, after: int) -> list[Event]:
        return [event for event in self._events if event.seq > after][:3]  # in pages


def _held(job: Job, last_seq: int) -> HeldJob:
    envelope = Envelope(job, job.digest(), "p1", "i", deadline_at=None, published_at=None, traceparent=None)
    delivery = Delivery("q", job.id, b"", {}, redelivered=False, timestamp=None, tag=None)
    claimed = Claimed(
        ClaimVerdict.RUN, "i.1", attempt=1, last_seq=last_seq, suspect=False, waited_s=0.0, deadline_in_s=1e9
    )
    return HeldJob.of(envelope, delivery, claimed, 0.0)

"""Jobs behind breakers: an answer at once where one would not come, and a smaller model in place of one that fails.

    store open            everything is StoreUnavailable at once
    broker open           submissions are BrokerUnavailable at once
    model fails           its breaker is open: what ends its jobs is the engine, not the job
    nobody serves it      no worker has told so for `unserved_s`; only in the lanes that do not wait for workers
                          -> the first of its fallbacks that neither fails nor is unserved, or ModelUnavailable

A submission whose job is there already attaches to it, whatever the broker and the workers do, as long as the
store answers. How jobs end is learnt from what callers read anyway (status, wait, stream): nothing is asked on
top, but for the reason of a stream that ended badly. A job counts once, and only if it was seen alive here.
Called by: gateway.serve, which hands it to every protocol as its `Jobs`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from codeyard.producer.gateway.breaker import TRAFFIC, Ticket
from codeyard.producer.gateway.health import Breakers, not_asked
from codeyard.producer.gateway.jobs import AcceptedJob, Jobs
from codeyard.shared.alias import Alias, Target
from codeyard.shared.chat import Chat
from codeyard.shared.errors import BrokerUnavailable, FleetError, JobNotFound, ModelUnavailable, StoreUnavailable
from codeyard.shared.job import JobId, Lane, Sampling
from codeyard.shared.notice import Notice, fleet
from codeyard.shared.record import Event, EventKind, JobStatus, State
from codeyard.shared.settings import BreakerSettings
from codeyard.shared.store.port import CancelVerdict, Store

log = logging.getLogger(__name__)

ENGINE_FAILURES = frozenset({"engine_error", "poison"})  # codes of failures that speak of the workers
MAX_ALIVE = 100_000  # jobs whose end is watched for here, the oldest forgotten first
LOOK_S = 1.0  # between looks at the fleet, while jobs are submitted
WAIT_S = 0.5  # of a submission for the first look
STALE_S = 5.0  # an older look says nothing


@dataclass(frozen=True, slots=True)
class _Seen:
    model: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class _Choice:
    """The model that takes the job, in place of another or not."""

    model: str
    ticket: Ticket


class GuardedJobs:
    """`Jobs`, and what is said above about them. Belongs to one event loop; `close` it."""

    def __init__(
        self,
        jobs: Jobs,
        breakers: Breakers,
        store: Store,
        settings: BreakerSettings,
        *,
        fallbacks: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._breakers = breakers
        self._settings = settings
        self._fallbacks = fallbacks or {}
        self._fleet = _Fleet(store, unserved_s=settings.unserved_s, clock=clock)
        self._alive: dict[JobId, _Seen] = {}

    async def close(self) -> None:
        await self._fleet.close()

    async def submit(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        model: str,
        lane: Lane | str,
        idempotency_key: str | None,
        sampling: Sampling | Mapping[str, Any] | None,
        stream: bool,
        timeout_s: float,
        metadata: Mapping[str, Any] | None,
        traceparent: str | None,
        tenant: str,
        job_id: JobId,
        callback_url: str | None = None,
        asked_model: str | None = None,
    ) -> AcceptedJob:
        """Raises what `Jobs.submit` raises, and ModelUnavailable."""
        self._store_answers()
        choice = None
        try:
            self._broker_answers()
            choice = await self._choose(model, Lane(lane), job_id)
        except (BrokerUnavailable, ModelUnavailable):
            if idempotency_key is None or not await self._was_accepted(job_id):
                raise
        taken = choice or _Choice(model, TRAFFIC)
        job = None
        try:
            job = await self._jobs.submit(
                prompt,
                model=taken.model,
                lane=lane,
                idempotency_key=idempotency_key,
                sampling=sampling,
                stream=stream,
                timeout_s=timeout_s,
                metadata=metadata,
                traceparent=traceparent,
                tenant=tenant,
                job_id=job_id,
                callback_url=callback_url,
                asked_model=asked_model if taken.model == model else model,
            )
        finally:
            if (job is None or job.attached) and (switch := self._breakers.known(taken.model)):
                switch.unused(taken.ticket)
        self._note(job.accepted_status, TRAFFIC if job.attached else taken.ticket)
        return job

    async def status(self, job_id: JobId) -> JobStatus:
        self._store_answers()
        return self._note(await self._jobs.status(job_id))

    async def wait(self, job_id: JobId, timeout: float) -> JobStatus:
        self._store_answers()
        return self._note(await self._jobs.wait(job_id, timeout))

    async def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]:
        self._store_answers()
        async with aclosing(self._jobs.stream(job_id, after)) as events:
            async for event in events:
                if event.kind is EventKind.END and job_id in self._alive:
                    await self._note_end(job_id, event.state)
                yield event

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        self._store_answers()
        return await self._jobs.cancel(job_id)

    async def recent(self, limit: int = 20) -> list[JobStatus]:
        self._store_answers()
        return await self._jobs.recent(limit)

    # Who takes the job -----------------------------------------------------------------------------

    def _store_answers(self) -> None:
        if self._breakers.store.refuses_for_s() > 0:
            raise not_asked(StoreUnavailable, self._breakers.store)

    def _broker_answers(self) -> None:
        if self._breakers.broker.refuses_for_s() > 0:
            raise not_asked(BrokerUnavailable, self._breakers.broker)

    async def _choose(self, model: str, lane: Lane, job_id: JobId) -> _Choice:
        """Raises ModelUnavailable."""
        waits = lane not in self._settings.refuse_unserved
        if not waits or self._fallbacks:
            await self._fleet.look()
        refusal = None
        for name in self._line(model):
            if not waits and self._fleet.unserved(name, job_id):
                refusal = refusal or ModelUnavailable(model, "no worker serves it now", retry_after_s=LOOK_S)
                continue
            switch = self._breakers.known(name)
            ticket = switch.admit() if switch else TRAFFIC
            if ticket is not None:
                return _Choice(name, ticket)
            assert switch is not None
            reason = "its jobs failed in the engine lately"
            refusal = refusal or ModelUnavailable(model, reason, retry_after_s=max(1.0, switch.refuses_for_s()))
        assert refusal is not None, "the line begins with the model itself"
        raise refusal

    def _line(self, model: str) -> Iterator[str]:
        """The model and those that stand in for it, in turn. The settings have no circles."""
        name: str | None = model
        while name is not None:
            if name == model or self._fleet.knows(name):
                yield name
            name = self._fallbacks.get(name)

    async def _was_accepted(self, job_id: JobId) -> bool:
        try:
            return (await self._jobs.status(job_id)).state is not State.RESERVED
        except (JobNotFound, StoreUnavailable):
            return False

    # How jobs end ----------------------------------------------------------------------------------

    def _note(self, status: JobStatus, ticket: Ticket = TRAFFIC) -> JobStatus:
        if not status.state.final:
            self._alive.setdefault(status.id, _Seen(status.model, ticket))
            while len(self._alive) > MAX_ALIVE:
                del self._alive[next(iter(self._alive))]
        elif (seen := self._alive.pop(status.id, None)) is not None:
            error = status.result.error if status.result else None
            self._record(seen, status.state, error.code if error else "")
        return status

    async def _note_end(self, job_id: JobId, state: State | None) -> None:
        if state is State.FAILED:
            try:
                self._note(await self._jobs.status(job_id))
            except FleetError as error:  # it will be seen again, or not: a count is not worth a stream
                log.debug("end_not_read", extra={"job": job_id, "error": str(error)})
        elif (seen := self._alive.pop(job_id, None)) is not None and state is not None:
            self._record(seen, state, "")

    def _record(self, seen: _Seen, state: State, code: str) -> None:
        """Cancelled, expired or refused by the engine for what it asks: that says nothing of the workers."""
        switch = self._breakers.model(seen.model)
        if state is State.SUCCEEDED:
            switch.record(True, seen.ticket)
        elif state is State.FAILED and code in ENGINE_FAILURES:
            switch.record(False, seen.ticket)
        else:
            switch.unused(seen.ticket)


class _Fleet:
    """Which revisions workers serve, looked at while jobs are submitted. What is not known counts as served."""

    def __init__(self, store: Store, *, unserved_s: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._unserved_s = unserved_s
        self._clock = clock
        self._aliases: Mapping[str, Alias] = {}
        self._served: frozenset[str] = frozenset()  # revisions
        self._seen_s = float("-inf")
        self._unserved_since_s: dict[str, float] = {}  # by revision; of those an alias points to
        self._looking: asyncio.Task[None] | None = None  # owned: `close` ends it

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def look(self) -> None:
        """Begin a look if it is time for one; wait for it only where nothing is known."""
        age_s = self._clock() - self._seen_s
        if age_s >= LOOK_S and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look(), name="fleet look")
        if age_s > STALE_S and self._looking is not None:
            await asyncio.wait([self._looking], timeout=WAIT_S)

    def knows(self, alias: str) -> bool:
        return alias in self._aliases

    def unserved(self, alias: str, job_id: JobId) -> bool:
        """For so long that it is no restart. Every job is pinned by its id, as its submission will be."""
        found, now_s = self._aliases.get(alias), self._clock()
        if found is None or now_s - self._seen_s > STALE_S:
            return False
        since_s = self._unserved_since_s.get(_base(found.pin(job_id).revision))
        return since_s is not None and now_s - since_s >= self._unserved_s

    async def _look(self) -> None:
        try:
            aliases, notices = await asyncio.gather(self._store.aliases(), fleet(self._store))
        except StoreUnavailable as error:
            log.debug("fleet_not_seen", extra={"error": str(error)})
            return
        self._aliases, self._served, self._seen_s = aliases, _served(notices), self._clock()
        wanted = {_base(target.revision) for alias in aliases.values() for target in _targets(alias)}
        since = self._unserved_since_s
        self._unserved_since_s = {one: since.get(one, self._seen_s) for one in wanted - self._served}


def _targets(alias: Alias) -> list[Target]:
    new = alias.rollout.new if alias.rollout else None
    return [alias.target, new] if new else [alias.target]


def _served(notices: Sequence[Notice]) -> frozenset[str]:
    return frozenset(model.revision for notice in notices for model in notice.models if model.serving)


def _base(revision: str) -> str:
    """An adapter's jobs wait in its base's queues."""
    return revision.split("@", 1)[0]

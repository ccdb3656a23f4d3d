"""The Store port in memory: `transitions` over a dict, as SQLite runs them over rows.

A `StoreServer` holds what a server would; a `MemoryStore` is one process's client of it, over a link.
Held to the port by the contract suite. Called by: fleet.py, tests/contract.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

from codeyard.shared.alias import Alias
from codeyard.shared.job import JobId
from codeyard.shared.record import Event, Record, State
from codeyard.shared.store import transitions
from codeyard.shared.store.port import (
    Append,
    AppendVerdict,
    CancelVerdict,
    Claim,
    Claimed,
    Commit,
    Committed,
    NoteCallback,
    Queued,
    QueuedVerdict,
    Recovered,
    Recovery,
    Redrive,
    Redriven,
    Release,
    ReleaseVerdict,
    Renewal,
    Renewed,
    Reservation,
    Reserved,
    TakeCallback,
    Timing,
    Wakeup,
)
from support.simulation.wire import NOTHING, Link

T = TypeVar("T")
R = TypeVar("R")

SWEEP_EVERY_S = 10.0


class StoreWitness(Protocol):
    """Sees every step that the store makes, at the moment it takes effect."""

    def stepped(self, call: str, before: Record | None, request: Any, step: transitions.Step[Any], now: float) -> None:
        """`step.record` is what will be written; None if nothing is."""


class StoreServer:
    """What all clients share. `clock` is the store's: seconds since the epoch."""

    def __init__(
        self,
        timing: Timing,
        clock: Callable[[], float],
        *,
        witness: StoreWitness | None = None,
        wake: Callable[["_Wakeup"], None] | None = None,
    ) -> None:
        self.timing = timing
        self.clock = clock
        self.records: dict[JobId, Record] = {}
        self.streams: dict[JobId, list[Event]] = {}
        self.alias_documents: dict[str, Alias] = {}
        self.notes: dict[str, tuple[float, str]] = {}  # by owner: until when, text
        self.waiting: dict[JobId, dict[_Wakeup, None]] = {}
        self._witness = witness
        self._wake = wake or _Wakeup.wake
        self._sweep_at = 0.0

    def find(self, job_id: JobId) -> Record | None:
        record = self.records.get(job_id)
        return record if record is not None and record.expires_at > self.clock() else None

    def stepping(self, call: str, job_id: Callable[[R], JobId]) -> Callable[[Sequence[R]], list[Any]]:
        """A group of one call, item by item. The transition is looked up now: tests may have changed it."""
        transition: Callable[..., transitions.Step[Any]] = getattr(transitions, call)

        def apply(group: Sequence[R]) -> list[Any]:
            now = self.clock()
            if now >= self._sweep_at:
                self._sweep(now)
            return [self._step(call, job_id(request), transition, request, now) for request in group]

        return apply

    def _step(
        self, call: str, job_id: JobId, transition: Callable[..., transitions.Step[Any]], request: Any, now: float
    ) -> Any:
        before = self.find(job_id)
        asked = () if call == "cancel" else (request,)
        step = transition(before, *asked, now, self.timing)
        if self._witness is not None:
            self._witness.stepped(call, before, request, step, now)
        if (after := step.record) is not None:
            if before is None or after.job is not before.job:  # transitions copy a record, they never alter its job
                self.records.pop(job_id, None)  # and last again, for `recent`
                self.streams[job_id] = []
            self.records[job_id] = after
            if step.events:
                self.streams[job_id] += step.events
                for wakeup in list(self.waiting.get(job_id, ())):  # the contract suite has threads
                    self._wake(wakeup)
        return step.outcome

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + SWEEP_EVERY_S
        for job_id in [job_id for job_id, record in self.records.items() if record.expires_at <= now]:
            del self.records[job_id], self.streams[job_id]


class MemoryStore:
    """One process's client."""

    def __init__(self, server: StoreServer, link: Link) -> None:
        self.timing = server.timing
        self._server = server
        self._link = link

    async def reserve(self, group: Sequence[Reservation]) -> list[Reserved]:
        return await self._steps("reserve", group, lambda one: one.job.id)

    async def mark_queued(self, group: Sequence[Queued]) -> list[QueuedVerdict]:
        return await self._steps("mark_queued", group, lambda one: one.job_id)

    async def claim(self, group: Sequence[Claim]) -> list[Claimed]:
        return await self._steps("claim", group, lambda one: one.job.id)

    async def renew(self, group: Sequence[Renewal]) -> list[Renewed]:
        return await self._steps("renew", group, lambda one: one.job_id)

    async def append(self, group: Sequence[Append]) -> list[AppendVerdict]:
        return await self._steps("append", group, lambda one: one.job_id)

    async def commit(self, group: Sequence[Commit]) -> list[Committed]:
        return await self._steps("commit", group, lambda one: one.job_id)

    async def release(self, group: Sequence[Release]) -> list[ReleaseVerdict]:
        return await self._steps("release", group, lambda one: one.job_id)

    async def cancel(self, group: Sequence[JobId]) -> list[CancelVerdict]:
        return await self._steps("cancel", group, lambda one: one)

    async def recover(self, group: Sequence[Recovery]) -> list[Recovered]:
        return await self._steps("recover", group, lambda one: one.job_id)

    async def redrive(self, group: Sequence[Redrive]) -> list[Redriven]:
        return await self._steps("redrive", group, lambda one: one.job.id)

    async def callbacks_due(self, limit: int) -> list[JobId]:
        def look(_: Sequence[None]) -> list[list[JobId]]:
            now = self._server.clock()
            due = [(one.callback_at, one.id) for one in self._server.records.values() if 0 < one.callback_at <= now]
            return [[job_id for _, job_id in sorted(due)[:limit] if self._server.find(job_id)]]

        [found] = await self._link.call("store.callbacks_due", NOTHING, look)
        return found

    async def take_callbacks(self, group: Sequence[TakeCallback]) -> list[Record | None]:
        return await self._steps("take_callback", group, lambda one: one.job_id)

    async def note_callbacks(self, group: Sequence[NoteCallback]) -> list[bool]:
        return await self._steps("note_callback", group, lambda one: one.job_id)

    async def read(self, group: Sequence[JobId]) -> list[Record | None]:
        return await self._link.call("store.read", group, lambda ids: [self._server.find(one) for one in ids])

    async def states(self, group: Sequence[JobId]) -> list[State | None]:
        def look(ids: Sequence[JobId]) -> list[State | None]:
            found = (self._server.find(one) for one in ids)
            return [record.state if record else None for record in found]

        return await self._link.call("store.states", group, look)

    async def events(self, job_id: JobId, *, after: int, limit: int = 1_000) -> list[Event]:
        def look(ids: Sequence[JobId]) -> list[list[Event]]:
            stream = self._server.streams[job_id] if self._server.find(job_id) else []
            return [[event for event in stream if event.seq > after][:limit]]

        [found] = await self._link.call("store.events", [job_id], look)
        return found

    def watch(self, job_id: JobId) -> AbstractAsyncContextManager[Wakeup]:
        return self._watch(job_id)

    async def due(self, limit: int) -> list[JobId]:
        def look(_: Sequence[None]) -> list[list[JobId]]:
            now = self._server.clock()
            due = [(one.check_at, one.id) for one in self._server.records.values() if 0 < one.check_at <= now]
            return [[job_id for _, job_id in sorted(due)[:limit] if self._server.find(job_id)]]

        [found] = await self._link.call("store.due", NOTHING, look)
        return found

    async def recent(self, limit: int) -> list[Record]:
        def look(_: Sequence[None]) -> list[list[Record]]:
            found = [record for job_id in reversed(self._server.records) if (record := self._server.find(job_id))]
            return [found[:limit]]

        [found] = await self._link.call("store.recent", NOTHING, look)
        return found

    async def aliases(self) -> Mapping[str, Alias]:
        [found] = await self._link.call("store.aliases", NOTHING, lambda _: [dict(self._server.alias_documents)])
        return found

    async def swap_alias(self, expected: Alias | None, new: Alias) -> Alias:
        def swap(_: Sequence[None]) -> list[Alias]:
            there = self._server.alias_documents.get(new.name)
            if there is None or there == expected:
                there = self._server.alias_documents[new.name] = new
            return [there]

        [now] = await self._link.call("store.swap_alias", NOTHING, swap)
        return now

    async def announce(self, owner: str, text: str, *, ttl_s: float) -> None:
        def tell(_: Sequence[None]) -> list[None]:
            self._server.notes[owner] = (self._server.clock() + ttl_s, text)
            return [None]

        await self._link.call("store.announce", NOTHING, tell)

    async def notices(self) -> Mapping[str, str]:
        def look(_: Sequence[None]) -> list[Mapping[str, str]]:
            now = self._server.clock()
            return [{owner: text for owner, (until, text) in self._server.notes.items() if until > now}]

        [found] = await self._link.call("store.notices", NOTHING, look)
        return found

    async def ping(self) -> str:
        [told] = await self._link.call("store.ping", NOTHING, lambda _: ["memory 1"])
        return told

    async def close(self) -> None:
        pass

    async def _steps(self, call: str, group: Sequence[R], job_id: Callable[[R], JobId]) -> list[Any]:
        return await self._link.call(f"store.{call}", group, self._server.stepping(call, job_id))

    @asynccontextmanager
    async def _watch(self, job_id: JobId) -> AsyncIterator[Wakeup]:
        wakeup = _Wakeup()
        waiting = self._server.waiting.setdefault(job_id, {})
        waiting[wakeup] = None
        try:
            yield wakeup
        finally:
            waiting.pop(wakeup, None)


class _Wakeup:
    """Awaited in the loop it was made in; woken from any."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return
        self._woken.clear()

    def wake(self) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits there
            self._loop.call_soon_threadsafe(self._woken.set)

"""The Store port on one SQLite file, for the processes of one machine.

What a call does to a record is decided by `transitions`; here records are loaded, stepped and saved,
a whole group in one transaction that is on disk when the call returns. Rows past their time are
treated as gone at once and swept in groups by later writes.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from codeyard.shared.alias import Alias
from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.file import EmbeddedFile, WallClock
from codeyard.shared.embedded.transactions import Work
from codeyard.shared.embedded.watcher import Watcher
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.record import Event, Record, State
from codeyard.shared.settings import StoreSettings
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
from codeyard.shared.store.transitions import Step
from codeyard.shared.topology import Topology

T = TypeVar("T")
RequestT = TypeVar("RequestT")
Transition = Callable[[Record | None, RequestT, float, Timing], Step[T]]

SWEEP_GROUP = 256  # jobs deleted in one write, so that no write takes long
SWEEP_EVERY_S = 10.0
MAX_SEQ = 2**63 - 1  # SQLite's largest integer


class SqliteStore:
    """Usable from several event loops; `watch` wakes the loop it was entered in."""

    def __init__(self, settings: StoreSettings, topology: Topology, file: EmbeddedFile) -> None:
        self.timing = settings.timing()
        self._timeout_s = settings.timeout_s
        self._namespace = topology.namespace
        self._file = file
        self._watched = _Watched(self._namespace, file.watcher)
        self._sweep_at = 0.0  # by the file's clock; used in the writer's thread
        self._closed = False

    @classmethod
    async def open(cls, settings: StoreSettings, topology: Topology, *, clock: WallClock = time.time) -> "SqliteStore":
        """Make or open the file of a `sqlite:` URL. Raises SettingsError if it cannot be used,
        StoreUnavailable if it is kept locked. `clock` gives seconds since the epoch."""
        try:
            return cls(settings, topology, await EmbeddedFile.open(settings.url, wall=clock))
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def reserve(self, group: Sequence[Reservation]) -> list[Reserved]:
        return await self._steps(group, lambda one: one.job.id, transitions.reserve)

    async def mark_queued(self, group: Sequence[Queued]) -> list[QueuedVerdict]:
        return await self._steps(group, lambda one: one.job_id, transitions.mark_queued)

    async def claim(self, group: Sequence[Claim]) -> list[Claimed]:
        return await self._steps(group, lambda one: one.job.id, transitions.claim)

    async def renew(self, group: Sequence[Renewal]) -> list[Renewed]:
        return await self._steps(group, lambda one: one.job_id, transitions.renew)

    async def append(self, group: Sequence[Append]) -> list[AppendVerdict]:
        return await self._steps(group, lambda one: one.job_id, transitions.append)

    async def commit(self, group: Sequence[Commit]) -> list[Committed]:
        return await self._steps(group, lambda one: one.job_id, transitions.commit)

    async def release(self, group: Sequence[Release]) -> list[ReleaseVerdict]:
        return await self._steps(group, lambda one: one.job_id, transitions.release)

    async def cancel(self, group: Sequence[JobId]) -> list[CancelVerdict]:
        return await self._steps(
            group, lambda one: one, lambda record, _, now, timing: transitions.cancel(record, now, timing)
        )

    async def recover(self, group: Sequence[Recovery]) -> list[Recovered]:
        return await self._steps(group, lambda one: one.job_id, transitions.recover)

    async def redrive(self, group: Sequence[Redrive]) -> list[Redriven]:
        return await self._steps(group, lambda one: one.job.id, transitions.redrive)

    async def callbacks_due(self, limit: int) -> list[JobId]:
        def work(db: sqlite3.Connection, now: float) -> list[JobId]:
            rows = db.execute(
                "SELECT id FROM callbacks JOIN jobs USING (number)"
                " WHERE callbacks.namespace = ? AND at <= ? AND expires_at > ? ORDER BY at LIMIT ?",
                (self._namespace, now, now, limit),
            )
            return [job_id for (job_id,) in rows]

        return await self._read(work)

    async def take_callbacks(self, group: Sequence[TakeCallback]) -> list[Record | None]:
        return await self._steps(group, lambda one: one.job_id, transitions.take_callback)

    async def note_callbacks(self, group: Sequence[NoteCallback]) -> list[bool]:
        return await self._steps(group, lambda one: one.job_id, transitions.note_callback)

    async def read(self, group: Sequence[JobId]) -> list[Record | None]:
        def work(db: sqlite3.Connection, now: float) -> list[Record | None]:
            rows = (_load(db, self._namespace, job_id, now) for job_id in group)
            return [row.record if row else None for row in rows]

        return await self._read(work)

    async def states(self, group: Sequence[JobId]) -> list[State | None]:
        def work(db: sqlite3.Connection, now: float) -> list[State | None]:
            query = "SELECT record ->> 'state' FROM jobs WHERE namespace = ? AND id = ? AND expires_at > ?"
            rows = (
                db.execute(query, (self._namespace, job_id, now)).fetchone() if _storable(job_id) else None
                for job_id in group
            )
            return [State(row[0]) if row else None for row in rows]

        return await self._read(work)

    async def events(self, job_id: JobId, *, after: int, limit: int = 1_000) -> list[Event]:
        def work(db: sqlite3.Connection, now: float) -> list[Event]:
            rows = db.execute(
                "SELECT event FROM jobs JOIN events USING (number)"
                " WHERE namespace = ? AND id = ? AND expires_at > ? AND seq > ? ORDER BY seq LIMIT ?",
                (self._namespace, job_id, now, min(after, MAX_SEQ), limit),
            )
            return [Event.decode(event) for (event,) in rows]

        return await self._read(work) if _storable(job_id) else []

    def watch(self, job_id: JobId) -> AbstractAsyncContextManager[Wakeup]:
        return self._watch(job_id)

    async def due(self, limit: int) -> list[JobId]:
        def work(db: sqlite3.Connection, now: float) -> list[JobId]:
            rows = db.execute(
                "SELECT id FROM jobs WHERE namespace = ? AND check_at > 0 AND check_at <= ? AND expires_at > ?"
                " ORDER BY check_at LIMIT ?",
                (self._namespace, now, now, limit),
            )
            return [job_id for (job_id,) in rows]

        return await self._read(work)

    async def recent(self, limit: int) -> list[Record]:
        def work(db: sqlite3.Connection, now: float) -> list[Record]:
            rows = db.execute(
                "SELECT record, job FROM jobs JOIN bodies USING (number)"
                " WHERE namespace = ? AND expires_at > ? ORDER BY number DESC LIMIT ?",
                (self._namespace, now, limit),
            )
            return [_decoded(record, job) for record, job in rows]

        return await self._read(work)

    async def aliases(self) -> Mapping[str, Alias]:
        def work(db: sqlite3.Connection, now: float) -> Mapping[str, Alias]:
            rows = db.execute("SELECT name, document FROM aliases WHERE namespace = ?", (self._namespace,))
            return {name: Alias.decode(name, document) for name, document in rows}

        return await self._read(work)

    async def swap_alias(self, expected: Alias | None, new: Alias) -> Alias:
        def work(db: sqlite3.Connection, now: float) -> Alias:
            key = (self._namespace, new.name)
            row = db.execute("SELECT document FROM aliases WHERE namespace = ? AND name = ?", key).fetchone()
            if row is not None and (there := Alias.decode(new.name, row[0])) != expected:
                return there
            db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (*key, new.encode()))
            return new

        return await self._write(work)

    async def announce(self, owner: str, text: str, *, ttl_s: float) -> None:
        def work(db: sqlite3.Connection, now: float) -> None:
            db.execute(
                "INSERT OR REPLACE INTO notices VALUES (?, ?, ?, ?)", (self._namespace, owner, now + ttl_s, text)
            )
            db.execute("DELETE FROM notices WHERE until <= ?", (now,))

        await self._write(work)

    async def notices(self) -> Mapping[str, str]:
        def work(db: sqlite3.Connection, now: float) -> Mapping[str, str]:
            rows = db.execute(
                "SELECT owner, document FROM notices WHERE namespace = ? AND until > ?", (self._namespace, now)
            )
            return dict(rows.fetchall())

        return await self._read(work)

    async def ping(self) -> str:
        version = await self._read(lambda db, now: str(db.execute("SELECT sqlite_version()").fetchone()[0]))
        return f"sqlite {version}"

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._file.close()

    # -------------------------------------------------------------------------------------------------

    async def _steps(
        self,
        group: Sequence[RequestT],
        job_id: Callable[[RequestT], JobId],
        transition: Transition[RequestT, T],
    ) -> list[T]:
        """Each request's transition on its record, one after the other, in one transaction."""

        def work(db: sqlite3.Connection, now: float) -> list[T]:
            outcomes = []
            for request in group:
                row = _load(db, self._namespace, job_id(request), now)
                step = transition(row.record if row else None, request, now, self.timing)
                _save(db, self._namespace, row, step)
                outcomes.append(step.outcome)
            self._sweep(db, now)
            return outcomes

        return await self._write(work)

    def _sweep(self, db: sqlite3.Connection, now: float) -> None:
        """Delete some of what nobody may see any more; the next write goes on if there is more."""
        if now < self._sweep_at:
            return
        gone = db.execute(
            "DELETE FROM jobs WHERE number IN (SELECT number FROM jobs WHERE expires_at <= ? LIMIT ?)",
            (now, SWEEP_GROUP),
        ).rowcount
        self._sweep_at = now if gone == SWEEP_GROUP else now + SWEEP_EVERY_S

    @asynccontextmanager
    async def _watch(self, job_id: JobId) -> AsyncIterator[Wakeup]:
        wakeup = _Wakeup()
        self._watched.add(job_id, wakeup)
        try:
            yield wakeup
        finally:
            self._watched.discard(job_id, wakeup)

    async def _read(self, work: Work[T]) -> T:
        try:
            return await self._file.read(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def _write(self, work: Work[T]) -> T:
        try:
            return await self._file.write(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None


# Rows ----------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    number: int
    record: Record


def _load(db: sqlite3.Connection, namespace: str, job_id: JobId, now: float) -> _Row | None:
    if not _storable(job_id):
        return None
    found = db.execute(
        "SELECT number, record, job FROM jobs JOIN bodies USING (number)"
        " WHERE namespace = ? AND id = ? AND expires_at > ?",
        (namespace, job_id, now),
    ).fetchone()
    return _Row(found[0], _decoded(found[1], found[2])) if found else None


def _save(db: sqlite3.Connection, namespace: str, before: _Row | None, step: Step[Any]) -> None:
    after = step.record
    if after is None:
        return
    if before is None or after.job is not before.record.job:  # transitions copy a record, they never alter its job
        number = _insert(db, namespace, after)
    else:
        number = before.number
        db.execute(
            "UPDATE jobs SET record = ?, last_seq = ?, check_at = ?, expires_at = ? WHERE number = ?",
            (_encoded(after), after.last_seq, after.check_at, after.expires_at, number),
        )
    if after.callback_at:
        db.execute("INSERT OR REPLACE INTO callbacks VALUES (?, ?, ?)", (number, namespace, after.callback_at))
    elif before is not None and before.record.callback_at:
        db.execute("DELETE FROM callbacks WHERE number = ?", (number,))
    db.executemany("INSERT INTO events VALUES (?, ?, ?)", [(number, one.seq, one.encode()) for one in step.events])


def _insert(db: sqlite3.Connection, namespace: str, record: Record) -> int:
    """In place of what had the id before: expired, or never accepted. Its events go with it."""
    db.execute("DELETE FROM jobs WHERE namespace = ? AND id = ?", (namespace, record.id))
    number: int = db.execute(
        "INSERT INTO jobs (namespace, id, record, last_seq, check_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)"
        " RETURNING number",
        (namespace, record.id, _encoded(record), record.last_seq, record.check_at, record.expires_at),
    ).fetchone()[0]
    db.execute("INSERT INTO bodies VALUES (?, ?)", (number, record.job.model_dump_json(exclude_none=True)))
    return number


def _encoded(record: Record) -> str:
    return record.model_dump_json(exclude={"job"}, exclude_defaults=True)


def _decoded(record: str, job: str) -> Record:
    return Record.model_validate_json(f'{{"job":{job},{record[1:]}')


def _storable(job_id: JobId) -> bool:
    """Ids are ASCII; what a caller made up may not even be encodable, and names no job."""
    return job_id.isascii()


# Wake-ups ------------------------------------------------------------------------------------------


class _Wakeup:
    """Set from the watcher's thread, awaited in the loop it was made in."""

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


class _Watched:
    """Who waits for which job, and the newest event they were told of. Every change that matters to a
    waiter adds an event, `end` included. All under the lock: loops add, the watcher's thread looks."""

    def __init__(self, namespace: str, watcher: Watcher) -> None:
        self._namespace = namespace
        self._watcher = watcher
        self._lock = threading.Lock()
        self._wakeups: dict[JobId, set[_Wakeup]] = {}
        self._told: dict[JobId, int] = {}  # absent until the first look, which therefore wakes

    def add(self, job_id: JobId, wakeup: _Wakeup) -> None:
        with self._lock:
            if not self._wakeups:
                self._watcher.add(self)
            self._wakeups.setdefault(job_id, set()).add(wakeup)

    def discard(self, job_id: JobId, wakeup: _Wakeup) -> None:
        with self._lock:
            waiting = self._wakeups[job_id]
            waiting.discard(wakeup)
            if not waiting:
                del self._wakeups[job_id]
                self._told.pop(job_id, None)
            if not self._wakeups:
                self._watcher.remove(self)

    def look(self, db: sqlite3.Connection, now: float, changed: bool) -> None:
        if not changed:
            return
        with self._lock:
            ids = json.dumps(list(self._wakeups))
        found = db.execute(
            "SELECT id, last_seq FROM jobs WHERE namespace = ? AND id IN (SELECT value FROM json_each(?))",
            (self._namespace, ids),
        ).fetchall()
        with self._lock:
            for job_id, last_seq in found:
                if job_id in self._wakeups and self._told.get(job_id) != last_seq:
                    self._told[job_id] = last_seq
                    for wakeup in self._wakeups[job_id]:
                        wakeup.wake()

    def lost(self) -> None:
        with self._lock:
            for waiting in self._wakeups.values():
                for wakeup in waiting:
                    wakeup.wake()

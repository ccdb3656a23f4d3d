"""The Store port on the embedded file: load the record, take the step, write what changed.

The protocol is transitions.py; here is only where it lives. Called by: shared.connect.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from codeyard.shared.sqlite_file import Database, Operation, Transaction
from codeyard.shared.errors import SettingsError, StoreUnavailable
from codeyard.shared.job import Job, JobId
from codeyard.shared.record import Event, Record
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store import transitions
from codeyard.shared.store.port import (
    Alias,
    Append,
    AppendVerdict,
    CancelVerdict,
    Claim,
    Claimed,
    Commit,
    Committed,
    Queued,
    QueuedVerdict,
    Recovered,
    Recovery,
    Release,
    ReleaseVerdict,
    Renewal,
    Renewed,
    Reservation,
    Reserved,
    Timing,
    Wakeup,
)
from codeyard.shared.topology import Topology

T = TypeVar("T")
R = TypeVar("R")

SWEPT = 100  # expired jobs removed per reserve, at most: faster than they can come in

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, namespace TEXT NOT NULL, created_at REAL NOT NULL, check_at REAL NOT NULL,
    expires_at REAL NOT NULL, record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_due ON jobs (namespace, check_at) WHERE check_at > 0;
CREATE INDEX IF NOT EXISTS jobs_recent ON jobs (namespace, created_at);
CREATE INDEX IF NOT EXISTS jobs_expired ON jobs (expires_at);
CREATE TABLE IF NOT EXISTS bodies (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id TEXT NOT NULL, seq INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (id, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aliases (
    namespace TEXT NOT NULL, name TEXT NOT NULL, revision TEXT NOT NULL, context_tokens INTEGER,
    PRIMARY KEY (namespace, name)
);
"""


class SqliteStore:
    """See the Store port. Several processes and event loops may each open one on the same file."""

    def __init__(self, database: Database, topology: Topology, timing: Timing) -> None:
        self.timing = timing
        self._database = database
        self._namespace = topology.namespace

    @classmethod
    async def open(
        cls, settings: StoreSettings, topology: Topology, *, clock: Callable[[], float] = time.time
    ) -> "SqliteStore":
        """Raises SettingsError for a path that cannot serve, StoreUnavailable for a file that does not open."""
        with _translated(settings.url):
            database = await asyncio.to_thread(Database.at, settings.url, SCHEMA, clock=clock)
        return cls(database, topology, settings.timing())

    async def reserve(self, group: Sequence[Reservation]) -> list[Reserved]:
        return await self._apply(group, lambda item: item.job.id, transitions.reserve, sweep=True)

    async def mark_queued(self, group: Sequence[Queued]) -> list[QueuedVerdict]:
        return await self._apply(group, lambda item: item.job_id, transitions.mark_queued)

    async def claim(self, group: Sequence[Claim]) -> list[Claimed]:
        return await self._apply(group, lambda item: item.job.id, transitions.claim)

    async def renew(self, group: Sequence[Renewal]) -> list[Renewed]:
        return await self._apply(group, lambda item: item.job_id, transitions.renew)

    async def append(self, group: Sequence[Append]) -> list[AppendVerdict]:
        return await self._apply(group, lambda item: item.job_id, transitions.append)

    async def commit(self, group: Sequence[Commit]) -> list[Committed]:
        return await self._apply(group, lambda item: item.job_id, transitions.commit)

    async def release(self, group: Sequence[Release]) -> list[ReleaseVerdict]:
        return await self._apply(group, lambda item: item.job_id, transitions.release)

    async def cancel(self, group: Sequence[JobId]) -> list[CancelVerdict]:
        return await self._apply(
            group, lambda job_id: job_id, lambda record, _, now, timing: transitions.cancel(record, now, timing)
        )

    async def recover(self, group: Sequence[Recovery]) -> list[Recovered]:
        return await self._apply(group, lambda item: item.job_id, transitions.recover)

    async def read(self, group: Sequence[JobId]) -> list[Record | None]:
        return await self._read(lambda tx: [self._load(tx, job_id) for job_id in group])

    async def events(self, job_id: JobId, *, after: int, limit: int = 1_000) -> list[Event]:
        def operation(tx: Transaction) -> list[Event]:
            query = "SELECT body FROM events WHERE id = ? AND seq > ? ORDER BY seq LIMIT ?"
            return [Event.decode(body) for (body,) in tx.sql.execute(query, (job_id, after, limit))]

        return await self._read(operation)

    @contextlib.asynccontextmanager
    async def watch(self, job_id: JobId) -> AsyncIterator[Wakeup]:
        with self._database.watch([_topic(job_id)]) as event:
            yield _EventWakeup(event)

    async def due(self, limit: int) -> list[JobId]:
        def operation(tx: Transaction) -> list[JobId]:
            query = (
                "SELECT id FROM jobs WHERE namespace = ? AND check_at > 0 AND check_at <= ? ORDER BY check_at LIMIT ?"
            )
            return [job_id for (job_id,) in tx.sql.execute(query, (self._namespace, tx.now, limit))]

        return await self._read(operation)

    async def recent(self, limit: int) -> list[Record]:
        def operation(tx: Transaction) -> list[Record]:
            query = "SELECT id FROM jobs WHERE namespace = ? ORDER BY created_at DESC LIMIT ?"
            ids = [job_id for (job_id,) in tx.sql.execute(query, (self._namespace, limit)).fetchall()]
            return [record for job_id in ids if (record := self._load(tx, job_id)) is not None]

        return await self._read(operation)

    async def aliases(self) -> Mapping[str, Alias]:
        def operation(tx: Transaction) -> dict[str, Alias]:
            query = "SELECT name, revision, context_tokens FROM aliases WHERE namespace = ?"
            return {row[0]: Alias(*row) for row in tx.sql.execute(query, (self._namespace,))}

        return await self._read(operation)

    async def set_alias(self, alias: Alias, *, only_if_absent: bool) -> Alias:
        def operation(tx: Transaction) -> Alias:
            verb = "IGNORE" if only_if_absent else "REPLACE"
            row = (self._namespace, alias.name, alias.revision, alias.context_tokens)
            tx.sql.execute(f"INSERT OR {verb} INTO aliases VALUES (?, ?, ?, ?)", row)
            query = "SELECT name, revision, context_tokens FROM aliases WHERE namespace = ? AND name = ?"
            return Alias(*tx.sql.execute(query, row[:2]).fetchone())

        return await self._write(operation)

    async def ping(self) -> str:
        await self._read(lambda tx: tx.sql.execute("SELECT 1").fetchone())
        return f"sqlite {sqlite3.sqlite_version}"

    async def close(self) -> None:
        await self._database.close()

    # One way through for every call that changes records -------------------------------------------

    async def _apply(
        self,
        group: Sequence[T],
        job_id_of: Callable[[T], JobId],
        transition: Callable[[Record | None, T, float, Timing], transitions.Step[R]],
        *,
        sweep: bool = False,
    ) -> list[R]:
        def operation(tx: Transaction) -> list[R]:
            if sweep:
                _sweep(tx)
            outcomes = []
            for item in group:
                record = self._load(tx, job_id_of(item))
                step = transition(record, item, tx.now, self.timing)
                if step.record is not None:
                    self._save(tx, step.record, known=record)
                    self._append(tx, step.record.id, step.events)
                    if step.events or step.record.state.final:
                        tx.changed.add(_topic(step.record.id))
                outcomes.append(step.outcome)
            return outcomes

        return await self._write(operation)

    def _load(self, tx: Transaction, job_id: JobId) -> Record | None:
        query = """SELECT record, body FROM jobs JOIN bodies USING (id)
                   WHERE id = ? AND namespace = ? AND expires_at > ?"""
        row = tx.sql.execute(query, (job_id, self._namespace, tx.now)).fetchone()
        if row is None:
            return None
        known = _WithoutJob.model_validate_json(row[0])
        return Record.model_construct(**{**dict(known), "job": Job.decode(row[1])})

    def _save(self, tx: Transaction, record: Record, *, known: Record | None) -> None:
        if known is None or known.incarnation != record.incarnation:
            _remove(tx, [record.id])
            tx.sql.execute("INSERT INTO bodies VALUES (?, ?)", (record.id, record.job.encode()))
        row = (
            record.id,
            self._namespace,
            record.created_at,
            record.check_at,
            record.expires_at,
            record.model_dump_json(exclude={"job"}),
        )
        tx.sql.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?)", row)

    def _append(self, tx: Transaction, job_id: JobId, events: Sequence[Event]) -> None:
        tx.sql.executemany(
            "INSERT INTO events VALUES (?, ?, ?)", [(job_id, event.seq, event.encode()) for event in events]
        )

    async def _read(self, operation: Operation[T]) -> T:
        with _translated(str(self._database.path)):
            return await self._database.read(operation)

    async def _write(self, operation: Operation[T]) -> T:
        with _translated(str(self._database.path)):
            return await self._database.write(operation)


class _WithoutJob(Record):
    """A record as it is written: its body is in a table of its own, since it never changes."""

    job: Any = None


class _EventWakeup:
    def __init__(self, event: asyncio.Event) -> None:
        self._event = event

    async def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        self._event.clear()


def _topic(job_id: JobId) -> str:
    return f"job:{job_id}"


def _sweep(tx: Transaction) -> None:
    query = "SELECT id FROM jobs WHERE expires_at <= ? LIMIT ?"
    _remove(tx, [job_id for (job_id,) in tx.sql.execute(query, (tx.now, SWEPT)).fetchall()])


def _remove(tx: Transaction, job_ids: Sequence[JobId]) -> None:
    for table in ("jobs", "bodies", "events"):
        tx.sql.executemany(f"DELETE FROM {table} WHERE id = ?", [(job_id,) for job_id in job_ids])


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except SettingsError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise StoreUnavailable(f"{what}: {error}") from error

"""Documents in the embedded file: a row each. `lease_until` is null in those that are closed."""

import sqlite3
import time
from collections.abc import Sequence
from typing import TypeVar

from codeyard.shared.documents.port import Document, Name
from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.file import EmbeddedFile, WallClock
from codeyard.shared.embedded.transactions import Work
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology

T = TypeVar("T")

SWEEP_GROUP = 100  # ended documents deleted with one that is made

THIS = "namespace = ? AND kind = ? AND tenant = ? AND id = ? AND until > ?"


class SqliteDocumentStore:
    def __init__(self, settings: StoreSettings, topology: Topology, file: EmbeddedFile) -> None:
        self._timeout_s = settings.timeout_s
        self._namespace = topology.namespace
        self._file = file

    @classmethod
    async def open(
        cls, settings: StoreSettings, topology: Topology, *, clock: WallClock = time.time
    ) -> "SqliteDocumentStore":
        """Raises StoreUnavailable, SettingsError."""
        try:
            return cls(settings, topology, await EmbeddedFile.open(settings.url, wall=clock))
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def create(self, name: Name, body: str, *, ttl_s: float, open: bool = False) -> bool:
        def work(db: sqlite3.Connection, now: float) -> bool:
            db.execute(
                "DELETE FROM documents WHERE number IN (SELECT number FROM documents WHERE until <= ? LIMIT ?)",
                (now, SWEEP_GROUP),
            )
            row = db.execute(f"SELECT first FROM documents WHERE {THIS}", self._this(name, now)).fetchone()
            if row is not None:
                return bool(row[0] == body)
            db.execute(
                "INSERT OR REPLACE INTO documents (namespace, kind, tenant, id, first, body, wish, owner, lease_until,"
                " until) VALUES (?, ?, ?, ?, ?, ?, '', '', ?, ?)",
                (self._namespace, name.kind, name.tenant, name.id, body, body, 0.0 if open else None, now + ttl_s),
            )
            return True

        return await self._write(work)

    async def read(self, name: Name) -> Document | None:
        return await self._read(lambda db, now: self._found(db, name, now))

    async def newest(self, kind: str, tenant: str, *, before: str | None = None, limit: int) -> list[Document]:
        def work(db: sqlite3.Connection, now: float) -> list[Document]:
            rows = db.execute(
                "SELECT id, body, wish FROM documents WHERE namespace = ? AND kind = ? AND tenant = ? AND until > ?"
                " AND (? IS NULL OR id < ?) ORDER BY id DESC LIMIT ?",
                (self._namespace, kind, tenant, now, before, before, limit),
            )
            return [Document(Name(kind, tenant, doc_id), body, wish, now) for doc_id, body, wish in rows]

        return await self._read(work)

    async def delete(self, name: Name) -> bool:
        def work(db: sqlite3.Connection, now: float) -> bool:
            return db.execute(f"DELETE FROM documents WHERE {THIS}", self._this(name, now)).rowcount == 1

        return await self._write(work)

    async def wish(self, name: Name, wish: str) -> Document | None:
        def work(db: sqlite3.Connection, now: float) -> Document | None:
            db.execute(f"UPDATE documents SET wish = ? WHERE {THIS}", (wish, *self._this(name, now)))
            return self._found(db, name, now)

        return await self._write(work)

    async def lapsed(self, kind: str, *, limit: int) -> Sequence[Name]:
        def work(db: sqlite3.Connection, now: float) -> Sequence[Name]:
            rows = db.execute(
                "SELECT tenant, id FROM documents WHERE namespace = ? AND kind = ? AND lease_until IS NOT NULL"
                " AND lease_until <= ? AND until > ? ORDER BY lease_until LIMIT ?",
                (self._namespace, kind, now, now, limit),
            )
            return [Name(kind, tenant, doc_id) for tenant, doc_id in rows]

        return await self._read(work)

    async def take(self, name: Name, owner: str, *, lease_s: float) -> Document | None:
        def work(db: sqlite3.Connection, now: float) -> Document | None:
            taken = db.execute(
                f"UPDATE documents SET owner = ?, lease_until = ? WHERE {THIS}"
                " AND lease_until IS NOT NULL AND (lease_until <= ? OR owner = ?)",
                (owner, now + lease_s, *self._this(name, now), now, owner),
            )
            return self._found(db, name, now) if taken.rowcount else None

        return await self._write(work)

    async def write(self, name: Name, owner: str, body: str, *, lease_s: float | None) -> Document | None:
        def work(db: sqlite3.Connection, now: float) -> Document | None:
            lease_until = None if lease_s is None else now + lease_s
            written = db.execute(
                f"UPDATE documents SET body = ?, lease_until = ? WHERE {THIS} AND owner = ?"
                " AND (lease_until IS NOT NULL OR (? IS NULL AND body = ?))",  # the second: a repeat of what closed it
                (body, lease_until, *self._this(name, now), owner, lease_until, body),
            )
            return self._found(db, name, now) if written.rowcount else None

        return await self._write(work)

    async def close(self) -> None:
        await self._file.close()

    # -------------------------------------------------------------------------------------------------

    def _this(self, name: Name, now: float) -> tuple[str, str, str, str, float]:
        return (self._namespace, name.kind, name.tenant, name.id, now)

    def _found(self, db: sqlite3.Connection, name: Name, now: float) -> Document | None:
        row = db.execute(f"SELECT body, wish FROM documents WHERE {THIS}", self._this(name, now)).fetchone()
        return Document(name, row[0], row[1], now) if row else None

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

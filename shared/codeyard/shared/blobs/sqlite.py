"""Chunks in the embedded file: a row each, and a row for each holder."""

import sqlite3
import time
from collections.abc import Sequence
from typing import TypeVar

from codeyard.shared.blobs.port import Chunk, Digest, Hold, PutVerdict
from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.file import EmbeddedFile, WallClock
from codeyard.shared.embedded.transactions import Work
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology

T = TypeVar("T")

SWEEP_GROUP = 64  # ended chunks deleted with one put: up to 64 MiB, and a put must stay short


class SqliteBlobStore:
    def __init__(self, settings: StoreSettings, topology: Topology, file: EmbeddedFile) -> None:
        self._timeout_s = settings.timeout_s
        self._quota_bytes = settings.blob_quota_bytes
        self._namespace = topology.namespace
        self._file = file

    @classmethod
    async def open(
        cls, settings: StoreSettings, topology: Topology, *, clock: WallClock = time.time
    ) -> "SqliteBlobStore":
        """Raises StoreUnavailable, SettingsError."""
        try:
            return cls(settings, topology, await EmbeddedFile.open(settings.url, wall=clock))
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def put(self, group: Sequence[Chunk]) -> list[PutVerdict]:
        def work(db: sqlite3.Connection, now: float) -> list[PutVerdict]:
            db.execute(
                "DELETE FROM chunks WHERE number IN (SELECT number FROM chunks WHERE until <= ? LIMIT ?)",
                (now, SWEEP_GROUP),
            )
            return [self._put(db, chunk, now) for chunk in group]

        return await self._write(work)

    async def hold(self, group: Sequence[Hold]) -> list[bool]:
        return await self._write(lambda db, now: [self._hold(db, hold, now) for hold in group])

    async def release(self, tenant: str, holder: str, digests: Sequence[Digest]) -> None:
        def work(db: sqlite3.Connection, now: float) -> None:
            for digest in digests:
                if (number := self._number(db, tenant, digest, now)) is not None:
                    db.execute("DELETE FROM chunk_holders WHERE chunk = ? AND holder = ?", (number, holder))
                    self._settle(db, number, now)

        await self._write(work)

    async def read(self, tenant: str, digests: Sequence[Digest]) -> list[bytes | None]:
        def work(db: sqlite3.Connection, now: float) -> list[bytes | None]:
            rows = (
                db.execute(
                    "SELECT data FROM chunks WHERE namespace = ? AND tenant = ? AND digest = ? AND until > ?",
                    (self._namespace, tenant, digest, now),
                ).fetchone()
                for digest in digests
            )
            return [row and row[0] for row in rows]

        try:
            return await self._file.read(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def used_bytes(self, tenant: str) -> int:
        try:
            return await self._file.read(lambda db, now: self._used(db, tenant, now), timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def close(self) -> None:
        await self._file.close()

    # -------------------------------------------------------------------------------------------------

    def _put(self, db: sqlite3.Connection, chunk: Chunk, now: float) -> PutVerdict:
        hold = chunk.hold
        if self._hold(db, hold, now):
            return PutVerdict.PRESENT
        if self._used(db, hold.tenant, now) + len(chunk.data) > self._quota_bytes:
            return PutVerdict.OVER_QUOTA
        db.execute(
            "INSERT OR REPLACE INTO chunks (namespace, tenant, digest, bytes, until, data) VALUES (?, ?, ?, ?, ?, ?)",
            (self._namespace, hold.tenant, hold.digest, len(chunk.data), now + hold.ttl_s, chunk.data),
        )
        self._hold(db, hold, now)
        return PutVerdict.STORED

    def _hold(self, db: sqlite3.Connection, hold: Hold, now: float) -> bool:
        number = self._number(db, hold.tenant, hold.digest, now)
        if number is None:
            return False
        db.execute(
            "INSERT INTO chunk_holders VALUES (?, ?, ?)"
            " ON CONFLICT (chunk, holder) DO UPDATE SET until = max(until, excluded.until)",
            (number, hold.holder, now + hold.ttl_s),
        )
        self._settle(db, number, now)
        return True

    def _settle(self, db: sqlite3.Connection, number: int, now: float) -> None:
        """The chunk ends with the last of its holders."""
        db.execute("DELETE FROM chunk_holders WHERE chunk = ? AND until <= ?", (number, now))
        until = db.execute("SELECT max(until) FROM chunk_holders WHERE chunk = ?", (number,)).fetchone()[0]
        if until is None:
            db.execute("DELETE FROM chunks WHERE number = ?", (number,))
        else:
            db.execute("UPDATE chunks SET until = ? WHERE number = ?", (until, number))

    def _number(self, db: sqlite3.Connection, tenant: str, digest: Digest, now: float) -> int | None:
        row = db.execute(
            "SELECT number FROM chunks WHERE namespace = ? AND tenant = ? AND digest = ? AND until > ?",
            (self._namespace, tenant, digest, now),
        ).fetchone()
        return row and int(row[0])

    def _used(self, db: sqlite3.Connection, tenant: str, now: float) -> int:
        row = db.execute(
            "SELECT coalesce(sum(bytes), 0) FROM chunks WHERE namespace = ? AND tenant = ? AND until > ?",
            (self._namespace, tenant, now),
        ).fetchone()
        return int(row[0])

    async def _write(self, work: Work[T]) -> T:
        try:
            return await self._file.write(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

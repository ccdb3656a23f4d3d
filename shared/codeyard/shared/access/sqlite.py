"""API keys in the embedded file: one row each."""

import sqlite3
from collections.abc import Sequence
from typing import TypeVar

from codeyard.shared.access.keys import ApiKey
from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.file import EmbeddedFile
from codeyard.shared.embedded.transactions import Work
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology

T = TypeVar("T")


class SqliteKeyStore:
    def __init__(self, settings: StoreSettings, topology: Topology, file: EmbeddedFile) -> None:
        self._timeout_s = settings.timeout_s
        self._namespace = topology.namespace
        self._file = file

    @classmethod
    async def open(cls, settings: StoreSettings, topology: Topology) -> "SqliteKeyStore":
        """Raises StoreUnavailable, SettingsError."""
        try:
            return cls(settings, topology, await EmbeddedFile.open(settings.url))
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def put(self, group: Sequence[ApiKey]) -> None:
        def work(db: sqlite3.Connection, now: float) -> None:
            rows = [(self._namespace, key.id, key.encode()) for key in group]
            db.executemany("INSERT OR REPLACE INTO api_keys VALUES (?, ?, ?)", rows)

        try:
            await self._file.write(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def read(self, group: Sequence[str]) -> list[ApiKey | None]:
        def work(db: sqlite3.Connection, now: float) -> list[ApiKey | None]:
            rows = (
                db.execute("SELECT document FROM api_keys WHERE namespace = ? AND id = ?", (self._namespace, key_id))
                for key_id in group
            )
            return [ApiKey.decode(found[0]) if (found := row.fetchone()) else None for row in rows]

        return await self._read(work)

    async def every(self) -> list[ApiKey]:
        def work(db: sqlite3.Connection, now: float) -> list[ApiKey]:
            rows = db.execute("SELECT document FROM api_keys WHERE namespace = ?", (self._namespace,))
            return sorted((ApiKey.decode(text) for (text,) in rows), key=lambda key: (key.created_at, key.id))

        return await self._read(work)

    async def close(self) -> None:
        await self._file.close()

    async def _read(self, work: Work[T]) -> T:
        try:
            return await self._file.read(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

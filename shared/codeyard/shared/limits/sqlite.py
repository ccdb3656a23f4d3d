"""What each tenant has used, in the embedded file: `rules` in a transaction.

The live jobs are counted anew each time: one machine has few.
"""

import sqlite3
import time
from collections.abc import Sequence
from typing import TypeVar

from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.file import EmbeddedFile, WallClock
from codeyard.shared.embedded.transactions import Work
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.limits import rules
from codeyard.shared.limits.rules import GiveBack, Level, Live, Take, Taken
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology

T = TypeVar("T")


class SqliteLimitStore:
    def __init__(self, settings: StoreSettings, topology: Topology, file: EmbeddedFile) -> None:
        self._timeout_s = settings.timeout_s
        self._namespace = topology.namespace
        self._file = file

    @classmethod
    async def open(
        cls, settings: StoreSettings, topology: Topology, *, clock: WallClock = time.time
    ) -> "SqliteLimitStore":
        """Raises StoreUnavailable, SettingsError."""
        try:
            return cls(settings, topology, await EmbeddedFile.open(settings.url, wall=clock))
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def take(self, group: Sequence[Take]) -> list[Taken]:
        return await self._write(lambda db, now: [self._take(db, ask, now) for ask in group])

    async def give_back(self, group: Sequence[GiveBack]) -> None:
        def work(db: sqlite3.Connection, now: float) -> None:
            for one in group:
                db.execute(
                    "DELETE FROM live_jobs WHERE namespace = ? AND tenant = ? AND id = ?",
                    (self._namespace, one.tenant, one.job_id),
                )
                db.execute(
                    "UPDATE levels SET amount = amount + ? WHERE namespace = ? AND tenant = ? AND bucket = 'tokens'",
                    (one.tokens, self._namespace, one.tenant),
                )

        await self._write(work)

    async def live(self, tenant: str, *, start: int, count: int) -> list[JobId]:
        def work(db: sqlite3.Connection, now: float) -> list[JobId]:
            rows = db.execute(
                "SELECT id FROM live_jobs WHERE namespace = ? AND tenant = ? AND until > ?"
                " ORDER BY until, id LIMIT ? OFFSET ?",
                (self._namespace, tenant, now, count, start),
            )
            return [job_id for (job_id,) in rows]

        try:
            return await self._file.read(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

    async def close(self) -> None:
        await self._file.close()

    # -------------------------------------------------------------------------------------------------

    def _take(self, db: sqlite3.Connection, ask: Take, now: float) -> Taken:
        live = self._live(db, ask, now) if ask.allowance.counts_live else Live()
        levels = self._levels(db, ask.tenant)
        step = rules.take(ask, levels.get("requests"), levels.get("tokens"), live, now)
        if step.taken.verdict is rules.Verdict.GRANTED:
            for bucket, level in (("requests", step.requests), ("tokens", step.tokens)):
                if level is not None:
                    row = (self._namespace, ask.tenant, bucket, level.amount, level.at)
                    db.execute("INSERT OR REPLACE INTO levels VALUES (?, ?, ?, ?, ?)", row)
        if step.taken.added:
            row = (self._namespace, ask.tenant, ask.job_id, ask.tokens, now + ask.live_s)
            db.execute("INSERT INTO live_jobs VALUES (?, ?, ?, ?, ?)", row)
        return step.taken

    def _levels(self, db: sqlite3.Connection, tenant: str) -> dict[str, Level]:
        rows = db.execute(
            "SELECT bucket, amount, at FROM levels WHERE namespace = ? AND tenant = ?", (self._namespace, tenant)
        )
        return {bucket: Level(amount, at) for bucket, amount, at in rows}

    def _live(self, db: sqlite3.Connection, ask: Take, now: float) -> Live:
        of_tenant = (self._namespace, ask.tenant)
        db.execute("DELETE FROM live_jobs WHERE namespace = ? AND tenant = ? AND until <= ?", (*of_tenant, now))
        num_jobs, tokens, mine = db.execute(
            "SELECT count(*), coalesce(sum(tokens), 0), coalesce(max(id = ?), 0) FROM live_jobs"
            " WHERE namespace = ? AND tenant = ?",
            (ask.job_id, *of_tenant),
        ).fetchone()
        return Live(num_jobs, tokens, bool(mine))

    async def _write(self, work: Work[T]) -> T:
        try:
            return await self._file.write(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise StoreUnavailable(str(error)) from None

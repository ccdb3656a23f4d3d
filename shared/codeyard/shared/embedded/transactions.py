"""Calls of any event loop on one connection, sharing transactions: group commit.

One thread owns the connection. It takes every call that waits, runs each in a savepoint of one
transaction, commits once, and only then answers. Nothing waits for more calls to come: a group is what
gathered while the one before was being written. Called by: embedded.file.
"""

import asyncio
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from codeyard.shared.embedded.clock import FileClock
from codeyard.shared.embedded.failure import FileUnavailable, NoAnswer, explained
from codeyard.shared.embedded.identity import Opened
from codeyard.shared.embedded.schema import connect, patiently

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sqlite3.Connection, float], T]
"""What to do inside a transaction, at which moment by the file's clock. May raise: then only it is undone."""

MAX_GROUP = 128  # calls in one transaction; bounds how long other processes wait for theirs


class Call(Generic[T]):
    """One piece of work on its way. Made and awaited in one event loop, run in the thread."""

    def __init__(self, work: Work[T]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self.loop.create_future()
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self.abandoned = False  # nobody waits: not worth beginning

    async def result(self, timeout_s: float | None = None) -> T:
        """The work's answer, or what it raised. Raises NoAnswer after `timeout_s`. Cancelling only
        stops waiting: the call can be awaited again."""
        await asyncio.wait({self._done}, timeout=timeout_s)
        if not self._done.done():
            raise NoAnswer(f"no answer from the disk within {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def run(self, db: sqlite3.Connection, now: float) -> None:
        self._outcome = [self.work(db, now)]

    def fail(self, error: BaseException) -> None:
        self._error = error

    def resolve(self) -> None:
        """In the call's own loop."""
        if not self._done.done():
            self._done.set_result(None)


class TransactionThread:
    """`begin` is "BEGIN IMMEDIATE" for the writer and "BEGIN" (one consistent snapshot) for the reader."""

    def __init__(
        self,
        path: Path,
        opened: Opened,
        clock: FileClock,
        *,
        begin: str,
        patience_s: float,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._opened = opened
        self._clock = clock
        self._begin = begin
        self._patience_s = patience_s
        self._on_change = on_change
        self._waiting: deque[Call[Any]] = deque()  # any loop puts, the thread takes, under the condition
        self._condition = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"codeyard-{begin.lower()}", daemon=True)
        self._thread.start()

    def start(self, call: Call[Any]) -> None:
        with self._condition:
            if self._closing:
                raise FileUnavailable(f"{self._path}: is closed")
            self._waiting.append(call)
            self._condition.notify()

    def close(self) -> None:
        """Finish what waits, then end. Blocks, for about `patience_s` at most."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(2 * self._patience_s)

    def _run(self) -> None:
        db: sqlite3.Connection | None = None
        while (group := self._next_group()) is not None:
            changed = False
            try:
                if db is None:
                    self._opened.check()
                    db = connect(self._path, patience_s=self._patience_s, read_only=self._begin == "BEGIN")
                changed = self._transact(db, group)
            except Exception as error:
                self._fail(group, error)
                if db is not None:
                    db.close()  # rolls back; the next group starts with a fresh connection
                    db = None
            _answer(group)
            if changed:
                self._on_change()
        if db is not None:
            db.close()

    def _next_group(self) -> list[Call[Any]] | None:
        with self._condition:
            while not self._waiting and not self._closing:
                self._condition.wait()
            if not self._waiting:
                return None
            return [self._waiting.popleft() for _ in range(min(MAX_GROUP, len(self._waiting)))]

    def _transact(self, db: sqlite3.Connection, group: list[Call[Any]]) -> bool:
        """Returns whether anything was written. Raises what concerns the whole group."""
        now = self._clock.now(patiently(lambda: self._begun(db), self._patience_s))
        changes = db.total_changes
        for call in group:
            if not call.abandoned:
                self._run_one(db, call, now)
        changed = db.total_changes != changes
        if changed:
            db.execute("UPDATE meta SET clock = ?", (now,))
        self._opened.check()  # last, so that nothing is confirmed that nobody would find
        db.execute("COMMIT")
        return changed

    def _begun(self, db: sqlite3.Connection) -> float:
        """Returns the latest moment written to the file."""
        db.execute(self._begin)
        try:
            latest: float = db.execute("SELECT clock FROM meta").fetchone()[0]
        except sqlite3.Error:
            db.execute("ROLLBACK")
            raise
        return latest

    def _run_one(self, db: sqlite3.Connection, call: Call[Any], now: float) -> None:
        db.execute("SAVEPOINT one")
        try:
            call.run(db, now)
        except Exception as error:
            if not db.in_transaction:
                raise  # SQLite undid the whole group: disk full, input/output error
            db.execute("ROLLBACK TO one")
            call.fail(explained(error, self._path) if isinstance(error, sqlite3.Error) else error)
        db.execute("RELEASE one")

    def _fail(self, group: list[Call[Any]], error: Exception) -> None:
        match error:
            case sqlite3.Error():
                reason = explained(error, self._path)
            case FileUnavailable():
                reason = error
            case _:
                log.error("embedded_transaction_failed", exc_info=error)
                reason = FileUnavailable(repr(error))
        for call in group:
            call.fail(reason)


def _answer(group: list[Call[Any]]) -> None:
    """One wake-up per event loop, however many calls it has in the group."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Call[Any]]] = {}
    for call in group:
        by_loop.setdefault(call.loop, []).append(call)
    for loop, calls in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, calls)
        except RuntimeError:  # the loop was closed meanwhile: nobody waits there
            continue


def _resolve(calls: list[Call[Any]]) -> None:
    for call in calls:
        call.resolve()

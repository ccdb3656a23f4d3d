"""The embedded file: one SQLite database that several processes share, for broker and store together.

Promise: `write` has committed to disk when it returns. All calls of a process go through one thread,
which takes whatever is waiting into one transaction (group commit: the fsync is shared). Changes are
announced by topic to every process that watches, within 50 ms across processes and at once within one.
Called by: broker.sqlite, store.sqlite; they translate the sqlite3 and OS errors that come out of here.
"""

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from codeyard.shared.errors import SettingsError

T = TypeVar("T")
Operation = Callable[["Transaction"], T]

BUSY_TIMEOUT_S = 10.0  # another process may hold the write lock this long
MAX_GROUP = 512  # operations per transaction
POLL_MIN_S, POLL_MAX_S = 0.005, 0.05  # how often a watching process looks for others' changes
KEPT_CHANGES = 10_000  # announcements; a watcher further behind wakes for everything
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"})

SCHEMA = """
CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY CHECK (one = 1), now REAL NOT NULL);
INSERT OR IGNORE INTO clock VALUES (1, 0);
CREATE TABLE IF NOT EXISTS changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT NOT NULL);
"""


@dataclass(slots=True)
class Transaction:
    """What an operation works with: the connection, the time, and the topics it changed."""

    sql: sqlite3.Connection
    now: float  # seconds since the epoch, never going back within the file
    changed: set[str]


@dataclass(frozen=True, slots=True)
class _Call:
    operation: Operation[Any]
    writes: bool
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[Any]"


class Database:
    """Open with `Database.at(url, schema)`; close once per open. Usable from several event loops."""

    _open: dict[tuple[int, Path], "Database"] = {}  # noqa: RUF012 - the one registry, guarded by _registry_lock
    _registry_lock = threading.Lock()

    @classmethod
    def at(cls, url: str, schema: str, *, clock: Callable[[], float] = time.time) -> "Database":
        """The process's one Database for the file of a `sqlite:///path` URL, made if it is not there.

        Raises SettingsError for a path that cannot serve, sqlite3.Error for a file that is not ours.
        """
        path = _path_of(url)
        key = (os.getpid(), path)  # a forked child starts anew and never touches its parent's connections
        with cls._registry_lock:
            database = cls._open.get(key)
            if database is None:
                database = cls._open[key] = cls(path, clock)
            database._users += 1
            try:
                database._ensure(schema)
            except BaseException:
                database._release(key)
                raise
        return database

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self._clock = clock
        self._users = 0
        self._schemas: set[str] = set()
        self._connection = _connect(path)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._watchers = _Watchers(path)
        self._thread = threading.Thread(target=self._work, name="codeyard-sqlite", daemon=True)
        self._connection.executescript(SCHEMA)
        self._thread.start()

    async def write(self, operation: Operation[T]) -> T:
        """Run `operation` in a transaction; return its value when that is on disk.

        Raises what it raises (its own changes undone), or sqlite3.Error if the commit failed: then the
        whole group had no effect.
        """
        return await self._call(operation, writes=True)

    async def read(self, operation: Operation[T]) -> T:
        """Run `operation` without a write transaction."""
        return await self._call(operation, writes=False)

    @contextlib.contextmanager
    def watch(self, topics: Sequence[str]) -> Iterator[asyncio.Event]:
        """An event that is set whenever one of `topics` may have changed. Clear it before you read."""
        with self._watchers.watch(topics) as event:
            yield event

    async def close(self) -> None:
        await asyncio.to_thread(self._close_one)

    def _close_one(self) -> None:
        with self._registry_lock:
            self._release((os.getpid(), self.path))

    def _release(self, key: tuple[int, Path]) -> None:
        self._users -= 1
        if self._users == 0:
            self._open.pop(key, None)
            self._calls.put(None)
            self._thread.join()
            self._watchers.close()
            self._connection.close()

    def _ensure(self, schema: str) -> None:
        if schema not in self._schemas:
            self._connection.executescript(schema)
            self._schemas.add(schema)

    async def _call(self, operation: Operation[T], *, writes: bool) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._calls.put(_Call(operation, writes, loop, answer))
        return await answer

    # The one thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        while (first := self._calls.get()) is not None:
            group = [first]
            closing = False
            while len(group) < MAX_GROUP and not self._calls.empty():
                following = self._calls.get_nowait()
                if following is None:
                    closing = True
                    break
                group.append(following)
            self._run(group)
            if closing:
                return

    def _run(self, group: Sequence[_Call]) -> None:
        writes = any(call.writes for call in group)
        outcomes: list[tuple[_Call, Any, BaseException | None]] = []
        try:
            if writes:
                self._connection.execute("BEGIN IMMEDIATE")
            transaction = Transaction(self._connection, self._now(writes), set())
            for call in group:
                outcomes.append((call, *self._run_one(call, transaction)))
            if writes:
                self._announce(transaction)
                self._connection.execute("COMMIT")
                if transaction.changed:
                    self._watchers.kick()
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
            outcomes = [(call, None, error) for call in group]
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any, BaseException | None]]] = {}
        for call, value, failure in outcomes:
            by_loop.setdefault(call.loop, []).append((call.answer, value, failure))
        for loop, answers in by_loop.items():
            with contextlib.suppress(RuntimeError):  # that loop has ended: nobody waits any more
                loop.call_soon_threadsafe(_resolve, answers)

    def _run_one(self, call: _Call, transaction: Transaction) -> tuple[Any, BaseException | None]:
        if not call.writes:
            try:
                return call.operation(transaction), None
            except Exception as error:
                return None, error
        sql = transaction.sql
        sql.execute("SAVEPOINT one")
        try:
            value = call.operation(transaction)
        except Exception as error:
            sql.execute("ROLLBACK TO one")
            sql.execute("RELEASE one")
            return None, error
        sql.execute("RELEASE one")
        return value, None

    def _now(self, writes: bool) -> float:
        last: float = self._connection.execute("SELECT now FROM clock").fetchone()[0]
        now = max(last, self._clock())
        if writes:
            self._connection.execute("UPDATE clock SET now = ?", (now,))
        return now

    def _announce(self, transaction: Transaction) -> None:
        sql = transaction.sql
        if transaction.changed:
            sql.executemany("INSERT INTO changes (topic) VALUES (?)", [(topic,) for topic in transaction.changed])
            sql.execute("DELETE FROM changes WHERE seq <= (SELECT MAX(seq) FROM changes) - ?", (KEPT_CHANGES,))


class _Watchers:
    """Wakes who watches a topic: at once for this process's writes, by polling for others'."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()
        self._kicked = threading.Event()
        self._someone = threading.Event()  # the poller sleeps while nobody watches
        self._closing = False
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(self, topics: Sequence[str]) -> Iterator[asyncio.Event]:
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            for topic in topics:
                self._events.setdefault(topic, []).append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._poll, name="codeyard-sqlite-watch", daemon=True)
                self._thread.start()
            self._someone.set()
        try:
            yield entry[1]
        finally:
            with self._lock:
                for topic in topics:
                    self._events[topic].remove(entry)
                    if not self._events[topic]:
                        del self._events[topic]
                if not self._events:
                    self._someone.clear()

    def kick(self) -> None:
        self._kicked.set()

    def close(self) -> None:
        self._closing = True
        self._someone.set()
        self._kicked.set()
        if self._thread is not None:
            self._thread.join()

    def _poll(self) -> None:
        connection = _connect(self._path)
        try:
            version, seq, wait_s = -1, _last_change(connection), POLL_MIN_S
            while True:
                self._someone.wait()
                kicked = self._kicked.wait(wait_s)
                self._kicked.clear()
                if self._closing:
                    return
                now_version: int = connection.execute("PRAGMA data_version").fetchone()[0]
                if now_version == version:
                    wait_s = min(POLL_MAX_S, wait_s * 1.5)
                    continue
                version, wait_s = now_version, POLL_MIN_S
                rows = connection.execute(
                    "SELECT seq, topic FROM changes WHERE seq > ? ORDER BY seq", (seq,)
                ).fetchall()
                if rows:
                    missed = rows[0][0] > seq + 1
                    seq = rows[-1][0]
                    self._wake(None if missed else {topic for _, topic in rows})
                elif kicked:
                    wait_s = POLL_MIN_S
        except sqlite3.Error:
            self._wake(None)  # the file is going away; readers find out for themselves
        finally:
            connection.close()

    def _wake(self, topics: set[str] | None) -> None:
        with self._lock:
            names = list(self._events) if topics is None else [name for name in topics if name in self._events]
            entries = {entry for name in names for entry in self._events[name]}
        for loop, event in entries:
            with contextlib.suppress(RuntimeError):  # that loop has ended
                loop.call_soon_threadsafe(event.set)


def _last_change(connection: sqlite3.Connection) -> int:
    found: int | None = connection.execute("SELECT MAX(seq) FROM changes").fetchone()[0]
    return found or 0


def _resolve(answers: Sequence[tuple["asyncio.Future[Any]", Any, BaseException | None]]) -> None:
    for answer, value, failure in answers:
        if answer.done():
            continue  # its caller was cancelled
        if failure is None:
            answer.set_result(value)
        else:
            answer.set_exception(failure)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _path_of(url: str) -> Path:
    text = url.removeprefix("sqlite:///")
    if text == url or not text:
        raise SettingsError(f"{url}: an embedded file is written sqlite:///relative/path or sqlite:////absolute/path")
    path = Path(text).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{url}: cannot make folder {path.parent}: {error.strerror}") from None
    kind = _file_system(path.parent)
    if kind in NETWORK_FILE_SYSTEMS:
        raise SettingsError(f"{url}: {path.parent} is on a network file system ({kind}); locks do not hold there")
    return path.resolve()


def _file_system(folder: Path) -> str:
    """The type of the file system a folder is on, "" where the system does not tell."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text()
    except OSError:
        return ""
    for line in mounts.splitlines():
        _, mount, fs_type, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if len(mount) >= len(best) and folder.resolve().is_relative_to(mount):
            best, kind = mount, fs_type
    return kind

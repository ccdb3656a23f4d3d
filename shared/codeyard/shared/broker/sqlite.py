"""The Broker port on the embedded file: a table of messages, an OS file lock per consumer.

A consumer holds a lock on a file of its own for as long as its process lives; the kernel frees it even
at kill -9. Whoever can take that lock knows the consumer is dead and puts its deliveries back.
Called by: shared.connect.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

from codeyard.shared.broker.port import Delivery, Message, PublishOutcome
from codeyard.shared.sqlite_file import Database, Operation, Transaction
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology, delay_step

T = TypeVar("T")

IDLE_LOOK_S = 0.25  # an idle consumer looks for dead ones, and for delayed messages that are due, this often

SCHEMA = """
CREATE TABLE IF NOT EXISTS queues (name TEXT PRIMARY KEY, length INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, message_id TEXT NOT NULL, body BLOB NOT NULL,
    headers TEXT NOT NULL, published_at REAL NOT NULL, ready_at REAL NOT NULL, owner TEXT,
    redelivered INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS messages_ready ON messages (queue, owner, seq);
CREATE INDEX IF NOT EXISTS messages_owned ON messages (owner) WHERE owner IS NOT NULL;
"""


class SqliteBroker:
    """See the Broker port. Several processes may each open one on the same file."""

    def __init__(self, database: Database, topology: Topology, settings: BrokerSettings) -> None:
        self._database = database
        self._topology = topology
        self._max_length = settings.queue_max_length
        self._consumers: list[SqliteConsumer] = []

    @classmethod
    async def open(cls, settings: BrokerSettings, topology: Topology) -> "SqliteBroker":
        """Raises SettingsError for a path that cannot serve, BrokerUnavailable for a file that does not open."""
        with _translated(settings.url):
            database = await asyncio.to_thread(Database.at, settings.url, SCHEMA)
        return cls(database, topology, settings)

    async def declare(self, queues: Sequence[str]) -> None:
        names = [*queues, self._topology.dead_queue, self._topology.dropped_queue]

        def operation(tx: Transaction) -> None:
            tx.sql.executemany("INSERT OR IGNORE INTO queues (name) VALUES (?)", [(name,) for name in names])

        await self._write(operation)

    async def publish(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        return await self._publish([(message, 0.0) for message in group], timeout_s)

    async def defer(self, group: Sequence[tuple[Message, float]], *, timeout_s: float) -> list[PublishOutcome]:
        return await self._publish([(message, delay_step(delay_s)) for message, delay_s in group], timeout_s)

    async def dead_letter(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        dead = self._topology.dead_queue
        moved = [Message(dead, m.message_id, m.body, {**m.headers, "queue": m.queue}) for m in group]
        return await self._publish([(message, 0.0) for message in moved], timeout_s)

    async def consume(self, prefetch: Mapping[str, int]) -> "SqliteConsumer":
        with _translated(str(self._database.path)):
            consumer = SqliteConsumer(self._database, prefetch)
        self._consumers.append(consumer)
        return consumer

    async def depth(self, queues: Sequence[str]) -> list[int]:
        def operation(tx: Transaction) -> list[int]:
            query = "SELECT COUNT(*) FROM messages WHERE queue = ? AND owner IS NULL AND ready_at <= ?"
            return [tx.sql.execute(query, (name, tx.now)).fetchone()[0] for name in queues]

        return await self._read(operation)

    async def ping(self) -> str:
        await self._read(lambda tx: tx.sql.execute("SELECT 1").fetchone())
        return f"sqlite {sqlite3.sqlite_version}"

    async def close(self) -> None:
        for consumer in self._consumers:
            await consumer.close()
        await self._database.close()

    async def _publish(self, group: Sequence[tuple[Message, float]], timeout_s: float) -> list[PublishOutcome]:
        def operation(tx: Transaction) -> list[PublishOutcome]:
            return [self._insert(tx, message, tx.now + delay_s) for message, delay_s in group]

        try:
            async with asyncio.timeout(timeout_s):
                return await self._write(operation)
        except TimeoutError:
            return [PublishOutcome.UNKNOWN] * len(group)

    def _insert(self, tx: Transaction, message: Message, ready_at: float) -> PublishOutcome:
        row = tx.sql.execute("SELECT length FROM queues WHERE name = ?", (message.queue,)).fetchone()
        if row is None:
            return PublishOutcome.UNROUTABLE
        if row[0] >= self._max_length:
            return PublishOutcome.FULL
        tx.sql.execute(
            "INSERT INTO messages (queue, message_id, body, headers, published_at, ready_at) VALUES (?, ?, ?, ?, ?, ?)",
            (message.queue, message.message_id, message.body, json.dumps(dict(message.headers)), tx.now, ready_at),
        )
        tx.sql.execute("UPDATE queues SET length = length + 1 WHERE name = ?", (message.queue,))
        tx.changed.add(_topic(message.queue))
        return PublishOutcome.CONFIRMED

    async def _read(self, operation: Operation[T]) -> T:
        with _translated(str(self._database.path)):
            return await self._database.read(operation)

    async def _write(self, operation: Operation[T]) -> T:
        with _translated(str(self._database.path)):
            return await self._database.write(operation)


class SqliteConsumer:
    """See the Consumer port. Takes only what `receive` gives out, so there is nothing to give back at `stop`."""

    def __init__(self, database: Database, prefetch: Mapping[str, int]) -> None:
        self._database = database
        self._prefetch = dict(prefetch)
        self._unacked = dict.fromkeys(prefetch, 0)
        self._owner = new_nonce()
        self._lock: IO[bytes] | None = _take_lock(_lock_folder(database.path) / self._owner)
        self._stopped = False

    async def receive(self, most: int) -> list[Delivery]:
        topics = [_topic(queue) for queue in self._prefetch]
        with self._database.watch(topics) as woken:
            while True:
                if not self._stopped and (taken := await self._take(most)):
                    return taken
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_LOOK_S):
                        await woken.wait()
                woken.clear()
                await self._put_back_dead()

    async def ack(self, group: Sequence[Delivery]) -> None:
        def operation(tx: Transaction) -> None:
            for delivery in group:
                query = "DELETE FROM messages WHERE seq = ? AND owner = ?"
                if tx.sql.execute(query, (delivery.tag, self._owner)).rowcount:
                    tx.sql.execute("UPDATE queues SET length = length - 1 WHERE name = ?", (delivery.queue,))

        await self._settle(group, operation)

    async def requeue(self, group: Sequence[Delivery]) -> None:
        def operation(tx: Transaction) -> None:
            for delivery in group:
                query = "UPDATE messages SET owner = NULL, redelivered = 1 WHERE seq = ? AND owner = ?"
                tx.sql.execute(query, (delivery.tag, self._owner))
                tx.changed.add(_topic(delivery.queue))

        await self._settle(group, operation)

    async def stop(self) -> None:
        self._stopped = True

    async def close(self) -> None:
        self._stopped = True
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        await self._write(lambda tx: _put_back(tx, self._owner))
        _drop_lock(lock)

    async def _settle(self, group: Sequence[Delivery], operation: Operation[None]) -> None:
        if not group:
            return
        await self._write(operation)
        for delivery in group:
            self._unacked[delivery.queue] -= 1

    async def _take(self, most: int) -> list[Delivery]:
        room = {queue: most_of - self._unacked[queue] for queue, most_of in self._prefetch.items()}
        wanted = {queue: places for queue, places in room.items() if places > 0}

        def look(tx: Transaction) -> bool:
            query = "SELECT 1 FROM messages WHERE queue = ? AND owner IS NULL AND ready_at <= ? LIMIT 1"
            return any(tx.sql.execute(query, (queue, tx.now)).fetchone() for queue in wanted)

        def take(tx: Transaction) -> list[Delivery]:
            taken: list[Delivery] = []
            for queue, places in wanted.items():
                query = """SELECT seq, message_id, body, headers, published_at, redelivered FROM messages
                           WHERE queue = ? AND owner IS NULL AND ready_at <= ? ORDER BY seq LIMIT ?"""
                rows = tx.sql.execute(query, (queue, tx.now, min(places, most - len(taken)))).fetchall()
                taken += [_delivery(queue, row) for row in rows]
            update = "UPDATE messages SET owner = ? WHERE seq = ?"
            tx.sql.executemany(update, [(self._owner, delivery.tag) for delivery in taken])
            return taken

        if not await self._read(look):
            return []
        # Shielded: a delivery taken for a receiver that was cancelled meanwhile would be nobody's.
        taking = asyncio.ensure_future(self._write(take))
        try:
            taken = await asyncio.shield(taking)
        except asyncio.CancelledError:
            for delivery in await taking:
                self._unacked[delivery.queue] += 1
            await self.requeue(taking.result())
            raise
        for delivery in taken:
            self._unacked[delivery.queue] += 1
        return taken

    async def _put_back_dead(self) -> None:
        def owners(tx: Transaction) -> list[str]:
            query = "SELECT DISTINCT owner FROM messages WHERE owner IS NOT NULL AND owner != ?"
            return [owner for (owner,) in tx.sql.execute(query, (self._owner,))]

        folder = _lock_folder(self._database.path)
        for owner in await self._read(owners):
            if _is_free(folder / owner):
                await self._write(lambda tx, owner=owner: _put_back(tx, owner))  # type: ignore[misc]  # bound default
                (folder / owner).unlink(missing_ok=True)

    async def _read(self, operation: Operation[T]) -> T:
        with _translated(str(self._database.path)):
            return await self._database.read(operation)

    async def _write(self, operation: Operation[T]) -> T:
        with _translated(str(self._database.path)):
            return await self._database.write(operation)


def _delivery(queue: str, row: tuple[int, str, bytes, str, float, int]) -> Delivery:
    seq, message_id, body, headers, published_at, redelivered = row
    return Delivery(queue, message_id, body, json.loads(headers), bool(redelivered), published_at, tag=seq)


def _put_back(tx: Transaction, owner: str) -> None:
    query = "SELECT DISTINCT queue FROM messages WHERE owner = ?"
    tx.changed.update(_topic(queue) for (queue,) in tx.sql.execute(query, (owner,)).fetchall())
    tx.sql.execute("UPDATE messages SET owner = NULL, redelivered = 1 WHERE owner = ?", (owner,))


def _lock_folder(database: Path) -> Path:
    return database.with_name(database.name + "-consumers")


def _take_lock(path: Path) -> IO[bytes]:
    path.parent.mkdir(exist_ok=True)
    lock = path.open("wb")
    os.set_inheritable(lock.fileno(), False)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _drop_lock(lock: IO[bytes]) -> None:
    Path(lock.name).unlink(missing_ok=True)
    lock.close()


def _is_free(path: Path) -> bool:
    """Whether the consumer of this lock file is dead. A missing file is free too."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False


def _topic(queue: str) -> str:
    return f"queue:{queue}"


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise BrokerUnavailable(f"{what}: {error}") from error

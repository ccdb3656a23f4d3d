"""One consumer of queues in the embedded file: it takes messages by marking their rows with its number.

Which messages it holds is only in the file, so that neither a lost answer nor a cancelled call can make
the books differ. Called by: broker.sqlite.
"""

import asyncio
import itertools
import json
import logging
import sqlite3
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from codeyard.shared.broker.backoff import backoff_s
from codeyard.shared.broker.port import Delivery
from codeyard.shared.embedded.failure import FileUnavailable, refused
from codeyard.shared.embedded.file import EmbeddedFile
from codeyard.shared.embedded.liveness import ConsumerLock, bury, is_alive
from codeyard.shared.embedded.transactions import Call, Work
from codeyard.shared.errors import BrokerUnavailable

log = logging.getLogger(__name__)

PROBE_EVERY_S = 0.05  # is everyone else alive? by the monotonic clock, while waiting


@dataclass(frozen=True, slots=True)
class _Queue:
    number: int
    name: str
    prefetch: int


class SqliteConsumer:
    """`receive` is for one task at a time; all methods belong to the loop it was opened in."""

    def __init__(
        self, file: EmbeddedFile, lock: ConsumerLock, number: int, queues: Sequence[_Queue], timeout_s: float
    ) -> None:
        self._file = file
        self._lock = lock
        self._number = number
        self._queues = queues
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._taking: Call[list[Delivery]] | None = None  # outlives a cancelled `receive`, the next one awaits it
        self._arrived: deque[Delivery] = deque()  # taken, not yet given out
        self._woken = asyncio.Event()
        self._probe_at_s = 0.0  # used by the watcher's thread
        self._stopped = False
        self.closed = False

    @classmethod
    async def open(cls, file: EmbeddedFile, prefetch: Mapping[str, int], *, timeout_s: float) -> Self:
        """Raises BrokerUnavailable for a queue nobody declared, FileUnavailable."""
        try:
            lock = await asyncio.to_thread(ConsumerLock.acquire, file.locks)
        except OSError as error:
            raise refused(error, file.locks) from None

        def work(db: sqlite3.Connection, now: float) -> tuple[int, list[_Queue]]:
            queues = [_declared(db, name, limit) for name, limit in prefetch.items()]
            row = db.execute("INSERT INTO consumers (lock) VALUES (?) RETURNING number", (lock.name,)).fetchone()
            return row[0], queues

        try:
            number, queues = await file.write(work, timeout_s=timeout_s)
        except BaseException:
            lock.release()
            raise
        return cls(file, lock, number, queues, timeout_s)

    async def receive(self, most: int) -> list[Delivery]:
        failures = 0
        while not self._arrived:
            if self._stopped:
                await self._forever()
            self._woken.clear()
            try:
                await self._take(most)
                failures = 0
            except FileUnavailable as error:
                failures += 1
                log.warning("receive_failed", extra={"error": str(error)})
                await asyncio.sleep(backoff_s(failures))
                continue
            if not self._arrived and not self._stopped:
                await self._until_woken()
        return [self._arrived.popleft() for _ in range(min(most, len(self._arrived)))]

    async def ack(self, group: Sequence[Delivery]) -> None:
        await self._on_held("DELETE FROM messages WHERE number = ? AND consumer = ?", group)

    async def requeue(self, group: Sequence[Delivery]) -> None:
        await self._on_held(
            "UPDATE messages SET consumer = NULL, redelivered = 1 WHERE number = ? AND consumer = ?", group
        )

    async def stop(self) -> None:
        self._stopped = True
        self._woken.set()
        if (taking := self._taking) is not None:
            with suppress(FileUnavailable):
                self._keep(taking, await taking.result(self._timeout_s))
        unseen = list(self._arrived)
        self._arrived.clear()
        if unseen:
            await self._on_held("UPDATE messages SET consumer = NULL WHERE number = ? AND consumer = ?", unseen)

    async def close(self) -> None:
        """What the file does not take now, others find out by the lock that is free."""
        if self.closed:
            return
        self.closed = True
        self._stopped = True
        self._woken.set()
        self._arrived.clear()
        try:
            await self._file.write(lambda db, now: _let_go(db, self._number), timeout_s=self._timeout_s)
        except FileUnavailable as error:
            log.warning("consumer_not_closed", extra={"error": str(error)})
        finally:
            self._lock.release()

    def look(self, db: sqlite3.Connection, now: float, changed: bool) -> None:
        """In the watcher's thread, while `receive` waits: is there anything to take?"""
        monotonic_s = self._loop.time()
        probe = monotonic_s >= self._probe_at_s
        if probe:
            self._probe_at_s = monotonic_s + PROBE_EVERY_S
        if (probe and _dead(db, self._number, self._file.locks)) or self._is_any_ready(db, now):
            self.lost()

    def lost(self) -> None:
        """In the watcher's thread: `receive` looks by itself, and says what is wrong."""
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._woken.set)

    # -------------------------------------------------------------------------------------------------

    async def _take(self, most: int) -> None:
        if self._taking is None:
            self._taking = self._file.start_write(self._taken(most))
        taking = self._taking
        try:
            arrived = await taking.result()
        except FileUnavailable:
            self._taking = None
            raise
        self._keep(taking, arrived)

    def _keep(self, taking: Call[list[Delivery]], arrived: Sequence[Delivery]) -> None:
        """Once, although both `receive` and `stop` may have waited for it."""
        if self._taking is taking:
            self._taking = None
            self._arrived.extend(arrived)

    def _taken(self, most: int) -> Work[list[Delivery]]:
        def work(db: sqlite3.Connection, now: float) -> list[Delivery]:
            for number, lock in _dead(db, self._number, self._file.locks):
                _let_go(db, number)
                bury(self._file.locks, lock)
            room = self._room(db)
            taken: list[Delivery] = []
            for queues_left, queue in zip(itertools.count(len(self._queues), -1), self._queues, strict=False):
                share = -(-(most - len(taken)) // queues_left)  # no deep queue keeps the others' messages away
                taken += self._from(db, queue, min(room[queue.number], share), now)
            for queue in self._queues:
                room = self._room(db)
                taken += self._from(db, queue, min(room[queue.number], most - len(taken)), now)
            return taken

        return work

    def _room(self, db: sqlite3.Connection) -> dict[int, int]:
        held = dict(
            db.execute("SELECT queue, count(*) FROM messages WHERE consumer = ? GROUP BY queue", (self._number,))
        )
        return {queue.number: queue.prefetch - held.get(queue.number, 0) for queue in self._queues}

    def _from(self, db: sqlite3.Connection, queue: _Queue, most: int, now: float) -> list[Delivery]:
        if most <= 0:
            return []
        rows = db.execute(
            "UPDATE messages SET consumer = ? WHERE number IN (SELECT number FROM messages"
            " WHERE queue = ? AND consumer IS NULL AND ready_at <= ? ORDER BY ready_at, number LIMIT ?)"
            " RETURNING ready_at, number, message_id, body, headers, redelivered, published_at",
            (self._number, queue.number, now, most),
        ).fetchall()
        rows.sort()  # RETURNING keeps no order
        return [
            Delivery(queue.name, message_id, body, json.loads(headers), bool(redelivered), published_at, tag=number)
            for _, number, message_id, body, headers, redelivered, published_at in rows
        ]

    def _is_any_ready(self, db: sqlite3.Connection, now: float) -> bool:
        ready = "SELECT 1 FROM messages WHERE queue = ? AND consumer IS NULL AND ready_at <= ? LIMIT 1"
        room = self._room(db)
        return any(
            room[queue.number] > 0 and db.execute(ready, (queue.number, now)).fetchone() for queue in self._queues
        )

    async def _until_woken(self) -> None:
        self._file.watcher.add(self)
        try:
            await self._woken.wait()
        finally:
            self._file.watcher.remove(self)

    async def _forever(self) -> None:
        """Nothing comes any more; whoever waits here is cancelled."""
        if self.closed:
            raise BrokerUnavailable("this consumer is closed")
        self._woken.clear()
        await self._woken.wait()

    async def _on_held(self, statement: str, group: Sequence[Delivery]) -> None:
        """`consumer = ?` makes a delivery that went to another consumer meanwhile not ours to end."""
        numbers = [(delivery.tag, self._number) for delivery in group]

        def work(db: sqlite3.Connection, now: float) -> None:
            db.executemany(statement, numbers)

        try:
            await self._file.write(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise BrokerUnavailable(str(error)) from None


def _declared(db: sqlite3.Connection, name: str, prefetch: int) -> _Queue:
    found = db.execute("SELECT number FROM queues WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise BrokerUnavailable(f"there is no queue {name}; declare it before consuming")
    return _Queue(found[0], name, prefetch)


def _dead(db: sqlite3.Connection, own: int, locks: Path) -> list[tuple[int, str]]:
    others = db.execute("SELECT number, lock FROM consumers WHERE number <> ?", (own,)).fetchall()
    return [(number, lock) for number, lock in others if not is_alive(locks, lock)]


def _let_go(db: sqlite3.Connection, number: int) -> None:
    """What a consumer held is ready again, ahead of what came later."""
    db.execute("UPDATE messages SET consumer = NULL, redelivered = 1 WHERE consumer = ?", (number,))
    db.execute("DELETE FROM consumers WHERE number = ?", (number,))

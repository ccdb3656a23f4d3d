"""The Broker port on one SQLite file, for the processes of one machine.

A message is a row: ready from `ready_at` on, held by a consumer until acked. Publishing is a commit, so
CONFIRMED means on disk. A consumer is alive while it holds its lock file; what a dead one held is ready
again as soon as another takes messages. Queues are served in the order in which messages became ready.
"""

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

from codeyard.shared.broker.port import Consumer, Message, PublishOutcome
from codeyard.shared.broker.sqlite_consumer import SqliteConsumer
from codeyard.shared.embedded.failure import FileUnavailable, NoAnswer
from codeyard.shared.embedded.file import EmbeddedFile, WallClock
from codeyard.shared.embedded.transactions import Work
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology, delay_step

T = TypeVar("T")

ORIGIN_HEADER = "queue"  # of a dead letter: the job queue it was meant for


class SqliteBroker:
    def __init__(self, settings: BrokerSettings, topology: Topology, file: EmbeddedFile) -> None:
        self._timeout_s = settings.publish_timeout_s
        self._max_length = settings.queue_max_length
        self._topology = topology
        self._file = file
        self._consumers: list[SqliteConsumer] = []
        self._closed = False

    @classmethod
    async def open(
        cls, settings: BrokerSettings, topology: Topology, *, clock: WallClock = time.time
    ) -> "SqliteBroker":
        """Make or open the file of a `sqlite:` URL. Raises SettingsError if it cannot be used,
        BrokerUnavailable if it is kept locked. `clock` gives seconds since the epoch."""
        try:
            return cls(settings, topology, await EmbeddedFile.open(settings.url, wall=clock))
        except FileUnavailable as error:
            raise BrokerUnavailable(str(error)) from None

    async def publish(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        return await self._publish([(message, 0.0) for message in group], timeout_s)

    async def defer(self, group: Sequence[tuple[Message, float]], *, timeout_s: float) -> list[PublishOutcome]:
        return await self._publish([(message, delay_step(delay_s)) for message, delay_s in group], timeout_s)

    async def dead_letter(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        dead = self._topology.dead_queue
        letters = [
            Message(dead, message.message_id, message.body, {**message.headers, ORIGIN_HEADER: message.queue})
            for message in group
        ]
        return await self.publish(letters, timeout_s=timeout_s)

    async def declare(self, queues: Sequence[str]) -> None:
        names = [self._topology.dead_queue, self._topology.dropped_queue, *queues]

        def work(db: sqlite3.Connection, now: float) -> None:
            db.executemany(
                "INSERT INTO queues (name, max_length) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET max_length = ?2",
                [(name, self._max_length) for name in names],
            )

        await self._write(work)

    async def consume(self, prefetch: Mapping[str, int]) -> Consumer:
        try:
            consumer = await SqliteConsumer.open(self._file, prefetch, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise BrokerUnavailable(str(error)) from None
        self._consumers = [one for one in self._consumers if not one.closed] + [consumer]
        return consumer

    async def depth(self, queues: Sequence[str]) -> list[int]:
        def work(db: sqlite3.Connection, now: float) -> list[int]:
            found = (
                db.execute(
                    "SELECT free - (SELECT count(*) FROM messages"
                    " WHERE queue = queues.number AND consumer IS NULL AND ready_at > ?) FROM queues WHERE name = ?",
                    (now, name),
                ).fetchone()
                for name in queues
            )
            return [row[0] if row else 0 for row in found]

        return await self._read(work)

    async def ping(self) -> str:
        version = await self._read(lambda db, now: str(db.execute("SELECT sqlite_version()").fetchone()[0]))
        return f"sqlite {version}"

    async def close(self) -> None:
        """Closes its consumers too."""
        if self._closed:
            return
        self._closed = True
        for consumer in self._consumers:
            await consumer.close()
        await self._file.close()

    async def _read(self, work: Work[T]) -> T:
        try:
            return await self._file.read(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise BrokerUnavailable(str(error)) from None

    async def _write(self, work: Work[T]) -> T:
        try:
            return await self._file.write(work, timeout_s=self._timeout_s)
        except FileUnavailable as error:
            raise BrokerUnavailable(str(error)) from None

    async def _publish(self, group: Sequence[tuple[Message, float]], timeout_s: float) -> list[PublishOutcome]:
        def work(db: sqlite3.Connection, now: float) -> list[PublishOutcome]:
            return _insert(db, group, now)

        try:
            return await self._file.write(work, timeout_s=timeout_s)
        except NoAnswer:
            return [PublishOutcome.UNKNOWN] * len(group)
        except FileUnavailable as error:
            raise BrokerUnavailable(str(error)) from None


def _insert(db: sqlite3.Connection, group: Sequence[tuple[Message, float]], now: float) -> list[PublishOutcome]:
    room: dict[str, tuple[int, float]] = {}  # by name: its number, and how many messages it still takes
    for name in {message.queue for message, _ in group}:
        found = db.execute("SELECT number, max_length - free FROM queues WHERE name = ?", (name,)).fetchone()
        if found:
            room[name] = found
    outcomes, rows = [], []
    for message, delay_s in group:
        number, left = room.get(message.queue, (0, 0))
        if number == 0:
            outcomes.append(PublishOutcome.UNROUTABLE)
        elif left <= 0:
            outcomes.append(PublishOutcome.FULL)
        else:
            room[message.queue] = (number, left - 1)
            headers = json.dumps(dict(message.headers))
            rows.append((number, now + delay_s, now, message.message_id, headers, message.body))
            outcomes.append(PublishOutcome.CONFIRMED)
    db.executemany(
        "INSERT INTO messages (queue, ready_at, published_at, message_id, headers, body) VALUES (?, ?, ?, ?, ?, ?)",
        rows,
    )
    return outcomes

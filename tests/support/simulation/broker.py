"""The Broker port in memory: durable queues, consumers with a prefetch, deliveries that come back.

A `BrokerServer` holds what a server would; a `MemoryBroker` is one process's client of it, over a link.
As with RabbitMQ a consumer has a connection (`Seat`): when it is lost, what was unacked goes back to the
queue, acks for it are skipped, and the client takes a new seat by itself. Held to the port by the contract
suite. Called by: fleet.py, tests/contract.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol

from codeyard.shared.broker.backoff import backoff_s
from codeyard.shared.broker.port import Consumer, Delivery, HeaderValue, Message, PublishOutcome
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.topology import Topology, delay_step
from support.simulation.wire import NOTHING, Link

ORIGIN_HEADER = "queue"  # of a dead letter: the job queue it was meant for


@dataclass(slots=True, eq=False)
class Letter:
    """One message at the broker."""

    number: int
    queue: str
    message_id: str
    body: bytes
    headers: Mapping[str, HeaderValue]
    published_at: float
    redelivered: bool = False


class BrokerWitness(Protocol):
    """Sees what the broker takes and lets go, at the moment it does."""

    def enqueued(self, letter: Letter) -> None: ...

    def acked(self, letter: Letter) -> None: ...


class Seat:
    """The server's side of one consumer. `held` is unacked, on its way or there."""

    def __init__(self, prefetch: Mapping[str, int], client: "MemoryConsumer") -> None:
        self.prefetch = prefetch
        self.client = client
        self.held: dict[int, Letter] = {}
        self.held_of: Counter[str] = Counter()
        self.connected = True
        self.takes_more = True

    def has_room(self, queue: str) -> bool:
        return self.takes_more and self.held_of[queue] < self.prefetch.get(queue, 0)


class Tag(NamedTuple):
    seat: Seat
    number: int


@dataclass(slots=True)
class _Queue:
    max_length: int
    ready: deque[Letter] = field(default_factory=deque)
    deferred: int = 0  # will be ready later


class BrokerServer:
    """What all clients share."""

    def __init__(
        self, topology: Topology, *, chance: Random | None = None, witness: BrokerWitness | None = None
    ) -> None:
        self.topology = topology
        self.queues: dict[str, _Queue] = {}
        self.seats: list[Seat] = []
        self.shuffles = False  # what comes back does so in any order
        self.room: dict[str, int] = {}  # messages that a queue takes, where it is less than it was declared with
        self._chance = chance or Random(0)
        self._witness = witness
        self._numbers = 0

    def declare(self, names: Sequence[str], max_length: int) -> None:
        for name in (self.topology.dead_queue, self.topology.dropped_queue, *names):
            queue = self.queues.setdefault(name, _Queue(max_length))
            queue.max_length = max_length

    def take(self, message: Message, published_at: float, delay_s: float = 0.0) -> PublishOutcome:
        queue = self.queues.get(message.queue)
        if queue is None:
            return PublishOutcome.UNROUTABLE
        if len(queue.ready) + queue.deferred >= min(queue.max_length, self.room.get(message.queue, queue.max_length)):
            return PublishOutcome.FULL
        letter = self._letter(message, published_at)
        if delay_s:
            queue.deferred += 1
            asyncio.get_running_loop().call_later(delay_s, self._due, letter)
        else:
            queue.ready.append(letter)
        if self._witness is not None:
            self._witness.enqueued(letter)
        self.push(message.queue)
        return PublishOutcome.CONFIRMED

    def copy(self, letter: Letter) -> None:
        """The same message once more, as after a publish that was repeated below the port."""
        message = Message(letter.queue, letter.message_id, letter.body, letter.headers)
        twin = self._letter(message, letter.published_at)
        self.queues[letter.queue].ready.append(twin)
        if self._witness is not None:
            self._witness.enqueued(twin)
        self.push(letter.queue)

    def move(self, letter: Letter, queue: str) -> bool:
        """A ready message to another queue: how the broker itself dead-letters. "" loses it."""
        ready = self.queues[letter.queue].ready
        if letter not in ready:
            return False
        ready.remove(letter)
        if queue:
            letter.queue = queue
            self.queues[queue].ready.append(letter)
            self.push(queue)
        return True

    def push(self, name: str) -> None:
        """Ready messages to whoever has room."""
        ready = self.queues[name].ready
        while ready:
            seats = [seat for seat in self.seats if seat.has_room(name)]
            if not seats:
                return
            seat = seats[0] if len(seats) == 1 else self._chance.choice(seats)
            letter = ready.popleft()
            seat.held[letter.number] = letter
            seat.held_of[name] += 1
            seat.client.send(seat, letter)

    def end(self, seat: Seat, number: int, *, requeue: bool, untouched: bool = False) -> None:
        """One delivery. Nothing if it is not this seat's (any more)."""
        letter = seat.held.pop(number, None)
        if letter is None:
            return
        seat.held_of[letter.queue] -= 1
        if requeue:
            letter.redelivered = letter.redelivered or not untouched
            self.queues[letter.queue].ready.appendleft(letter)
        elif self._witness is not None:
            self._witness.acked(letter)
        self.push(letter.queue)

    def cut(self, seat: Seat) -> None:
        """The connection is gone: what it held goes back, ahead of what came later."""
        if seat not in self.seats:
            return
        self.seats.remove(seat)
        seat.connected = False
        back = sorted(seat.held.values(), key=lambda letter: letter.number, reverse=True)
        if self.shuffles:
            self._chance.shuffle(back)
        seat.held.clear()
        for letter in back:
            letter.redelivered = True
            self.queues[letter.queue].ready.appendleft(letter)
        for name in dict.fromkeys(letter.queue for letter in back):
            self.push(name)

    def depth(self, name: str) -> int:
        queue = self.queues.get(name)
        return len(queue.ready) if queue is not None else 0

    def _letter(self, message: Message, published_at: float) -> Letter:
        self._numbers += 1
        return Letter(
            self._numbers, message.queue, message.message_id, message.body, dict(message.headers), published_at
        )

    def _due(self, letter: Letter) -> None:
        queue = self.queues[letter.queue]
        queue.deferred -= 1
        queue.ready.append(letter)
        self.push(letter.queue)


class MemoryBroker:
    """One process's client."""

    def __init__(
        self, server: BrokerServer, link: Link, *, max_length: int = 1_000_000, acks_answer: bool = True
    ) -> None:
        self._server = server
        self._link = link
        self._max_length = max_length
        self._acks_answer = acks_answer
        self._consumers: list[MemoryConsumer] = []

    async def publish(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        return await self._publish("broker.publish", [(message, 0.0) for message in group], timeout_s)

    async def defer(self, group: Sequence[tuple[Message, float]], *, timeout_s: float) -> list[PublishOutcome]:
        later = [(message, float(delay_step(delay_s))) for message, delay_s in group]
        return await self._publish("broker.defer", later, timeout_s)

    async def dead_letter(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        dead = self._server.topology.dead_queue
        letters = [
            Message(dead, message.message_id, message.body, {**message.headers, ORIGIN_HEADER: message.queue})
            for message in group
        ]
        return await self._publish("broker.dead_letter", [(letter, 0.0) for letter in letters], timeout_s)

    async def declare(self, queues: Sequence[str]) -> None:
        def apply(_: Sequence[None]) -> list[None]:
            self._server.declare(queues, self._max_length)
            return [None]

        await self._link.call("broker.declare", NOTHING, apply)

    async def consume(self, prefetch: Mapping[str, int]) -> Consumer:
        consumer = MemoryConsumer(self._server, self._link, prefetch, acks_answer=self._acks_answer)
        self._consumers.append(consumer)  # before it is there: the process may end meanwhile
        await consumer.open()
        return consumer

    async def depth(self, queues: Sequence[str]) -> list[int]:
        return await self._link.call("broker.depth", queues, lambda names: [self._server.depth(one) for one in names])

    async def ping(self) -> str:
        [told] = await self._link.call("broker.ping", NOTHING, lambda _: ["memory 1"])
        return told

    async def close(self) -> None:
        for consumer in self._consumers:
            await consumer.close()

    def hang_up(self) -> None:
        """Every connection of this process is cut; its consumers come back by themselves."""
        for consumer in self._consumers:
            consumer.lose_seat()

    async def _publish(
        self, name: str, group: Sequence[tuple[Message, float]], timeout_s: float
    ) -> list[PublishOutcome]:
        published_at = time.time()

        def apply(items: Sequence[tuple[Message, float]]) -> list[PublishOutcome]:
            return [self._server.take(message, published_at, delay_s) for message, delay_s in items]

        return await self._link.call(name, group, apply, within_s=timeout_s, unknown=PublishOutcome.UNKNOWN)


class MemoryConsumer:
    """`receive` is for one task at a time. `acks_answer`: an ack waits for the broker and may raise, as with
    a file; otherwise it is sent and forgotten, as with AMQP."""

    def __init__(self, server: BrokerServer, link: Link, prefetch: Mapping[str, int], *, acks_answer: bool) -> None:
        self._server = server
        self._link = link
        self._prefetch = dict(prefetch)
        self._acks_answer = acks_answer
        self._arrived: deque[Delivery] = deque()
        self._woken = asyncio.Event()
        self._seat: Seat | None = None
        self._failures = 0
        self._stopped = False

    async def open(self) -> None:
        """Raises BrokerUnavailable, also for a queue nobody declared."""
        try:
            await self._link.call("broker.consume", NOTHING, self._sit_down)
        except BaseException:
            await self.close()
            raise

    async def receive(self, most: int) -> list[Delivery]:
        while True:
            while self._arrived and not _seat_of(self._arrived[0]).connected:
                self._arrived.popleft()  # it will arrive again
            if self._arrived:
                struck = self._link.strike("consumer.receive")
                if struck is not None and struck.side == "before":
                    self.lose_seat()
                    continue
                taken = [self._arrived.popleft() for _ in range(min(most, len(self._arrived)))]
                if struck is not None and struck.side == "after":
                    self.lose_seat()
                return taken
            self._woken.clear()
            await self._woken.wait()

    async def ack(self, group: Sequence[Delivery]) -> None:
        await self._end("consumer.ack", group, requeue=False)

    async def requeue(self, group: Sequence[Delivery]) -> None:
        await self._end("consumer.requeue", group, requeue=True)

    async def stop(self) -> None:
        self._stopped = True
        if (seat := self._seat) is not None:
            seat.takes_more = False
        unseen = list(self._arrived)
        self._arrived.clear()
        for delivery in reversed(unseen):
            self._give_back(delivery)

    async def close(self) -> None:
        self._stopped = True
        self._arrived.clear()
        self.lose_seat()

    # The server's side ------------------------------------------------------------------------------

    def send(self, seat: Seat, letter: Letter) -> None:
        """A delivery leaves the server."""
        delivery = Delivery(
            queue=letter.queue,
            message_id=letter.message_id,
            body=letter.body,
            headers=letter.headers,
            redelivered=letter.redelivered,
            timestamp=letter.published_at,
            tag=Tag(seat, letter.number),
        )
        self._link.arrive(lambda: self._arrive(delivery))

    def lose_seat(self) -> None:
        """The connection breaks, and the server notices at once. What lives comes back by itself."""
        if (seat := self._seat) is not None:
            self._seat = None
            self._server.cut(seat)
            if not self._stopped:
                self._failures += 1
                self._link.later(backoff_s(self._failures), self._come_back)

    # -------------------------------------------------------------------------------------------------

    def _arrive(self, delivery: Delivery) -> None:
        if self._stopped:
            self._give_back(delivery)
        else:
            self._arrived.append(delivery)
            self._woken.set()

    def _give_back(self, delivery: Delivery) -> None:
        self._server.end(*_tag_of(delivery), requeue=True, untouched=True)

    def _come_back(self) -> None:
        if self._link.reachable:
            self._sit_down(NOTHING)
        elif not self._stopped:
            self._failures += 1
            self._link.later(backoff_s(self._failures), self._come_back)

    def _sit_down(self, _: Sequence[None]) -> list[None]:
        if missing := [name for name in self._prefetch if name not in self._server.queues]:
            raise BrokerUnavailable(f"there is no queue {missing[0]}; declare it before consuming")
        if not self._stopped and self._link.reachable:
            self._seat = Seat(self._prefetch, self)
            self._server.seats.append(self._seat)
            for name in self._prefetch:
                self._server.push(name)
        return [None]

    async def _end(self, name: str, group: Sequence[Delivery], *, requeue: bool) -> None:
        tags = [tag for delivery in group if (tag := _tag_of(delivery)).seat.connected]

        def apply(some: Sequence[Tag]) -> list[None]:
            for tag in some:
                self._server.end(*tag, requeue=requeue)
            return [None] * len(some)

        if not tags:
            return
        if self._acks_answer:
            await self._link.call(name, tags, apply)
        else:
            self._link.send(name, tags, apply, lost=self.lose_seat)


def _tag_of(delivery: Delivery) -> Tag:
    assert isinstance(delivery.tag, Tag)
    return delivery.tag


def _seat_of(delivery: Delivery) -> Seat:
    return _tag_of(delivery).seat

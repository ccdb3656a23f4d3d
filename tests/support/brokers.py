"""A Broker adapter under test: a namespace of its own, everything opened on it, and what to tidy up."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import aio_pika

from codeyard.producer.pika_publisher import PikaPublisher
from codeyard.shared.broker.port import Broker, Consumer, Delivery, Message, Publisher
from codeyard.shared.connect import open_broker
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import DELAY_STEPS_S, Topology
from support.simulation.broker import BrokerServer, MemoryBroker
from support.simulation.wire import DirectLink

T = TypeVar("T")

PATIENCE_S = 15.0  # for what must happen; reached only by a failing test


@dataclass
class Yard:
    """Where one test works. `queue` and `other` are declared by whoever asks for `declared()`."""

    url: str
    topology: Topology = field(default_factory=lambda: Topology(f"test-{uuid.uuid4().hex[:12]}"))
    opened: list[Publisher] = field(default_factory=list)

    @property
    def queue(self) -> str:
        return self.topology.job_queue("weights:1", Lane.INTERACTIVE)

    @property
    def other(self) -> str:
        return self.topology.job_queue("weights:1", Lane.BULK)

    @property
    def is_rabbitmq(self) -> bool:
        return self.url.startswith("amqp")

    def settings(self, *, url: str | None = None, max_length: int = 10_000, timeout_s: float = 10.0) -> BrokerSettings:
        return BrokerSettings(
            url=url or self.url, queue_max_length=max_length, publish_timeout_s=timeout_s, heartbeat_s=2
        )

    @property
    def kind(self) -> str:
        return "rabbitmq" if self.is_rabbitmq else "sqlite"

    async def open(self, settings: BrokerSettings | None = None) -> Broker:
        broker = await self._connect(settings or self.settings())
        self.opened.append(broker)
        return broker

    async def declared(self, settings: BrokerSettings | None = None) -> Broker:
        broker = await self.open(settings)
        await broker.declare([self.queue, self.other])
        return broker

    async def _connect(self, settings: BrokerSettings) -> Broker:
        return await open_broker(settings, self.topology)

    def pika(self, settings: BrokerSettings | None = None) -> PikaPublisher:
        publisher = PikaPublisher(settings or self.settings(), self.topology)
        self.opened.append(publisher)
        return publisher

    async def tidy(self) -> None:
        for publisher in reversed(self.opened):
            await publisher.close()
        if self.is_rabbitmq:
            await self._delete_from_server()

    async def _delete_from_server(self) -> None:
        topology = self.topology
        delays = [topology.delay_queue(step) for step in DELAY_STEPS_S]
        async with await aio_pika.connect(self.url) as connection:
            channel = await connection.channel()
            for queue in (self.queue, self.other, topology.dead_queue, topology.dropped_queue, *delays):
                await channel.queue_delete(queue)
            for exchange in (topology.jobs_exchange, topology.dropped_queue, *delays):
                await channel.exchange_delete(exchange)


class MemoryYard(Yard):
    """The simulation's broker."""

    def __init__(self) -> None:
        super().__init__("memory:")
        self._server = BrokerServer(self.topology)

    @property
    def kind(self) -> str:
        return "memory"

    def settings(self, *, url: str | None = None, max_length: int = 10_000, timeout_s: float = 10.0) -> BrokerSettings:
        return BrokerSettings(queue_max_length=max_length, publish_timeout_s=timeout_s)

    async def _connect(self, settings: BrokerSettings) -> Broker:
        return MemoryBroker(self._server, DirectLink(), max_length=settings.queue_max_length)


def message(queue: str, body: bytes = b"{}", **headers: str | int) -> Message:
    return Message(queue=queue, message_id=str(uuid.uuid4()), body=body, headers={"publication": "p-1", **headers})


def numbered(queue: str, count: int) -> list[Message]:
    return [message(queue, str(number).encode()) for number in range(count)]


async def take(consumer: Consumer, count: int) -> list[Delivery]:
    """Exactly the next `count` deliveries, in order."""
    taken: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(taken) < count:
            taken += await consumer.receive(count - len(taken))
    return taken


async def take_bodies(consumer: Consumer, wanted: Sequence[bytes]) -> list[Delivery]:
    """Deliveries until every wanted body was there, however often each came and in whatever order."""
    missing, taken = set(wanted), list[Delivery]()
    async with asyncio.timeout(PATIENCE_S):
        while missing:
            group = await consumer.receive(100)
            taken += group
            missing -= {delivery.body for delivery in group}
    return taken


async def comes_to(question: Callable[[], Awaitable[T]], answer: T) -> T:
    """Ask again until the answer is `answer`; each question is a round trip. The last answer if it never is."""
    last = await question()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while last != answer:
                last = await question()
    except TimeoutError:
        pass
    return last


@contextlib.contextmanager
def logged(event: str, logger: str) -> Iterator[asyncio.Event]:
    """Set once `event` is logged: a signal of what the code under test has noticed."""
    seen = asyncio.Event()

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == event:
                seen.set()

    watcher = Watcher()
    logging.getLogger(logger).addHandler(watcher)
    try:
        yield seen
    finally:
        logging.getLogger(logger).removeHandler(watcher)

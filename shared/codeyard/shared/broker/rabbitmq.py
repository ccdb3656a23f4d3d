"""The Broker port on RabbitMQ 3.10 and later, through aio-pika.

Three kinds of connections: one to publish on; one to declare and ask on; one for each consumer, which
resumes by itself. They are apart because a broker short of memory or disk stops reading from a
connection that has published: acks and questions must get through then more than ever. What there is on
the server: rabbitmq_topology.py.
Called by: shared.connect. Raises BrokerUnavailable, and SettingsError where a queue exists with other arguments.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Self

from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed
from aiormq.channel import Channel

from codeyard.shared.broker.port import Message, PublishOutcome
from codeyard.shared.broker.rabbitmq_consumer import RabbitConsumer
from codeyard.shared.broker.rabbitmq_link import Link, translated
from codeyard.shared.broker.rabbitmq_publishing import GroupPublisher
from codeyard.shared.broker.rabbitmq_topology import exchanges, queues, to_dead_queue, to_delay, to_its_queue
from codeyard.shared.errors import BrokerUnavailable, SettingsError
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology


class RabbitBroker:
    def __init__(self, settings: BrokerSettings, topology: Topology) -> None:
        self._settings = settings
        self._topology = topology
        self._timeout_s = settings.publish_timeout_s  # of calls that are given none
        self._publishing = Link(settings, purpose="publisher")
        self._publisher = GroupPublisher(self._publishing)
        self._questions = Link(settings, purpose="questions")
        self._asking = asyncio.Lock()
        self._scratch: Channel | None = None  # to ask on: a question about a missing queue ends the channel
        self._consumers: list[RabbitConsumer] = []

    @classmethod
    async def open(cls, settings: BrokerSettings, topology: Topology) -> Self:
        broker = cls(settings, topology)
        try:
            await broker._publishing.connect_within(settings.publish_timeout_s)
        except BaseException:
            await broker.close()
            raise
        return broker

    async def publish(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        outgoing = [to_its_queue(self._topology, message) for message in group]
        return await self._publisher.publish(outgoing, timeout_s=timeout_s)

    async def defer(self, group: Sequence[tuple[Message, float]], *, timeout_s: float) -> list[PublishOutcome]:
        outgoing = [to_delay(self._topology, message, delay_s) for message, delay_s in group]
        return await self._publisher.publish(outgoing, timeout_s=timeout_s)

    async def dead_letter(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        outgoing = [to_dead_queue(self._topology, message) for message in group]
        return await self._publisher.publish(outgoing, timeout_s=timeout_s)

    async def declare(self, queues: Sequence[str]) -> None:
        async with self._bounded("cannot declare queues"):
            channel = await self._questions.channel()
            try:
                await self._declare_on(channel, queues)
            finally:
                await channel.close(timeout=self._timeout_s)

    async def consume(self, prefetch: Mapping[str, int]) -> RabbitConsumer:
        consumer = RabbitConsumer(
            Link(self._settings, purpose="consumer"),
            prefetch,
            timeout_s=self._timeout_s,
            dropped_queue=self._topology.dropped_queue,
            declare=self._declare_on,
        )
        await consumer.start()
        self._consumers.append(consumer)
        return consumer

    async def depth(self, queues: Sequence[str]) -> list[int]:
        async with self._bounded("cannot ask for the depth"), self._asking:
            return [await self._ready_messages(queue) for queue in queues]

    async def ping(self) -> str:
        async with self._bounded("no answer to a ping"), self._asking:
            wire = await self._questions.connect()
            channel = await self._scratch_channel()
            await channel.exchange_declare("amq.direct", exchange_type="direct", passive=True)  # every server has it
            return f"rabbitmq {_text(wire.server_properties.get('version') if wire.server_properties else None)}"

    async def close(self) -> None:
        for consumer in self._consumers:
            await consumer.close()
        await self._publishing.close()
        await self._questions.close()

    @asynccontextmanager
    async def _bounded(self, doing: str) -> AsyncIterator[None]:
        with translated(doing):
            async with asyncio.timeout(self._timeout_s):
                yield

    async def _declare_on(self, channel: Channel, names: Sequence[str]) -> None:
        try:
            with translated("cannot declare queues"):
                for exchange in exchanges(self._topology):
                    await channel.exchange_declare(exchange.name, exchange_type=exchange.kind, durable=True)
                for queue in queues(self._topology, names, max_length=self._settings.queue_max_length):
                    await channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
                    if queue.exchange is not None:
                        await channel.queue_bind(queue.name, queue.exchange, routing_key=queue.name)
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, ChannelPreconditionFailed):
                raise SettingsError(
                    f"a queue exists with other arguments ({error.__cause__}). CODEYARD_BROKER_QUEUE_MAX_LENGTH must "
                    "be the same everywhere; to change it, drain and delete the fleet's queues first"
                ) from error
            raise

    async def _ready_messages(self, queue: str) -> int:
        channel = await self._scratch_channel()
        try:
            answer = await channel.queue_declare(queue, passive=True)
        except ChannelNotFoundEntity:
            return 0
        return answer.message_count or 0

    async def _scratch_channel(self) -> Channel:
        if self._scratch is None or self._scratch.is_closed:
            self._scratch = await self._questions.channel()
        return self._scratch


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

"""Questions to a RabbitMQ that the Broker port has no use for: can it do what we need, and what is there already?

Leaves nothing behind: its one queue is deleted at the end, and by the server a minute later if we die before.
Called by: `codeyard doctor`. Raises BrokerUnavailable as the port does; what an answer means is for the caller.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Self

from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed
from aiormq.abc import AbstractConnection as Wire
from aiormq.exceptions import ChannelClosed
from pamqp.commands import Basic

from codeyard.shared.broker.rabbitmq_alarm import is_blocked
from codeyard.shared.broker.rabbitmq_link import Link, describe, translated
from codeyard.shared.broker.rabbitmq_topology import PERSISTENT, Exchange, Queue
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.settings import BrokerSettings

EXPIRES_MS = 60_000  # the trial queue goes by itself if we cannot delete it
BLOCKED_S = 0.2  # for the server's word that it has blocked us, which comes right after a publish


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a quorum queue and two messages to it. `refused` is the server's reason."""

    refused: str = ""
    blocked: bool = False  # an alarm of memory or disk: the server has stopped reading from publishers
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """A queue or exchange as it is there. `differs` is the server's reason why it is not the one we want."""

    name: str
    there: bool = False
    ready: int = 0  # messages
    consumers: int = 0
    differs: str = ""


class RabbitProbe:
    """Made by `open`. Every answer is waited for at most `timeout_s`."""

    def __init__(self, settings: BrokerSettings, wire: Wire, asking: Link, *, timeout_s: float) -> None:
        self._settings = settings
        self._asking = asking
        self._timeout_s = timeout_s
        properties = wire.server_properties or {}
        self.version = _text(properties.get("version"))
        self.product = _text(properties.get("product"))

    @classmethod
    async def open(cls, settings: BrokerSettings, *, timeout_s: float) -> Self:
        """Raises BrokerUnavailable."""
        asking = Link(settings, purpose="doctor")
        try:
            wire = await asking.connect_within(timeout_s)
        except BaseException:
            await asking.close()
            raise
        return cls(settings, wire, asking, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._asking.close()

    async def try_queue(self, name: str) -> Trial:
        """Make a quorum queue, have two messages confirmed in it, delete it.

        The second message is what an alarm shows by: the server takes the first and stops reading then.
        """
        try:
            await self._declare(Queue(name, {"x-queue-type": "quorum", "x-expires": EXPIRES_MS}))
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, ChannelClosed):
                return Trial(refused=describe(error.__cause__))
            raise
        publishing = Link(self._settings, purpose="doctor publishes")  # blocked, it must not keep us from deleting
        try:
            wire = await publishing.connect_within(self._timeout_s)
            return await self._publish(publishing, wire, name)
        finally:
            await publishing.close()
            with contextlib.suppress(BrokerUnavailable):
                await self._delete(name)

    async def look_at_queue(self, queue: Queue) -> Seen:
        """Is it there, and is it ours? One that is not there is not made."""
        try:
            with translated(f"cannot look at {queue.name}"):
                async with asyncio.timeout(self._timeout_s):
                    channel = await self._asking.channel()
                    answer = await channel.queue_declare(queue.name, passive=True)
                    await channel.close()
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity):
                return Seen(queue.name)
            raise
        ready, consumers = (answer.message_count or 0, answer.consumer_count or 0) if answer else (0, 0)
        try:
            await self._declare(queue)
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, ChannelPreconditionFailed):
                return Seen(queue.name, True, ready, consumers, describe(error.__cause__))
            raise
        return Seen(queue.name, True, ready, consumers)

    async def look_at_exchange(self, exchange: Exchange) -> Seen:
        """A passive declare does not compare, and an active one would make it: so one after the other."""
        try:
            await self._declare_exchange(exchange, passive=True)
            await self._declare_exchange(exchange, passive=False)
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity):
                return Seen(exchange.name)
            if isinstance(error.__cause__, ChannelPreconditionFailed):
                return Seen(exchange.name, True, differs=describe(error.__cause__))
            raise
        return Seen(exchange.name, True)

    async def _publish(self, link: Link, wire: Wire, queue: str) -> Trial:
        properties = Basic.Properties(delivery_mode=PERSISTENT)
        try:
            with translated("cannot publish"):
                async with asyncio.timeout(self._timeout_s):
                    channel = await link.channel()
                    for _ in range(2):
                        await channel.basic_publish(b"", routing_key=queue, properties=properties, mandatory=True)
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, TimeoutError):
                return Trial(blocked=await is_blocked(wire, within_s=BLOCKED_S))
            raise
        return Trial(confirmed=True)

    async def _declare(self, queue: Queue) -> None:
        with translated(f"cannot declare {queue.name}"):
            async with asyncio.timeout(self._timeout_s):
                channel = await self._asking.channel()
                await channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
                await channel.close()

    async def _declare_exchange(self, exchange: Exchange, *, passive: bool) -> None:
        with translated(f"cannot look at {exchange.name}"):
            async with asyncio.timeout(self._timeout_s):
                channel = await self._asking.channel()
                await channel.exchange_declare(
                    exchange.name, exchange_type=exchange.kind, durable=True, passive=passive
                )
                await channel.close()

    async def _delete(self, name: str) -> None:
        with translated(f"cannot delete {name}"):
            async with asyncio.timeout(self._timeout_s):
                channel = await self._asking.channel()
                await channel.queue_delete(name)
                await channel.close()


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")

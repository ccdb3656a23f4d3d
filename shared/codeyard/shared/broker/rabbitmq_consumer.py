"""Deliveries of several RabbitMQ queues: one connection, one channel per queue.

Promise: a delivery is given out at most once per arrival; after any loss (connection, channel, queue
deleted, cancelled by the server) the queue is consumed again, and what was unacked arrives again.
Owns: its connection, one task per queue that keeps the subscription, and the arrivals not yet given out,
which the prefetch bounds.
Called by: shared.broker.rabbitmq.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from aio_pika.exceptions import ChannelNotFoundEntity
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.base import Frame

from codeyard.shared.broker.backoff import LONGEST_S, backoff_s
from codeyard.shared.broker.port import Delivery
from codeyard.shared.broker.rabbitmq_link import CLOSE_TIMEOUT_S, Link, translated
from codeyard.shared.broker.rabbitmq_topology import delivered_headers
from codeyard.shared.errors import BrokerUnavailable

log = logging.getLogger(__name__)

Declare = Callable[[Channel, Sequence[str]], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Subscription:
    """One queue on one channel. Delivery numbers count from 1 on each channel and mean nothing on another."""

    queue: str
    channel: Channel
    tag: str
    unacked: set[int] = field(default_factory=set)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)  # by the server

    @property
    def alive(self) -> bool:
        return not self.channel.is_closed


class _Tag(NamedTuple):
    subscription: _Subscription
    number: int


class _Step(NamedTuple):
    """One ack or nack on the wire: number `last`, with `multiple` all unacked ones up to it."""

    last: int
    multiple: bool
    covers: frozenset[int]


class RabbitConsumer:
    def __init__(
        self, link: Link, prefetch: Mapping[str, int], *, timeout_s: float, dropped_queue: str, declare: Declare
    ) -> None:
        self._link = link
        self._prefetch = dict(prefetch)
        self._timeout_s = timeout_s  # for one subscription, and for handing acks to the connection
        self._dropped_queue = dropped_queue
        self._declare = declare
        self._ready: deque[Delivery] = deque()
        self._changed = asyncio.Event()  # something arrived, or the supervisor ended
        self._subscriptions: dict[str, _Subscription] = {}
        self._supervisor: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Return once every queue is consumed. Raises BrokerUnavailable if that takes too long."""
        waiting = set(self._prefetch)
        subscribed = asyncio.Event()

        def on_subscribed(queue: str) -> None:
            waiting.discard(queue)
            if not waiting:
                subscribed.set()

        self._supervisor = asyncio.create_task(self._consume_all(on_subscribed), name="rabbitmq-consumer")
        self._supervisor.add_done_callback(lambda _: self._changed.set())
        try:
            async with asyncio.timeout(self._timeout_s):
                await subscribed.wait()
        except TimeoutError:
            await self.close()
            raise BrokerUnavailable(f"not consuming {', '.join(sorted(waiting))} after {self._timeout_s:g} s") from None
        except BaseException:
            await self.close()
            raise

    async def receive(self, most: int) -> list[Delivery]:
        """See Consumer.receive. Once stopped there is nothing to come, and it waits until it is cancelled."""
        while True:
            while self._ready and not self._ready[0].tag.subscription.alive:  # type: ignore[attr-defined]  # our own tag
                self._ready.popleft()  # it will arrive again
            if self._ready:
                return self._take(most)
            self._changed.clear()
            if self._supervisor is not None and self._supervisor.done() and not self._stopped:
                self._supervisor.result()  # only a mistake in here ends it: show it
            await self._changed.wait()

    async def ack(self, group: Sequence[Delivery]) -> None:
        for subscription, steps in self._plan(group):
            await self._send(subscription, steps, requeue=False)

    async def requeue(self, group: Sequence[Delivery]) -> None:
        for subscription, steps in self._plan(group):
            await self._send(subscription, steps, requeue=True)

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        await self._end_supervision()
        for subscription in self._subscriptions.values():
            if subscription.alive:
                try:
                    with translated(f"cannot stop consuming {subscription.queue}"):
                        # What is under way arrives before the server's answer, and goes back below.
                        await subscription.channel.basic_cancel(subscription.tag, timeout=self._timeout_s)
                except BrokerUnavailable as error:
                    log.warning("cancel_unanswered", extra={"queue": subscription.queue, "trouble": str(error)})
        left, self._ready = list(self._ready), deque()
        await self.requeue(left)

    async def close(self) -> None:
        self._stopped = True
        await self._end_supervision()
        self._ready.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for subscription in self._subscriptions.values():
                    if subscription.alive:
                        # Queued behind the last acks; closing the connection at once would throw those away.
                        await self._hang_up(subscription.channel)
        await self._link.close()

    # Subscriptions --------------------------------------------------------------------------------------

    async def _consume_all(self, on_subscribed: Callable[[str], None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for queue in self._prefetch:
                tasks.create_task(self._keep_consuming(queue, on_subscribed), name=f"consume {queue}")

    async def _keep_consuming(self, queue: str, on_subscribed: Callable[[str], None]) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                async with asyncio.timeout(self._timeout_s):
                    subscription = await self._subscribe(queue)
            except (BrokerUnavailable, TimeoutError) as error:
                log.warning("not_consuming", extra={"queue": queue, "trouble": str(error) or "timed out"})
            else:
                on_subscribed(queue)
                await self._until_lost(subscription)
                log.warning("consumer_lost", extra={"queue": queue})
            failures = failures + 1 if loop.time() - began_s < 2 * LONGEST_S else 1
            await asyncio.sleep(backoff_s(failures))

    async def _subscribe(self, queue: str) -> _Subscription:
        try:
            return await self._consume(queue)
        except BrokerUnavailable as error:
            if not isinstance(error.__cause__, ChannelNotFoundEntity):
                raise
        # Deleted by someone. Producers would be told UNROUTABLE for ever, so it is made again.
        log.warning("queue_missing", extra={"queue": queue})
        channel = await self._link.channel()
        try:
            await self._declare(channel, [queue])
        finally:
            await self._hang_up(channel)
        return await self._consume(queue)

    async def _consume(self, queue: str) -> _Subscription:
        channel = await self._link.channel()
        subscription = _Subscription(queue, channel, tag=f"codeyard-{uuid.uuid4().hex}")

        async def on_delivery(message: DeliveredMessage) -> None:
            self._arrived(subscription, message)

        def on_cancel(frame: Frame) -> None:
            subscription.cancelled.set()

        channel.on_consumer_cancel_callbacks.add(on_cancel)
        self._subscriptions[queue] = subscription
        with translated(f"cannot consume {queue}"):
            # Per consumer; quorum queues refuse a prefetch for the whole channel.
            await channel.basic_qos(prefetch_count=self._prefetch[queue])
            await channel.basic_consume(queue, on_delivery, consumer_tag=subscription.tag)
        return subscription

    async def _until_lost(self, subscription: _Subscription) -> None:
        closing = subscription.channel.closing
        cancelled = asyncio.create_task(subscription.cancelled.wait())
        try:
            await asyncio.wait([closing, cancelled], return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
            cancelled.cancel()
        await self._hang_up(subscription.channel)

    async def _hang_up(self, channel: Channel) -> None:
        try:
            with translated("closing a channel"):
                await channel.close(timeout=self._timeout_s)
        except BrokerUnavailable as error:
            log.debug("close_unanswered", extra={"trouble": str(error)})

    async def _end_supervision(self) -> None:
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        await asyncio.wait([self._supervisor])

    # Deliveries -----------------------------------------------------------------------------------------

    def _arrived(self, subscription: _Subscription, message: DeliveredMessage) -> None:
        number = message.delivery_tag
        if number is None:
            return
        subscription.unacked.add(number)
        properties = message.header.properties
        dropped = subscription.queue == self._dropped_queue
        self._ready.append(
            Delivery(
                queue=subscription.queue,
                message_id=properties.message_id or "",
                body=message.body,
                headers=delivered_headers(properties.headers or {}, dropped=dropped),
                redelivered=bool(message.redelivered),
                timestamp=_seconds(properties.timestamp),
                tag=_Tag(subscription, number),
            )
        )
        self._changed.set()

    def _take(self, most: int) -> list[Delivery]:
        taken: list[Delivery] = []
        while self._ready and len(taken) < most:
            delivery = self._ready.popleft()
            if delivery.tag.subscription.alive:  # type: ignore[attr-defined]  # our own tag
                taken.append(delivery)
        return taken

    def _plan(self, group: Iterable[Delivery]) -> list[tuple[_Subscription, list[_Step]]]:
        """What to send on which channel. Left out: channels gone, and deliveries ended before, since the
        server closes the channel over a number it does not know."""
        numbers: dict[_Subscription, set[int]] = {}
        for delivery in group:
            tag = delivery.tag
            if isinstance(tag, _Tag) and tag.subscription.alive and tag.number in tag.subscription.unacked:
                numbers.setdefault(tag.subscription, set()).add(tag.number)
        return [(subscription, _steps(subscription.unacked, ending)) for subscription, ending in numbers.items()]

    async def _send(self, subscription: _Subscription, steps: Sequence[_Step], *, requeue: bool) -> None:
        channel = subscription.channel
        for step in steps:
            if not subscription.alive or not step.covers <= subscription.unacked:
                continue  # lost, or ended by a concurrent call, since it was planned
            subscription.unacked -= step.covers
            try:
                with translated("cannot settle a delivery"):
                    async with asyncio.timeout(self._timeout_s):
                        if requeue:
                            await channel.basic_nack(step.last, multiple=step.multiple, requeue=True, wait=False)
                        else:
                            await channel.basic_ack(step.last, multiple=step.multiple, wait=False)
            except BaseException as error:
                subscription.unacked |= step.covers  # the frame was not handed over
                if isinstance(error, BrokerUnavailable) and not subscription.alive:
                    return
                raise


def _steps(unacked: set[int], ending: set[int]) -> list[_Step]:
    """`multiple` ends every unacked number up to the one it names, also one that has arrived and was not
    given out. So it is used for as long as the lowest unacked ones are all in `ending`, and no further."""
    lowest: list[int] = []
    for number in sorted(unacked):
        if number not in ending:
            break
        lowest.append(number)
    single = [_Step(number, multiple=False, covers=frozenset([number])) for number in sorted(ending.difference(lowest))]
    if not lowest:
        return single
    return [_Step(lowest[-1], multiple=len(lowest) > 1, covers=frozenset(lowest)), *single]


def _seconds(timestamp: datetime | None) -> float | None:
    return timestamp.timestamp() if timestamp is not None else None

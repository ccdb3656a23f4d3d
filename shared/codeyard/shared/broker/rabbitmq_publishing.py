"""Groups of messages to RabbitMQ, one outcome each.

Promise: a whole group is on its way before the first confirm is awaited, and no call outlives its
timeout. Owns the channel it publishes on. Nothing is sent while the server has blocked publishers: that waits, within
the same timeout. FULL is said of a queue only by a channel that can know it. Called by: shared.broker.rabbitmq.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from aio_pika.exceptions import ChannelNotFoundEntity, DeliveryError, PublishError
from aiormq.abc import AbstractConnection as Wire
from aiormq.channel import Channel
from pamqp.commands import Basic

from codeyard.shared.broker.port import PublishOutcome
from codeyard.shared.broker.rabbitmq_alarm import BLOCKED, is_blocked, unblocked
from codeyard.shared.broker.rabbitmq_link import (
    CLOSE_TIMEOUT_S,
    LIBRARY_ERRORS,
    Link,
    cancelled_from_outside,
    translated,
)
from codeyard.shared.broker.rabbitmq_refusals import SETTLE_S, Proven
from codeyard.shared.broker.rabbitmq_topology import CONTENT_TYPE, MESSAGE_TYPE, PERSISTENT, Outgoing, now
from codeyard.shared.errors import BrokerUnavailable

log = logging.getLogger(__name__)

WINDOW = 1_024  # messages of one group sent before their confirms are awaited: bounds tasks and memory
DRAIN_OVER_BYTES = 65_536  # larger bodies wait for the socket, or a slow link would pile them up in memory


@dataclass(slots=True, eq=False)
class _Opened:
    """The channel, and what it is known for. Given up, it is closed when the last window on it has ended."""

    channel: Channel
    proven: Proven = field(default_factory=Proven)
    num_windows: int = 0  # under way
    given_up: bool = False


class GroupPublisher:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._opening = asyncio.Lock()
        self._wire: Wire | None = None  # the connection of the channel
        self._opened: _Opened | None = None
        self._in_flight: dict[str, asyncio.Future[None]] = {}  # by message id; see _after_its_twin

    async def publish(self, group: Sequence[Outgoing], *, timeout_s: float) -> list[PublishOutcome]:
        """See Publisher.publish. Messages to one queue arrive there in the group's order."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        outcomes: list[PublishOutcome] = []
        for start in range(0, len(group), WINDOW):
            window = group[start : start + WINDOW]
            try:
                outcomes += await self._publish_window(window, deadline)
            except BrokerUnavailable:
                if start == 0:
                    raise  # nothing was sent
                return outcomes + [PublishOutcome.UNKNOWN] * (len(group) - start)
        if outcomes and all(outcome is PublishOutcome.UNKNOWN for outcome in outcomes) and await self._is_blocked():
            raise BrokerUnavailable(BLOCKED)  # the same to the caller, and says why
        return outcomes

    async def _open_channel(self, deadline: float) -> _Opened:
        try:
            async with asyncio.timeout_at(deadline), self._opening:
                while True:
                    self._wire = await self._link.connect()
                    if self._opened is None or self._opened.given_up or self._opened.channel.is_closed:
                        self._opened = _Opened(await self._link.channel())
                    await unblocked(self._wire)
                    if not self._opened.channel.is_closed:
                        return self._opened
        except TimeoutError:
            pass
        raise BrokerUnavailable(BLOCKED) if await self._is_blocked() else self._link.unreachable()

    async def _is_blocked(self) -> bool:
        return self._wire is not None and not self._wire.is_closed and await is_blocked(self._wire)

    async def _publish_window(self, window: Sequence[Outgoing], deadline: float) -> list[PublishOutcome]:
        """Raises BrokerUnavailable if nothing was sent."""
        opened = await self._open_channel(deadline)
        outcomes = await self._publish_on(opened, window, deadline)
        if doubtful := opened.proven.doubtful(window, outcomes):
            await self._give_up(opened)
            loop = asyncio.get_running_loop()
            await asyncio.sleep(min(SETTLE_S, (deadline - loop.time()) / 2))
            again = [PublishOutcome.UNKNOWN] * len(doubtful)
            with contextlib.suppress(BrokerUnavailable):
                opened = await self._open_channel(deadline)
                again = await self._publish_on(opened, [window[index] for index in doubtful], deadline)
                opened.proven.doubtful([window[index] for index in doubtful], again)
            for index, outcome in zip(doubtful, again, strict=True):
                outcomes[index] = outcome
        return outcomes

    async def _publish_on(self, opened: _Opened, window: Sequence[Outgoing], deadline: float) -> list[PublishOutcome]:
        # Tasks start in the order they are made and queue for the channel's lock, which keeps the group's order.
        opened.num_windows += 1
        tasks = [asyncio.create_task(self._publish_one(opened.channel, item)) for item in window]
        try:
            await asyncio.wait(tasks, timeout=deadline - asyncio.get_running_loop().time())
        finally:
            opened.num_windows -= 1
            late = [task for task in tasks if task.cancel()]
            if late:
                await asyncio.gather(*late, return_exceptions=True)
        return [PublishOutcome.UNKNOWN if task.cancelled() else task.result() for task in tasks]

    async def _give_up(self, opened: _Opened) -> None:
        opened.given_up = True
        if opened.num_windows:
            return  # it ends with the connection, or with another window that doubts it
        try:
            with translated("closing a channel"):
                await opened.channel.close(timeout=CLOSE_TIMEOUT_S)
        except BrokerUnavailable as error:
            log.debug("close_unanswered", extra={"trouble": str(error)})

    async def _publish_one(self, channel: Channel, item: Outgoing) -> PublishOutcome:
        message = item.message
        settled = await self._after_its_twin(message.message_id)
        try:
            await channel.basic_publish(
                message.body,
                exchange=item.exchange,
                routing_key=item.routing_key,
                properties=Basic.Properties(
                    content_type=CONTENT_TYPE,
                    delivery_mode=PERSISTENT,
                    message_id=message.message_id,
                    message_type=MESSAGE_TYPE,
                    timestamp=now(),
                    headers=dict(item.headers),
                ),
                mandatory=True,
                wait=len(message.body) > DRAIN_OVER_BYTES,
            )
        except PublishError:
            return PublishOutcome.UNROUTABLE
        except DeliveryError:
            return PublishOutcome.FULL  # or so it seems, see rabbitmq_refusals
        except ChannelNotFoundEntity as error:
            # No exchange: nobody ever declared this fleet. The server closes the channel over it, so others
            # that were under way on it are unknown.
            missing = f"no exchange '{item.exchange}'" in str(error)
            return PublishOutcome.UNROUTABLE if missing else PublishOutcome.UNKNOWN
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            return PublishOutcome.UNKNOWN
        except LIBRARY_ERRORS:
            return PublishOutcome.UNKNOWN
        else:
            return PublishOutcome.CONFIRMED
        finally:
            settled.set_result(None)
            if self._in_flight.get(message.message_id) is settled:
                del self._in_flight[message.message_id]

    async def _after_its_twin(self, message_id: str) -> "asyncio.Future[None]":
        """Wait until no other message with this id is under way; resolve what is returned when this one is not.

        aiormq finds the publish that a returned message belongs to by its message id. With two of one id
        under way it would mix them up and report an unroutable message as confirmed.
        """
        while (twin := self._in_flight.get(message_id)) is not None:
            await asyncio.wait([twin])
        settled = self._in_flight[message_id] = asyncio.get_running_loop().create_future()
        return settled

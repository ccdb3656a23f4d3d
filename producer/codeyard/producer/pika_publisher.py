"""The Publisher port on pika, for the blocking client.

Lives on the client's background event loop, where heartbeats go on whatever the caller's thread does;
everything here runs on that loop. Connects at the first publish and again after a loss, within the
timeout of the publish that needs it. A group is sent in one go and its confirms are counted by
callbacks, without a task or a future per message. Called by: producer.client. For the same promises on
aio-pika see shared.broker.rabbitmq_publishing.
"""

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit, urlunsplit

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.exceptions import (
    AMQPChannelError,
    AMQPConnectionError,
    AMQPError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from codeyard.shared.broker.port import Message, PublishOutcome
from codeyard.shared.broker.rabbitmq_alarm import BLOCKED
from codeyard.shared.broker.rabbitmq_nodes import Turns, node_of
from codeyard.shared.broker.rabbitmq_refusals import SETTLE_S, Proven
from codeyard.shared.broker.rabbitmq_topology import (
    CONTENT_TYPE,
    MESSAGE_TYPE,
    PERSISTENT,
    Outgoing,
    now,
    to_its_queue,
)
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.settings import BrokerSettings, masked
from codeyard.shared.topology import Topology

log = logging.getLogger(__name__)
# Pika reports each failed try seven times at ERROR, in the log of the service we are a guest in; we say it once.
logging.getLogger("pika.adapters").setLevel(logging.CRITICAL)

WINDOW = 1_024  # messages of one group sent before their confirms are awaited: bounds what waits for the socket
CLOSE_TIMEOUT_S = 3.0
NOT_FOUND = 404


class PikaPublisher:
    def __init__(self, settings: BrokerSettings, topology: Topology) -> None:
        self._settings = settings
        self._topology = topology
        self._turns = Turns(settings.url)
        self._url = settings.url  # of the node last tried
        self._opening = asyncio.Lock()
        self._connection: _Connection | None = None
        self._channel: _ConfirmingChannel | None = None
        self._trouble = "no answer"
        self._closed = False

    async def publish(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        """See Publisher.publish. Messages to one queue arrive there in the group's order."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        outcomes: list[PublishOutcome] = []
        for start in range(0, len(group), WINDOW):
            window = [to_its_queue(self._topology, message) for message in group[start : start + WINDOW]]
            try:
                outcomes += await self._publish_window(window, deadline)
            except BrokerUnavailable:
                if start == 0:
                    raise  # nothing was sent
                return outcomes + [PublishOutcome.UNKNOWN] * (len(group) - start)
        if outcomes and self._is_blocked and all(outcome is PublishOutcome.UNKNOWN for outcome in outcomes):
            raise BrokerUnavailable(BLOCKED)  # the same to the caller, and says why
        return outcomes

    async def close(self) -> None:
        """Hang up, bounded. Publishes under way end as unknown."""
        self._closed = True
        async with self._opening:
            await self._forget()

    async def _publish_window(self, window: Sequence[Outgoing], deadline: float) -> list[PublishOutcome]:
        """Raises BrokerUnavailable if nothing was sent."""
        channel = await self._open_channel(deadline)
        outcomes = await channel.publish(window, deadline)
        if doubtful := channel.proven.doubtful(window, outcomes):
            if self._channel is channel:
                self._channel = None
            channel.give_up()
            await asyncio.sleep(min(SETTLE_S, (deadline - asyncio.get_running_loop().time()) / 2))
            again = [PublishOutcome.UNKNOWN] * len(doubtful)
            with contextlib.suppress(BrokerUnavailable):
                channel = await self._open_channel(deadline)
                again = await channel.publish([window[index] for index in doubtful], deadline)
                channel.proven.doubtful([window[index] for index in doubtful], again)
            for index, outcome in zip(doubtful, again, strict=True):
                outcomes[index] = outcome
        return outcomes

    async def _open_channel(self, deadline: float) -> "_ConfirmingChannel":
        try:
            async with asyncio.timeout_at(deadline), self._opening:
                while True:
                    if self._closed:
                        raise BrokerUnavailable("this client was closed")
                    if self._channel is None or self._connection is None or not self._channel.is_open:
                        await self._try_once()
                        continue
                    await self._connection.flowing.wait()
                    if self._channel.is_open:
                        return self._channel
        except TimeoutError:
            if self._is_blocked:
                raise BrokerUnavailable(BLOCKED) from None
            where = masked(self._settings.url)
            raise BrokerUnavailable(f"no connection to {where} in time ({self._trouble})") from None

    async def _try_once(self) -> None:
        if wait_s := self._turns.wait_s:
            await asyncio.sleep(wait_s)
        try:
            async with asyncio.timeout(self._turns.patience_s):
                if self._connection is None or not self._connection.is_open:
                    await self._forget()
                    self._url = self._turns.next()
                    self._connection = await _Connection.open(_parameters(self._url, self._settings))
                self._channel = await _ConfirmingChannel.open(self._connection)
        except (AMQPError, OSError) as error:
            tries = self._turns.failed()
            refused = isinstance(error, ProbableAuthenticationError | ProbableAccessDeniedError)
            if refused and self._turns.all_failed:
                raise BrokerUnavailable(f"{masked(self._url)} refused us: {_describe(error)}") from error
            if isinstance(error, TimeoutError):
                await self._forget()  # a node that is open and silent must not be asked again
            self._trouble = _describe(error)
            told = {"node": node_of(self._url), "tries": tries, "trouble": self._trouble}
            log.warning("broker_unreachable", extra=told)
        else:
            self._turns.succeeded()
            self._trouble = "no answer"

    @property
    def _is_blocked(self) -> bool:
        return self._connection is not None and not self._connection.flowing.is_set()

    async def _forget(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            await connection.close()


class _Connection:
    """A pika connection whose callbacks have become futures."""

    def __init__(self, parameters: pika.ConnectionParameters) -> None:
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self.flowing = asyncio.Event()  # not while the server has blocked publishers
        self.flowing.set()
        self.raw = AsyncioConnection(
            parameters,
            on_open_callback=lambda _: _resolve(self._opened),
            on_open_error_callback=lambda _, error: self._failed(error),
            on_close_callback=lambda _, error: self._ended(),
            custom_ioloop=loop,
        )
        self.raw.add_on_connection_blocked_callback(lambda _, method: self.flowing.clear())
        self.raw.add_on_connection_unblocked_callback(lambda _, method: self.flowing.set())

    @classmethod
    async def open(cls, parameters: pika.ConnectionParameters) -> Self:
        """Cancel to give up; then nothing is left behind."""
        connection = cls(parameters)
        try:
            await connection._opened
        except asyncio.CancelledError:
            if not (connection.raw.is_closed or connection.raw.is_closing):
                connection.raw.close()
            raise
        return connection

    @property
    def is_open(self) -> bool:
        return bool(self.raw.is_open)

    async def close(self) -> None:
        if self.raw.is_open:
            self.raw.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.shield(self._closed)
        except TimeoutError:
            # Pika has no public way to drop a connection whose peer does not answer the goodbye.
            self.raw._terminate_stream(None)

    def _ended(self) -> None:
        _resolve(self._closed)
        self.flowing.set()  # whoever waits finds that it is closed

    def _failed(self, error: BaseException) -> None:
        self._ended()
        if not self._opened.done():
            self._opened.set_exception(error)


@dataclass(slots=True)
class _Group:
    """The outcomes of one window, filled in by callbacks; `settled` when none is open any more."""

    outcomes: list[PublishOutcome]
    settled: asyncio.Future[None]
    num_open: int


@dataclass(slots=True)
class _Pending:
    """One message under way: the item of its group it stands for."""

    group: _Group
    index: int
    exchange: str
    message_id: str
    returned: bool = False

    def end(self, outcome: PublishOutcome) -> None:
        self.group.outcomes[self.index] = outcome
        self.group.num_open -= 1
        if self.group.num_open == 0:
            _resolve(self.group.settled)


class _ConfirmingChannel:
    """One channel in confirm mode. The server numbers what is published on it from 1, and so do we."""

    def __init__(self) -> None:
        self._raw: Any = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._published = 0
        self._pending: dict[int, _Pending] = {}  # by number, in publishing order
        self._numbers: dict[str, deque[int]] = {}  # by message id, in publishing order
        self._given_up = False
        self.proven = Proven()

    @classmethod
    async def open(cls, connection: _Connection) -> Self:
        channel = cls()
        channel._raw = connection.raw.channel(on_open_callback=channel._on_open)
        channel._raw.add_on_close_callback(channel._on_close)
        await channel._opened
        return channel

    @property
    def is_open(self) -> bool:
        return self._raw is not None and bool(self._raw.is_open)

    def give_up(self) -> None:
        """Close it once nothing is under way on it any more."""
        self._given_up = True
        if not self._pending and self.is_open:
            self._raw.close()

    async def publish(self, window: Sequence[Outgoing], deadline: float) -> list[PublishOutcome]:
        loop = asyncio.get_running_loop()
        group = _Group([PublishOutcome.UNKNOWN] * len(window), loop.create_future(), len(window))
        for index, item in enumerate(window):
            pending = _Pending(group, index, item.exchange, item.message.message_id)
            try:
                self._send(item)
            except (AMQPChannelError, AMQPConnectionError, OSError):  # closed meanwhile
                pending.end(PublishOutcome.UNKNOWN)
                continue
            self._published += 1
            self._pending[self._published] = pending
            self._numbers.setdefault(pending.message_id, deque()).append(self._published)
        try:
            async with asyncio.timeout_at(deadline):
                await group.settled
        except TimeoutError:
            pass  # what has no answer is UNKNOWN; a late answer finds its number and changes a list nobody reads
        return list(group.outcomes)

    def _send(self, item: Outgoing) -> None:
        message = item.message
        self._raw.basic_publish(
            item.exchange,
            item.routing_key,
            message.body,
            pika.BasicProperties(
                content_type=CONTENT_TYPE,
                delivery_mode=PERSISTENT,
                message_id=message.message_id,
                type=MESSAGE_TYPE,
                timestamp=int(now().timestamp()),
                headers=dict(item.headers),
            ),
            mandatory=True,
        )

    # What the server says, in the order it says it -------------------------------------------------------

    def _on_open(self, raw: Any) -> None:
        raw.add_on_return_callback(self._on_return)
        raw.confirm_delivery(self._on_confirm, callback=lambda _: _resolve(self._opened))

    def _on_return(self, raw: Any, method: Any, properties: Any, body: bytes) -> None:
        """Unroutable; its ack follows. A return has no number: among equal ids it is the oldest not yet returned."""
        for number in self._numbers.get(properties.message_id, ()):
            pending = self._pending[number]
            if not pending.returned:
                pending.returned = True
                return

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        acked = isinstance(method, pika.spec.Basic.Ack)
        if method.multiple:
            numbers = []
            for number in self._pending:
                if number > method.delivery_tag:
                    break
                numbers.append(number)
        else:
            numbers = [method.delivery_tag] if method.delivery_tag in self._pending else []
        for number in numbers:
            pending = self._take(number)
            if pending.returned:
                pending.end(PublishOutcome.UNROUTABLE)
            else:
                # A quorum queue refuses for nothing else than its length; but see rabbitmq_refusals.
                pending.end(PublishOutcome.CONFIRMED if acked else PublishOutcome.FULL)

    def _on_close(self, raw: Any, reason: Any) -> None:
        """Closed by the server, or with the connection. A missing exchange means nobody ever declared this fleet."""
        if not self._opened.done():
            self._opened.set_exception(reason)
        text = str(reason) if getattr(reason, "reply_code", None) == NOT_FOUND else ""
        for number in list(self._pending):
            pending = self._take(number)
            missing = f"no exchange '{pending.exchange}'" in text
            pending.end(PublishOutcome.UNROUTABLE if missing or pending.returned else PublishOutcome.UNKNOWN)

    def _take(self, number: int) -> _Pending:
        pending = self._pending.pop(number)
        numbers = self._numbers[pending.message_id]
        numbers.remove(number)
        if not numbers:
            del self._numbers[pending.message_id]
        if self._given_up:
            self.give_up()
        return pending


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _describe(error: BaseException) -> str:
    return str(error) or repr(error)


def _parameters(url: str, settings: BrokerSettings) -> pika.ConnectionParameters:
    """A node's URL as aio-pika reads it: TLS files are query parameters, and pika refuses those it does not know."""
    parts = urlsplit(url)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    parameters = pika.URLParameters(urlunsplit(parts._replace(query="")))
    parameters.heartbeat = settings.heartbeat_s
    parameters.client_properties = {"connection_name": "codeyard publisher"}
    if parts.scheme == "amqps":
        context = ssl.create_default_context(cafile=query.get("cafile"), capath=query.get("capath"))
        if "certfile" in query:
            context.load_cert_chain(query["certfile"], query.get("keyfile"))
        if query.get("no_verify_ssl", "0") != "0":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        parameters.ssl_options = pika.SSLOptions(context, parts.hostname)
    return parameters

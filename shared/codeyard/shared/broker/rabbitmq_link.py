"""One connection to RabbitMQ, made when it is asked for and again when it was lost, to whichever node takes it.

Owns: the connection, the waits between tries, and the translation of library errors.
Called by: shared.broker.rabbitmq and its parts, nobody else. Every wait is bounded by the caller's timeout.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from urllib.parse import unquote, urlsplit

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    InvalidFrameError,
    ProbableAuthenticationError,
)
from aiormq.abc import AbstractConnection as Wire
from aiormq.channel import Channel

from codeyard.shared.broker.rabbitmq_decoding import tolerate_undecodable_properties
from codeyard.shared.broker.rabbitmq_nodes import Turns, node_of
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.settings import BrokerSettings, masked

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0  # aiormq waits 2 s for the server's close-ok
LIBRARY_ERRORS = (*CONNECTION_EXCEPTIONS, TimeoutError, EOFError)

tolerate_undecodable_properties()


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Whatever the library raises in here leaves as BrokerUnavailable; our own cancellation as itself."""
    try:
        yield
    except asyncio.CancelledError:
        if cancelled_from_outside():
            raise
        raise BrokerUnavailable(f"{doing}: the connection was closed") from None
    except LIBRARY_ERRORS as error:
        raise BrokerUnavailable(f"{doing}: {describe(error)}") from error


def cancelled_from_outside() -> bool:
    """Whether a CancelledError is this task's own. aiormq also throws one into whoever waits on a channel it closes."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


class Link:
    # Not aio-pika's robust connection: its restoration runs in the background, has no deadline, and an
    # operation started meanwhile waits on it for ever (aio-pika issue 636). Here whoever needs the
    # connection makes it, within the deadline it has, and each consumer resumes what is its own.

    def __init__(self, settings: BrokerSettings, *, purpose: str) -> None:
        self._url = settings.url
        self._turns = Turns(settings.url)
        self._purpose = purpose  # shown in the management UI as part of the connection's name
        # aiormq gives a silent peer up after 3 x (heartbeat + 1); the setting promises about two heartbeats.
        self._heartbeat_s = max(1, settings.heartbeat_s * 2 // 3 - 1)
        self._connecting = asyncio.Lock()
        self._connection: AbstractConnection | None = None
        self._trouble = "no answer"
        self._closed = False

    async def connect(self) -> Wire:
        """The live connection. Tries until there is one; bound it with `asyncio.timeout`.

        Raises BrokerUnavailable where trying again cannot help: no node takes our password, or has our virtual host.
        """
        async with self._connecting:
            while True:
                if self._closed:
                    raise BrokerUnavailable("this client was closed")
                if (wire := self._live_wire()) is not None:
                    return wire
                await self._forget()
                if wait_s := self._turns.wait_s:
                    await asyncio.sleep(wait_s)
                await self._try_once()

    async def connect_within(self, timeout_s: float) -> Wire:
        """As `connect`, raising BrokerUnavailable with the last trouble seen once the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.connect()
        except TimeoutError:
            raise self.unreachable() from None

    def unreachable(self) -> BrokerUnavailable:
        """To raise when the time is over: says what the last trouble was."""
        return BrokerUnavailable(f"no connection to {masked(self._url)} in time ({self._trouble})")

    async def channel(self) -> Channel:
        """A fresh channel with confirms, unroutable messages raised. Bound it with `asyncio.timeout`.

        A channel of aio-pika's lower layer: only that one can publish without waiting for the socket
        to drain each time, which is what makes a group one round trip.
        """
        wire = await self.connect()
        with translated("cannot open a channel"):
            await wire.ready()  # unbounded while the broker has blocked publishers
            return cast(Channel, await wire.channel(on_return_raises=True))

    async def close(self) -> None:
        """Hang up. Bounded: a peer that does not answer is left to its socket."""
        self._closed = True
        async with self._connecting:
            await self._forget()

    async def _try_once(self) -> None:
        url = self._turns.next()
        try:
            with translated("cannot connect"):
                async with asyncio.timeout(self._turns.patience_s):
                    self._connection = await aio_pika.connect(
                        url, heartbeat=self._heartbeat_s, name=f"codeyard {self._purpose}"
                    )
        except BrokerUnavailable as error:
            tries = self._turns.failed()
            refusal = _refusal(error.__cause__, url)
            if refusal is not None and self._turns.all_failed:
                raise BrokerUnavailable(refusal) from error
            self._trouble = refusal or describe(error.__cause__ or error)
            told = {"node": node_of(url), "tries": tries, "trouble": self._trouble}
            log.warning("broker_unreachable", extra=told)
        else:
            self._turns.succeeded()
            self._trouble = "no answer"

    def _live_wire(self) -> Wire | None:
        transport = self._connection.transport if self._connection is not None else None
        return transport.connection if transport is not None and transport.connection.is_opened else None

    async def _forget(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            with translated("closing"):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await connection.close()
        except BrokerUnavailable as error:
            log.debug("close_unanswered", extra={"trouble": str(error)})


def _refusal(error: BaseException | None, url: str) -> str | None:
    """Why the server does not want us, as a sentence; None if it may want us later."""
    parts = urlsplit(url)
    user = unquote(parts.username or "guest")
    if isinstance(error, ProbableAuthenticationError | AuthenticationError):
        return f"{masked(url)} refused user {user!r}: {describe(error)}"
    if isinstance(error, InvalidFrameError) and "Connection.Close" in str(error):
        # The server closes instead of opening the virtual host; aiormq keeps no more of its reason.
        vhost = unquote(parts.path[1:]) or "/"
        return f"{masked(url)}: there is no virtual host {vhost!r}, or user {user!r} may not use it"
    return None

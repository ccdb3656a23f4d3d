"""A TCP link that a drill or a test can cut, stall or refuse at a chosen moment.

Promise: bytes pass unchanged and in order until told otherwise. A cut is a reset (RST), as when
a host dies; a stall is a link that stays open and silent, as when a network drops packets; a half-close is a link
of which one direction has ended (FIN) and the other has not, as a middlebox leaves them.
Called by: cli.drill, and tests that put it between a client and a real server. Lives in their event loop, so a
blocking client under test belongs in `asyncio.to_thread`.

    async with TcpProxy("127.0.0.1", 6379) as proxy:
        store = await open_store(f"redis://127.0.0.1:{proxy.port}")
        proxy.drop_replies(after=b"EVALSHA")  # the script runs, its reply never arrives
        with pytest.raises(StoreUnavailable):
            await store.commit(...)
        assert proxy.cuts == 1
"""

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

End = Literal["client", "server", "both"]

_CHUNK_BYTES = 65_536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST and drops what is unsent


class TcpProxy:
    """Forward `127.0.0.1:port` to the target. Every order takes effect at once and on every live link."""

    def __init__(self, target_host: str, target_port: int) -> None:
        self.target_host = target_host
        self.target_port = target_port
        self.port = 0  # known once entered
        self.cuts = 0  # links that this proxy has reset on order
        self.links_opened = 0  # links ever forwarded; a client that reconnects makes it grow
        self.tried_s: list[float] = []  # when each connection was asked for, refused ones too, by the loop's clock
        self._links: set[_Link] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._half_closed: End | None = None
        self._whole = asyncio.Event()
        self._whole.set()
        self._ambush: _Ambush | None = None
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None

    @classmethod
    def to(cls, url: str) -> Self:
        """A proxy in front of the server that `url` names."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port)

    def url(self, direct: str) -> str:
        """`direct`, a URL of the target, by way of this proxy; of several nodes the first goes by way of it."""
        parts = urlsplit(direct)
        user, at, hosts = parts.netloc.rpartition("@")
        _, comma, others = hosts.partition(",")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}{comma}{others}"))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self._flowing.set()
        self._whole.set()
        for link in list(self._links):
            link.reset()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    @property
    def links(self) -> int:
        """Links open now."""
        return len(self._links)

    # Orders ----------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset every live link; new ones are served."""
        for link in list(self._links):
            self.cuts += 1
            link.reset()

    def stall(self) -> None:
        """Forward nothing, in either direction, but keep the links open (and accept new ones)."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward again, what was held first."""
        self._flowing.set()

    def refuse(self) -> None:
        """Reset every live link, and each new one before a byte of it passes."""
        self._refusing = True
        self.cut()

    def half_close(self, end: End) -> None:
        """On every live link, and each new one, until `accept`: what this end reads is over (FIN), its own bytes
        pass as before. That the client hangs up on it is kept from the server, which goes on serving a ghost; that
        the server hangs up is passed on. "both": both ends read a FIN, and nothing passes any more."""
        self._half_closed = end
        self._whole.clear()
        for link in list(self._links):
            link.half_close(end)

    def accept(self) -> None:
        """Serve new links again. Those half closed are cut."""
        self._refusing = False
        self._half_closed = None
        self._whole.set()
        for link in list(self._links):
            if link.half_closed is not None:
                self.cuts += 1
                link.reset()

    def drop_requests(self, containing: bytes = b"") -> None:
        """Once: swallow the next request (the next that has `containing`) and cut its link.
        The server never sees it, the client cannot know."""
        self._ambush = _Ambush(containing, after_effect=False)

    def drop_replies(self, after: bytes = b"") -> None:
        """Once: let the next request (the next that has `after`) through, swallow the reply, cut the link.
        The request took effect, the client cannot know."""
        self._ambush = _Ambush(after, after_effect=True)

    def cut_after_request_bytes(self, count: int) -> None:
        """Once: forward `count` more bytes towards the server, on whichever links, then cut the link that
        carries the next one: half a frame arrives."""
        self._ambush = _Ambush(b"", after_effect=False, pass_bytes=count)

    async def wait_cuts(self, count: int, *, timeout_s: float = 10.0) -> None:
        """Until this proxy has cut `count` links in all. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self.cuts >= count)

    async def wait_links_opened(self, count: int, *, timeout_s: float = 10.0) -> None:
        """Until `count` links have been opened in all: a client has come back. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self.links_opened >= count)

    # Forwarding ------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        self.tried_s.append(asyncio.get_running_loop().time())
        try:
            await self._forward_link(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # a dead target or the end of it all: the client sees a reset
        finally:
            _reset(writer)
            self._handlers.discard(handler)

    async def _forward_link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            return
        up_reader, up_writer = await asyncio.open_connection(self.target_host, self.target_port)
        link = _Link(writer, up_writer)
        self._links.add(link)
        self.links_opened += 1
        if self._half_closed is not None:
            link.half_close(self._half_closed)
        await self._notify()
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._requests(link, reader, up_writer))
                pumps.create_task(self._replies(link, up_reader, writer))
        except* OSError:
            pass  # one side is gone; the other is reset below
        finally:
            self._links.discard(link)
            _reset(up_writer)
            await self._notify()

    async def _requests(self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            await self._flowing.wait()
            ambush = self._ambush
            if ambush is not None and ambush.pass_bytes is not None:
                if len(chunk) > ambush.pass_bytes:
                    writer.write(chunk[: ambush.pass_bytes])
                    await writer.drain()
                    self._spring(link)
                    return
                ambush.pass_bytes -= len(chunk)
            elif ambush is not None and ambush.trigger in chunk:
                if not ambush.after_effect:
                    self._spring(link)
                    return
                link.awaiting_reply = True
                self._ambush = None
            if link.half_closed in (None, "client"):
                writer.write(chunk)
                await writer.drain()
        if link.half_closed is not None:
            await self._whole.wait()
        await _finish(writer)

    async def _replies(self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            await self._flowing.wait()
            if link.awaiting_reply:
                self._spring(link)
                return
            if link.half_closed in (None, "server"):
                writer.write(chunk)
                await writer.drain()
        if link.half_closed == "both":
            await self._whole.wait()
        await _finish(writer)

    def _spring(self, link: "_Link") -> None:
        self._ambush = None
        self.cuts += 1
        link.reset()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@dataclass
class _Ambush:
    """What to do to the next request that fits; gone once it has happened."""

    trigger: bytes
    after_effect: bool
    pass_bytes: int | None = None


@dataclass(eq=False)
class _Link:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    awaiting_reply: bool = field(default=False)
    half_closed: End | None = None

    def half_close(self, end: End) -> None:
        self.half_closed = end
        for writer, at in ((self.client, "client"), (self.server, "server")):
            if end in (at, "both"):
                with contextlib.suppress(OSError, RuntimeError):
                    writer.write_eof()

    def reset(self) -> None:
        """To the client a reset; to the server a plain end after what was already forwarded, since a reset
        could overtake a request that is meant to take effect."""
        _reset(self.client)
        with contextlib.suppress(OSError, RuntimeError):
            self.server.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


async def _finish(writer: asyncio.StreamWriter) -> None:
    """The other side has ended: pass that on, after what is still buffered."""
    with contextlib.suppress(OSError, RuntimeError):
        await writer.drain()
        writer.close()

"""A TCP link that loses one chosen request, or its reply: the two ways a call's fate becomes unknown."""

import asyncio
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import Self


class Loss(StrEnum):
    REQUEST = "request"  # before the effect
    REPLY = "reply"  # after the effect


class LossyLink:
    """Forwards 127.0.0.1:port to a server. `lose()` arms it: the next `times` requests that contain
    `marker` end their connection, unseen by the server or unanswered to the client."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._marker = b""
        self._loss = Loss.REQUEST
        self._times = 0
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.num_lost = 0

    def lose(self, loss: Loss, *, marker: bytes, times: int) -> None:
        self._loss, self._marker, self._times = loss, marker, times

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for writer in list(self._open):
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._open |= {writer, far_writer}
        drop_reply = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                replies = tasks.create_task(self._replies(far_reader, writer, drop_reply))
                await self._requests(reader, far_writer, drop_reply, replies)
                replies.cancel()
        except* OSError:
            pass  # either side went away: so does the link
        finally:
            self._open -= {writer, far_writer}
            for end in (writer, far_writer):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        far: asyncio.StreamWriter,
        drop_reply: asyncio.Event,
        replies: "asyncio.Task[None]",
    ) -> None:
        while data := await reader.read(65_536):
            if self._times and self._marker in data:
                self._times -= 1
                self.num_lost += 1
                if self._loss is Loss.REQUEST:
                    return
                drop_reply.set()
            far.write(data)
            await far.drain()
            if drop_reply.is_set():
                await replies  # ends with the first byte of the reply: the effect is there
                return

    async def _replies(
        self, far: asyncio.StreamReader, writer: asyncio.StreamWriter, drop_reply: asyncio.Event
    ) -> None:
        while data := await far.read(65_536):
            if drop_reply.is_set():
                return
            writer.write(data)
            await writer.drain()

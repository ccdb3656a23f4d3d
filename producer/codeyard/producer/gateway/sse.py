"""A job's events as a server-sent event stream (text/event-stream), which ends four ways.

    the last frame            of a job's own events, `end`; an EventSource that comes back gets 204 and stops
    the caller hangs up       everything is let go
    the gateway stops         the response ends, after a `farewell` if there is one; the caller resumes at another
                              with `Last-Event-ID`
    the store stays away      the same

`native_frames` are a job's events as they are, each with its sequence number as `id`; other APIs have frames of
their own. Events are read from the store as the caller takes
them: a slow reader makes this coroutine wait, and nobody else.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Response
from prometheus_client import Gauge
from starlette.types import Receive, Scope, Send

from codeyard.producer.gateway.waiting import hung_up, unless
from codeyard.shared.errors import FleetError
from codeyard.shared.record import Event

log = logging.getLogger(__name__)

HEARTBEAT_S = 15.0  # between comments: proxies cut connections that are silent for a minute
RECONNECT_MS = 1_000  # what an EventSource waits before it resumes
TAKE_S = 60.0  # a reader that takes nothing for this long is let go; it can resume


class EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[str, None],
        *,
        stopping: asyncio.Event,
        streams_open: Gauge,
        heartbeat_s: float,
        beat: str | None = None,
        farewell: str | None = None,
        last_of_connection: bool = False,
    ) -> None:
        closing = {"Connection": "close"} if last_of_connection else {}
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **closing})
        del self.headers["content-length"]
        self._frames = frames
        self._stopping = stopping
        self._streams_open = streams_open
        self._heartbeat_s = heartbeat_s
        self._beat_frame = beat or ": still here\n\n"
        self._farewell = farewell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams_open.track_inprogress():
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                told = await unless(self._tell(send), self._beat(send), hung_up(receive), self._stopping.wait())
                if not told and self._farewell is not None and self._stopping.is_set():
                    await _write(send, self._farewell)
                async with asyncio.timeout(TAKE_S):  # a reader that is stuck takes no end either
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:
                log.warning("stream_reader_stuck", extra={"waited_s": TAKE_S})

    async def _tell(self, send: Send) -> bool:
        async with aclosing(self._frames) as frames:
            try:
                async for frame in frames:
                    await _write(send, frame)
            except FleetError as error:  # the headers are out: ending is all that can be said
                log.warning("stream_broke_off", extra={"error": str(error)})
        return True

    async def _beat(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            await _write(send, self._beat_frame)


async def native_frames(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        yield f"retry: {RECONNECT_MS}\n\n"
        async for event in events:
            yield frame(event)


def frame(event: Event) -> str:
    """One event on the wire. JSON has no raw line break, so `data` is one line."""
    data = event.model_dump_json(exclude={"v"}, exclude_defaults=True, exclude_none=True)
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {data}\n\n"


async def _write(send: Send, text: str) -> None:
    async with asyncio.timeout(TAKE_S):
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

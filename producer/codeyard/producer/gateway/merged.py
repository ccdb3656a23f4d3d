"""The events of a request's jobs, in the order in which they come: one stream for each choice.

Each stream is asked for its next event only when the one before was taken, so a slow reader holds nothing but
one event of each. Belongs to one task; `aclose` it. Called by: gateway.openai, gateway.anthropic.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from codeyard.shared.record import Event, EventKind


class Merged:
    def __init__(self, streams: Sequence[AsyncGenerator[Event, None]]) -> None:
        self._streams = streams
        self._asked: dict[asyncio.Task[Event | None], int] = {}  # by task: whose next event it waits for
        self._idle = set(range(len(streams)))  # not asked since the last event was taken

    async def first(self) -> tuple[int, Event] | None:
        """What comes next, and stays next; None if nothing does. May be cancelled without loss."""
        found = await self._next()
        event = found[1].result() if found else None
        return (found[0], event) if found and event else None

    def __aiter__(self) -> "Merged":
        return self

    async def __anext__(self) -> tuple[int, Event]:
        """The place of the job, and what it said. Raises what the streams raise."""
        while (found := await self._next()) is not None:
            place, task = found
            del self._asked[task]
            if (event := task.result()) is not None:
                self._idle.add(place)
                return place, event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        for task in self._asked:
            task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    async def _next(self) -> tuple[int, asyncio.Task[Event | None]] | None:
        for place in self._idle:
            self._asked[asyncio.ensure_future(_pulled(self._streams[place]))] = place
        self._idle = set()
        while self._asked:
            done, _ = await asyncio.wait(self._asked, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None and task.result() is None:  # that stream is over
                    del self._asked[task]
                else:
                    return self._asked[task], task
        return None


async def _pulled(stream: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(stream, None)


async def without_taken_back(events: AsyncGenerator[Event, None], known_seq: int) -> AsyncGenerator[Event, None]:
    """Events from the first on; of those that were there when the caller came, up to `known_seq`, none that a later
    `restarted` takes back: who comes back after one gets what counts."""
    held: list[Event] = []
    try:
        async for event in events:
            if event.seq > known_seq:
                yield event
                continue
            if event.kind is EventKind.RESTARTED:
                held.clear()
            else:
                held.append(event)
            if event.seq == known_seq:
                for one in held:
                    yield one
                held.clear()
    finally:
        await events.aclose()

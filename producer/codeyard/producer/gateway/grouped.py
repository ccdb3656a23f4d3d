"""Calls for one item, sent as calls for groups.

A group is formed from what is there, never by waiting when idle: up to `in_flight` items leave at once, each
alone; those that come meanwhile leave together. Called by: gateway.keys, gateway.limits.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Grouped(Generic[Q, A]):
    """`call` gives one answer per item, in order. Belongs to one event loop."""

    def __init__(
        self, call: Callable[[Sequence[Q]], Awaitable[Sequence[A]]], *, in_flight: int = 4, most: int = 256
    ) -> None:
        self._call = call
        self._in_flight = in_flight
        self._most = most
        self._flying = 0
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()  # owned: `close` ends them

    async def __call__(self, one: Q) -> A:
        """Raises what `call` raises."""
        if self._flying < self._in_flight:
            self._flying += 1
            try:
                [answer] = await self._call([one])
                return answer
            finally:
                self._landed()
        answered: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((one, answered))
        return await answered

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _landed(self) -> None:
        self._flying -= 1
        if self._waiting:
            group = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            self._flying += 1
            task = asyncio.create_task(self._send([pair for pair in group if not pair[1].done()]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, group: list[tuple[Q, "asyncio.Future[A]"]]) -> None:
        try:
            answers = await self._call([one for one, _ in group]) if group else []
        except BaseException as error:
            for _, answered in group:
                if not answered.done():
                    answered.set_exception(error) if isinstance(error, Exception) else answered.cancel()
            if not isinstance(error, Exception):
                raise
        else:
            for (_, answered), answer in zip(group, answers, strict=True):
                if not answered.done():
                    answered.set_result(answer)
        finally:
            self._landed()

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
        self._tasks: set[asyncio.Task[Sequence[A]]] = set()  # owned: `close` ends them

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
        """Who still waits is cancelled."""
        while self._waiting:
            self._waiting.popleft()[1].cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _landed(self) -> None:
        self._flying -= 1
        if not self._waiting:
            return
        taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
        group = [(one, answered) for one, answered in taken if not answered.done()]
        self._flying += 1
        self._tasks.add(task := asyncio.create_task(self._send([one for one, _ in group])))
        task.add_done_callback(lambda sent: self._sent(sent, [answered for _, answered in group]))

    async def _send(self, group: list[Q]) -> Sequence[A]:
        return await self._call(group) if group else []

    def _sent(self, task: "asyncio.Task[Sequence[A]]", waiting: list["asyncio.Future[A]"]) -> None:
        """Called however it ended, also if it was cancelled before it began."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        for n, answered in enumerate(waiting):
            if answered.done():
                continue
            if task.cancelled():
                answered.cancel()
            elif error is not None:
                answered.set_exception(error)
            else:
                answered.set_result(task.result()[n])
        self._landed()

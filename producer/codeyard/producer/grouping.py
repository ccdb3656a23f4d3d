"""Let concurrent submissions share round trips.

A group is formed from what is there, never by waiting when idle: the first submission leaves at once,
those that come while it is under way leave together. Called by: async_client.
"""

import asyncio
from collections.abc import Sequence

from codeyard.producer.submission import Accepted, Submission, Submitter
from codeyard.shared.errors import FleetError

MAX_GROUP = 256  # jobs per round trip
IN_FLIGHT = 4  # groups under way at once: one is reserved while another is confirmed


class GroupingSubmitter:
    """An async context manager; its tasks live as long as it is entered."""

    def __init__(self, submitter: Submitter, *, timeout_s: float) -> None:
        self._submitter = submitter
        self._timeout_s = timeout_s
        self._waiting: asyncio.Queue[tuple[Submission, asyncio.Future[Accepted | FleetError]]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "GroupingSubmitter":
        self._tasks = [asyncio.create_task(self._pump(), name=f"submit {n}") for n in range(IN_FLIGHT)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def submit(self, submission: Submission) -> Accepted | FleetError:
        """One outcome. Cancelling the caller does not take the job back: it may be accepted."""
        answer: asyncio.Future[Accepted | FleetError] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((submission, answer))
        return await answer

    async def submit_many(self, group: Sequence[Submission]) -> list[Accepted | FleetError]:
        """One outcome per item, in order; pipelined in groups of MAX_GROUP."""
        parts = [group[start : start + MAX_GROUP] for start in range(0, len(group), MAX_GROUP)]
        outcomes: list[Accepted | FleetError] = []
        for start in range(0, len(parts), IN_FLIGHT):
            calls = [
                self._submitter.submit(part, timeout_s=self._timeout_s) for part in parts[start : start + IN_FLIGHT]
            ]
            for answers in await asyncio.gather(*calls):
                outcomes += answers
        return outcomes

    async def _pump(self) -> None:
        while True:
            taken = [await self._waiting.get()]
            while len(taken) < MAX_GROUP and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            try:
                outcomes = await self._submitter.submit([one for one, _ in taken], timeout_s=self._timeout_s)
            except BaseException as error:
                # A bug, or the end of the client: nobody may wait for ever, and the next group goes on.
                for _, answer in taken:
                    if not answer.done():
                        answer.set_exception(FleetError(f"submission broke off: {error!r}"))
                if not isinstance(error, Exception):
                    raise
                continue
            for (_, answer), outcome in zip(taken, outcomes, strict=True):
                if not answer.done():
                    answer.set_result(outcome)

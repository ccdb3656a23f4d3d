"""Clients that ask all the time and take no refusal for an answer: each is asked again, under the same key.

Called by: tests that take a server away under a fleet.
"""

import asyncio
import contextlib
import time

import httpx

from codeyard.producer import AsyncClient
from codeyard.producer.submission import Submission
from codeyard.shared.errors import FleetError
from codeyard.shared.job import JobId
from codeyard.shared.record import State

AGAIN_S = 0.05
PATIENCE_S = 180.0  # reached only by a failing test


class Asking:
    """Of a gateway, over HTTP: one question after the other."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers: list[str] = []
        self.refusals: list[int] = []  # status codes
        self.longest_s = 0.0  # from the first try of a question to its answer

    async def run(self) -> None:
        """For ever."""
        async with httpx.AsyncClient(base_url=self._url, timeout=30.0) as http:
            while True:
                began_s, number = time.monotonic(), len(self.answers)
                async with asyncio.timeout(PATIENCE_S):
                    while (answer := await self._answer(http, number)) is None:  # noqa: ASYNC110  # another process's
                        await asyncio.sleep(AGAIN_S)
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)
                self.answers.append(answer)

    async def more(self, count: int) -> None:
        """Return when so many more are answered."""
        wanted = len(self.answers) + count
        async with asyncio.timeout(PATIENCE_S):
            while len(self.answers) < wanted:  # noqa: ASYNC110  # another process's
                await asyncio.sleep(AGAIN_S)

    async def _answer(self, http: httpx.AsyncClient, number: int) -> str | None:
        headers = {"Idempotency-Key": f"asking-{number}", "Prefer": "wait=5"}
        body = {
            "prompt": f"def asked_{number}():",
            "model": "starter",
            "lane": "interactive",
            "sampling": {"max_tokens": 8},
        }
        with contextlib.suppress(httpx.TransportError):
            said = await http.post("/v1/jobs", json=body, headers=headers)
            if said.is_success and said.json()["state"] == State.SUCCEEDED:
                return str(said.json()["result"]["text"])
            self.refusals.append(said.status_code)
        return None


async def accepted(client: AsyncClient, name: str, count: int) -> list[JobId]:
    """Submit so many until each is accepted; their ids, in order."""
    group = [Submission(f"def {name}_{n}():", idempotency_key=f"{name}-{n}") for n in range(count)]
    async with asyncio.timeout(PATIENCE_S):
        while True:
            outcomes = await client.submit_many(group)
            ids = [one.id for one in outcomes if not isinstance(one, FleetError)]
            if len(ids) == count:
                return ids
            await asyncio.sleep(AGAIN_S)


async def ended(client: AsyncClient, ids: list[JobId]) -> list[State]:
    """Their final states, once all have one. A job without a record may yet be made again from its message."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            states = [state for state in await client.store.states(ids) if state is not None and state.final]
            if len(states) == len(ids):
                return states
            await asyncio.sleep(AGAIN_S)

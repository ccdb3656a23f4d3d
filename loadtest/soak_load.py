"""The load of a soak: jobs of every kind at a steady rate, each followed to the end that it must have.

Open loop: a job starts at its time, however long the others take. Every caller knows the answer (the simulated
engine's is a function of the prompt) and says what was wrong, or nothing. Called by: soak.
"""

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx
from loadtest.bench_streams import RETRY_S, Caller, Told

from codeyard.shared.chat import Chat, Message
from codeyard.shared.errors import FleetError
from codeyard.shared.job import Lane
from codeyard.worker.engines.simulated import simulated_completion

MODEL = "soak"
FAILING, HANGING = "!fail", "!hang"  # prompts that begin so; the latency table of the soak's workers knows them
MAX_TOKENS = 64
TIMEOUT_S = 60.0  # of a job: its record ends soon after
EXPIRES_S = 2.0  # of a job that hangs until it expires
MOST_IN_FLIGHT = 500  # then the fleet does not keep up, and what is measured is a queue
PATIENCE_S = 90.0  # for the end of one job
SHOWN = 20
LANES = tuple(Lane)


class Kind(StrEnum):
    POLLED = "polled"
    WAITED = "waited for"  # Prefer: wait
    FOLLOWED = "followed"  # as server-sent events
    RESUMED = "resumed"  # followed, cut and followed on
    ABANDONED = "abandoned"  # its reader hangs up in the middle and asks for the result later
    REPEATED = "repeated"  # submitted twice under one key
    CHAT = "chat"  # OpenAI's API
    CHAT_STREAM = "chat stream"
    CANCELLED = "cancelled"
    FAILED = "failed"
    EXPIRED = "expired"


MIX = (
    *(Kind.POLLED,) * 9,
    *(Kind.WAITED,) * 8,
    *(Kind.FOLLOWED,) * 6,
    *(Kind.RESUMED,) * 3,
    *(Kind.ABANDONED,) * 2,
    *(Kind.REPEATED,) * 4,
    *(Kind.CHAT,) * 3,
    *(Kind.CHAT_STREAM,) * 2,
    Kind.CANCELLED,
    Kind.FAILED,
    Kind.EXPIRED,
)  # 40
STEP = 7  # through MIX: no kind comes in a row


class NotAsItShould(Exception):
    """A job that did not end as it had to."""


MET = (NotAsItShould, OSError, EOFError, TimeoutError, RuntimeError, ValueError, LookupError, httpx.HTTPError)
"""What an answer that is none, or is another than it should be, is met as. Anything else ends the soak."""


@dataclass(slots=True)
class Ledger:
    """sent = ended + len(wrong) when nothing is in flight."""

    sent: Counter[Kind] = field(default_factory=Counter)
    ended: Counter[Kind] = field(default_factory=Counter)  # as they had to
    num_wrong: int = 0
    wrong: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN))
    late_s: float = 0.0  # the latest start behind its time: this program was held up

    @property
    def in_flight(self) -> int:
        return self.sent.total() - self.ended.total() - self.num_wrong

    @property
    def balanced(self) -> bool:
        return self.num_wrong == 0 and self.in_flight == 0


class Load:
    """`seed` keeps the jobs of one run apart from those of another on the same servers."""

    def __init__(self, url: str, seed: str) -> None:
        self.ledger = Ledger()
        self._url = url
        self._seed = seed
        self._number = 0
        host, _, port = url.removeprefix("http://").partition(":")
        self._caller = Caller(host, int(port))

    async def first_revision(self) -> str:
        """What the model's alias points to: by a first job, which is none of the ledger's."""
        prompt = _prompt(f"{self._seed}-first")
        job = await self._submit(f"{self._seed}-first", prompt, Lane.STANDARD, headers="Prefer: wait=60\r\n")
        _check(job, prompt)
        return str(job["revision"])

    async def send(self, *, rate: float, until: Callable[[], bool]) -> None:
        """`rate` jobs a second until told otherwise, then wait for those under way.

        Raises FleetError if the fleet does not keep up.
        """
        limits = httpx.Limits(max_keepalive_connections=8)
        client = httpx.AsyncClient(base_url=self._url, timeout=PATIENCE_S, trust_env=False, limits=limits)
        async with client as http, asyncio.TaskGroup() as tasks:
            began_s, begun = time.monotonic(), 0
            while not until():
                due_s = began_s + begun / rate
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                self.ledger.late_s = max(self.ledger.late_s, time.monotonic() - due_s)
                if self.ledger.in_flight >= MOST_IN_FLIGHT:
                    raise FleetError(f"{MOST_IN_FLIGHT} jobs are in flight: the fleet does not keep up with {rate:g}/s")
                kind = MIX[self._number * STEP % len(MIX)]
                self.ledger.sent[kind] += 1
                tasks.create_task(self._one(http, kind, self._number), name=kind)
                begun += 1
                self._number += 1

    async def _one(self, http: httpx.AsyncClient, kind: Kind, number: int) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await _CALLS[kind](self, http, f"{self._seed}-{number}", LANES[number % len(LANES)])
        except MET as error:
            self.ledger.num_wrong += 1
            self.ledger.wrong.append(f"{kind} {number}: {type(error).__name__} {error}")
        else:
            self.ledger.ended[kind] += 1

    # One method for each kind ------------------------------------------------------------------------

    async def _polled(self, _: httpx.AsyncClient, name: str, lane: Lane) -> None:
        prompt = _prompt(name)
        job = await self._submit(name, prompt, lane)
        _check(await self._final(job["id"]), prompt)

    async def _waited(self, _: httpx.AsyncClient, name: str, lane: Lane) -> None:
        prompt = _prompt(name)
        job = await self._submit(name, prompt, lane, headers="Prefer: wait=60\r\n")
        _check(job, prompt)

    async def _followed(self, _: httpx.AsyncClient, name: str, lane: Lane, cut_after: int | None = None) -> None:
        prompt, told = _prompt(name), Told()
        job = await self._submit(name, prompt, lane, stream=True)
        await self._caller.follow(job["id"], told, cut_after=cut_after)
        if cut_after is not None and not told.ended:
            await self._caller.follow(job["id"], told)
        job = await self._final(job["id"])
        _check(job, prompt)
        if told.fault or (told.ended, told.text) != (job["state"], job["result"]["text"]):
            raise NotAsItShould(f"its stream is not its result: {told.fault or told.ended or 'no end'}")

    async def _resumed(self, http: httpx.AsyncClient, name: str, lane: Lane) -> None:
        await self._followed(http, name, lane, cut_after=2)

    async def _abandoned(self, _: httpx.AsyncClient, name: str, lane: Lane) -> None:
        prompt = _prompt(name)
        job = await self._submit(name, prompt, lane, stream=True)
        await self._caller.follow(job["id"], Told(), cut_after=1)
        _check(await self._final(job["id"]), prompt)

    async def _repeated(self, _: httpx.AsyncClient, name: str, lane: Lane) -> None:
        prompt = _prompt(name)
        job, again = await asyncio.gather(self._submit(name, prompt, lane), self._submit(name, prompt, lane))
        _check(await self._final(job["id"]), prompt)
        after = await self._submit(name, prompt, lane)
        if len({job["id"], again["id"], after["id"]}) > 1 or not (after["attached"] and after["result"]):
            raise NotAsItShould("the same key is another job")

    async def _chat(self, http: httpx.AsyncClient, name: str, lane: Lane) -> None:
        prompt = _prompt(name)
        async with _asked(http, name, _chat_body(prompt)) as answer:
            document = json.loads(await answer.aread())
        _check_chat(document["choices"][0]["message"]["content"], prompt)

    async def _chat_stream(self, http: httpx.AsyncClient, name: str, lane: Lane) -> None:
        prompt, said = _prompt(name), ""
        async with _asked(http, name, _chat_body(prompt) | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if "choices" not in chunk:
                        raise NotAsItShould(f"its stream ends in {chunk}")
                    said += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        _check_chat(said, prompt)

    async def _cancelled(self, _: httpx.AsyncClient, name: str, lane: Lane) -> None:
        job = await self._submit(name, f"{HANGING}{_prompt(name)}", lane)
        await self._caller.ask("DELETE", f"/v1/jobs/{job['id']}")
        _is(await self._final(job["id"]), "cancelled")

    async def _failed(self, _: httpx.AsyncClient, name: str, lane: Lane) -> None:
        job = await self._submit(name, f"{FAILING}{_prompt(name)}", lane, headers="Prefer: wait=60\r\n")
        _is(job, "failed")

    async def _expired(self, _: httpx.AsyncClient, name: str, lane: Lane) -> None:
        job = await self._submit(name, f"{HANGING}{_prompt(name)}", lane, timeout_s=EXPIRES_S)
        _is(await self._final(job["id"]), "expired")

    # -------------------------------------------------------------------------------------------------

    async def _submit(
        self,
        key: str,
        prompt: str,
        lane: Lane,
        *,
        stream: bool = False,
        timeout_s: float = TIMEOUT_S,
        headers: str = "",
    ) -> dict[str, Any]:
        body = {
            "model": MODEL,
            "prompt": prompt,
            "lane": lane,
            "stream": stream,
            "timeout_s": timeout_s,
            "sampling": {"max_tokens": MAX_TOKENS},
        }
        headers += f"Idempotency-Key: {key}\r\n"
        answer: dict[str, Any] = await self._caller.ask("POST", "/v1/jobs", body, headers=headers)
        return answer

    async def _final(self, job_id: str) -> dict[str, Any]:
        wait_s = 0.1
        while True:
            job: dict[str, Any] = await self._caller.ask("GET", f"/v1/jobs/{job_id}")
            if job.get("finished_at"):
                return job
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 1.0)


_CALLS = {
    Kind.POLLED: Load._polled,
    Kind.WAITED: Load._waited,
    Kind.FOLLOWED: Load._followed,
    Kind.RESUMED: Load._resumed,
    Kind.ABANDONED: Load._abandoned,
    Kind.REPEATED: Load._repeated,
    Kind.CHAT: Load._chat,
    Kind.CHAT_STREAM: Load._chat_stream,
    Kind.CANCELLED: Load._cancelled,
    Kind.FAILED: Load._failed,
    Kind.EXPIRED: Load._expired,
}


@asynccontextmanager
async def _asked(http: httpx.AsyncClient, key: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
    """A chat's answer, once there is one. After a 503 or 429 it asks again, as the SDKs do."""
    while True:
        headers = {"Idempotency-Key": key}
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.status_code not in (429, 503):
                answer.raise_for_status()
                yield answer
                return
        await asyncio.sleep(RETRY_S)


def _prompt(name: str) -> str:
    return f"def soak_{name.replace('-', '_')}(line: str) -> dict[str, str]:\n"


def _chat_body(prompt: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_completion_tokens": MAX_TOKENS}


def _check(job: dict[str, Any], prompt: str) -> None:
    _is(job, "succeeded")
    if job["result"]["text"] != simulated_completion(prompt, MAX_TOKENS)[0]:
        raise NotAsItShould("its text is not the prompt's answer")


def _check_chat(said: str, prompt: str) -> None:
    chat = Chat(messages=(Message(role="user", content=prompt),))
    if said != simulated_completion(chat, MAX_TOKENS)[0]:
        raise NotAsItShould("its text is not the conversation's answer")


def _is(job: dict[str, Any], state: str) -> None:
    if job["state"] != state:
        raise NotAsItShould(f"{job['state']}, expected {state}")

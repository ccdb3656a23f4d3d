"""An engine in virtual time whose answer is a function of the prompt, and which fails as the prompt says.

Called by: fleet.py.
"""

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

from codeyard.shared.errors import EngineDead, JobFailed, JobRejected
from codeyard.shared.job import JobId
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load, Memory
from support.simulation.plan import JobPlan, Kind

REVISION = "weights-1"
PROMPT_TOKENS = 7
LOAD_S = 0.3


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says to a prompt when nothing goes wrong."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


def prompt_of(job: JobPlan, *, other: bool = False) -> str:
    return f"{job.kind} {job.num_tokens} {job.step_s} {'other' if other else 'usual'} {job.number}"


def answer_to(prompt: str, max_tokens: int) -> Answer:
    num_tokens = int(prompt.split(" ", 2)[1])
    token_ids = tuple(zlib.crc32(b"%d %s" % (n, prompt.encode())) % 10_000 for n in range(min(num_tokens, max_tokens)))
    finish_reason = "length" if num_tokens >= max_tokens else "stop"
    return Answer("".join(map(_word, token_ids)), token_ids, finish_reason)


def _word(token_id: int) -> str:
    return f"{token_id} "


@dataclass(slots=True, eq=False)
class _Run:
    moves: "asyncio.Future[None]"
    aborted: bool = False
    hangs: bool = False


class TinyEngine:
    """`tries` counts generations by prompt, over all engines of a world."""

    def __init__(self, slots: int, tries: Counter[str]) -> None:
        self.info = EngineInfo("tiny", "tiny 1", "tiny", REVISION, 4_096, slots, continuous=True)
        self._tries = tries
        self._runs: dict[JobId, _Run] = {}
        self._dead = ""
        self._steps = 0

    async def generate(self, job: EngineJob) -> AsyncIterator[Delta]:
        assert isinstance(job.prompt, str)
        self._check()
        kind, _, step, _ = job.prompt.split(" ", 3)
        if kind.startswith("#"):  # how a line times an engine that starts
            yield Delta("", (), "stop", PROMPT_TOKENS)
            return
        self._tries[job.prompt] += 1
        answer = answer_to(job.prompt, job.sampling.max_tokens)
        assert job.prefix_token_ids == answer.token_ids[: len(job.prefix_token_ids)], "continued another's tokens"
        rest = answer.token_ids[len(job.prefix_token_ids) :]
        run = self._runs[job.id] = _Run(asyncio.get_running_loop().create_future())
        try:
            await self._begin(Kind(kind), run, job.prompt)
            pieces = [(token_id,) for token_id in rest] if job.stream else [rest]
            for piece in pieces:
                await self._pause(run, float(step) * len(piece))
                if run.aborted:
                    yield Delta("", (), "abort", PROMPT_TOKENS)
                    return
                yield Delta("".join(map(_word, piece)), piece)
            yield Delta("", (), answer.finish_reason, PROMPT_TOKENS)
        finally:
            if self._runs.get(job.id) is run:
                del self._runs[job.id]

    async def abort(self, job_id: JobId) -> None:
        if (run := self._runs.get(job_id)) is not None:
            run.aborted = True
            _wake(run.moves)

    def load(self) -> Load:
        if self._runs and not any(run.hangs for run in self._runs.values()):
            self._steps += 1  # asked about once a second
        return Load(running=len(self._runs), waiting=0, steps=self._steps)

    def pids(self) -> tuple[int, ...]:
        return ()

    async def memory(self) -> Memory:
        return Memory(0, 0)

    async def sleep(self) -> None:
        raise AssertionError("nobody puts it to sleep")

    async def wake(self) -> None:
        raise AssertionError("it does not sleep")

    async def close(self, *, force: bool = False) -> None:
        self.die("closed")

    def die(self, why: str) -> None:
        self._dead = self._dead or why
        for run in self._runs.values():
            _wake(run.moves)

    # -------------------------------------------------------------------------------------------------

    async def _begin(self, kind: Kind, run: _Run, prompt: str) -> None:
        if kind is Kind.REFUSED:
            raise JobRejected("simulated", "the prompt says so")
        if kind is Kind.BROKEN or (kind is Kind.FAILS_ONCE and self._tries[prompt] == 1):
            await self._pause(run, 0.1)
            raise JobFailed("the prompt says so")
        if kind is Kind.KILLS:
            await self._pause(run, 0.1)
            self.die("the prompt says so")
            self._check()
        if kind is Kind.HANGS:
            run.hangs = True
            while not run.aborted:
                await self._pause(run, 1e6)

    async def _pause(self, run: _Run, seconds: float) -> None:
        self._check()
        if run.aborted:
            return
        loop = asyncio.get_running_loop()
        run.moves = loop.create_future()
        timer = loop.call_later(seconds, _wake, run.moves)
        try:
            await run.moves
        finally:
            timer.cancel()
        self._check()

    def _check(self) -> None:
        if self._dead:
            raise EngineDead(self._dead)


def _wake(moves: "asyncio.Future[None]") -> None:
    if not moves.done():
        moves.set_result(None)


class TinyLease:
    """What a line holds of a model cache."""

    def __init__(self, slots: int, tries: Counter[str]) -> None:
        self._slots = slots
        self._tries = tries
        self.engine = TinyEngine(slots, tries)

    async def renew(self) -> TinyEngine:
        await self.engine.close(force=True)
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()
        loop.call_later(LOAD_S, _wake, loaded)
        await loaded
        self.engine = TinyEngine(self._slots, self._tries)
        return self.engine

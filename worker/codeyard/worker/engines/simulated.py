"""An engine without a model: it sleeps and streams as a GPU of a given latency table would.

For load tests, drills and capacity planning. It says what it is in its name and in every result, and is
never chosen by itself. The answer is a function of the prompt (`simulated_completion`), so a drill can
tell a wrong result from a right one.

A latency table may name faults, by prompt prefix, so that tests reach them in a real worker process:
`"faults": {"!hang": "hang", "!die": "die", "!fail": "fail", "!exit": "exit"}`.
"""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field

from codeyard.shared.errors import EngineDead, JobFailed, JobRejected
from codeyard.shared.job import JobId
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load
from codeyard.worker.simulation.latency import load_table

CONTEXT_TOKENS = 32_768
CHARS_PER_TOKEN = 4
MIN_TOKENS, SPREAD_TOKENS = 16, 240  # answers have 16 to 255 tokens unless max_tokens is less
MIN_SLEEP_S = 0.001  # shorter steps are made up for in the next one
WORDS = tuple(
    f" {word}"
    for word in (
        *("def", "return", "self", "for", "in", "if", "not", "and", "or", "while", "x", "y", "z", "n", "i", "key"),
        *("value", "items", "result", "list", "dict", "set", "str", "int", "float", "None", "True", "False", "yield"),
        *("await", "async", "with", "as", "try", "except", "raise", "import", "from", "class", "lambda", "pass"),
    )
)


def simulated_completion(prompt: str | tuple[int, ...], max_tokens: int) -> tuple[str, tuple[int, ...], str]:
    """(text, token ids, finish reason) that the simulated engine gives for a prompt: always the same."""
    seed = hashlib.sha256(json.dumps(prompt).encode()).digest()
    length = MIN_TOKENS + int.from_bytes(seed[:2], "big") % SPREAD_TOKENS
    token_ids = tuple((seed[n % 32] + n * seed[(n + 1) % 32]) % len(WORDS) for n in range(min(length, max_tokens)))
    return _text(token_ids), token_ids, "stop" if length <= max_tokens else "length"


@dataclass(slots=True, eq=False)
class _Running:
    job: EngineJob
    token_ids: tuple[int, ...]  # the whole answer
    finish_reason: str
    prompt_tokens: int
    done: int  # tokens given, any prefix included
    deltas: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    hangs: bool = False


class SimulatedEngine:
    """See the module. `settings.time_scale` 0.1 is ten times faster than the table."""

    def __init__(self, source: ModelSource, settings: EngineSettings) -> None:
        table = load_table(settings.latency_table)
        self.info = EngineInfo(
            name="simulated",
            version=f"simulated (no model; times of: {table.what.split(',')[0]})",
            model=source.location,
            revision=source.revision,
            context_tokens=settings.max_model_len or CONTEXT_TOKENS,
            max_running=settings.max_running,
            continuous=True,
        )
        self._table = table
        self._scale = settings.time_scale
        self._faults = _faults(settings)
        self._running: dict[JobId, _Running] = {}
        self._prefill_tokens = 0
        self._steps = 0
        self._wake = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._dead = False

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        if self._dead:
            raise EngineDead("the simulated engine is closed")
        prompt_tokens = len(job.prompt) if isinstance(job.prompt, tuple) else len(job.prompt) // CHARS_PER_TOKEN + 1
        if prompt_tokens >= self.info.context_tokens:
            text = f"the prompt has {prompt_tokens} tokens, the model takes {self.info.context_tokens}"
            raise JobRejected("prompt_too_long", text)
        fault = self._fault(job)
        if fault == "fail":
            raise JobFailed("a fault of the latency table: fail")
        if fault == "exit":
            os._exit(70)
        _, token_ids, reason = simulated_completion(job.prompt, job.sampling.max_tokens)
        running = _Running(job, token_ids, reason, prompt_tokens, done=len(job.prefix_token_ids), hangs=fault == "hang")
        self._running[job.id] = running
        self._prefill_tokens += prompt_tokens + len(job.prefix_token_ids)
        if fault == "die":
            await self.close(force=True)
        elif self._driver is None:
            self._driver = asyncio.create_task(self._drive(), name="simulated engine")
        self._wake.set()
        try:
            while True:
                delta = await running.deltas.get()
                if isinstance(delta, Exception):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            if self._running.get(job.id) is running:
                del self._running[job.id]

    async def abort(self, job_id: JobId) -> None:
        if running := self._running.pop(job_id, None):
            first = 0 if running.job.stream else len(running.job.prefix_token_ids)
            ids = () if running.job.stream else running.token_ids[first : running.done]
            running.deltas.put_nowait(Delta(_text(ids), ids, "abort", running.prompt_tokens))

    def load(self) -> Load:
        return Load(running=len(self._running), waiting=0, steps=self._steps)

    async def close(self, *, force: bool = False) -> None:
        self._dead = True
        for running in self._running.values():
            running.deltas.put_nowait(EngineDead("the simulated engine was closed"))
        self._running.clear()
        if self._driver is not None:
            self._driver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._driver

    async def _drive(self) -> None:
        """One step after another, while anything runs."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            moving = [running for running in self._running.values() if not running.hangs]
            if not moving:
                self._wake.clear()
                await self._wake.wait()
                due_s = loop.time()
                continue
            due_s = max(due_s, loop.time() - 1.0) + self._step_s(len(moving)) * self._scale
            ahead_s = due_s - loop.time()
            await asyncio.sleep(ahead_s if ahead_s >= MIN_SLEEP_S else 0)
            self._steps += 1
            for running in moving:
                if self._running.get(running.job.id) is running:
                    self._give_token(running)

    def _step_s(self, num_running: int) -> float:
        prefill = min(self._prefill_tokens, self._table.step_tokens)
        self._prefill_tokens -= prefill
        return self._table.decode_s[min(num_running, self._table.slots)] + self._table.prefill_s * prefill

    def _give_token(self, running: _Running) -> None:
        running.done = min(running.done + 1, len(running.token_ids))
        last = running.done == len(running.token_ids)
        if not last and not running.job.stream:
            return
        first = running.done - 1 if running.job.stream else len(running.job.prefix_token_ids)
        ids = running.token_ids[first : running.done]
        reason = running.finish_reason if last else None
        running.deltas.put_nowait(Delta(_text(ids), ids, reason, running.prompt_tokens if last else 0))
        if last:
            del self._running[running.job.id]

    def _fault(self, job: EngineJob) -> str | None:
        if isinstance(job.prompt, tuple):
            return None
        return next((kind for prefix, kind in self._faults.items() if job.prompt.startswith(prefix)), None)


def _text(token_ids: tuple[int, ...]) -> str:
    return "".join(WORDS[i] for i in token_ids)


def _faults(settings: EngineSettings) -> Mapping[str, str]:
    if settings.latency_table is None:
        return {}
    faults: dict[str, str] = json.loads(settings.latency_table.read_text()).get("faults", {})
    return faults

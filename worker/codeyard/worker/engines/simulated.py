"""An engine without a model: it sleeps and streams as a GPU of a given latency table would.

For load tests, drills and capacity planning. It says what it is in its name and in every result, and is
never chosen by itself. The answer is a function of the prompt and the adapter (`simulated_completion`), so a
drill can tell a wrong result from a right one, and one that another adapter made. A conversation that offers
tools and ends with the user is answered with a call of the first one, or of the one that is demanded.

A latency table may name faults, by prompt prefix, so that a drill reaches them in a real worker process:
`"faults": {"!hang": "hang", "!die": "die", "!fail": "fail", "!exit": "exit"}`.
"""

import asyncio
import hashlib
import heapq
import itertools
import json
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from codeyard.shared.chat import Chat, NamedTool
from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, SettingsError
from codeyard.shared.job import JobId, Lane, Prompt, Sampling, estimate_tokens
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.completion import Completion, Decode, check_prompt, refuse_formats, token_logprob
from codeyard.worker.engines.hermes import CLOSE, OPEN, HermesReader
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load, Memory
from codeyard.worker.engines.tool_calls import Calls
from codeyard.worker.simulation.latency import load_table

Fault = Literal["hang", "die", "fail", "exit"]
"""hang: never a token. die: the engine, with all its jobs. fail: this job. exit: the whole process."""

CONTEXT_TOKENS = 32_768
MAX_COMPLETION = 131_072  # tokens a job may ask for
MIN_TOKENS, SPREAD_TOKENS = 16, 240  # answers have 16 to 255 tokens unless max_tokens is less
NAP_S = 0.001  # shorter sleeps are inexact: several steps are made at once instead
LAG_S = 1.0  # of a process that was held up: time it does not try to make good
EXIT_STATUS = 70
FAILS = "/fails"  # of a model's location: loading it fails
END = 0  # the end-of-text token
PRIORITY = {lane: place for place, lane in enumerate(Lane)}
WORDS = (
    "",  # END
    *(" def", " return", " self", " for", " in", " if", " not", " and", " or", " while", " x", " y", " z", " n"),
    *(" value", " items", " result", " list", " dict", " set", " str", " int", " float", " None", " True", " False"),
    *(" await", " async", " with", " as", " try", " except", " raise", " import", " from", " class", " lambda"),
)


def simulated_completion(
    prompt: Prompt, max_tokens: int, *, stop: tuple[str, ...] = (), adapter: str | None = None
) -> tuple[str, tuple[int, ...], str]:
    """(text, token ids, finish reason) that the simulated engine gives for a prompt: always the same."""
    job = EngineJob("", prompt, Sampling(max_tokens=max_tokens, stop=stop), Lane.STANDARD, stream=False)
    completion, calls = _completion(job), _calls(job)
    completion.push(_answer(prompt, adapter))
    delta = completion.delta()
    assert delta is not None
    delta = delta if calls is None else calls.of(delta)
    assert delta.finish_reason is not None
    return delta.text, delta.token_ids, delta.finish_reason


@dataclass(slots=True, eq=False)
class _Run:
    """One job inside the engine."""

    job: EngineJob
    completion: Completion
    answer: tuple[int, ...]  # what is left of it
    num_prompt: int  # tokens to prefill
    calls: Calls | None  # where it offers tools
    hangs: bool  # holds its slot and never moves
    joined_at: int | None = None  # step; None: waits for a slot
    news: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)

    def advance(self, step: int) -> None:
        """Take the tokens of the steps made since it joined; hand over what is new."""
        if self.joined_at is not None and not self.hangs:
            have = len(self.completion.token_ids) - len(self.job.prefix_token_ids)
            new = self.answer[have : step - self.joined_at]
            asked = self.job.sampling.logprobs is not None
            decode = _decoder(self.job.prompt) if asked else None
            self.completion.push(new, [token_logprob(decode, token, 0.0) for token in new] if decode else ())

    def tell(self) -> None:
        if (delta := self.completion.delta()) is not None:
            self.news.put_nowait(delta if self.calls is None else self.calls.of(delta))


class SimulatedEngine:
    """See the module. `settings.time_scale` 0.1 is ten times faster than the table.

    One task makes the steps for all jobs. A job that does not stream costs nothing while it runs: a
    heap knows the step at which each will have its last token.
    """

    def __init__(
        self, source: ModelSource, settings: EngineSettings, *, fault: Callable[[EngineJob], Fault | None] | None = None
    ) -> None:
        table = load_table(settings.latency_table)
        self.info = EngineInfo(
            name="simulated",
            version=f"simulated (no model; times of: {table.what.split(',')[0]})",
            model=source.location,
            revision=source.revision,
            context_tokens=settings.max_model_len or CONTEXT_TOKENS,
            max_running=settings.max_running,
            continuous=True,
            can_sleep=True,
            resumes_calls=True,
        )
        self._settings = settings
        self._asleep = False
        self._table = table
        self._scale = settings.time_scale
        self._fault = fault or _table_faults(settings)
        self._runs: dict[int, _Run] = {}  # by order of arrival
        self._orders = itertools.count()
        self._waiting: list[tuple[int, int]] = []  # heap: priority, order
        self._ending: list[tuple[int, int]] = []  # heap: step of the last token, order; those who do not stream
        self._streaming: dict[int, _Run] = {}
        self._num_running = 0
        self._num_hanging = 0
        self._prefill_tokens = 0  # of prompts that have joined, not yet paid for
        self._step = 0
        self._wake = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._dead: str | None = None  # why; an error is made for each who asks, since one holds its frames

    @classmethod
    async def start(cls, source: ModelSource, settings: EngineSettings) -> "SimulatedEngine":
        """After as long as the settings say that loading takes. Raises EngineUnavailable if the location is
        `fails`: how a rollout or a cache is shown a model that does not load."""
        await asyncio.sleep(settings.simulated_load_s * settings.time_scale)
        if source.location.endswith(FAILS):
            raise EngineUnavailable(f"the simulated engine cannot load {source.location}: its name says so")
        return cls(source, settings)

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        self._check_awake()
        refuse_formats(job, "simulated")
        completion, calls = _completion(job, self.info.context_tokens), _calls(job)
        if (delta := completion.delta()) is not None:
            yield (
                delta if calls is None else calls.of(delta)
            )  # complete with what an earlier run had generated, or only counted
            return
        fault = self._fault(job)
        if fault == "exit":
            os._exit(EXIT_STATUS)
        if fault == "die":
            self._die("a simulated fault: die")
        if fault == "fail":
            raise JobFailed("a simulated fault: fail")
        self._check_awake()
        answer, num_prompt = _rest_of(job, completion.limit)
        order, run = next(self._orders), _Run(job, completion, answer, num_prompt, calls, fault == "hang")
        self._enter(order, run)
        try:
            while True:
                news = await run.news.get()
                if isinstance(news, Exception):
                    try:
                        raise news
                    finally:
                        del news  # else frame and error hold each other, and with them this engine
                yield news
                if news.finish_reason is not None:
                    return
        finally:
            self._leave(order)

    async def abort(self, job_id: JobId) -> None:
        for order, run in list(self._runs.items()):
            if run.job.id == job_id:
                run.advance(self._step)
                run.completion.end("abort")
                run.tell()
                self._leave(order)

    def load(self) -> Load:
        return Load(running=self._num_running, waiting=len(self._runs) - self._num_running, steps=self._step)

    def pids(self) -> tuple[int, ...]:
        return ()

    async def memory(self) -> Memory:
        """What the settings say it holds."""
        if self._asleep:
            return Memory(device_bytes=0, host_bytes=self._settings.simulated_bytes)
        return Memory(device_bytes=self._settings.simulated_bytes, host_bytes=0)

    async def sleep(self) -> None:
        self._asleep = True

    async def wake(self) -> None:
        await asyncio.sleep(self._settings.simulated_wake_s * self._scale)
        self._asleep = False

    async def close(self, *, force: bool = False) -> None:
        self._die("the simulated engine was closed")
        driver, self._driver = self._driver, None  # its cancellation holds its frame, and that this engine
        if driver is not None:
            driver.cancel()
            await asyncio.gather(driver, return_exceptions=True)

    # Coming and going ------------------------------------------------------------------------------

    def _enter(self, order: int, run: _Run) -> None:
        self._runs[order] = run
        heapq.heappush(self._waiting, (PRIORITY[run.job.lane], order))
        if self._driver is None:
            self._driver = asyncio.create_task(self._drive(), name="simulated engine")
        self._wake.set()

    def _join(self) -> None:
        """Jobs that wait take the free slots, the urgent lanes first."""
        while self._waiting and self._num_running < self.info.max_running:
            _, order = heapq.heappop(self._waiting)
            if (run := self._runs.get(order)) is None:
                continue  # aborted while it waited
            run.joined_at = self._step
            self._num_running += 1
            self._prefill_tokens += run.num_prompt
            if run.hangs:
                self._num_hanging += 1
            elif run.job.stream:
                self._streaming[order] = run
            else:
                heapq.heappush(self._ending, (self._step + len(run.answer), order))

    def _leave(self, order: int) -> None:
        run = self._runs.pop(order, None)
        if run is not None and run.joined_at is not None:
            self._num_running -= 1
            self._num_hanging -= run.hangs
            self._streaming.pop(order, None)
            self._wake.set()

    def _check_awake(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._asleep:
            raise JobFailed("the engine sleeps")

    def _die(self, reason: str) -> None:
        self._dead = self._dead or reason
        for run in self._runs.values():
            run.news.put_nowait(EngineDead(self._dead))
        self._runs.clear()
        self._streaming.clear()
        self._num_running = self._num_hanging = 0

    # Stepping --------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        """One step after another while anything moves. `due_s` is when the next one is through."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            self._join()
            num_moving = self._num_running - self._num_hanging
            if not num_moving:
                self._wake.clear()
                await self._wake.wait()
                due_s = max(due_s, loop.time())
                continue
            due_s = max(due_s, loop.time() - LAG_S) + self._step_s(num_moving) * self._scale
            ahead_s = due_s - loop.time()
            await asyncio.sleep(ahead_s if ahead_s >= NAP_S else 0)
            self._step += 1
            for order, run in list(self._streaming.items()):
                self._move(order, run)
            while self._ending and self._ending[0][0] <= self._step:
                _, order = heapq.heappop(self._ending)
                if (ended := self._runs.get(order)) is not None:
                    self._move(order, ended)

    def _step_s(self, num_moving: int) -> float:
        prefill = min(self._prefill_tokens, self._table.step_tokens)
        self._prefill_tokens -= prefill
        return self._table.decode_s[min(num_moving, self._table.slots)] + self._table.prefill_s * prefill

    def _move(self, order: int, run: _Run) -> None:
        run.advance(self._step)
        run.tell()
        if run.completion.finish_reason is not None:
            self._leave(order)


def _answer(prompt: Prompt, adapter: str | None) -> tuple[int, ...]:
    if call := _call_words(prompt):
        return (*range(len(WORDS), len(WORDS) + len(call)), END)
    said = prompt.model_dump_json(exclude_defaults=True) if isinstance(prompt, Chat) else prompt
    asked = said if adapter is None else [said, adapter]
    seed = hashlib.sha256(json.dumps(asked).encode()).digest()
    length = MIN_TOKENS + int.from_bytes(seed[:2], "big") % SPREAD_TOKENS
    words = (1 + (seed[n % 32] + n * seed[(n + 1) % 32]) % (len(WORDS) - 1) for n in range(length - 1))
    return (*words, END)


def _rest_of(job: EngineJob, limit: int) -> tuple[tuple[int, ...], int]:
    """(token ids still to come, tokens to prefill)."""
    adapter = job.adapter.name if job.adapter is not None else None
    _, token_ids, _ = simulated_completion(job.prompt, job.sampling.max_tokens, stop=job.sampling.stop, adapter=adapter)
    return token_ids[len(job.prefix_token_ids) : limit], estimate_tokens(job.prompt) + len(job.prefix_token_ids)


def _completion(job: EngineJob, context_tokens: int = CONTEXT_TOKENS + MAX_COMPLETION) -> Completion:
    """Raises JobRejected for a prompt over the context."""
    stand_in = [END] * estimate_tokens(job.prompt)
    only_count = job.sampling.max_tokens == 0
    check_prompt(stand_in, vocabulary=len(WORDS), context_tokens=context_tokens, only_count=only_count)
    return Completion(job, stand_in, _decoder(job.prompt), ends=(END,), context_tokens=context_tokens)


def _decoder(prompt: Prompt) -> Decode:
    words = (*WORDS, *_call_words(prompt))
    return lambda token_ids: "".join(words[token] for token in token_ids)


def _call_words(prompt: Prompt) -> tuple[str, ...]:
    """The call that a conversation is answered with, a word a token; none where it is not."""
    if not isinstance(prompt, Chat) or not prompt.offers_tools:
        return ()
    choice = prompt.tool_choice
    if choice == "auto" and prompt.messages[-1].role != "user":
        return ()
    name = choice.name if isinstance(choice, NamedTool) else prompt.tools[0].name
    return (OPEN, '\n{"name": "', name, '", "arguments": ', "{}", "}\n", CLOSE)


def _calls(job: EngineJob) -> Calls | None:
    chat = job.prompt
    if not isinstance(chat, Chat) or not chat.offers_tools:
        return None
    return Calls(job, HermesReader(), parallel=chat.parallel_tool_calls)


def _table_faults(settings: EngineSettings) -> Callable[[EngineJob], Fault | None]:
    """Those the latency table names, by prompt prefix. Raises SettingsError for a kind that is none."""
    faults: dict[str, Fault] = {}
    if settings.latency_table is not None:
        faults = json.loads(settings.latency_table.read_text()).get("faults", {})
    if unknown := set(faults.values()) - set(get_args(Fault)):
        raise SettingsError(f"latency table {settings.latency_table}: no such fault: {', '.join(map(str, unknown))}")

    def fault(job: EngineJob) -> Fault | None:
        if not isinstance(job.prompt, str):
            return None
        return next((kind for prefix, kind in faults.items() if job.prompt.startswith(prefix)), None)

    return fault

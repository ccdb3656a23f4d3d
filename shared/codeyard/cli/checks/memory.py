"""Is there enough host memory for what a worker here would hold, and does the worker's own limit leave it room?

Called by: cli.doctor.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from codeyard.cli.checks.check import Finding, Place, aside, fail, gib, ok, skipped, warn
from codeyard.cli.checks.gpu import look_for_gpus, wants_gpu
from codeyard.cli.checks.install import installed
from codeyard.cli.checks.models import Weights, weights_of
from codeyard.shared.settings import Settings
from codeyard.worker.machine_memory import HostMemory, bytes_of, host_memory
from codeyard.worker.memory_watch import SHRINK_AT

MIB = 2**20
GIB = 2**30
PROCESS_BYTES = 1 * GIB  # an engine's libraries and buffers in host memory, measured with torch and vllm
WEIGHT_OVERHEAD = 1.2  # as worker.warmup counts, before an engine was measured
KV_BYTES = 4 * GIB  # vLLM on a CPU takes VLLM_CPU_KVCACHE_SPACE, 4 unless it is set
SHM_BYTES = 1 * GIB  # what the processes of one engine share: Docker gives a container 64 MiB


async def check_memory(place: Place) -> list[Finding]:
    settings = place.settings
    host = await aside(host_memory)
    if settings.worker.engine == "simulated":
        return [ok(f"{_told(host)}; the simulated engine needs little")]
    gpus = await look_for_gpus(place.environment, within_s=place.answer_s * 2)
    packages = await aside(installed)
    on_gpu = wants_gpu(settings) and bool(gpus.usable) and "vllm-cpu" not in packages
    weights = await aside(lambda: weights_of(settings))
    kv_bytes = cache_bytes(place, vllm_here=not {"vllm", "vllm-cpu"}.isdisjoint(packages))
    findings = list(memory_findings(host, weights, settings, on_gpu=on_gpu, kv_bytes=kv_bytes))
    shared = await aside(lambda: _shared_bytes(Path("/dev/shm")))
    return [*findings, *shared_findings(shared, settings)]


def cache_bytes(place: Place, *, vllm_here: bool) -> int:
    """What one engine on a CPU takes for its KV cache at start: vLLM's does, torch's grows with what runs."""
    engine = place.settings.worker.engine
    if engine == "torch" or (engine == "auto" and not vllm_here):
        return 0
    asked = place.environment.get("VLLM_CPU_KVCACHE_SPACE", "")
    return place.settings.engine.kv_cache_memory_bytes or (int(asked) * GIB if asked.isdecimal() else KV_BYTES)


def needed_bytes(weights: Sequence[Weights], settings: Settings, *, on_gpu: bool, kv_bytes: int) -> int:
    """Host memory of all engines that may be loaded at once, about."""
    if on_gpu:
        return PROCESS_BYTES * len(weights) + settings.worker.host_budget_bytes
    each = sorted(int(one.num_bytes * WEIGHT_OVERHEAD) + PROCESS_BYTES + kv_bytes for one in weights)
    budget = settings.worker.device_budget_bytes
    # With a budget some are put away for others, but the largest one must fit.
    return sum(each) if budget is None else max(each[-1] if each else 0, min(sum(each), budget))


def memory_findings(
    host: HostMemory, weights: Sequence[Weights], settings: Settings, *, on_gpu: bool, kv_bytes: int
) -> Iterator[Finding]:
    limit = bytes_of(settings.worker.memory_limit, host.total_bytes)
    if not weights:
        yield skipped(f"{_told(host)}; no model to add up")
        return
    need = needed_bytes(weights, settings, on_gpu=on_gpu, kv_bytes=kv_bytes)
    names = ", ".join(one.alias for one in weights)
    about = f"{names} {'needs' if len(weights) == 1 else 'need'} about {gib(need)}"
    fewer = "a smaller or quantised model, fewer models, or CODEYARD_WORKER_DEVICE_BUDGET_BYTES to hold some at a time"
    if need > host.total_bytes:
        where = f"of {host.limited_by}" if host.limited_by else "of this machine"
        yield fail(f"{about}, more than all memory {where}: {gib(host.total_bytes)}", fewer)
    elif need > limit * SHRINK_AT:
        yield warn(
            f"{about}; the worker makes room at {SHRINK_AT:.0%} of its limit of {gib(limit)}: its window stays narrow",
            f"a higher CODEYARD_WORKER_MEMORY_LIMIT, or {fewer}",
        )
    elif need > host.available_bytes:
        yield warn(f"{about}, and {gib(host.available_bytes)} are free now", "end what else runs here, or wait for it")
    else:
        yield ok(f"{_told(host)}; {about}")


def _told(host: HostMemory) -> str:
    limited = f" (limited by {host.limited_by})" if host.limited_by else ""
    return f"{gib(host.available_bytes)} of {gib(host.total_bytes)} free{limited}"


def shared_findings(shared_bytes: int | None, settings: Settings) -> Iterator[Finding]:
    """Only the processes of one engine over several GPUs speak through it."""
    if settings.engine.tensor_parallel_size > 1 and shared_bytes is not None and shared_bytes < SHM_BYTES:
        yield warn(
            f"/dev/shm has {gib(shared_bytes)}, too little for an engine over several GPUs",
            "docker run --shm-size 4g, or an emptyDir with medium: Memory at /dev/shm (Kubernetes)",
        )


def _shared_bytes(path: Path) -> int | None:
    try:
        space = os.statvfs(path)
    except OSError:
        return None
    return space.f_frsize * space.f_blocks

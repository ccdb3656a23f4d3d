"""What processes hold of host and accelerator memory: measured, never guessed. Linux, and NVIDIA's library.

Host memory is the proportional set size where the kernel tells it (pages shared by n processes count 1/n),
else the resident one. Called by: the engines, worker.cache, worker.memory_watch.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import os
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from codeyard.worker.engines.port import Memory

KIB = 1_024


class Meter:
    """What one engine holds.

    In a container the driver knows our processes by other numbers, or not at all. There an engine's device
    memory is the change of all that is in use across its own load, sleep and wake: right as long as nothing
    else loads meanwhile, which the model cache sees to.
    """

    def __init__(self) -> None:
        self._device_bytes = 0

    @contextlib.asynccontextmanager
    async def across(self) -> AsyncIterator[None]:
        """Around whatever changes what the engine holds."""
        before = await asyncio.to_thread(used_device_bytes)
        yield
        self._device_bytes += await asyncio.to_thread(used_device_bytes) - before

    def measure(self, pids: Collection[int], device: str) -> Memory:
        """`device` as the engine names it. Blocks for some milliseconds."""
        host = host_bytes(pids)
        if not device.startswith("cuda"):
            return Memory(device_bytes=host, host_bytes=host)
        told = accelerator_bytes(pids)
        return Memory(device_bytes=max(0, self._device_bytes) if told is None else told, host_bytes=host)


def host_bytes(pids: Iterable[int]) -> int:
    """Processes that have ended count nothing."""
    return sum(_process_bytes(pid) for pid in pids)


def accelerator_bytes(pids: Collection[int]) -> int | None:
    """On all NVIDIA devices. None where nobody can tell: no library (it comes with vLLM, `nvidia-ml-py`), no
    driver, or one that does not know these processes."""
    with _devices() as (nvml, devices):
        running = [one for device in devices for one in nvml.nvmlDeviceGetComputeRunningProcesses(device)]
        ours = [one.usedGpuMemory for one in running if one.pid in pids and one.usedGpuMemory is not None]
        return sum(ours) if ours else None


def used_device_bytes() -> int:
    """In use on all NVIDIA devices, by whomever. 0 without any."""
    with _devices() as (nvml, devices):
        return sum(nvml.nvmlDeviceGetMemoryInfo(device).used for device in devices)


@contextlib.contextmanager
def _devices() -> Iterator[tuple[Any, list[Any]]]:
    """NVIDIA's library and its devices: none without the library or a driver."""
    if importlib.util.find_spec("pynvml") is None:
        yield None, []
        return
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield nvml, []
        return
    try:
        yield nvml, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _process_bytes(pid: int) -> int:
    folder = Path("/proc") / str(pid)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (folder / "smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * KIB
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0

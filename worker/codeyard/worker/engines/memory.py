"""What processes hold of host and accelerator memory: measured, never guessed. Linux, and NVIDIA's library.

Host memory is the proportional set size where the kernel tells it (pages shared by n processes count 1/n),
else the resident one. Called by: the engines, worker.cache, worker.memory_watch.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from codeyard.worker.engines.port import Memory

KIB = 1_024


def measured(pids: Collection[int], device: str) -> Memory:
    """Of these processes together; `device` as the engine names it. Blocks for some milliseconds."""
    host = host_bytes(pids)
    return Memory(device_bytes=accelerator_bytes(pids) if device.startswith("cuda") else host, host_bytes=host)


def host_bytes(pids: Iterable[int]) -> int:
    """Processes that have ended count nothing."""
    return sum(_process_bytes(pid) for pid in pids)


def accelerator_bytes(pids: Collection[int]) -> int:
    """On all NVIDIA devices. 0 without the library that knows, which comes with vLLM (`nvidia-ml-py`)."""
    if importlib.util.find_spec("pynvml") is None:
        return 0
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return 0
    try:
        devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        running = [one for device in devices for one in nvml.nvmlDeviceGetComputeRunningProcesses(device)]
        return sum(one.usedGpuMemory or 0 for one in running if one.pid in pids)
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

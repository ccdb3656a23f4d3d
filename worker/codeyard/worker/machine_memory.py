"""How much memory this process may use here: of the machine, of its containers, of its GPUs. Linux and NVIDIA.

A container's limit is that of a control group, and every group above it counts too: the tightest one kills.
Page cache that nobody maps is not used memory: the kernel gives it back before it kills.
Called by: worker.memory_watch, `codeyard doctor`.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

KIB = 1_024
GIB = 2**30
UNLIMITED = 2**60  # bytes; version 1 writes "no limit" as the largest number of pages


@dataclass(frozen=True, slots=True)
class HostMemory:
    """In bytes. `limited_by` is the control group that sets `total_bytes`; empty: the machine itself."""

    total_bytes: int
    available_bytes: int  # what could still be taken before the kernel ends a process
    limited_by: str = ""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of one accelerator, by whomever it is used."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    limit_bytes: int
    used_bytes: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Read now. `root` is where /proc and /sys are. Without Linux's files all memory counts as available."""
    meminfo = _meminfo(root)
    total = meminfo.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available, limited_by = meminfo.get("MemAvailable", total), ""
    for group in _groups(root):
        if group.limit_bytes < total:
            total, limited_by = group.limit_bytes, group.name
        available = min(available, max(0, group.limit_bytes - group.used_bytes))
    return HostMemory(total, available, limited_by)


def bytes_of(limit: float, total_bytes: int) -> int:
    """A memory limit of the settings: up to 1 a share of `total_bytes`, above it bytes, never more than there are."""
    return int(limit * total_bytes) if limit <= 1 else min(int(limit), total_bytes)


def device_memory(environment: Mapping[str, str] = os.environ) -> DeviceMemory | None:
    """The fullest of the NVIDIA GPUs this process may use. None without any, or without NVIDIA's library (it
    comes with vLLM, `nvidia-ml-py`)."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        told = [nvml.nvmlDeviceGetMemoryInfo(handles[index]) for index in visible(names, environment)]
    except nvml.NVMLError:
        return None  # a GPU that shares the host's memory has none of its own to tell of
    finally:
        nvml.nvmlShutdown()
    return max(
        (DeviceMemory(one.used, one.total) for one in told),
        key=lambda one: one.used_bytes / one.total_bytes,
        default=None,
    )


def visible(uuids: Sequence[str], environment: Mapping[str, str]) -> list[int]:
    """Which of the GPUs a process may use: places in `uuids`, as CUDA_VISIBLE_DEVICES (places, or beginnings of
    UUIDs) names them; it ends at the first that is none. All of them where it is not set."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for word in named.split(","):
        name = word.strip()
        places = (
            [int(name)] if name.isdecimal() else [n for n, uuid in enumerate(uuids) if name and uuid.startswith(name)]
        )
        if not places or places[0] >= len(uuids):
            break
        found.append(places[0])
    return found


# Control groups ------------------------------------------------------------------------------------


def _groups(root: Path) -> Iterator[_Group]:
    """Those of this process that limit memory, its own first, then the ones around it."""
    with contextlib.suppress(OSError, ValueError):
        own = (root / "proc/self/cgroup").read_text()
        mounts = (root / "proc/self/mountinfo").read_text()
        for line in own.splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                yield from _chain(root, mounts, path, version=2)
            elif "memory" in controllers.split(","):
                yield from _chain(root, mounts, path, version=1)


def _chain(root: Path, mounts: str, path: str, *, version: int) -> Iterator[_Group]:
    for point, top in _mounted(mounts, version):
        inside = PurePosixPath(path)
        # In a container without a namespace of its own, what is mounted is a part of the tree.
        inside = inside.relative_to(top) if inside.is_relative_to(top) else PurePosixPath(path.lstrip("/"))
        folder = root / point.lstrip("/") / str(inside).lstrip("/")
        end = root / point.lstrip("/")
        while folder.is_relative_to(end):
            with contextlib.suppress(OSError, ValueError):
                limit, used = _limit(folder, version), _used(folder, version)
                if limit < UNLIMITED:
                    yield _Group("/" + str(folder.relative_to(root)), limit, used)
            folder = folder.parent


def _mounted(mounts: str, version: int) -> Iterator[tuple[str, str]]:
    """Where the memory controller's tree is mounted, and which part of it. Format: proc(5), mountinfo."""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if (version == 2 and kind[0] == "cgroup2") or (
            version == 1 and kind[0] == "cgroup" and "memory" in kind[2].split(",")
        ):
            yield fields[4], fields[3]


def _limit(folder: Path, version: int) -> int:
    if version == 1:
        return int((folder / "memory.limit_in_bytes").read_text())
    limits = [UNLIMITED]
    for name in ("memory.max", "memory.high"):  # over `high` a process is not killed, but hardly runs
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((folder / name).read_text()))  # "max": no limit
    return min(limits)


def _used(folder: Path, version: int) -> int:
    current, cache = (
        ("memory.current", "inactive_file") if version == 2 else ("memory.usage_in_bytes", "total_inactive_file")
    )
    used = int((folder / current).read_text())
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == cache:
            return max(0, used - int(value))
    return used


def _meminfo(root: Path) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * KIB
    return found

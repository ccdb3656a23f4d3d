"""What the machine is, and what else ran on it: without that, figures of a shared machine mean nothing.

Called by: bench_flood, flood_side.
"""

import contextlib
import os
import platform
import time
from pathlib import Path

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class CpuMeter:
    """Cores that programs other than this one and its children have used since it was made."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._busy_s, self._ours_s = _busy_s(), _ours_s()

    def others(self) -> float | None:
        """In cores; None where /proc does not tell. Children that ended meanwhile count as others."""
        if self._busy_s is None:
            return None
        busy_s, ours_s = (_busy_s() or 0.0) - self._busy_s, _ours_s() - self._ours_s
        return max(0.0, (busy_s - ours_s) / (time.monotonic() - self._began_s))


def describe() -> str:
    """Cores and processor."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = (PROC / "cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores, {model}"


def _busy_s() -> float | None:
    """Of all cores since boot: everything but idle and waiting for a disk (proc(5), stat)."""
    try:
        _, user, nice, system, _, _, *rest = (PROC / "stat").read_text().split("\n", 1)[0].split()
    except (OSError, ValueError):
        return None
    return sum(map(int, (user, nice, system, *rest[:3]))) / _TICKS_PER_S


def _ours_s() -> float:
    """CPU time of this process and all its descendants that live."""
    used_s: dict[int, float] = {}
    parents: dict[int, int] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], used_s[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return sum(seconds for pid, seconds in used_s.items() if _descends(pid, parents))


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = parents.get(pid, 0)
    return False

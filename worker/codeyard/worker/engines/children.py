"""The processes below a process, and how to be rid of them: also when this one is killed with -9.

Run as `python -m codeyard.worker.engines.children PID...` it is the reaper: it waits until its stdin
ends, which the kernel sees to when its parent dies of anything, and then kills those processes and all
below them. Linux; elsewhere only the processes named are known, not those below.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def descendants(pids: Iterable[int]) -> list[int]:
    """Every process below these, nearest first, without them."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # "pid (name) state ppid ...": the name may hold blanks and brackets
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            below.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    level = list(pids)
    while level:
        level = [child for pid in level for child in below.get(pid, [])]
        found += level
    return found


def kill(pids: Sequence[int]) -> None:
    """These and all below them, at once. Those already gone are passed over."""
    for pid in [*pids, *descendants(pids)]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


class Reaper:
    """Ends `pids` and all below them when this process is gone, however it went."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, pids: Sequence[int]) -> "Reaper":
        module = "codeyard.worker.engines.children"
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", module, *map(str, pids)),
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C ends the worker, which is what this one waits for
            )
        )

    async def dismiss(self) -> None:
        """The processes are gone: it must not touch whoever has their numbers next."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process._transport.close()  # type: ignore[attr-defined]  # else it warns when it is collected


def main() -> None:
    pids = [int(argument) for argument in sys.argv[1:]]
    handles = []
    for pid in pids:
        with contextlib.suppress(OSError, AttributeError):
            handles.append(os.pidfd_open(pid))  # stays this process, whoever gets the number later
    sys.stdin.buffer.read()
    below = descendants(pids) if len(handles) == len(pids) else []
    for handle in handles:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    for pid in below:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()

"""An engine's processes, those below them included, and how to be rid of them: also when this one is killed with -9.

Run as `python -m codeyard.worker.engines.children PID... FOLDER...` it is the reaper: it waits until its
stdin ends, which the kernel sees to when its parent dies of anything, then kills those processes and removes
those folders. Linux only, as is vLLM: a process is held by a pidfd, which never means another one that got
its number later.
"""

import asyncio
import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

KILL_S = 3.0  # for killed processes to be gone: one that is has given its GPU memory back


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


class Processes:
    """Some processes and all below them. One whose parent ends first stays known, if it was there when
    this was made or at the last `kill`."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._handles: dict[int, int] = {}  # pid -> pidfd
        self._add(pids)
        self._add(descendants(self._handles))

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._handles)

    def kill(self) -> None:
        """At once. Those already gone are passed over."""
        self._add(descendants(pid for pid, handle in self._handles.items() if not _has_ended(handle)))
        for handle in self._handles.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def wait(self, within_s: float) -> bool:
        """Until all have ended. False if some had not in time, as one in an uninterruptible call. Blocks."""
        until_s = time.monotonic() + within_s
        return all(_has_ended(handle, until_s - time.monotonic()) for handle in self._handles.values())

    def forget(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _add(self, pids: Iterable[int]) -> None:
        for pid in pids:
            if pid not in self._handles:
                with contextlib.suppress(ProcessLookupError):
                    self._handles[pid] = os.pidfd_open(pid)


class Reaper:
    """Ends processes when this one is gone, however it went."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, processes: Processes, *folders: str) -> "Reaper":
        module = "codeyard.worker.engines.children"
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", module, *map(str, processes.pids), *folders),
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C ends the worker, which is what this one waits for
            )
        )

    async def dismiss(self) -> None:
        """The processes are gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process._transport.close()  # type: ignore[attr-defined]  # else it warns when it is collected


def main() -> None:
    processes = Processes(int(argument) for argument in sys.argv[1:] if argument.isdigit())
    sys.stdin.buffer.read()
    processes.kill()
    processes.wait(KILL_S)
    for argument in sys.argv[1:]:
        if not argument.isdigit():
            shutil.rmtree(argument, ignore_errors=True)


def _has_ended(handle: int, within_s: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(max(0.0, within_s) * 1e3))


if __name__ == "__main__":
    main()

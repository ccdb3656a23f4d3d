"""What an engine's processes leave on the machine when they are killed: sockets, shared memory.

vLLM never removes its sockets' files, and a process that is killed cannot unlink its shared memory: a worker
that loads models all day would fill /tmp and /dev/shm. Linux only. Called by: the vLLM engine.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable
from multiprocessing import resource_tracker
from pathlib import Path

PREFIX = "codeyard-vllm-"
NAME_CHARS = 8 + 36 + 2  # what `tempfile` adds, vLLM's name of a socket, two slashes
SOCKET_CHARS = 107  # a socket's path: sizeof(sockaddr_un.sun_path) - 1
SHARED = Path("/dev/shm")
KINDS = {"psm_": "shared_memory", "sem.mp-": "semaphore"}  # how Python's multiprocessing names them


class Remains:
    """Of one engine. `folder` is for its sockets; it is there until `clear`."""

    def __init__(self) -> None:
        fits = len(tempfile.gettempdir()) + len(PREFIX) + NAME_CHARS <= SOCKET_CHARS
        self.folder = tempfile.mkdtemp(prefix=PREFIX, dir=None if fits else "/tmp")
        self._segments: set[Path] = set()

    def note(self, pids: Iterable[int]) -> None:
        """While they live: afterwards nothing tells whose a segment was."""
        for pid in pids:
            self._segments |= _segments_of(str(pid))

    def clear(self) -> None:
        """When they have ended. What they unlinked themselves, or this process still uses, is passed over."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._segments - _segments_of("self"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                kind = next(kind for prefix, kind in KINDS.items() if path.name.startswith(prefix))
                # Else the tracker, which is this process's and its children's, warns of it at exit.
                resource_tracker.unregister(f"/{path.name.removeprefix('sem.')}", kind)
        self._segments.clear()


def _segments_of(pid: str) -> set[Path]:
    found = set()
    with contextlib.suppress(OSError):
        for line in (Path("/proc") / pid / "maps").read_text().splitlines():
            path = Path(line.split(maxsplit=5)[-1])  # "address rights offset device inode path"
            if path.parent == SHARED and path.name.startswith(tuple(KINDS)):
                found.add(path)
    return found

"""No process that the tests started outlives them, even if they are killed with -9 (Linux).

`watching()` marks this process's environment, which every child inherits, and starts this file as a process
that holds a pipe to us. When the pipe closes, whatever still carries the mark is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

MARK = "TESTS_OF_CODEYARD"  # not CODEYARD_*: those are settings, which some tests take away


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """For as long as the context lasts; at its end leftovers are killed too."""
    if sys.platform != "linux":
        yield
        return
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    mark = os.environ[MARK] = uuid.uuid4().hex
    with subprocess.Popen(
        [sys.executable, "-I", __file__, mark], env=unmarked, stdin=subprocess.PIPE, start_new_session=True
    ):
        try:
            yield
        finally:
            del os.environ[MARK]


def marked(mark: str) -> list[int]:
    """Processes that were started with `mark` in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if wanted in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
    return found


def main() -> None:
    while os.read(0, 4096):
        pass
    while processes := marked(sys.argv[1]):  # again: one may have started another meanwhile
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main()

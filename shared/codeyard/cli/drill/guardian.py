"""Run one server and see to it that it does not outlive who started it.

    python guardian.py COMMAND...      (standard input: a pipe held open by who started it)

Prints the server's process id, then waits. The server and whatever it started in its process group are
killed when the pipe closes, which the kernel does even when that one is killed with -9; and when
the guardian itself is killed. SIGTERM is passed on. Uses nothing but the standard library.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1


def main() -> int:
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=_own_group)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    print(server.pid, flush=True)
    threading.Thread(target=_kill_when_pipe_closes, args=(server.pid,), daemon=True).start()
    try:
        return server.wait()
    finally:
        _kill(server.pid)  # a wrapper script may have left the real server behind


def _own_group() -> None:
    """A group of its own to be killed by; and on Linux death with the guardian."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_when_pipe_closes(group: int) -> None:
    while os.read(0, 4096):
        pass
    _kill(group)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

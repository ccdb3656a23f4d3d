"""Who is behind a process id, or behind a port, as far as /proc tells. Linux; elsewhere nobody is known.

Called by: checks.ports, checks.gpu.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LISTEN = "0A"  # state in /proc/net/tcp, see proc(5)
SHOWN_WORDS = 3  # `python -m http.server`; what follows may be a password
MAX_COMMAND = 60  # characters shown
ANCESTORS = 16  # looked at: an engine is a few processes below its worker


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    command: str  # its program and the next words
    ours: bool  # a codeyard command, or below one

    def __str__(self) -> str:
        return f"{self.command or 'a process'} (pid {self.pid})"


def process(pid: int, root: Path = Path("/proc")) -> Process:
    words = _command(root, pid)[:SHOWN_WORDS]
    command = " ".join([Path(words[0]).name, *words[1:]]) if words else ""
    short = command if len(command) <= MAX_COMMAND else command[: MAX_COMMAND - 3] + "..."
    return Process(pid, short, any(_is_codeyard(_command(root, one)) for one in _line(root, pid)))


def listener(port: int, root: Path = Path("/proc")) -> Process | None:
    """Who listens on a TCP port of this machine. None: nobody, or another user's process that hides it."""
    inodes = set(_inodes(port, root))
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for folder in root.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for handle in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(handle) in wanted:
                        return process(int(folder.name), root)
    return None


def _inodes(port: int, root: Path) -> Iterator[str]:
    for name in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            for line in (root / name).read_text().splitlines()[1:]:
                fields = line.split()
                # "sl local_address rem_address st ... inode": addresses are hexadecimal, host:port
                if len(fields) > 9 and fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _line(root: Path, pid: int) -> Iterator[int]:
    """It, its parent, and so on."""
    for _ in range(ANCESTORS):
        yield pid
        try:
            # "pid (name) state ppid ...": the name may hold blanks and brackets
            pid = int((root / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
        if pid <= 1:
            return


def _command(root: Path, pid: int) -> list[str]:
    try:
        return (root / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _is_codeyard(words: list[str]) -> bool:
    """`/x/bin/codeyard worker`, `python /x/bin/codeyard worker`, `python -m codeyard.cli.main worker`; not
    `vim /home/me/codeyard/notes`."""
    program = [Path(word).name for word in words[:2]]
    return "codeyard" in program or any(
        before == "-m" and word.startswith("codeyard.") for before, word in itertools.pairwise(words)
    )

"""Is that consumer still alive? A lock file per consumer: the kernel frees it however the process ends.

`flock` belongs to the open file, not to the process, so that it also tells consumers of one process
apart: https://man7.org/linux/man-pages/man2/flock.2.html. A forked child must drop its copies.
"""

import fcntl
import os
import uuid
from pathlib import Path
from typing import Self

_OPEN_HERE: set[int] = set()  # descriptors of locks held by this process


class ConsumerLock:
    """Held from `acquire` to `release`, or to the end of the process. Both block only on the local disk."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @property
    def name(self) -> str:
        return self._path.name

    @classmethod
    def acquire(cls, folder: Path) -> Self:
        """Raises OSError."""
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / uuid.uuid4().hex
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        _OPEN_HERE.add(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return cls(path, descriptor)

    def release(self) -> None:
        if self._descriptor in _OPEN_HERE:
            _OPEN_HERE.discard(self._descriptor)
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)


def is_alive(folder: Path, name: str) -> bool:
    """Whether the consumer behind a lock still holds it."""
    try:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def bury(folder: Path, name: str) -> None:
    """Remove the lock file of a consumer that is dead."""
    (folder / name).unlink(missing_ok=True)


def _drop_copies() -> None:
    """Else a consumer whose process was killed would seem alive for as long as a child lives."""
    for descriptor in _OPEN_HERE:
        os.close(descriptor)
    _OPEN_HERE.clear()


os.register_at_fork(after_in_child=_drop_copies)

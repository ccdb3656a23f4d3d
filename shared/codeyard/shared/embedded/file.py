"""The embedded file as the adapters see it: `read` and `write` work on it, `watcher` to wait for changes.

Promise: adapters of one process that name one file share one writer, one reader and one watcher, from
whatever event loop they call; a process forked off opens anew. Called by: store.sqlite, broker.sqlite.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from codeyard.shared.embedded.clock import FileClock
from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.identity import Opened, close_cleanly
from codeyard.shared.embedded.place import embedded_path
from codeyard.shared.embedded.schema import prepare
from codeyard.shared.embedded.transactions import Call, TransactionThread, Work
from codeyard.shared.embedded.watcher import Watcher

T = TypeVar("T")
WallClock = Callable[[], float]

LOCK_PATIENCE_S = 5.0  # for another process's transaction, which takes milliseconds


class EmbeddedFile:
    def __init__(self, path: Path, wall: WallClock) -> None:
        self.path = path
        self.users = 0  # adapters that have it open; under the registry's lock
        self._wall = wall
        self._pid = os.getpid()
        self._opened = opened = Opened(path)
        clock = FileClock(wall)
        self.watcher = Watcher(path, opened, clock, patience_s=LOCK_PATIENCE_S)
        self._writer = TransactionThread(
            path, opened, clock, begin="BEGIN IMMEDIATE", patience_s=LOCK_PATIENCE_S, on_change=self.watcher.poke
        )
        self._reader = TransactionThread(path, opened, clock, begin="BEGIN", patience_s=LOCK_PATIENCE_S)

    @classmethod
    async def open(cls, url: str, *, wall: WallClock = time.time) -> "EmbeddedFile":
        """Shared with everyone here who named it with the same clock; `close` it once.
        Raises SettingsError if it cannot be used, FileUnavailable if it is kept locked."""
        opening = asyncio.create_task(asyncio.to_thread(_acquire, url, wall))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_give_back)  # the thread cannot be stopped
            raise

    async def close(self) -> None:
        """Give up this use of it; the last one finishes what waits and closes the file."""
        await asyncio.to_thread(_release, self)

    @property
    def locks(self) -> Path:
        """The folder of the consumers' lock files."""
        return self.path.with_name(self.path.name + "-consumers")

    async def read(self, work: Work[T], *, timeout_s: float) -> T:
        """Run on a consistent snapshot. Raises FileUnavailable, or what `work` raises."""
        return await self._call(self._reader, work, timeout_s)

    async def write(self, work: Work[T], *, timeout_s: float) -> T:
        """Run in a transaction and return when it is on disk. Raises FileUnavailable, or what `work` raises."""
        return await self._call(self._writer, work, timeout_s)

    def start_write(self, work: Work[T]) -> Call[T]:
        """As `write`, for a caller that must learn the outcome whatever becomes of the task that asked."""
        self._check_process()
        call = Call(work)
        self._writer.start(call)
        return call

    async def _call(self, thread: TransactionThread, work: Work[T], timeout_s: float) -> T:
        self._check_process()
        call = Call(work)
        thread.start(call)
        try:
            return await call.result(timeout_s)
        finally:
            call.abandoned = True

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise FileUnavailable(f"{self.path} was opened before a fork; open it again in the child")

    def shut(self) -> None:
        """Blocks until what waits is written."""
        self._writer.close()
        self._reader.close()
        self.watcher.close()
        close_cleanly(self.path, self._opened)


_open_files: dict[tuple[Path, WallClock], EmbeddedFile] = {}
_lock = threading.Lock()
_of_the_parent: list[EmbeddedFile] = []  # kept: even closing a connection that was forked harms the file


def _acquire(url: str, wall: WallClock) -> EmbeddedFile:
    path = embedded_path(url)
    with _lock:
        file = _open_files.get((path, wall))
        if file is None:
            prepare(path, patience_s=LOCK_PATIENCE_S)
            file = _open_files[path, wall] = EmbeddedFile(path, wall)
        file.users += 1
        return file


def _release(file: EmbeddedFile) -> None:
    if file in _of_the_parent:
        return
    with _lock:
        file.users -= 1
        last = file.users == 0
        if last:
            _open_files.pop((file.path, file._wall), None)
    if last:
        file.shut()


def _give_back(opening: "asyncio.Task[EmbeddedFile]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        threading.Thread(target=_release, args=(opening.result(),), name="codeyard-release").start()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that is not here may have held the old one
    _of_the_parent.extend(_open_files.values())
    _open_files.clear()


os.register_at_fork(after_in_child=_forget)

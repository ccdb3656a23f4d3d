"""Tell waiters that the file changed, whoever changed it.

SQLite counts commits (`PRAGMA data_version`) but wakes nobody, so one thread looks: every 5 ms while
there is traffic, slowing down to every 50 ms, and at once after a commit of this process. It sleeps
while nobody waits. Called by: embedded.file.
"""

import logging
import sqlite3
import threading
from pathlib import Path
from typing import Protocol

from codeyard.shared.embedded.clock import FileClock
from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.identity import Opened
from codeyard.shared.embedded.schema import connect

log = logging.getLogger(__name__)

SHORTEST_S = 0.005
LONGEST_S = 0.05
SLOW_DOWN = 1.5


class Interest(Protocol):
    def look(self, db: sqlite3.Connection, now: float, changed: bool) -> None:
        """Called in the watcher's thread at every look; wakes whom it concerns. `changed` may be true
        without need, never false while something was committed since the look before."""

    def lost(self) -> None:
        """Called there when the file is not under its path any more: whoever waits should ask, and be told."""


class Watcher:
    def __init__(self, path: Path, opened: Opened, clock: FileClock, *, patience_s: float) -> None:
        self._path = path
        self._opened = opened
        self._clock = clock
        self._patience_s = patience_s
        self._interests: tuple[Interest, ...] = ()  # replaced under the condition, read by the thread
        self._condition = threading.Condition()
        self._poked = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, interest: Interest) -> None:
        with self._condition:
            self._interests = (*self._interests, interest)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="codeyard-watcher", daemon=True)
                self._thread.start()
        self.poke()

    def remove(self, interest: Interest) -> None:
        with self._condition:
            self._interests = tuple(one for one in self._interests if one is not interest)

    def poke(self) -> None:
        """Look now."""
        with self._condition:
            self._poked = True
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(self._patience_s)

    def _run(self) -> None:
        db: sqlite3.Connection | None = None
        version = -1
        pause_s = SHORTEST_S
        while self._sleep(pause_s):
            pause_s = min(LONGEST_S, pause_s * SLOW_DOWN)
            try:
                self._opened.check()
                if db is None:
                    db, version = connect(self._path, patience_s=self._patience_s, read_only=True), -1
                now_version = db.execute("PRAGMA data_version").fetchone()[0]
                if now_version != version:
                    pause_s = SHORTEST_S
                self._look(db, changed=now_version != version)
                version = now_version
            except FileUnavailable:
                pause_s = LONGEST_S
                for interest in self._interests:
                    interest.lost()
            except Exception as error:  # waiters read by themselves now and then; here only try again
                log.warning("embedded_watch_failed", extra={"path": str(self._path), "error": str(error)})
                pause_s = LONGEST_S
                if db is not None:
                    db.close()
                    db = None
        if db is not None:
            db.close()

    def _sleep(self, pause_s: float) -> bool:
        """False: time to end."""
        with self._condition:
            while not self._interests and not self._closing:
                self._condition.wait()
            if not self._poked and not self._closing:
                self._condition.wait(pause_s)
            self._poked = False
            return not self._closing

    def _look(self, db: sqlite3.Connection, *, changed: bool) -> None:
        now = self._clock.now(db.execute("SELECT clock FROM meta").fetchone()[0])
        for interest in self._interests:
            interest.look(db, now, changed)

"""The file's clock: the machine's wall time, never going back within one file.

A step back of the wall clock, in this process or between two that share the file, becomes an offset:
time goes on from the latest moment anyone has written, at its usual pace.
"""

import threading
from collections.abc import Callable


class FileClock:
    """Thread-safe. `wall` gives seconds since the epoch."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._lock = threading.Lock()
        self._latest = 0.0
        self._offset_s = 0.0

    def now(self, persisted: float) -> float:
        """Not earlier than any answer before, nor than `persisted`, the latest written to the file."""
        with self._lock:
            wall = self._wall()
            latest = max(self._latest, persisted)
            if wall + self._offset_s < latest:
                self._offset_s = latest - wall
            self._latest = max(latest, wall + self._offset_s)
            return self._latest

"""What a closed engine did not give back.

Its processes are gone when it was closed, and their memory with them; that is why engines are processes. So
what can stay behind is a process that did not end (stuck in a driver call, say). It is named in the log and
its memory counts as used, a quarantine, until it is gone. Called by: worker.cache.model_cache.
"""

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path

from codeyard.worker.engines.memory import accelerator_bytes, host_bytes
from codeyard.worker.engines.port import Memory

log = logging.getLogger(__name__)

SETTLE_S = 0.2  # between looks at a process that was killed
LOOKS = 10


class Accounts:
    """Measures after each close. The sums are of the last look; `look` takes another."""

    def __init__(self) -> None:
        self._left: set[int] = set()  # processes of closed engines that have not ended
        self.quarantined_bytes = 0

    async def closed(self, revision: str, pids: Collection[int], held: Memory) -> None:
        """An engine with these processes was closed while it held that much."""
        self._left |= set(pids)
        for _ in range(LOOKS):
            await self.look()
            if not self._left & set(pids):
                return
            await asyncio.sleep(SETTLE_S)
        log.error(
            "engine_memory_not_returned",
            extra={
                "revision": revision,
                "held_bytes": held.device_bytes,
                "left_bytes": self.quarantined_bytes,
                "pids": sorted(self._left & set(pids)),
                "hint": "its processes did not end; their memory counts as used until they do",
            },
        )

    async def look(self) -> None:
        """Measure what is left now."""
        self._left = {pid for pid in self._left if _lives(pid)}
        self.quarantined_bytes = await asyncio.to_thread(_bytes_of, frozenset(self._left)) if self._left else 0


def _bytes_of(pids: frozenset[int]) -> int:
    return accelerator_bytes(pids) or host_bytes(pids)


def _lives(pid: int) -> bool:
    """A process that has ended and waits to be collected holds nothing."""
    try:
        # "pid (name) state ...": the name may hold blanks and brackets
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False

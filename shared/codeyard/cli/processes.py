"""Gateway and worker as child processes, for the demo and the drill: ended with their parent."""

import asyncio
import ctypes
import os
import signal
import sys
from collections import deque
from dataclasses import dataclass, field

from codeyard.shared.errors import FleetError

READY_S = 180.0  # a cold import of torch or vLLM on a slow disk included
STOP_S = 20.0
TAIL_LINES = 12


@dataclass(slots=True, eq=False)
class Child:
    """One `codeyard ...` process. `ready` is the rest of the line that begins with its announcement."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    announcement: str
    module: str = "codeyard.cli.main"
    keeps_settings: bool = True  # False: without the CODEYARD_* of this process's environment
    process: asyncio.subprocess.Process | None = None
    ready: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    _reader: asyncio.Task[None] | None = None
    _announced: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> str:
        """Return what it announced. Raises FleetError with its last lines if it ended instead."""
        self._announced, self.ready = asyncio.Event(), ""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            *self.arguments,
            env={**self._inherited(), **self.environment, "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self._reader = asyncio.create_task(self._read(self.process), name=f"output of {self.name}")
        try:
            async with asyncio.timeout(READY_S):
                await self._announced.wait()
        except TimeoutError:
            raise FleetError(f"{self.name} was not ready within {READY_S:g} s:\n{self.last_lines()}") from None
        if not self.ready:
            raise FleetError(f"{self.name} ended at start:\n{self.last_lines()}")
        return self.ready

    async def kill(self) -> None:
        """-9: it gets no chance to say goodbye."""
        assert self.process is not None
        self.process.kill()
        await self._ended()

    async def stop(self) -> int:
        """SIGTERM, then -9. Returns its exit status."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
        await self._ended()
        return self.process.returncode or 0

    def last_lines(self) -> str:
        return "\n".join(f"  | {line}" for line in self.tail)

    def _inherited(self) -> dict[str, str]:
        return {
            name: value for name, value in os.environ.items() if self.keeps_settings or not name.startswith("CODEYARD_")
        }

    async def _ended(self) -> None:
        assert self.process is not None
        await self.process.wait()
        if self._reader is not None:
            await self._reader

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            text = line.decode(errors="replace").rstrip()
            self.tail.append(text)
            if text.startswith(self.announcement):
                self.ready = text.removeprefix(self.announcement).strip()
                self._announced.set()
        self._announced.set()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h

"""A child process that reports by lines and is told to go on by lines. Called by: tests of the embedded file."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

PATIENCE_S = 30.0  # for what must happen; reached only by a failing test


class Process:
    """Dead when its context ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await self._process.stdout.readline()
        assert line.endswith(b"\n"), "the process ended early; its error is above"
        return line.decode().strip()

    async def lines_until(self, first_word: str) -> list[str]:
        """Up to and with the line that begins so."""
        lines: list[str] = []
        while not lines or lines[-1].split()[0] != first_word:
            try:
                lines.append(await self.line())
            except TimeoutError:
                raise AssertionError(f"no line begins with {first_word}; the last were {lines[-5:]}") from None
        return lines

    def go_on(self) -> None:
        """A line on its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    async def kill(self) -> list[str]:
        """kill -9, children included; returns the lines it had still written."""
        self.send(signal.SIGKILL)
        assert self._process.stdout is not None
        rest = await self._process.stdout.read()
        await self._process.wait()
        return [line.decode().strip() for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]

    async def kill_after(self, delay_s: float) -> list[str]:
        """kill -9 by a timer, wherever the process then is; what it wrote meanwhile is returned."""
        timer = asyncio.get_running_loop().call_later(delay_s, self.send, signal.SIGKILL)
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(delay_s + PATIENCE_S):
                rest = await self._process.stdout.read()
                await self._process.wait()
        finally:
            timer.cancel()
        return [line.decode().strip() for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]

    def send(self, number: signal.Signals) -> None:
        """To it and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def freeze(self) -> None:
        """Returns when each of its threads stands still: the signal alone is only a wish."""
        self.send(signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE_S):
            while not _stands_still(self.pid):  # noqa: ASYNC110 - the kernel sets no event
                await asyncio.sleep(0.001)

    def kill_alone(self) -> None:
        """kill -9; its children live on."""
        os.kill(self.pid, signal.SIGKILL)

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self._process.wait()


@asynccontextmanager
async def running(script: Path, *arguments: str) -> AsyncIterator[Process]:
    """A script of tests/support, in a process group of its own."""
    process = Process(
        await asyncio.create_subprocess_exec(
            *(sys.executable, str(script), *arguments),
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=1_048_576,
        )
    )
    try:
        yield process
    finally:
        await process.kill()


def _stands_still(pid: int) -> bool:
    """By the state of its threads in proc(5), the first word after the name in brackets."""
    stats = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[0] in ("T", "t") for stat in stats)

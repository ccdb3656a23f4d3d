"""What a check is: a name, a limit of time, and findings, each with the way out.

A check looks and says; it changes nothing that lasts, on this machine or on a server. Whatever it asks may hang:
waits on servers are asyncio's, everything else that may block runs in `aside`, in a thread that nobody waits for.
Called by: cli.doctor and every check.
"""

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from codeyard.shared.settings import Settings

T = TypeVar("T")


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, but not as it should
    FAIL = "fail"  # does not work, or loses work
    SKIPPED = "skipped"  # does not apply here


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `way_out` is what to do about it, as a person would type or set it."""

    status: Status
    text: str
    way_out: str = ""


def ok(text: str) -> Finding:
    return Finding(Status.OK, text)


def warn(text: str, way_out: str) -> Finding:
    return Finding(Status.WARN, text, way_out)


def fail(text: str, way_out: str) -> Finding:
    return Finding(Status.FAIL, text, way_out)


def skipped(text: str, way_out: str = "") -> Finding:
    return Finding(Status.SKIPPED, text, way_out)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the doctor was called: what every check is given.

    Args:
        given: settings from the command line, nested as the file is.
        answer_s: a server must answer one question within this.
    """

    settings: Settings
    environment: Mapping[str, str]
    config: Path | None
    given: Mapping[str, Any] = field(default_factory=dict)
    answer_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """`limit_s` bounds all of it; `needs_settings` False: also run where the settings cannot be read."""

    name: str
    about: str
    run: Callable[[Place], Awaitable[list[Finding]]]
    limit_s: float
    needs_settings: bool = True


async def aside(call: Callable[[], T]) -> T:
    """Run what may block in a thread of its own. Given up by cancelling: the thread is left to itself, and the
    process does not wait for it at its end, as it would for one of asyncio's (a network file system may hang for
    ever)."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: object) -> None:
        if not done.done():
            set_it(value)

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            try:
                result = call()
            except BaseException as error:
                loop.call_soon_threadsafe(settle, done.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, done.set_result, result)

    threading.Thread(target=work, name="doctor", daemon=True).start()
    return await done


@dataclass(frozen=True, slots=True)
class Said:
    """What a program wrote and how it ended."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        lines = [line for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


async def ask_program(command: Sequence[str], environment: Mapping[str, str], *, within_s: float) -> Said | None:
    """Run a program to its end. None: there was none within `within_s`, and it was killed. Raises OSError."""

    def call() -> Said | None:
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s
            )
        except subprocess.TimeoutExpired:
            return None
        return Said(done.returncode, done.stdout, done.stderr)

    return await aside(call)


def gib(num_bytes: float) -> str:
    """For people."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.0f} MiB"

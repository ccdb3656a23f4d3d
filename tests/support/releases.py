"""An earlier release beside the present one: its sources from this repository's history, its worker, its clients.

The sources are taken by `git archive`, so what runs is what was released and not a copy of it. Where there is no
history (a source distribution, a shallow clone) the test is skipped and the corpus of test_upgrades.py is left.
"""

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.fleet import READY_S

REPOSITORY = Path(__file__).parents[2]
PREVIOUS = "1c3e6e4adbfbdb8011439543536534cd05d03ae3"
"""The last commit before the newest change of what lies in the store (`Result.stop`); with each release: its tag."""

# Other paths lead to the present sources; the package itself is told where its parts are.
_AS_OF = """
import runpy, sys, codeyard
root = sys.argv[1]
codeyard.__path__ = [f"{root}/{part}/codeyard" for part in ("shared", "producer", "worker")]
del sys.argv[1]
if sys.argv[1] == "-m":
    from codeyard.cli.main import main
    del sys.argv[1]
    main()
else:
    sys.argv[:] = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
CLIENT = Path(__file__).with_name("release_client.py")


@dataclass(frozen=True)
class Release:
    """`root`: where its sources are; None: the present one."""

    root: Path | None

    def command(self, *words: str) -> list[str]:
        """`-m` and words for `codeyard`, or a script and its arguments."""
        if self.root is not None:
            return [sys.executable, "-c", _AS_OF, str(self.root), *words]
        return [sys.executable, *(("-m", "codeyard.cli.main", *words[1:]) if words[0] == "-m" else words)]


PRESENT = Release(None)


def previous(folder: Path) -> Release:
    """Its sources unpacked into `folder`. Skips where the history does not have it."""
    root = folder / PREVIOUS[:8]
    root.mkdir()
    archive = ["git", "-C", str(REPOSITORY), "archive", PREVIOUS, "shared", "producer", "worker"]
    try:
        found = subprocess.run(archive, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no git: the sources of an earlier release cannot be had")
    if found.returncode != 0:
        pytest.skip(f"no commit {PREVIOUS[:8]} in this copy of the repository: fetch its history")
    subprocess.run(["tar", "-x", "-C", str(root)], input=found.stdout, check=True)
    return Release(root)


def following(folder: Path) -> Release:
    """A release to come: the present sources, but that they write version 2 of the message, and read 1."""
    root = folder / "following"
    for part in ("shared", "producer", "worker"):
        shutil.copytree(REPOSITORY / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    source = root / "shared" / "codeyard" / "shared" / "job.py"
    text = source.read_text()
    for now, then in (("WIRE_VERSION = 1 ", "WIRE_VERSION = 2 "), ("Fields]]] = {}", "Fields]]] = {1: dict}")):
        assert text.count(now) == 1
        text = text.replace(now, then)
    source.write_text(text)
    return Release(root)


@dataclass
class LoggedWorker:
    """A worker process whose log can be asked what it did."""

    process: asyncio.subprocess.Process
    log: Path

    def ended(self) -> list[dict[str, Any]]:
        """Its line for each job whose outcome it committed."""
        return [line for line in self._lines() if line["event"] == "job_ended"]

    async def says(self, event: str, *, times: int = 1) -> None:
        """Return when it has said this so often."""
        async with asyncio.timeout(READY_S):
            while sum(line["event"] == event for line in self._lines()) < times:  # noqa: ASYNC110 - a file tells nobody
                await asyncio.sleep(0.05)

    def _lines(self) -> list[dict[str, Any]]:
        whole = self.log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    async def end(self, number: signal.Signals) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(READY_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def worker(release: Release, config: Path, name: str) -> AsyncIterator[LoggedWorker]:
    """`codeyard worker` of a release, serving; killed at the end if it still runs."""
    log = config.with_name(f"{name}.log")
    with log.open("ab") as lines:
        process = await asyncio.create_subprocess_exec(
            *release.command("-m", "worker", "--config", str(config), "--log-format", "json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=lines,
        )
    started = LoggedWorker(process, log)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(READY_S):
            first = await process.stdout.readline()
        assert first.startswith(b"worker "), log.read_text()[-2_000:]
        yield started
    finally:
        await started.end(signal.SIGKILL)


async def client(release: Release, config: Path, work: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a client of a release answers to each piece of work: see release_client.py."""
    process = await asyncio.create_subprocess_exec(
        *release.command(str(CLIENT), str(config)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(READY_S):
        told, errors = await process.communicate(json.dumps(list(work)).encode())
    assert process.returncode == 0, errors.decode()[-2_000:]
    return [json.loads(line) for line in told.splitlines()]

"""A leak is found and named, flat work is not accused; on at start or by a signal."""

import asyncio
import json
import logging
import os
import signal
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.brokers import logged

from codeyard.shared.settings import WorkerSettings
from codeyard.worker.memory_profile import MemoryProfile

LOGGER = "codeyard.worker.memory_profile"
EVERY = 200
WARM = EVERY // 10  # jobs before the baseline
KEPT: list[bytes] = []  # by the leaking job


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    KEPT.clear()


def flat_job(number: int) -> None:
    """Takes and gives back, as a job does."""
    parts = [bytes(1_000 + number % 7) for _ in range(50)]
    json.loads(json.dumps({"text": len(parts), "ids": list(range(100))}))


def leaking_job(number: int) -> None:
    flat_job(number)
    KEPT.append(bytes(200))


LEAK_LINE = leaking_job.__code__.co_firstlineno + 2


@pytest.fixture(autouse=True)
def _traced_no_longer() -> Iterator[None]:
    yield
    tracemalloc.stop()


async def work(profile: MemoryProfile, job: Callable[[int], None], count: int) -> None:
    """Jobs, and after each one what the profile would do meanwhile on the worker's loop."""
    for number in range(count):
        job(number)
        profile.job_ended()
        await profile.look()


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


@pytest.fixture
def path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.INFO, LOGGER)
    return tmp_path / "state" / "profile.json"


async def test_a_deliberate_leak_is_found_with_its_line_and_its_rate(path: Path) -> None:
    """The report names where the memory was taken, not where it is missed."""
    profile = MemoryProfile(path, every_jobs=EVERY, at_start=True)
    await profile.look()
    await work(profile, leaking_job, WARM + EVERY)

    report = report_of(path)
    site = report["sites"][0]
    assert site["at"] == f"{__file__}:{LEAK_LINE}"
    assert 200 <= site["bytes_per_job"] <= 300
    assert any(f"{__file__}:" in frame for frame in site["traceback"][:-1])
    assert report["num_jobs"] == EVERY
    assert report["traced_bytes"] >= 200 * EVERY


async def test_flat_work_is_reported_as_flat(path: Path) -> None:
    """A tool that cries at every cache is soon switched off."""
    profile = MemoryProfile(path, every_jobs=EVERY, at_start=True)
    await profile.look()
    await work(profile, flat_job, WARM + 2 * EVERY)

    report = report_of(path)
    assert (report["num_jobs"], report["sites"]) == (2 * EVERY, [])


async def test_what_grew_once_and_stays_is_no_leak(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cache that fills up in the first stretch is told there, and not again."""
    profile = MemoryProfile(path, every_jobs=EVERY, at_start=True)
    await profile.look()
    await work(profile, leaking_job, WARM + EVERY)
    await work(profile, flat_job, EVERY)

    assert [record.message for record in caplog.records] == ["memory_profile_begins", "memory_grew", "memory_flat"]
    assert report_of(path)["sites"] == []


async def test_a_signal_begins_it_and_the_next_one_reports_and_ends_it(path: Path) -> None:
    """On a worker that runs: no restart, no job lost, and afterwards no cost."""
    profile = MemoryProfile(path, every_jobs=EVERY, at_start=False)
    running = asyncio.create_task(profile.run())
    await asyncio.sleep(0)
    assert not tracemalloc.is_tracing()

    await said("memory_profile_begins", lambda: os.kill(os.getpid(), signal.SIGUSR2))
    assert tracemalloc.is_tracing()
    await work(profile, leaking_job, EVERY // 2)  # past the baseline, short of a report
    await said("memory_profile_ends", lambda: os.kill(os.getpid(), signal.SIGUSR2))

    assert not tracemalloc.is_tracing()
    assert report_of(path)["sites"]
    running.cancel()
    await asyncio.wait([running])


async def test_a_worker_that_stops_ends_its_tracing(path: Path) -> None:
    """`codeyard up` and tests go on in the same process."""
    profile = MemoryProfile(path, every_jobs=EVERY, at_start=True)
    tasks: list[asyncio.Task[None]] = []
    await said("memory_profile_begins", lambda: tasks.append(asyncio.create_task(profile.run())))
    tasks[0].cancel()
    await asyncio.wait(tasks)

    assert not tracemalloc.is_tracing()
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


async def said(event: str, during: Callable[[], Awaitable[None] | None]) -> None:
    """What `during` does makes the profile log `event`."""
    with logged(event, LOGGER) as seen:
        if (done := during()) is not None:
            await done
        async with asyncio.timeout(30):
            await seen.wait()


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "profile.json"


async def test_a_report_that_cannot_be_written_costs_only_itself(unwritable: Path) -> None:
    """A container's file system may be read-only."""
    profile = MemoryProfile(unwritable, every_jobs=50, at_start=True)
    await profile.look()
    await said("memory_profile_not_written", lambda: work(profile, flat_job, 60))


def test_settings_say_where_when_and_how_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`codeyard worker --memory-profile` needs no more words."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    profile = MemoryProfile.of(WorkerSettings())
    assert profile.path == tmp_path / "codeyard" / f"memory-profile-{os.getpid()}.json"
    assert MemoryProfile.of(WorkerSettings(memory_profile_file=tmp_path / "p.json")).path == tmp_path / "p.json"

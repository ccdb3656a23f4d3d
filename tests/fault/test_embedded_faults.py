"""The embedded file under kill -9 at any point, a full disk, processes that stand still, and copies.

`support.embedded_life` leads jobs through their whole life and tells what was confirmed; after each fault
SQLite's own check must find the file whole, and the file must hold all that was told.
"""

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
from support import children, embedded_life
from support.children import Process
from support.embedded_book import Book, assert_whole
from support.embedded_life import QUEUE, open_broker, open_store
from support.store_calls import make_job, reservation_of

from codeyard.shared.broker.port import Message
from codeyard.shared.embedded import file as embedded_file
from codeyard.shared.embedded.backup import BackupRefused, back_up
from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.errors import BrokerUnavailable, SettingsError, StoreUnavailable
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology

pytestmark = pytest.mark.process

PATIENCE_S = 30.0
LONGEST_LIFE_S = 0.6  # of a process that is killed; opening the file takes a tenth of it
SMALL_DISK_BYTES = 33_554_432  # for all that 60 processes leave behind


def running(file: Path, *what: str) -> AbstractAsyncContextManager[Process]:
    return children.running(Path(embedded_life.__file__), str(file), *what)


@asynccontextmanager
async def opened(file: Path) -> AsyncIterator[SqliteStore]:
    store = await open_store(str(file))
    yield store
    await store.close()


async def begin(process: Process) -> None:
    assert await process.line() == "ready"
    process.go_on()


async def finished(file: Path, book: Book) -> None:
    """A process that takes over at once and brings every job to its end; then the book is right to the last line."""
    async with running(file, "finish") as process:
        await begin(process)
        book.note(await process.lines_until("finished"))
        assert await process.ended() == 0
    async with opened(file) as store:
        await book.ended(store)
    assert_whole(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "yard.db"


# Kill -9 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kills",
    [10, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1_200)])],
)
async def test_killed_at_any_point_of_a_jobs_life_nothing_told_is_lost_and_every_job_ends_once(
    file: Path, kills: int
) -> None:
    """The moment is drawn: while the file is made, opened, written, folded. The next process starts at once."""
    draw = random.Random(kills)
    book, last = Book(), Book()
    async with AsyncExitStack() as stack:
        following = await stack.enter_async_context(running(file, "live", "n0"))
        for number in range(kills):
            process = following
            following = await stack.enter_async_context(running(file, "live", f"n{number + 1}"))
            await begin(process)
            async with asyncio.TaskGroup() as tasks:
                dying = tasks.create_task(process.kill_after(draw.uniform(0.0, LONGEST_LIFE_S)))
                async with opened(file) as store:  # beside the process that has begun, and may be making the file
                    await last.holds(store)
            last = Book()
            last.note(dying.result())
            book.note(dying.result())
            assert_whole(file)

    await finished(file, book)
    assert len(book.accepted) > kills
    async with opened(file) as store:
        assert await left_of(store, embedded_life.BRIEF) < book.num_passing  # the rest was swept


async def left_of(store: SqliteStore, topology: Topology) -> int:
    query = "SELECT count(*) FROM jobs WHERE namespace = ?"
    return await store._file.read(
        lambda db, now: int(db.execute(query, (topology.namespace,)).fetchone()[0]), timeout_s=5
    )


# A full disk ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system needs root and CAP_SYS_ADMIN: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """A file that takes all room but `leave` bytes, of a disk that others are writing to."""
    ballast = disk / "ballast"
    with ballast.open("wb") as raw:
        while (room := room_on(disk) - leave) > 0:
            with suppress(OSError):  # somebody was faster
                os.posix_fallocate(raw.fileno(), 0, os.fstat(raw.fileno()).st_size + room)
    return ballast


def room_on(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


@pytest.mark.parametrize("times", [2, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
async def test_a_disk_that_fills_at_any_moment_is_named_and_everything_goes_on_when_there_is_room(
    small_disk: Path, times: int
) -> None:
    """Also while the file is made: what is left is drawn, from nothing to a few commits' worth."""
    file, draw, book = small_disk / "yard.db", random.Random(times), Book()
    for number in range(times):
        ballast = fill(small_disk, leave=draw.choice([0, 0, 4_096, 40_000, 100_000]))
        async with running(file, "live", f"n{number}") as process:
            await begin(process)
            book.note(await process.lines_until("refused"))
            assert "the disk is full; make room" in book.refusals[-1]
            ballast.unlink()
            process.go_on()
            for _ in range(draw.randrange(1, 5)):
                book.note(await process.lines_until("accepted"))
            ballast = fill(small_disk, leave=draw.randrange(0, 50_000))
            book.note(await process.lines_until("refused"))
            assert "the disk is full; make room" in book.refusals[-1]
            if draw.random() < 0.5:  # else it is killed while the disk is full
                ballast.unlink()
                assert_whole(file)  # looking needs room too, for the log's index
                process.go_on()
                book.note(await process.lines_until("accepted"))
            book.note(await process.kill())
        ballast.unlink(missing_ok=True)
        assert_whole(file)
        async with opened(file) as store:
            await book.holds(store)
    await finished(file, book)


# Processes that stand still ------------------------------------------------------------------------


async def test_a_process_frozen_in_a_transaction_is_named_and_nobody_waits_for_ever(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the only write lock, for longer than anyone has patience; it may also be woken, or killed."""
    monkeypatch.setattr(embedded_file, "LOCK_PATIENCE_S", 0.3)
    book = Book()
    async with running(file, "live", "before") as process:
        await begin(process)
        book.note(await process.lines_until("committed"))
        book.note(await process.kill())

    for wakes in (False, True):
        async with opened(file) as store, running(file, "freeze") as frozen:
            broker = await open_broker(str(file))
            await begin(frozen)
            await frozen.lines_until("locked")
            await frozen.freeze()

            job = make_job()
            with pytest.raises(StoreUnavailable, match="look for a stopped or hung process"):
                await store.reserve([reservation_of(job)])
            with pytest.raises(BrokerUnavailable, match="look for a stopped or hung process"):
                await broker.publish([Message(QUEUE, job.id, job.encode(), {})], timeout_s=5)
            await book.holds(store)  # who only reads is not kept waiting

            if wakes:
                frozen.send(signal.SIGCONT)
                frozen.go_on()
                await frozen.lines_until("committed")
            else:
                await frozen.kill()
            await store.reserve([reservation_of(job)])
            assert await is_declared(store, "of the frozen") == wakes
            await book.holds(store)
            await broker.close()
        assert_whole(file)


async def test_a_worker_frozen_past_its_lease_loses_its_jobs_and_commits_none_of_them_twice(file: Path) -> None:
    """Its consumer's lock stays held, so that the reconciler has to find its jobs; then it wakes and goes on."""
    book = Book()
    async with running(file, "live", "frozen") as process:
        await begin(process)
        book.note(await process.lines_until("committed"))
        await frozen_outside_a_transaction(process, file)
        async with running(file, "finish") as other:
            await begin(other)
            book.note(await other.lines_until("finished"))
        process.send(signal.SIGCONT)
        for _ in range(3):
            book.note(await process.lines_until("accepted"))
        book.note(await process.kill())
    assert_whole(file)
    await finished(file, book)


async def test_submitters_workers_and_readers_of_long_streams_at_once_see_the_same_file(file: Path) -> None:
    """Three processes write, this one reads snapshots while the log under them grows and is folded."""
    book = Book()
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(running(file, "live", f"n{number}")) for number in range(3)]
        for process in processes:
            await begin(process)
        for process in processes:
            book.note(await process.lines_until("committed"))
        store = await stack.enter_async_context(opened(file))
        for _ in range(3):
            for process in processes:
                book.note(await process.lines_until("accepted"))
                await book.holds(store)
        assert_whole(file)
        for process in processes:
            book.note(await process.kill())
    await finished(file, book)


async def is_declared(store: SqliteStore, queue: str) -> bool:
    query = "SELECT count(*) FROM queues WHERE name = ?"
    return await store._file.read(lambda db, now: bool(db.execute(query, (queue,)).fetchone()[0]), timeout_s=5)


async def frozen_outside_a_transaction(process: Process, file: Path) -> None:
    """Stopped where it holds no write lock, so that the others can show what becomes of its jobs."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await process.freeze()
            with closing(sqlite3.connect(file, isolation_level=None, timeout=0.0)) as db:
                try:
                    db.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    process.send(signal.SIGCONT)
                else:
                    db.execute("ROLLBACK")
                    return


# Copies --------------------------------------------------------------------------------------------


COPIED = {"alone": ("",), "with its log": ("", "-wal"), "with all": ("", "-shm", "-wal"), "log first": ("-wal", "")}


def pages_of(file: Path) -> list[bytes]:
    content = file.read_bytes()
    return [content[start : start + 4_096] for start in range(0, len(content), 4_096)]


def copy(file: Path, target: Path, suffixes: tuple[str, ...]) -> Path:
    for suffix in suffixes:
        shutil.copyfile(f"{file}{suffix}", f"{target}{suffix}")
    return target


@pytest.mark.parametrize("times", [2, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
async def test_a_file_copied_while_in_use_is_refused_and_a_backup_of_it_is_whole_or_refused(
    file: Path, tmp_path: Path, times: int
) -> None:
    """`cp` takes file and log at two moments; whatever it caught, nobody works on it unawares."""
    book = Book()
    async with running(file, "live", "copied") as process:
        await begin(process)
        book.note(await process.lines_until("committed"))
        for number in range(times):
            for how, suffixes in COPIED.items():
                torn = copy(file, tmp_path / f"{number}-{how}.db", suffixes)
                with pytest.raises(SettingsError, match=r"copy made while the file was in use.*codeyard backup"):
                    await open_store(str(torn))
                with suppress(BackupRefused):
                    back_up(f"sqlite:///{torn}", saved := tmp_path / f"{number}-{how}-saved.db")
                    assert_whole(saved)
            book.note(await process.lines_until("accepted"))
        book.note(await process.kill())
    async with opened(file) as store:
        await book.holds(store)
    assert_whole(file)


async def test_a_copy_of_a_closed_file_holds_everything_in_its_new_place_or_is_refused(
    file: Path, tmp_path: Path
) -> None:
    """Moving to another disk with everything stopped needs no command of ours. Opened meanwhile, it may be torn."""
    books, pages = [Book(), Book()], list[list[bytes]]()
    for number, book in enumerate(books):
        async with running(file, "live", f"n{number}") as process:
            await begin(process)
            for _ in range(4):
                book.note(await process.lines_until("committed"))
            book.note(await process.kill())
        async with opened(file) as store:
            await book.holds(store)
        pages.append(pages_of(file))  # the last one out has closed it

    moved = copy(file, tmp_path / "moved.db", ("",))
    async with opened(moved) as store:
        for book in books:
            await book.holds(store)
    assert_whole(moved)
    (before, after), refusals = pages, 0
    for place in range(1, len(before), max(1, len(before) // 8)):  # cp was there when the rest was written
        torn = tmp_path / f"torn-{place}.db"
        torn.write_bytes(b"".join(before[:place] + after[place:]))
        try:
            async with opened(torn) as store:
                await books[0].holds(store)  # all that was confirmed when the copy began
        except (SettingsError, StoreUnavailable) as error:
            refusals += "torn copy" in str(error) or "damaged" in str(error)
    assert refusals


async def test_a_backup_made_under_load_holds_all_that_was_confirmed_before_it_and_can_go_on(
    file: Path, tmp_path: Path
) -> None:
    """And it never takes the place of another file, nor lies open to others."""
    book, target = Book(), tmp_path / "backup.db"
    async with running(file, "live", "backed-up") as process:
        await begin(process)
        book.note(await process.lines_until("committed"))
        book.note(await process.lines_until("accepted"))
        made = await asyncio.to_thread(back_up, f"sqlite:///{file}", target)
        await process.lines_until("accepted")  # it was not in the way
        with pytest.raises(BackupRefused, match="is there already"):
            back_up(f"sqlite:///{file}", target)

    assert made.num_jobs >= len(book.accepted)
    assert (target.stat().st_mode & 0o777, made.num_bytes) == (0o600, target.stat().st_size)
    assert sorted(os.listdir(tmp_path)) == ["backup.db", "yard.db", "yard.db-consumers", "yard.db-shm", "yard.db-wal"]
    assert_whole(target)
    async with opened(target) as store:
        await book.holds(store)
    restored = copy(target, tmp_path / "restored.db", ("",))
    await finished(restored, book)


async def test_a_backup_that_finds_no_room_leaves_nothing_behind(file: Path, small_disk: Path) -> None:
    """Half a backup under its name would be the worst of all."""
    async with opened(file) as store:
        await store.reserve([reservation_of(make_job(prompt="x" * 1_000_000)) for _ in range(4)])
        ballast = fill(small_disk, leave=1_000_000)
        with pytest.raises(FileUnavailable, match="the disk is full; make room"):
            back_up(f"sqlite:///{file}", small_disk / "backup.db")
    assert os.listdir(small_disk) == [ballast.name]

"""What is the embedded file's own: where it may lie, shared commits, its clock, and errors with a way out."""

import asyncio
import itertools
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.brokers import logged
from support.store_calls import commit_of, make_job, reservation_of, run_jobs

from codeyard.shared.alias import Alias
from codeyard.shared.broker.sqlite import SqliteBroker
from codeyard.shared.embedded import file as embedded_file
from codeyard.shared.embedded import place
from codeyard.shared.embedded.backup import back_up
from codeyard.shared.embedded.clock import FileClock
from codeyard.shared.embedded.failure import FileUnavailable, NoAnswer
from codeyard.shared.embedded.file import EmbeddedFile
from codeyard.shared.embedded.place import embedded_path, file_system
from codeyard.shared.embedded.schema import APPLICATION_ID, SCHEMA
from codeyard.shared.embedded.transactions import Work
from codeyard.shared.errors import BrokerUnavailable, SettingsError, StoreUnavailable
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store.port import ReserveVerdict
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology

TOPOLOGY = Topology("file")
PATIENCE_S = 10.0


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


async def open_store(path: Path, **settings: float) -> SqliteStore:
    return await SqliteStore.open(StoreSettings.model_validate({"url": url_of(path), **settings}), TOPOLOGY)


@pytest.fixture
async def file(tmp_path: Path) -> AsyncIterator[EmbeddedFile]:
    file = await EmbeddedFile.open(url_of(tmp_path / "yard.db"))
    yield file
    await file.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program keeps the file's write lock."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


# Where it may lie ----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///:memory:", "sqlite://yard.db", "sqlite:yard.db"])
def test_a_url_that_names_no_file_is_refused(url: str) -> None:
    """Memory cannot be shared between processes, and a missing slash would be somewhere unexpected."""
    with pytest.raises(SettingsError, match="sqlite:////absolute"):
        embedded_path(url)


def test_relative_and_absolute_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes and four, as everyone knows them from SQLAlchemy."""
    monkeypatch.chdir(tmp_path)

    assert embedded_path("sqlite:///a/yard.db") == tmp_path / "a" / "yard.db"
    assert embedded_path(f"sqlite:///{tmp_path}/b c/50%.db") == tmp_path / "b c" / "50%.db"
    assert (tmp_path / "a").is_dir()
    assert (tmp_path / "b c").is_dir()


def test_a_folder_or_a_path_under_a_file_is_refused(tmp_path: Path) -> None:
    """The sentence names the path, not an error number."""
    (tmp_path / "plain").write_text("")

    with pytest.raises(SettingsError, match="is a folder"):
        embedded_path(url_of(tmp_path))
    with pytest.raises(SettingsError, match="cannot be made"):
        embedded_path(url_of(tmp_path / "plain" / "yard.db"))


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 22 0:27 / /srv rw - ext4 /dev/vdb rw
45 31 0:40 / /srv/shared\\040data rw,relatime shared:9 master:1 - nfs4 server:/export rw,vers=4.2
46 45 0:41 / /srv/shared\\040data/local rw - tmpfs tmpfs rw
47 22 0:42 / /mnt/both rw - ext4 /dev/vdc rw
48 47 0:43 / /mnt/both rw - fuse.sshfs me@host:/ rw
"""


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/home/me", "ext4"),
        ("/srv/x", "ext4"),
        ("/srv/shared data/yard", "nfs4"),
        ("/srv/shared data/local/yard", "tmpfs"),
        ("/srv/shared database", "ext4"),
        ("/mnt/both/yard", "fuse.sshfs"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_mount_on_top(path: str, kind: str) -> None:
    """A local disk inside a network share is local, and the last mount on a point hides the others."""
    assert file_system(Path(path), MOUNTS) == kind


async def test_a_network_file_system_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite over NFS works until it loses a night's jobs."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {tmp_path} rw - nfs4 server:/ rw\n")
    monkeypatch.setattr(place, "_MOUNTS", mounts)

    with pytest.raises(SettingsError, match=r"network file system \(nfs4\).*local disk.*RabbitMQ and Redis"):
        await open_store(tmp_path / "yard.db")


# Whose it may be -----------------------------------------------------------------------------------


async def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    """It is never overwritten."""
    path = tmp_path / "yard.db"
    path.write_text("my precious notes\n" * 100)

    with pytest.raises(SettingsError, match="not a SQLite database"):
        await open_store(path)
    assert path.read_text().startswith("my precious")


async def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    """Our tables have no business there."""
    path = tmp_path / "yard.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")

    with pytest.raises(SettingsError, match="another program"):
        await open_store(path)


async def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """An older worker must not write into a format it does not know."""
    path = tmp_path / "yard.db"
    await (await open_store(path)).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")

    with pytest.raises(SettingsError, match=r"format 99.*update codeyard here too"):
        await open_store(path)


async def test_a_file_of_the_first_format_is_taken_over(tmp_path: Path) -> None:
    """An update must not make a user throw the yard away."""
    path = tmp_path / "yard.db"
    with closing(sqlite3.connect(path)) as db:
        first = SCHEMA.replace("name TEXT NOT NULL, document TEXT", "name TEXT NOT NULL, revision TEXT")
        db.executescript(first.replace("revision TEXT NOT NULL,", "revision TEXT NOT NULL, context_tokens INTEGER,"))
        for later in ("notices", "api_keys", "levels", "live_jobs", "chunks", "chunk_holders", "documents"):
            db.execute(f"DROP TABLE {later}")
        db.executescript("DROP TRIGGER callback_gone; DROP TABLE callbacks; ALTER TABLE meta DROP COLUMN inode;")
        db.execute("INSERT INTO aliases VALUES ('file', 'starter', 'starter-1', 2048)")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
        db.commit()

    store = await open_store(path)

    assert await store.aliases() == {"starter": Alias("starter", "starter-1", 2_048)}
    await store.close()


async def test_a_file_of_the_format_before_keeps_its_jobs_and_learns_where_it_is(tmp_path: Path) -> None:
    """It knows no inode, so that it is at home wherever it is first opened."""
    path = tmp_path / "yard.db"
    store = await open_store(path)
    [claimed] = await run_jobs(store, job := make_job())
    await store.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE meta DROP COLUMN inode")
        db.execute("PRAGMA user_version = 5")

    moved = tmp_path / "moved.db"
    shutil.copy(path, moved)
    store = await open_store(moved)
    [committed] = await store.commit([commit_of(job, claimed)])
    await store.close()

    assert committed.verdict == "committed"
    with closing(sqlite3.connect(moved)) as db:
        assert db.execute("SELECT inode FROM meta").fetchone() == (os.stat(moved).st_ino,)


# Shared commits ------------------------------------------------------------------------------------


class _Gate:
    """Work that keeps the writer busy until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self, db: sqlite3.Connection, now: float) -> float:
        self.entered.set()
        assert self._open.wait(PATIENCE_S)
        return now

    def open(self) -> None:
        self._open.set()


async def test_calls_that_gather_while_one_is_written_share_the_next_commit(tmp_path: Path) -> None:
    """The fsync is the price of durability; fifty callers pay it once."""
    ticks = itertools.count(1_000.0)  # read once in each transaction
    file = await EmbeddedFile.open(url_of(tmp_path / "yard.db"), wall=lambda: next(ticks))
    gate = _Gate()
    first = file.start_write(gate)
    await asyncio.to_thread(gate.entered.wait, PATIENCE_S)

    waiting = [file.start_write(lambda db, now: now) for _ in range(50)]
    gate.open()
    alone = await first.result(PATIENCE_S)
    together = {await call.result(PATIENCE_S) for call in waiting}

    assert len(together) == 1
    assert together != {alone}
    await file.close()


async def test_a_call_that_fails_undoes_its_own_changes_only(file: EmbeddedFile) -> None:
    """It shares the transaction with strangers."""
    gate = _Gate()
    first = file.start_write(gate)
    await asyncio.to_thread(gate.entered.wait, PATIENCE_S)

    def fail(db: sqlite3.Connection, now: float) -> None:
        db.execute("INSERT INTO queues (name) VALUES ('undone')")
        raise ZeroDivisionError

    def add(name: str) -> Work[int]:
        return lambda db, now: db.execute("INSERT INTO queues (name) VALUES (?)", (name,)).rowcount

    before, failing, after = file.start_write(add("before")), file.start_write(fail), file.start_write(add("after"))
    gate.open()

    with pytest.raises(ZeroDivisionError):
        await failing.result(PATIENCE_S)
    assert [await before.result(PATIENCE_S), await after.result(PATIENCE_S)] == [1, 1]
    names = await file.read(lambda db, now: db.execute("SELECT name FROM queues").fetchall(), timeout_s=PATIENCE_S)
    await first.result(PATIENCE_S)
    assert sorted(names) == [("after",), ("before",)]


async def test_a_call_whose_caller_left_before_it_began_is_not_run(file: EmbeddedFile) -> None:
    """After an outage of seconds, the calls everyone gave up would only be in the way."""
    gate, ran = _Gate(), threading.Event()
    first = file.start_write(gate)
    await asyncio.to_thread(gate.entered.wait, PATIENCE_S)

    with pytest.raises(NoAnswer):
        await file.write(lambda db, now: ran.set(), timeout_s=0.01)
    gate.open()
    await first.result(PATIENCE_S)
    await file.write(lambda db, now: None, timeout_s=PATIENCE_S)

    assert not ran.is_set()


async def test_reading_does_not_wait_for_the_writer(file: EmbeddedFile) -> None:
    """A poll of a result answers at once while a large group is being written."""
    gate = _Gate()
    first = file.start_write(gate)
    await asyncio.to_thread(gate.entered.wait, PATIENCE_S)

    assert await file.read(lambda db, now: db.execute("SELECT 1").fetchone(), timeout_s=PATIENCE_S) == (1,)
    gate.open()
    await first.result(PATIENCE_S)


async def test_adapters_of_one_process_share_the_file_and_the_last_one_closes_it(tmp_path: Path) -> None:
    """Broker and store usually lie in one file; one writer means one commit for both."""
    files = [await EmbeddedFile.open(url_of(tmp_path / "yard.db")) for _ in range(3)]
    assert files[0] is files[1] is files[2]

    await files[0].close()
    await files[1].close()
    await files[2].write(lambda db, now: None, timeout_s=PATIENCE_S)
    await files[2].close()

    with pytest.raises(FileUnavailable, match="closed"):
        await files[2].write(lambda db, now: None, timeout_s=PATIENCE_S)
    assert os.listdir(tmp_path) == ["yard.db"]  # the log was folded in


async def test_a_waiter_learns_of_what_another_process_wrote(tmp_path: Path) -> None:
    """Nobody tells it: the file's commit counter is all there is. Another clock acts as another process."""
    path = tmp_path / "yard.db"
    store = await open_store(path)
    elsewhere = await SqliteStore.open(StoreSettings(url=url_of(path)), TOPOLOGY, clock=lambda: time.time())
    [claimed] = await run_jobs(elsewhere, job := make_job())

    async with store.watch(job.id) as wakeup, asyncio.timeout(PATIENCE_S):
        await elsewhere.commit([commit_of(job, claimed)])
        while not await store.events(job.id, after=0):
            await wakeup.wait(2 * PATIENCE_S)

    assert elsewhere._file is not store._file
    await elsewhere.close()
    await store.close()


# Errors --------------------------------------------------------------------------------------------


async def test_a_file_locked_for_too_long_is_unavailable_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence tells the person on call what to look for."""
    monkeypatch.setattr(embedded_file, "LOCK_PATIENCE_S", 0.05)
    path = tmp_path / "yard.db"
    store = await open_store(path)
    job = make_job()

    with locked(path), pytest.raises(StoreUnavailable, match="stopped or hung process"):
        await store.reserve([reservation_of(job)])
    [reserved] = await store.reserve([reservation_of(job)])

    assert reserved.verdict is ReserveVerdict.NEW
    await store.close()


async def test_a_call_is_bounded_by_the_timeout_of_the_settings(tmp_path: Path) -> None:
    """Whatever the disk does."""
    path = tmp_path / "yard.db"
    store = await open_store(path, timeout_s=0.05)

    with locked(path), pytest.raises(StoreUnavailable, match=r"within 0.05 s"):
        await store.reserve([reservation_of(make_job())])
    await store.close()


async def test_a_full_disk_is_unavailable_and_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    """SQLite then undoes the whole transaction; everyone in it is told."""
    store = await open_store(tmp_path / "yard.db")
    [claimed] = await run_jobs(store, kept := make_job())
    await store._file.write(lambda db, now: db.execute("PRAGMA max_page_count = 1").fetchone(), timeout_s=5)
    large = [make_job(prompt="x" * 100_000) for _ in range(3)]

    answers = await asyncio.gather(*[store.reserve([reservation_of(job)]) for job in large], return_exceptions=True)

    assert all(isinstance(answer, StoreUnavailable) and "disk is full" in str(answer) for answer in answers)
    assert await store.read([job.id for job in large]) == [None, None, None]
    [committed] = await store.commit([commit_of(kept, claimed)])  # on a new connection, which has room
    assert committed.verdict == "committed"
    await store.close()


async def test_a_damaged_file_is_unavailable_and_not_a_crash(tmp_path: Path) -> None:
    """sqlite3's own exceptions never reach a caller."""
    path = tmp_path / "yard.db"
    store = await open_store(path)
    await store.reserve([reservation_of(make_job(prompt="x" * 50_000))])
    await store.close()
    with closing(sqlite3.connect(path)) as db:
        roots = [
            number
            for (number,) in db.execute("SELECT rootpage FROM sqlite_schema WHERE rootpage > 0 AND name <> 'meta'")
        ]
    with path.open("r+b") as raw:
        for number in roots:  # of every table and index; what they are is still known
            raw.seek((number - 1) * 4_096)
            raw.write(b"\xa5" * 4_096)

    store = await open_store(path)
    with pytest.raises(StoreUnavailable, match="damaged"):
        await store.recent(10)
    with pytest.raises(StoreUnavailable, match="damaged"):
        await store.reserve([reservation_of(make_job())])
    await store.close()


async def test_a_file_deleted_under_a_running_process_is_named_and_may_be_moved_back(tmp_path: Path) -> None:
    """Linux lets a process write into a file that nobody will ever find again; ours confirms nothing there."""
    path, away = tmp_path / "yard.db", tmp_path / "away.db"
    store = await open_store(path)
    await store.reserve([reservation_of(kept := make_job())])

    path.rename(away)
    with pytest.raises(StoreUnavailable, match="was deleted or moved away while in use; move it back"):
        await store.reserve([reservation_of(make_job())])
    with pytest.raises(StoreUnavailable, match="was deleted or moved away"):
        await store.read([kept.id])
    assert not path.exists()  # nor was it made anew, and empty
    away.rename(path)

    [record] = await store.read([kept.id])
    assert record is not None
    await store.close()


async def test_a_file_replaced_under_a_running_process_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    """A backup put back while a worker runs: what the worker knows is not in it."""
    path, other = tmp_path / "yard.db", tmp_path / "other.db"
    await (await open_store(other)).close()
    store = await open_store(path)
    await store.reserve([reservation_of(make_job())])
    content = other.read_bytes()

    other.replace(path)
    with pytest.raises(StoreUnavailable, match="was replaced by another file while in use; stop every process"):
        await store.reserve([reservation_of(make_job())])
    with pytest.raises(StoreUnavailable, match="was replaced"):
        await store.recent(10)
    await store.close()

    assert path.read_bytes() == content


async def test_a_backup_put_beside_the_log_of_killed_processes_is_refused(tmp_path: Path) -> None:
    """SQLite would take that log for the backup's own, and fold it in: neither one nor the other would be left."""
    path, saved = tmp_path / "yard.db", tmp_path / "saved.db"
    store = await open_store(path)
    await store.reserve([reservation_of(make_job())])
    back_up(url_of(path), saved)
    log = shutil.copy(f"{path}-wal", tmp_path / "log")
    await store.close()

    shutil.copy(saved, path)
    shutil.copy(log, f"{path}-wal")
    with pytest.raises(SettingsError, match=r"is that one's log; move yard\.db-wal and yard\.db-shm away"):
        await open_store(path)
    os.unlink(f"{path}-wal")

    await (await open_store(path)).close()


async def test_whoever_waits_for_a_message_is_told_that_the_file_is_gone(tmp_path: Path) -> None:
    """An idle worker asks for nothing, and would otherwise wait for ever without a word."""
    path = tmp_path / "yard.db"
    broker = await SqliteBroker.open(BrokerSettings(url=url_of(path)), TOPOLOGY)
    await broker.declare([TOPOLOGY.job_queue("m-1", Lane.BULK)])
    consumer = await broker.consume({TOPOLOGY.job_queue("m-1", Lane.BULK): 1})

    with logged("receive_failed", "codeyard.shared.broker.sqlite_consumer") as told:
        receiving = asyncio.create_task(consumer.receive(1))
        path.unlink()
        async with asyncio.timeout(PATIENCE_S):
            await told.wait()
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    await broker.close()


async def test_the_broker_translates_the_files_errors_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers catch BrokerUnavailable and repeat."""
    monkeypatch.setattr(embedded_file, "LOCK_PATIENCE_S", 0.05)
    path = tmp_path / "yard.db"
    broker = await SqliteBroker.open(BrokerSettings(url=url_of(path)), TOPOLOGY)
    queue = TOPOLOGY.job_queue("m-1", Lane.BULK)
    await broker.declare([queue])

    with locked(path):
        with pytest.raises(BrokerUnavailable, match="hung process"):
            await broker.declare([queue])
        with pytest.raises(BrokerUnavailable, match="hung process"):
            await broker.publish([], timeout_s=5)
        with pytest.raises(BrokerUnavailable, match="hung process"):
            await broker.consume({queue: 1})
    await broker.close()


# The clock -----------------------------------------------------------------------------------------


def test_the_clock_goes_on_when_the_machines_goes_back() -> None:
    """A frozen clock would end no lease, one that goes back would end leases late or twice."""
    wall = [100.0]
    clock = FileClock(lambda: wall[0])

    moments = []
    for wall[0] in (100.0, 101.0, 50.0, 52.0, 49.0, 49.5, 200.0):
        moments.append(clock.now(0.0))

    assert moments == [100.0, 101.0, 101.0, 103.0, 103.0, 103.5, 254.0]


def test_the_clock_starts_from_the_latest_moment_written() -> None:
    """Another process, or this one before a restart, has handed out leases by it."""
    wall = [100.0]
    clock = FileClock(lambda: wall[0])

    first = clock.now(500.0)
    wall[0] = 110.0

    assert (first, clock.now(500.0), clock.now(600.0)) == (500.0, 510.0, 600.0)


async def test_time_goes_on_over_a_restart_with_a_clock_set_back(tmp_path: Path) -> None:
    """A machine that comes up with yesterday's time must not revive yesterday's leases."""
    url, later, earlier = url_of(tmp_path / "yard.db"), 2_000.0, 1_000.0
    before = await EmbeddedFile.open(url, wall=lambda: later)
    await before.write(lambda db, now: db.execute("INSERT INTO queues (name) VALUES ('q')").rowcount, timeout_s=5)
    await before.close()

    after = await EmbeddedFile.open(url, wall=lambda: earlier)
    told = [
        await after.read(lambda db, now: now, timeout_s=5),
        await after.write(lambda db, now: now, timeout_s=5),
    ]
    await after.close()

    assert told == [2_000.0, 2_000.0]

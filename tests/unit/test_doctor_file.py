"""The embedded file in every state: not there yet, ours, somebody else's, damaged, locked, in a wrong place."""

import shutil
import sqlite3
from collections import namedtuple
from pathlib import Path

import pytest
from support.doctor import healthy, only, place, worst

from codeyard.cli.checks import file as file_module
from codeyard.cli.checks.check import Finding, Status
from codeyard.cli.checks.file import check_file, file_findings, file_format
from codeyard.shared.embedded.schema import VERSION, prepare
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file as the first worker makes it."""
    made = tmp_path / "yard.db"
    prepare(made, patience_s=1.0)
    return made


async def looked_at(path: Path) -> list[Finding]:
    return await check_file(place(broker={"url": f"sqlite:///{path}"}, store={"url": f"sqlite:///{path}"}))


async def test_our_own_file_is_healthy_also_while_it_is_in_use(path: Path) -> None:
    """A doctor beside a worker that runs."""
    assert healthy(await looked_at(path))
    store = await SqliteStore.open(StoreSettings(url=f"sqlite:///{path}"), Topology("t"))
    [finding] = await looked_at(path)
    await store.close()
    assert "whole" in finding.text
    assert "0 jobs on record, 0 messages wait" in finding.text
    assert file_format(path) == VERSION


async def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """Nor its folders."""
    findings = await looked_at(tmp_path / "deep" / "er" / "yard.db")
    assert healthy(findings)
    assert "made at first use" in findings[0].text
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240


async def test_servers_have_no_file_and_one_of_each_is_a_warning(path: Path) -> None:
    """Redis beside a SQLite broker: the second machine's worker never sees a job."""
    servers = place(broker={"url": "amqp://h/"}, store={"url": "redis://h/"})
    assert only(await check_file(servers), Status.SKIPPED)
    half = place(broker={"url": f"sqlite:///{path}"}, store={"url": "redis://h/"})
    assert "only CODEYARD_BROKER_URL is the embedded file" in worst(await check_file(half)).text
    assert BrokerSettings().url == StoreSettings().url  # the default is one file for both


def spoiled_header(path: Path) -> None:
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 100)


def spoiled_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4_096:8_192] = b"\xff" * 4_096
    path.write_bytes(content)


def of_another_program(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE cookies (jar TEXT)")
    db.commit()
    db.close()


def of_the_future(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()


STATES = {
    "no database": (spoiled_header, "no SQLite file"),
    "damaged": (spoiled_page, "damaged"),
    "another's": (of_another_program, "database of another program"),
    "newer": (of_the_future, f"format {VERSION + 1}"),
}


@pytest.mark.parametrize("spoil,said", STATES.values(), ids=STATES.keys())
async def test_a_file_that_cannot_be_used_says_why(path: Path, spoil: object, said: str) -> None:
    """And is left as it is."""
    assert callable(spoil)
    spoil(path)
    before = path.read_bytes()  # noqa: ASYNC240
    finding = worst(await looked_at(path))
    assert finding.status is Status.FAIL
    assert said in finding.text
    assert path.read_bytes() == before  # noqa: ASYNC240


async def test_a_file_that_somebody_holds_locked_is_told(path: Path) -> None:
    """A backup tool, a shell left open in a transaction."""
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        finding = worst(await looked_at(path))
    finally:
        holder.close()
    assert "locked by another program" in finding.text
    assert finding.status is Status.WARN


async def test_an_older_format_is_told_and_not_upgraded(path: Path) -> None:
    """Opening it would bring it to a format that a running worker may not know."""
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {VERSION - 1}")
    db.close()
    [finding] = await looked_at(path)
    assert f"format {VERSION - 1} (the next start makes it {VERSION})" in finding.text
    assert file_format(path) == VERSION - 1


def mounted(kind: str, folder: Path) -> str:
    return f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {folder} rw - {kind} server:/export rw\n"


@pytest.mark.parametrize("kind,refused", [("nfs4", True), ("cifs", True), ("fuse.gcsfuse", True), ("xfs", False)])
def test_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refused: bool
) -> None:
    """Locks and shared memory do not work over it: jobs would be lost and doubled."""
    monkeypatch.setattr(file_module, "_mounts", lambda: mounted(kind, tmp_path))
    findings = list(file_findings(f"sqlite:///{tmp_path / 'yard.db'}", "CODEYARD_STORE_URL"))
    assert any("network file system" in text for text in only(findings, Status.FAIL)) is refused


@pytest.mark.parametrize("free,status", [(2**34, Status.OK), (2**29, Status.WARN), (2**20, Status.FAIL)])
async def test_a_disk_that_is_nearly_full_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: Status
) -> None:
    """It takes no more jobs when it is."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, free))
    findings = await looked_at(path)
    assert findings[0].status is status


async def test_a_folder_an_empty_name_and_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    """What a URL can get wrong."""
    assert "is a folder" in worst(await looked_at(tmp_path)).text
    assert "names no file" in worst(list(file_findings("sqlite://yard.db", "X"))).text
    assert "names no file" in worst(list(file_findings("sqlite:///:memory:", "X"))).text
    assert "may not write in /proc" in worst(await looked_at(Path("/proc/yard.db"))).text


async def test_a_large_file_is_looked_at_as_far_as_time_allows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check must end."""
    monkeypatch.setattr(file_module, "INTEGRITY_S", 0.0)
    monkeypatch.setattr(file_module, "STEPS", 1)
    [finding] = await looked_at(path)
    assert "as far as looked at" in finding.text


async def test_a_copy_made_while_the_file_was_in_use_is_told_from_the_file(path: Path, tmp_path: Path) -> None:
    """A worker would refuse it; the doctor says so before."""
    store = await SqliteStore.open(StoreSettings(url=f"sqlite:///{path}"), Topology("t"))
    await store.announce("w", "here", ttl_s=5)
    shutil.copy(path, copied := tmp_path / "copied.db")
    shutil.copy(f"{path}-wal", f"{copied}-wal")
    shutil.copy(f"{path}-wal", log := tmp_path / "log")
    await store.close()

    finding = worst(await looked_at(copied))
    shutil.copy(log, f"{path}-wal")
    beside = worst(await looked_at(path))

    assert (finding.status, beside.status) == (Status.FAIL, Status.FAIL)
    assert "copy made while the file was in use" in finding.text
    assert "move yard.db-wal and yard.db-shm away" in beside.text

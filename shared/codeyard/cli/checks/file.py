"""The embedded file: may it be written, on a disk that keeps it, with room, whole, and free?

A file that is not there yet is not made. Called by: cli.doctor.
"""

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from codeyard.cli.checks.check import Finding, Place, aside, fail, gib, ok, skipped, warn
from codeyard.shared.embedded.identity import refuse_foreign_log, uri_of, was_copied_in_use
from codeyard.shared.embedded.place import NETWORK_FILE_SYSTEMS, file_system
from codeyard.shared.embedded.schema import APPLICATION_ID, OLDEST_SQLITE, VERSION
from codeyard.shared.errors import SettingsError

MIB = 2**20
TIGHT_BYTES = 1024 * MIB
FULL_BYTES = 64 * MIB
INTEGRITY_S = 20.0  # a quick check reads the whole file; of a large one only the beginning
STEPS = 10_000  # of SQLite's machine between looks at the clock


async def check_file(place: Place) -> list[Finding]:
    """Broker's and store's, which are one as a rule."""
    named = {
        "CODEYARD_BROKER_URL": place.settings.broker.url,
        "CODEYARD_STORE_URL": place.settings.store.url,
    }
    files: dict[str, list[str]] = {}
    for variable, url in named.items():
        if url.startswith("sqlite:"):
            files.setdefault(url, []).append(variable)
    if not files:
        return [skipped("broker and store are servers")]
    findings = []
    if len(files) == 1 and len(next(iter(files.values()))) == 1:
        [variable] = next(iter(files.values()))
        text = f"only {variable} is the embedded file, which other machines cannot see"
        findings.append(warn(text, "on one machine name it for both; on several name servers for both"))
    for url, variables in files.items():
        findings += await aside(lambda: list(file_findings(url, variables[0])))  # noqa: B023 - awaited here
    return findings


def file_findings(url: str, variable: str) -> Iterator[Finding]:
    """Blocks; for as long as INTEGRITY_S on a large file."""
    name = url.removeprefix("sqlite:///")
    if name == url or not name or name.startswith(":memory:"):
        yield fail(f"{url} names no file", f"{variable}=sqlite:////absolute/path/yard.db")
        return
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        wanted = ".".join(map(str, OLDEST_SQLITE))
        yield fail(f"this Python has SQLite {sqlite3.sqlite_version}", f"codeyard needs {wanted}: use a newer Python")
        return
    path = Path(name).expanduser().resolve()
    folder = next((one for one in path.parents if one.exists()), Path("/"))
    if path.is_dir():
        yield fail(f"{path} is a folder", f"name a file in it: {variable}=sqlite:///{path / 'yard.db'}")
        return
    if blocked := _unwritable(folder, path):
        yield fail(blocked, f"chown or chmod it, mount it read-write, or name another path in {variable}")
        return
    kind = file_system(folder, _mounts())
    if kind in NETWORK_FILE_SYSTEMS:
        yield fail(
            f"{path} is on a network file system ({kind}), where SQLite loses data",
            f"a local disk in {variable}, or RabbitMQ and Redis for several machines",
        )
        return
    yield from _space(folder)
    yield from _content(path) if path.exists() else [ok(f"{path} is not there yet: it is made at first use")]


def _unwritable(folder: Path, path: Path) -> str:
    """Tried, not asked: permissions say nothing of a file system that is mounted read-only."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"this user may not write in {folder} ({error.strerror})"
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        return f"this user may not write {path}"
    return ""


def _mounts() -> str:
    try:
        return os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        return ""  # not Linux


def _space(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    if free < TIGHT_BYTES:
        said = fail if free < FULL_BYTES else warn
        yield said(f"{gib(free)} are free in {folder}: a full disk takes no more jobs", "free some, or move the file")


def _content(path: Path) -> Iterator[Finding]:
    try:
        refuse_foreign_log(path)  # else closing the connection would fold it in
        db = sqlite3.connect(uri_of(path), uri=True, timeout=1.0, isolation_level=None)
        try:
            yield from _looked_into(db, path)
        finally:
            db.close()
    except SettingsError as error:
        yield fail(str(error), "docs/embedded.md, under Copies")
    except sqlite3.Error as error:
        yield _broken(error, path)


def _looked_into(db: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    owner = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if owner != APPLICATION_ID:
        yield fail(f"{path} is the database of another program", "name another path")
        return
    if version > VERSION:
        yield fail(
            f"{path} has format {version}, this codeyard reads {VERSION}", "upgrade codeyard, or name another path"
        )
        return
    if version == VERSION and was_copied_in_use(db, path):
        yield fail(
            f"{path} is a copy made while the file was in use: jobs may be missing from it or torn",
            "restore one made by codeyard backup (docs/embedded.md, under Copies)",
        )
        return
    problem, whole = _integrity(db)
    if problem:
        way_out = "stop everything, then sqlite3 FILE .recover into a new one; jobs in it may be lost"
        yield fail(f"{path} is damaged: {problem}", way_out)
        return
    db.execute("BEGIN IMMEDIATE")  # may it be written now?
    db.execute("ROLLBACK")
    jobs = db.execute("SELECT count(*) FROM jobs").fetchone()[0]
    waiting = db.execute("SELECT coalesce(sum(free), 0) FROM queues").fetchone()[0]
    older = f", format {version} (the next start makes it {VERSION})" if version < VERSION else ""
    looked = "whole" if whole else f"whole as far as looked at within {INTEGRITY_S:g} s"
    yield ok(f"{path}: {looked}, {gib(path.stat().st_size)}{older}, {jobs} jobs on record, {waiting} messages wait")


def file_format(path: Path) -> int:
    """The format of an embedded file; 0 for one that is none of ours, or cannot be read."""
    try:
        db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=1.0)
        try:
            return int(db.execute("PRAGMA user_version").fetchone()[0])
        finally:
            db.close()
    except sqlite3.Error:
        return 0


def _integrity(db: sqlite3.Connection) -> tuple[str, bool]:
    """What SQLite's quick check found, and whether it came to its end."""
    until_s = time.monotonic() + INTEGRITY_S
    db.set_progress_handler(lambda: time.monotonic() > until_s, STEPS)
    try:
        first = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            return "", False
        raise
    finally:
        db.set_progress_handler(None, STEPS)
    return ("" if first == "ok" else str(first)), True


def _broken(error: sqlite3.Error, path: Path) -> Finding:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_NOTADB:
            return fail(f"{path} is no SQLite file", "name another path, or remove it")
        case sqlite3.SQLITE_CORRUPT:
            return fail(f"{path} is damaged: {error}", "stop everything, then sqlite3 FILE .recover into a new one")
        case sqlite3.SQLITE_BUSY:
            return warn(
                f"{path} is locked by another program", "end it: fuser FILE shows who; no backup tool may hold it"
            )
        case sqlite3.SQLITE_FULL:
            return fail(f"the disk of {path} is full", "free some space")
    return fail(f"{path}: {error}", "see who may read and write it and its folder")

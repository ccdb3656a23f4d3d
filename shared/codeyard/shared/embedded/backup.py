"""A copy of the embedded file that is whole, made while the file is in use.

Promise: it holds everything that was confirmed before `back_up` began, as of one moment, was looked through
to its last page, and is under its name only when it is complete and on disk. What was there is never replaced.
Called by: cli.backup.
"""

import os
import sqlite3
import uuid
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from codeyard.shared.embedded.failure import code_of, explained, refused
from codeyard.shared.embedded.identity import damage, inode_of, refuse_foreign_log, uri_of
from codeyard.shared.embedded.place import embedded_path
from codeyard.shared.embedded.schema import APPLICATION_ID, VERSION, patiently
from codeyard.shared.errors import FleetError, SettingsError

PATIENCE_S = 5.0  # for the moment in which another process opens or closes the file


@dataclass(frozen=True, slots=True)
class Backup:
    path: Path
    num_bytes: int
    num_jobs: int
    num_messages: int


class BackupRefused(FleetError):
    """Nothing was written. The message says what to do instead."""


def back_up(url: str, target: Path) -> Backup:
    """Blocks: reads the file twice, to look through it and to copy it; others go on writing meanwhile.

    Raises SettingsError for a URL of no file of ours, BackupRefused, FileUnavailable (no room, for one).
    """
    source = embedded_path(url)
    if not source.is_file():
        raise SettingsError(f"{source}: there is no such file, so nothing to back up")
    target = target.expanduser().resolve()
    if os.path.lexists(target):
        raise _there_already(target)
    refuse_foreign_log(source)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        part.touch(mode=0o600, exist_ok=False)  # prompts are private
    except OSError as error:
        raise refused(error, target) from None
    try:
        _copy(source, part)
        made = _finish(part)
        _give_name(part, target)
    finally:
        for suffix in ("", "-journal"):  # SQLite leaves its own where it found no room
            part.with_name(part.name + suffix).unlink(missing_ok=True)
    return Backup(target, *made)


def _copy(source: Path, part: Path) -> None:
    try:
        with closing(sqlite3.connect(uri_of(source), uri=True, timeout=PATIENCE_S, isolation_level=None)) as db:
            owner, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
            if owner != APPLICATION_ID:
                raise SettingsError(f"{source} is not an embedded file of codeyard")
            if version > VERSION:
                raise BackupRefused(
                    f"{source} has format {version}, this version reads {VERSION}: update codeyard here too"
                )
            if trouble := damage(db):  # the copy is built anew from the tables, and would not show it
                raise BackupRefused(f"{source} is damaged: {trouble}; restore an earlier backup")
            patiently(lambda: db.execute("VACUUM INTO ?", (str(part),)), PATIENCE_S)
    except sqlite3.Error as error:
        raise explained(error, part if code_of(error, part) == sqlite3.SQLITE_FULL else source) from None


def _finish(part: Path) -> tuple[int, int, int]:
    """Look through it, make it known in its place, and have it on disk. Its size in bytes, jobs, messages."""
    try:
        with closing(sqlite3.connect(uri_of(part), uri=True, isolation_level=None)) as db:
            if trouble := damage(db):
                raise BackupRefused(f"the copy came out damaged: {trouble}; is the disk of {part.parent} sound?")
            if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:  # an older one learns it when it is opened
                db.execute("UPDATE meta SET inode = ?", (inode_of(part),))
            jobs, messages = (
                db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("jobs", "messages")
            )
        with part.open("rb") as written:
            os.fsync(written.fileno())
        return part.stat().st_size, jobs, messages
    except sqlite3.Error as error:
        raise explained(error, part) from None
    except OSError as error:
        raise refused(error, part) from None


def _give_name(part: Path, target: Path) -> None:
    """A hard link is refused where the name is taken, and keeps the inode that the copy knows itself by."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise _there_already(target) from None
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise _there_already(target) from None
        os.rename(part, target)
    with suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _there_already(target: Path) -> BackupRefused:
    return BackupRefused(f"{target} is there already; name another file, backups are never overwritten")

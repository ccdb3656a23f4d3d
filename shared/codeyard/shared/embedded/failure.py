"""sqlite3's errors as one error with a sentence for the person on call."""

import errno
import os
import sqlite3
from pathlib import Path

from codeyard.shared.errors import FleetError

_FULL = "the disk is full; make room, nothing that was confirmed is lost"
_REASONS = {
    sqlite3.SQLITE_BUSY: "another process has kept it locked for too long; look for a stopped or hung process",
    sqlite3.SQLITE_LOCKED: "another process has kept it locked for too long; look for a stopped or hung process",
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database; move it away or name another path",
    sqlite3.SQLITE_CORRUPT: "it is damaged; move it and its -wal file away, or restore a copy",
    sqlite3.SQLITE_READONLY: "it cannot be written; check the owner and the mode of the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the owner and the mode of the file and its folder",
    sqlite3.SQLITE_PERM: "it cannot be opened; check the owner and the mode of the file and its folder",
    sqlite3.SQLITE_IOERR: "the disk reports an input/output error, or a quota is used up",
}
_ALSO_WHEN_FULL = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}  # no room for the log's index, or for the log
_NO_ROOM_BYTES = 65_536  # the log's index alone grows by 32 KiB


class FileUnavailable(FleetError):
    """The embedded file did not take or answer the call. Its fate is unknown; it may be repeated."""


class NoAnswer(FileUnavailable):
    """Not in time; it may still be under way."""


def explained(error: sqlite3.Error, path: Path) -> FileUnavailable:
    return FileUnavailable(f"{path}: {_REASONS.get(code_of(error, path), 'SQLite refused the call')} ({error})")


def refused(error: OSError, path: Path) -> FileUnavailable:
    """The same of a file beside it."""
    reason = _FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else "it cannot be opened"
    return FileUnavailable(f"{path}: {reason} ({error.strerror})")


def code_of(error: sqlite3.Error, path: Path) -> int:
    """SQLite's primary code; SQLITE_FULL for a full disk, whatever that kept SQLite from doing."""
    code: int = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    return sqlite3.SQLITE_FULL if code in _ALSO_WHEN_FULL and _is_full(path.parent) else code


def _is_full(folder: Path) -> bool:
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < _NO_ROOM_BYTES or (found.f_files > 0 and found.f_favail == 0)

"""sqlite3's errors as one error with a sentence for the person on call."""

import sqlite3
from pathlib import Path

from codeyard.shared.errors import FleetError

_REASONS = {
    sqlite3.SQLITE_BUSY: "another process has kept it locked for too long; look for a stopped or hung process",
    sqlite3.SQLITE_LOCKED: "another process has kept it locked for too long; look for a stopped or hung process",
    sqlite3.SQLITE_FULL: "the disk is full; make room, nothing that was confirmed is lost",
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database; move it away or name another path",
    sqlite3.SQLITE_CORRUPT: "it is damaged; move it and its -wal file away, or restore a copy",
    sqlite3.SQLITE_READONLY: "it cannot be written; check the owner and the mode of the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the owner and the mode of the file and its folder",
    sqlite3.SQLITE_PERM: "it cannot be opened; check the owner and the mode of the file and its folder",
    sqlite3.SQLITE_IOERR: "the disk reports an input/output error",
}


class FileUnavailable(FleetError):
    """The embedded file did not take or answer the call. Its fate is unknown; it may be repeated."""


class NoAnswer(FileUnavailable):
    """Not in time; it may still be under way."""


def explained(error: sqlite3.Error, path: Path) -> FileUnavailable:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    return FileUnavailable(f"{path}: {_REASONS.get(code, 'SQLite refused the call')} ({error})")

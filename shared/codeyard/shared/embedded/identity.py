"""Is it still the file that was opened, and is it the one that it says it is?

A running process must not go on writing into a file that was deleted or replaced: nobody would ever find
what it confirms. And a copy made with `cp` while the file is in use lacks what was in the log, or is torn.
How copies are told: the file keeps its own inode, and the last process that closes it takes it out of WAL
mode. So one in WAL mode under another inode was copied in the middle of something, and is refused; one
that was closed is looked through once, and is then at home in its new place.
Called by: embedded.schema, embedded.file, embedded.watcher.
"""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from codeyard.shared.embedded.failure import FileUnavailable
from codeyard.shared.embedded.place import kind_of
from codeyard.shared.errors import SettingsError

UNKNOWN = 0
"""In place of an inode: made by an older version, or on a file system that gives files new ones at each mount."""

LOOKS = 5  # at log and header, which another process may be changing in between

_HEADER_BYTES, _WRITE_VERSION_AT, _CLOSED = 20, 18, 1  # https://www.sqlite.org/fileformat.html: 1 is not WAL

_WITHOUT_INODES = frozenset(["vfat", "msdos", "exfat", "9p", "fuseblk", "fuse", "virtiofs"])

_CONTENT_CHECKS = {
    "a job without its body": "SELECT 1 FROM jobs WHERE number NOT IN (SELECT number FROM bodies) LIMIT 1",
    "a body without its job": "SELECT 1 FROM bodies WHERE number NOT IN (SELECT number FROM jobs) LIMIT 1",
    "events that are missing": (
        "SELECT 1 FROM jobs LEFT JOIN"
        " (SELECT number, count(*) AS told, max(seq) AS last FROM events GROUP BY number) USING (number)"
        " WHERE last_seq <> coalesce(told, 0) OR last_seq <> coalesce(last, 0) LIMIT 1"
    ),
    "events without their job": "SELECT 1 FROM events WHERE number NOT IN (SELECT number FROM jobs) LIMIT 1",
    "queues that count other messages than there are": (
        "SELECT 1 FROM queues WHERE free <>"
        " (SELECT count(*) FROM messages WHERE queue = queues.number AND consumer IS NULL) LIMIT 1"
    ),
    "messages of no queue": "SELECT 1 FROM messages WHERE queue NOT IN (SELECT number FROM queues) LIMIT 1",
}


class Opened:
    """What lay under a path when this was made. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Raises FileUnavailable."""
        self._path = path
        self._seen = self._look()

    def check(self) -> None:
        """Raises FileUnavailable once something else, or nothing, is there. Takes a microsecond or two."""
        if self._look() != self._seen:
            raise FileUnavailable(
                f"{self._path}: was replaced by another file while in use; "
                "stop every process on it, see that the right file is there, start them again"
            )

    def _look(self) -> tuple[int, int]:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            raise FileUnavailable(
                f"{self._path}: was deleted or moved away while in use; move it back, "
                "or stop every process on it, restore a backup and start them again"
            ) from None
        except OSError as error:
            raise FileUnavailable(f"{self._path}: cannot be looked at ({error.strerror})") from None
        return found.st_dev, found.st_ino


def inode_of(path: Path) -> int:
    """What tells a file from its copies, or UNKNOWN. Raises FileNotFoundError."""
    kind = kind_of(path)
    return UNKNOWN if kind in _WITHOUT_INODES or kind.startswith("fuse.") else path.stat().st_ino


def refuse_torn_copy(db: sqlite3.Connection, path: Path) -> None:
    """In a transaction of a connection that did not change the journal mode. Leaves the inode in the file.

    Raises SettingsError. Of a closed file under a new inode it reads every page: for a second or so per GB.
    """
    [known] = db.execute("SELECT inode FROM meta").fetchone()
    inode = inode_of(path)
    if known == inode or inode == UNKNOWN:
        return
    if was_copied_in_use(db, path):
        raise SettingsError(
            f"{path} is a copy made while the file was in use, so jobs may be missing from it or torn; "
            "use one made by `codeyard backup`, or copy the file again when every process on it has ended. "
            "If it is the last there is, `codeyard backup` makes a usable file of what is whole in it "
            f"(--broker sqlite:///{path} --store sqlite:///{path})"
        )
    if known != UNKNOWN and (trouble := damage(db)):
        raise SettingsError(f"{path} is a torn copy: {trouble}; use one made by `codeyard backup`")
    db.execute("UPDATE meta SET inode = ?", (inode,))


def was_copied_in_use(db: sqlite3.Connection, path: Path) -> bool:
    """Another file's inode, and nobody closed it. `db` did not change the journal mode."""
    [known] = db.execute("SELECT inode FROM meta").fetchone()
    if UNKNOWN in (known, inode := inode_of(path)) or known == inode:
        return False
    return str(db.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"


def refuse_foreign_log(path: Path) -> None:
    """Before anyone connects: SQLite would take a log that lies there for the file's own, and fold it in.

    A closed file has none, so this one was put in the place of a file whose processes were killed.
    Raises SettingsError.
    """
    log = path.with_name(path.name + "-wal")
    for _ in range(LOOKS):
        try:
            if not log.stat().st_size:
                return
            with path.open("rb") as raw:
                header = raw.read(_HEADER_BYTES)
        except OSError:
            return  # no such log, or no such file; what else is wrong, connecting will say
        if len(header) < _HEADER_BYTES or header[_WRITE_VERSION_AT] != _CLOSED:
            return
    raise SettingsError(
        f"{path} was put in the place of a file that was in use, and {log.name} is that one's log; "
        f"move {log.name} and {path.name}-shm away, then start again"
    )


def damage(db: sqlite3.Connection) -> str:
    """What is wrong in the file, "" if nothing is: SQLite's own full check, then ours. Reads every page."""
    try:
        first = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
        if first != "ok":
            return " ".join(first.removeprefix("*** in database main ***").split())
        found = (what for what, query in _CONTENT_CHECKS.items() if db.execute(query).fetchone())
        return next(found, "")
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return str(error)
        raise


def close_cleanly(path: Path, opened: Opened) -> None:
    """Out of WAL mode, if nobody else has the file open: from here on a copy of it is whole. Blocks on the disk."""
    with suppress(sqlite3.Error, FileUnavailable):
        opened.check()  # another file's mode is not ours to change: it tells whether that is a copy
        db = sqlite3.connect(uri_of(path), uri=True, timeout=0.0, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA journal_mode = DELETE")  # takes the whole file, or fails at once
        finally:
            db.close()


def uri_of(path: Path) -> str:
    """To connect to a file that is there: SQLite would make one that was deleted anew, and empty."""
    return f"file:{quote(str(path))}?mode=rw"

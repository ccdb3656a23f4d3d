"""What is in the file, and how a connection to it is made.

One file may hold several fleets: jobs and aliases carry their namespace, queue names begin with it.
"""

import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from codeyard.shared.embedded.failure import code_of, explained
from codeyard.shared.embedded.identity import refuse_foreign_log, refuse_torn_copy, uri_of
from codeyard.shared.errors import SettingsError

T = TypeVar("T")

APPLICATION_ID = 0x59415244  # "YARD": tells our files from other programs'
VERSION = 6
OLDEST_SQLITE = (3, 38, 0)  # RETURNING, and JSON functions built in
LOCK_RETRY_S = 0.001  # SQLite's own waits grow to 100 ms and starve under writers that never pause

SCHEMA = """
-- `inode` is the file's own, so that a copy can be told: see identity.py.
CREATE TABLE meta (
    one INTEGER PRIMARY KEY CHECK (one = 1), clock REAL NOT NULL, inode INTEGER NOT NULL DEFAULT 0) STRICT;
INSERT INTO meta (one, clock) VALUES (1, 0.0);

-- A record without its job, which never changes and may be large, so that a renewal writes little.
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, namespace TEXT NOT NULL, id TEXT NOT NULL, record TEXT NOT NULL,
    last_seq INTEGER NOT NULL, check_at REAL NOT NULL, expires_at REAL NOT NULL, UNIQUE (namespace, id)) STRICT;
CREATE INDEX jobs_due ON jobs (namespace, check_at) WHERE check_at > 0;
CREATE INDEX jobs_expiry ON jobs (expires_at);
CREATE TABLE bodies (number INTEGER PRIMARY KEY, job TEXT NOT NULL) STRICT;
CREATE TABLE events (
    number INTEGER NOT NULL, seq INTEGER NOT NULL, event TEXT NOT NULL,
    PRIMARY KEY (number, seq)) STRICT, WITHOUT ROWID;
CREATE TRIGGER job_gone AFTER DELETE ON jobs BEGIN
    DELETE FROM bodies WHERE number = OLD.number;
    DELETE FROM events WHERE number = OLD.number;
END;
-- Final jobs whose caller is still to be told, and when next.
CREATE TABLE callbacks (number INTEGER PRIMARY KEY, namespace TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE INDEX callbacks_due ON callbacks (namespace, at);
CREATE TRIGGER callback_gone AFTER DELETE ON jobs BEGIN
    DELETE FROM callbacks WHERE number = OLD.number;
END;
CREATE TABLE aliases (
    namespace TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (namespace, name)) STRICT, WITHOUT ROWID;
CREATE TABLE notices (
    namespace TEXT NOT NULL, owner TEXT NOT NULL, until REAL NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (namespace, owner)) STRICT, WITHOUT ROWID;

-- Credentials, and what each tenant has used: see access/ and limits/.
CREATE TABLE api_keys (
    namespace TEXT NOT NULL, id TEXT NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (namespace, id)) STRICT, WITHOUT ROWID;
CREATE TABLE levels (
    namespace TEXT NOT NULL, tenant TEXT NOT NULL, bucket TEXT NOT NULL, amount REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (namespace, tenant, bucket)) STRICT, WITHOUT ROWID;
CREATE TABLE live_jobs (
    namespace TEXT NOT NULL, tenant TEXT NOT NULL, id TEXT NOT NULL, tokens INTEGER NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (namespace, tenant, id)) STRICT, WITHOUT ROWID;

-- Long prompts and files in chunks, and what the gateways keep of files and batches: see blobs/ and documents/.
CREATE TABLE chunks (
    number INTEGER PRIMARY KEY, namespace TEXT NOT NULL, tenant TEXT NOT NULL, digest TEXT NOT NULL,
    bytes INTEGER NOT NULL, until REAL NOT NULL, data BLOB NOT NULL, UNIQUE (namespace, tenant, digest)) STRICT;
CREATE INDEX chunks_use ON chunks (namespace, tenant, until, bytes);
CREATE INDEX chunks_end ON chunks (until);
CREATE TABLE chunk_holders (
    chunk INTEGER NOT NULL, holder TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (chunk, holder)) STRICT, WITHOUT ROWID;
CREATE TRIGGER chunk_gone AFTER DELETE ON chunks BEGIN
    DELETE FROM chunk_holders WHERE chunk = OLD.number;
END;
CREATE TABLE documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, kind TEXT NOT NULL, tenant TEXT NOT NULL,
    id TEXT NOT NULL, first TEXT NOT NULL, body TEXT NOT NULL, wish TEXT NOT NULL, owner TEXT NOT NULL,
    lease_until REAL, until REAL NOT NULL, UNIQUE (namespace, kind, tenant, id)) STRICT;
CREATE INDEX documents_open ON documents (namespace, kind, lease_until) WHERE lease_until IS NOT NULL;
CREATE INDEX documents_end ON documents (until);

-- `free` counts messages without a consumer; triggers keep it, so that no path can forget to.
CREATE TABLE queues (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, max_length INTEGER, free INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE consumers (number INTEGER PRIMARY KEY AUTOINCREMENT, lock TEXT NOT NULL) STRICT;
CREATE TABLE messages (
    number INTEGER PRIMARY KEY AUTOINCREMENT, queue INTEGER NOT NULL, ready_at REAL NOT NULL,
    published_at REAL NOT NULL, redelivered INTEGER NOT NULL DEFAULT 0, consumer INTEGER,
    message_id TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL) STRICT;
CREATE INDEX messages_ready ON messages (queue, ready_at, number) WHERE consumer IS NULL;
CREATE INDEX messages_held ON messages (consumer, queue) WHERE consumer IS NOT NULL;
CREATE TRIGGER message_in AFTER INSERT ON messages BEGIN
    UPDATE queues SET free = free + 1 WHERE number = NEW.queue;
END;
CREATE TRIGGER message_out AFTER DELETE ON messages WHEN OLD.consumer IS NULL BEGIN
    UPDATE queues SET free = free - 1 WHERE number = OLD.queue;
END;
CREATE TRIGGER message_moved AFTER UPDATE OF consumer ON messages
WHEN (OLD.consumer IS NULL) <> (NEW.consumer IS NULL) BEGIN
    UPDATE queues SET free = free + iif(NEW.consumer IS NULL, 1, -1) WHERE number = NEW.queue;
END;
"""

# What makes a file of format N one of N + 1, keyed by N.
UPGRADES = {
    1: """
CREATE TABLE aliases_2 (
    namespace TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (namespace, name)) STRICT, WITHOUT ROWID;
INSERT INTO aliases_2 SELECT namespace, name,
    json_object('revision', revision, 'context_tokens', context_tokens) FROM aliases;
DROP TABLE aliases;
ALTER TABLE aliases_2 RENAME TO aliases;
CREATE TABLE notices (
    namespace TEXT NOT NULL, owner TEXT NOT NULL, until REAL NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (namespace, owner)) STRICT, WITHOUT ROWID;
""",
    2: """
CREATE TABLE api_keys (
    namespace TEXT NOT NULL, id TEXT NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (namespace, id)) STRICT, WITHOUT ROWID;
CREATE TABLE levels (
    namespace TEXT NOT NULL, tenant TEXT NOT NULL, bucket TEXT NOT NULL, amount REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (namespace, tenant, bucket)) STRICT, WITHOUT ROWID;
CREATE TABLE live_jobs (
    namespace TEXT NOT NULL, tenant TEXT NOT NULL, id TEXT NOT NULL, tokens INTEGER NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (namespace, tenant, id)) STRICT, WITHOUT ROWID;
""",
    3: """
CREATE TABLE chunks (
    number INTEGER PRIMARY KEY, namespace TEXT NOT NULL, tenant TEXT NOT NULL, digest TEXT NOT NULL,
    bytes INTEGER NOT NULL, until REAL NOT NULL, data BLOB NOT NULL, UNIQUE (namespace, tenant, digest)) STRICT;
CREATE INDEX chunks_use ON chunks (namespace, tenant, until, bytes);
CREATE INDEX chunks_end ON chunks (until);
CREATE TABLE chunk_holders (
    chunk INTEGER NOT NULL, holder TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (chunk, holder)) STRICT, WITHOUT ROWID;
CREATE TRIGGER chunk_gone AFTER DELETE ON chunks BEGIN
    DELETE FROM chunk_holders WHERE chunk = OLD.number;
END;
CREATE TABLE documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, kind TEXT NOT NULL, tenant TEXT NOT NULL,
    id TEXT NOT NULL, first TEXT NOT NULL, body TEXT NOT NULL, wish TEXT NOT NULL, owner TEXT NOT NULL,
    lease_until REAL, until REAL NOT NULL, UNIQUE (namespace, kind, tenant, id)) STRICT;
CREATE INDEX documents_open ON documents (namespace, kind, lease_until) WHERE lease_until IS NOT NULL;
CREATE INDEX documents_end ON documents (until);
""",
    4: """
CREATE TABLE callbacks (number INTEGER PRIMARY KEY, namespace TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE INDEX callbacks_due ON callbacks (namespace, at);
CREATE TRIGGER callback_gone AFTER DELETE ON jobs BEGIN
    DELETE FROM callbacks WHERE number = OLD.number;
END;
""",
    5: "ALTER TABLE meta ADD COLUMN inode INTEGER NOT NULL DEFAULT 0;\n",
}


def prepare(path: Path, *, patience_s: float) -> None:
    """Make the file, or check that it is ours and no torn copy. Raises SettingsError or FileUnavailable."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        wanted = ".".join(map(str, OLDEST_SQLITE))
        raise SettingsError(f"the embedded file needs SQLite {wanted}, this Python has {sqlite3.sqlite_version}")
    refuse_foreign_log(path)
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(path, timeout=0.0, isolation_level=None)
        if not patiently(partial(_pragma, db, "page_count"), patience_s):
            _use_log(db, path, patience_s)  # of a file that is there, its mode says how it was closed
        patiently(partial(_make_or_check, db, path), patience_s)
        _use_log(db, path, patience_s)
    except sqlite3.Error as error:
        if code_of(error, path) in _HOPELESS:
            raise SettingsError(f"embedded file {explained(error, path)}") from None
        raise explained(error, path) from None
    finally:
        if db is not None:
            db.close()


def connect(path: Path, *, patience_s: float, read_only: bool = False) -> sqlite3.Connection:
    """A connection to the prepared file, in autocommit mode; transactions are begun by hand.
    Raises sqlite3.Error."""
    db = sqlite3.connect(uri_of(path), uri=True, timeout=0.0, isolation_level=None)
    try:
        _use_log(db, path, patience_s)
        db.execute("PRAGMA synchronous = FULL")  # a commit that was told is on disk
        db.execute("PRAGMA journal_size_limit = 67108864")
        if read_only:
            db.execute("PRAGMA query_only = ON")
    except BaseException:
        db.close()
        raise
    return db


def _use_log(db: sqlite3.Connection, path: Path, patience_s: float) -> None:
    mode = patiently(lambda: db.execute("PRAGMA journal_mode = WAL").fetchone()[0], patience_s)
    if mode != "wal":
        raise SettingsError(f"{path}: its file system cannot hold SQLite's write-ahead log; use a local disk")


def patiently(attempt: Callable[[], T], patience_s: float) -> T:
    """Repeat while the file is locked, for `patience_s`; blocks, so never in an event loop."""
    give_up_s = time.monotonic() + patience_s
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > give_up_s:
                raise
            time.sleep(LOCK_RETRY_S)


_HOPELESS = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM}


def _make_or_check(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN IMMEDIATE")  # two processes may come at once: one makes it, the other finds it
    try:
        owner, version = _pragma(db, "application_id"), _pragma(db, "user_version")
        if (owner, version) == (0, 0) and not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            for statement in _statements(SCHEMA):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {VERSION}")
        elif owner != APPLICATION_ID:
            raise SettingsError(f"{path} is the database of another program; name another path")
        elif version < VERSION:
            for step in range(version, VERSION):
                for statement in _statements(UPGRADES[step]):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")
        elif version > VERSION:
            raise SettingsError(
                f"{path} has format {version}, this version reads {VERSION}: "
                "update codeyard here too, or name another path"
            )
        refuse_torn_copy(db, path)
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _statements(script: str) -> list[str]:
    """`executescript` would commit first, so the script is cut at its complete statements."""
    statements, begun = [], ""
    for line in script.splitlines(keepends=True):
        begun += line
        if sqlite3.complete_statement(begun):
            statements.append(begun)
            begun = ""
    return statements

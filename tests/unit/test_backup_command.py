"""`codeyard backup` as a person meets it: what it says, and what it refuses."""

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from codeyard.cli.main import main
from codeyard.shared.embedded.schema import prepare
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "yard.db"
    prepare(path, patience_s=1.0)
    return path


def backup(target: Path, broker: str, store: str | None = None, *more: str) -> Result:
    return CliRunner().invoke(main, ["backup", str(target), "--broker", broker, "--store", store or broker, *more])


def test_a_backup_says_what_is_in_it_and_opens_as_the_file_does(file: Path, tmp_path: Path) -> None:
    """For people, and for scripts."""
    told = backup(tmp_path / "one.db", f"sqlite:///{file}")
    as_json = backup(tmp_path / "two.db", f"sqlite:///{file}", None, "--json")

    assert (told.exit_code, as_json.exit_code) == (0, 0)
    assert "0 jobs, 0 messages, looked through" in told.stdout
    shown = json.loads(as_json.stdout)
    assert shown == {"file": str(tmp_path / "two.db"), "bytes": shown["bytes"], "jobs": 0, "messages": 0}

    async def opened() -> None:
        store = await SqliteStore.open(StoreSettings(url=f"sqlite:///{tmp_path / 'one.db'}"), Topology("t"))
        await store.close()

    asyncio.run(opened())


def test_a_backup_refuses_in_one_line_what_it_cannot_copy(file: Path, tmp_path: Path) -> None:
    """Each with the way out, and nothing written."""
    url, target, theirs = f"sqlite:///{file}", tmp_path / "backup.db", tmp_path / "theirs.db"
    prepare(tmp_path / "other.db", patience_s=1.0)
    with closing(sqlite3.connect(theirs)) as db:
        db.execute("CREATE TABLE cookies (jar TEXT)")
    refused = {
        "servers": (backup(target, "amqp://h/", "redis://h/"), "their own ways"),
        "two files": (backup(target, url, f"sqlite:///{tmp_path / 'other.db'}"), "back up each"),
        "no file": (backup(target, f"sqlite:///{tmp_path / 'none.db'}"), "nothing to back up"),
        "another program's": (backup(target, f"sqlite:///{theirs}"), "not an embedded file of codeyard"),
        "itself": (backup(file, url), "is there already"),
        "no folder": (backup(tmp_path / "deep" / "b.db", url), "No such file or directory"),
    }

    for what, (result, words) in refused.items():
        assert result.exit_code == 1, what
        assert words in result.stderr, what
        assert result.stderr.count("\n") == 1, what
    assert not target.exists()


def test_the_help_teaches_how_a_backup_is_restored() -> None:
    """Nobody reads documentation in the night in which it is needed."""
    said = CliRunner().invoke(main, ["backup", "--help"]).stdout

    assert "To restore" in said
    assert "Do not use cp on a file in use" in said

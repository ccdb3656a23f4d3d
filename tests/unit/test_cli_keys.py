"""`codeyard keys`: what an operator sees, and what nobody sees twice."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from codeyard.cli.main import main

Keys = Callable[..., Result]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Runs `codeyard keys ...` on a fleet of its own."""

    def run(*words: str) -> Result:
        where = ["--store", f"sqlite:///{tmp_path / 'yard.db'}", "--broker", f"sqlite:///{tmp_path / 'yard.db'}"]
        return CliRunner().invoke(main, ["keys", *words, *where], catch_exceptions=False)

    return run


def test_a_key_is_printed_once_and_kept_only_as_its_hash(keys: Keys, tmp_path: Path) -> None:
    """A copy of the file opens nothing, and no list shows it again."""
    made = keys("make", "laptop", "--tenant", "acme", "--scope", "read")
    listed = keys("list"), keys("list", "--json")

    text = made.stdout.strip()
    secret = text.split("_")[2]
    assert made.exit_code == 0
    assert "restart gateways" in made.stderr
    assert all(secret not in one.output for one in listed)
    assert "laptop" in listed[0].output
    [shown] = json.loads(listed[1].stdout)
    assert (shown["tenant"], shown["scopes"], shown["state"]) == ("acme", ["read"], "valid")
    with sqlite3.connect(tmp_path / "yard.db") as db:
        dump = "\n".join(db.iterdump())
    db.close()
    assert "api_keys" in dump
    assert secret not in dump


def test_a_key_submits_reads_and_cancels_unless_told_otherwise(keys: Keys) -> None:
    """Admin is asked for by name."""
    default = json.loads(keys("make", "a", "--json").stdout)
    admin = json.loads(keys("make", "b", "--scope", "admin", "--days", "1", "--json").stdout)

    assert (default["scopes"], default["tenant"]) == (["cancel", "read", "submit"], "default")
    assert "expires_at" not in default
    assert admin["scopes"] == ["admin"]
    assert admin["expires_at"] == pytest.approx(admin["created_at"] + 86_400)


def test_a_leaked_key_can_be_revoked_as_it_was_found(keys: Keys) -> None:
    """By its id, or by the whole text; once or twice."""
    first, second = [json.loads(keys("make", name, "--json").stdout) for name in ("a", "b")]

    outputs = [keys("revoke", given).output for given in (first["id"], second["key"], second["key"])]

    assert outputs == [f"revoked {key['id']}\n" for key in (first, second, second)]
    assert [key["state"] for key in json.loads(keys("list", "--json").stdout)] == ["revoked", "revoked"]
    assert second["key"].split("_")[2] not in "".join(outputs)


@pytest.mark.parametrize(
    "words, said",
    [
        (("revoke", "aaaaaaaaaaaa"), "no key aaaaaaaaaaaa"),
        (("make", "x", "--tenant", "a b"), "tenant"),
        (("make", "x\ny"), "name"),
        (("make", "x", "--scope", "root"), "root"),
        (("make", "x", "--days", "0"), "days"),
    ],
)
def test_a_mistake_is_said_in_one_line_and_nothing_is_made(words: tuple[str, ...], said: str, keys: Keys) -> None:
    """Status 1 or 2, no traceback."""
    done = keys(*words)

    assert done.exit_code in (1, 2)
    assert said in done.output
    assert json.loads(keys("list", "--json").stdout) == []


def test_without_keys_the_list_says_how_to_make_one(keys: Keys) -> None:
    """The first thing one types."""
    assert "codeyard keys make" in keys("list").output

"""Which weights a model argument means, and when its revision changes."""

import hashlib
from pathlib import Path

import pytest

from codeyard.shared.errors import EngineUnavailable, SettingsError
from codeyard.worker.engines.models import EDGE_BYTES, fingerprint, parse_model, starter_directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory as engines load it, with weights longer than what is read of them."""
    directory = tmp_path / "coder"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "model.safetensors").write_bytes(bytes(3 * EDGE_BYTES))
    (directory / "README.md").write_text("about")
    return directory


def test_the_starter_model_is_there_without_anything_else() -> None:
    """Demos and tests run with nothing but the package."""
    source = parse_model("starter")
    assert source.alias == "starter"
    assert Path(source.location) == starter_directory()
    assert source.revision == f"starter-{fingerprint(starter_directory())}"
    source.require_weights()


def test_the_same_weights_elsewhere_are_the_same_revision(model: Path, tmp_path: Path) -> None:
    """Workers on two machines serve the same queues."""
    copy = model.rename(tmp_path / "elsewhere")
    first = parse_model(f"coder={copy}").revision
    second = parse_model(f"coder={copy.rename(tmp_path / 'again')}").revision
    assert first == second
    assert first.startswith("coder-")


@pytest.mark.parametrize(
    "name,at",
    [
        *(("config.json", 0), ("tokenizer.json", 1), ("chat_template.jinja", 3)),
        *(("model.safetensors", 0), ("model.safetensors", -1)),
    ],
)
def test_a_changed_file_is_another_revision(model: Path, name: str, at: int) -> None:
    """Jobs are pinned to what generated the first half of their answer."""
    before = fingerprint(model)
    content = bytearray((model / name).read_bytes())
    content[at] ^= 1
    (model / name).write_bytes(content)
    assert fingerprint(model) != before


def test_a_bare_directory_lends_its_name_to_the_alias(model: Path) -> None:
    """`codeyard worker --model ./coder` needs no more words."""
    assert parse_model(str(model)) == parse_model(f"coder={model}")


def test_a_file_that_generation_does_not_depend_on_changes_nothing(model: Path) -> None:
    """A new README must not strand the jobs in the queue."""
    before = fingerprint(model)
    (model / "README.md").write_text("more about")
    assert fingerprint(model) == before


def test_a_fetched_model_is_the_commit_that_was_fetched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`main` moves on; what this machine has does not."""
    commit = hashlib.sha1(b"a commit", usedforsecurity=False).hexdigest()
    repo = tmp_path / "hub" / "models--org--coder"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    model.rename(repo / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    source = parse_model("coder=org/coder")

    assert source.location == str(repo / "snapshots" / commit)
    assert source.revision == f"coder-{commit[:8]}"


def test_a_model_that_was_not_fetched_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that fetched it now would serve another revision than the one its queue is named after."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    source = parse_model("coder=org/coder")
    with pytest.raises(EngineUnavailable, match="hf download org/coder"):
        source.require_weights()


@pytest.mark.parametrize("argument", ["", "a b=/x", "=x", "x=", "/", "-x"])
def test_a_malformed_argument_says_what_was_expected(argument: str) -> None:
    """It is typed by hand."""
    with pytest.raises(SettingsError, match="ALIAS=DIRECTORY_OR_ID"):
        parse_model(argument)


def test_a_directory_that_is_missing_or_holds_no_model_is_named(tmp_path: Path) -> None:
    """A typo must not be looked up as a Hugging Face id."""
    with pytest.raises(EngineUnavailable, match="no directory"):
        parse_model(f"x={tmp_path}/nowhere")
    with pytest.raises(EngineUnavailable, match=r"no config\.json"):
        parse_model(f"x={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineUnavailable, match="no weights"):
        parse_model(f"x={tmp_path}")

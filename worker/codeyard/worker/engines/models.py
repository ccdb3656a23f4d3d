"""Which weights a model argument means, and their revision: a name that changes when the weights do."""

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from codeyard.shared.errors import EngineUnavailable, SettingsError

EDGE_BYTES = 1_048_576  # of each weight file that go into the fingerprint: its first and last MiB
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where weights come from. `location` is a directory, or a Hugging Face id that the engine resolves."""

    alias: str
    location: str
    revision: str

    @property
    def is_directory(self) -> bool:
        return Path(self.location).is_dir()


def parse_model(argument: str) -> ModelSource:
    """`ALIAS`, or `ALIAS=DIRECTORY_OR_HUGGING_FACE_ID`. The alias `starter` alone is the packaged model.

    Raises SettingsError for a malformed argument, EngineUnavailable for a directory without a model.
    """
    alias, _, location = argument.partition("=")
    if not ALIAS.fullmatch(alias):
        raise SettingsError(
            f"--model {argument!r}: an alias is letters, digits, '.', '_' and '-', e.g. coder=/models/x"
        )
    if not location:
        location = str(starter_directory()) if alias == "starter" else alias
    directory = Path(location).expanduser()
    if directory.is_dir():
        return ModelSource(alias, str(directory.resolve()), f"{alias}-{fingerprint(directory)}")
    if location.startswith((".", "/", "~")):
        raise EngineUnavailable(f"--model {argument!r}: there is no directory {directory}")
    return ModelSource(alias, location, f"{alias}-{hashlib.sha256(location.encode()).hexdigest()[:8]}")


def starter_directory() -> Path:
    """The packaged 3.3-million-parameter model; docs/starter-model.md."""
    return Path(str(resources.files("codeyard.worker") / "models" / "starter"))


def fingerprint(directory: Path) -> str:
    """8 hex digits over config, tokenizer, and each weight file's name, size and edges: cheap for any size.

    Raises EngineUnavailable if there is no config.json.
    """
    if not (directory / "config.json").is_file():
        raise EngineUnavailable(f"{directory} has no config.json: it is not a Hugging Face model directory")
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".model", ".txt"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".gguf", ".pt"):
            digest.update(f"{path.name} {path.stat().st_size}".encode() + _edges(path))
    return digest.hexdigest()[:8]


def _edges(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(EDGE_BYTES)
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        return head + file.read(EDGE_BYTES)

"""Which weights a model argument means, and their revision: a name that changes when the weights do."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from codeyard.shared.errors import EngineUnavailable, SettingsError

EDGE_BYTES = 1_048_576  # of each weight file, at both ends, go into the fingerprint
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DESCRIPTIONS = (".json", ".model", ".txt", ".jinja")  # config, tokenizer, index of the weights, chat template
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where weights come from. `location` is a directory; or a Hugging Face id that is not on this machine."""

    alias: str
    location: str
    revision: str

    def require_weights(self) -> None:
        """Raises EngineUnavailable if they are not here. An engine must not fetch them by itself: which
        revision it serves, and so from which queue, would only be known afterwards."""
        if not Path(self.location).is_dir():
            raise EngineUnavailable(
                f"model {self.location} is not on this machine: give a directory, or fetch it first "
                f"with `hf download {self.location}`"
            )


def parse_model(argument: str) -> ModelSource:
    """`ALIAS=DIRECTORY_OR_HUGGING_FACE_ID`, or only the latter, whose last part is then the alias.

    `starter` alone is the packaged model. A Hugging Face id in the local cache is the snapshot its `main`
    points to.

    Raises SettingsError for a malformed argument, EngineUnavailable for a directory without a model.
    """
    alias, given, location = argument.partition("=")
    if not given:
        alias, location = Path(argument).name, argument
    if not ALIAS.fullmatch(alias) or not location:
        raise SettingsError(
            f"model {argument!r}: expected ALIAS=DIRECTORY_OR_ID, e.g. coder=/models/coder; "
            "an alias is up to 100 letters, digits, '.', '_' and '-'"
        )
    if argument == "starter":
        location = str(starter_directory())
    directory = Path(location).expanduser()
    if directory.is_dir():
        return ModelSource(alias, str(directory.resolve()), f"{alias}-{fingerprint(directory)}")
    if location.startswith((".", "/", "~")):
        raise EngineUnavailable(f"model {argument!r}: there is no directory {directory}")
    if (snapshot := _cached_snapshot(location)) is not None:
        return ModelSource(alias, str(snapshot), f"{alias}-{snapshot.name[:8]}")
    return ModelSource(alias, location, f"{alias}-{hashlib.sha256(location.encode()).hexdigest()[:8]}")


def context_tokens(source: ModelSource) -> int | None:
    """The context length in a model's own config, before it is loaded; None where it does not say."""
    try:
        config = json.loads((Path(source.location) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    tokens = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return tokens if isinstance(tokens, int) else None


def starter_directory() -> Path:
    """The packaged 3.3-million-parameter model; docs/starter-model.md."""
    return Path(str(resources.files("codeyard.worker") / "models" / "starter"))


def fingerprint(directory: Path, *, config: str = "config.json") -> str:
    """8 hex digits over config, tokenizer, and each weight file's name, size and edges: cheap for any size.

    Raises EngineUnavailable if it is no model directory (a LoRA adapter's config is `adapter_config.json`), or
    cannot be read.
    """
    if not (directory / config).is_file():
        raise EngineUnavailable(f"{directory} has no {config}: it is not a Hugging Face model directory")
    digest = hashlib.sha256()
    try:
        for part in _parts(directory):
            digest.update(len(part).to_bytes(8, "big") + part)
    except OSError as error:
        raise EngineUnavailable(f"cannot read the model in {directory}: {error}") from None
    return digest.hexdigest()[:8]


def _parts(directory: Path) -> Iterator[bytes]:
    num_weights = 0
    for path in sorted(directory.iterdir()):
        if path.suffix in DESCRIPTIONS:
            yield path.name.encode()
            yield path.read_bytes()
        elif path.suffix in WEIGHTS:
            num_weights += 1
            size = path.stat().st_size
            yield f"{path.name} {size}".encode()
            with path.open("rb") as file:
                yield file.read(EDGE_BYTES)
                file.seek(max(0, size - EDGE_BYTES))
                yield file.read(EDGE_BYTES)
    if not num_weights:
        raise EngineUnavailable(f"{directory} has no weights ({', '.join(WEIGHTS)})")


def _cached_snapshot(model_id: str) -> Path | None:
    """Where huggingface_hub keeps the commit that `main` pointed to when the model was last fetched."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repo = hub / ("models--" + model_id.replace("/", "--"))
    try:
        snapshot = repo / "snapshots" / (repo / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if (snapshot / "config.json").is_file() else None

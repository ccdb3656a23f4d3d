"""Are the models a worker here would load really there, whole, and do they fit into host memory?

Called by: cli.doctor, checks.gpu.
"""

import difflib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from codeyard.cli.checks.check import Finding, Place, aside, fail, gib, ok, skipped, warn
from codeyard.shared.errors import EngineUnavailable, SettingsError
from codeyard.shared.settings import Settings
from codeyard.worker.catalogue import serve
from codeyard.worker.engines.models import WEIGHTS, ModelSource, context_tokens, parse_model

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
LFS = b"version https://git-lfs"  # how the pointer begins that stands for a file until `git lfs pull`
MAX_HEADER = 100_000_000  # bytes of a safetensors header, as its readers bound it


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one model, on disk."""

    alias: str
    num_bytes: int


def arguments(settings: Settings) -> list[str]:
    """The models named in the settings, each as `ALIAS=DIRECTORY_OR_ID` or shorter."""
    return [word.strip() for word in settings.worker.model.split(",")]


async def check_models(place: Place) -> list[Finding]:
    settings = place.settings
    if settings.worker.engine == "simulated":
        return [skipped("the simulated engine loads none")]
    return [
        finding
        for one in arguments(settings)
        for finding in await aside(lambda: model_findings(one, settings))  # noqa: B023 - awaited here
    ]


def model_findings(argument: str, settings: Settings) -> list[Finding]:
    """One model: is it there, is it whole, does it take the context that is asked of it?"""
    try:
        source = parse_model(argument)
    except SettingsError as error:
        return [fail(str(error), "set CODEYARD_WORKER_MODEL, or --model")]
    except EngineUnavailable as error:
        return [fail(str(error), _way_in(argument))]
    folder = Path(source.location)
    if not folder.is_dir():
        way_out = f"hf download {source.location}; if it was a directory, write ./{source.location}"
        return [fail(f"{source.alias}: {source.location} is not on this machine", way_out)]
    wrong = [*damage(folder), *_adapters(argument, source, settings)]
    if wrong:
        return wrong
    limits = list(_context(source, settings))
    size = gib(_on_disk(folder))
    return [*limits, ok(f"{source.alias}: {size} of weights in {folder}, revision {source.revision}")]


def _way_in(argument: str) -> str:
    path = Path(argument.partition("=")[2] or argument).expanduser()
    if path.is_file():
        return f"name the directory it is in: {path.parent}"
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        return f"this user may not read it: chmod -R a+rX {path}"
    if path.is_dir() and (inside := sorted(one.parent for one in path.glob("*/config.json"))):
        return f"did you mean {inside[0]}?"
    if path.is_dir() or not path.parent.is_dir():
        return "it takes a directory with config.json, tokenizer and weights, as `hf download` makes it"
    beside = sorted(one.name for one in path.parent.iterdir() if one.is_dir())
    if close := difflib.get_close_matches(path.name, beside, n=1):
        return f"did you mean {path.parent / close[0]}?"
    return f"{path.parent} holds {', '.join(beside[:5]) or 'no directory'}"


def damage(folder: Path) -> Iterator[Finding]:
    """What an engine would find minutes later, or a download that broke off left behind."""
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        yield fail(f"{folder}/config.json cannot be read: {error}", "download the model again")
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHTS:
            yield from _file_damage(path)
    yield from _missing_parts(folder)
    if not any((folder / name).exists() for name in TOKENIZERS):
        yield fail(f"{folder} has no tokenizer ({', '.join(TOKENIZERS[:2])}, ...)", "download the whole model")


def _file_damage(path: Path) -> Iterator[Finding]:
    try:
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                yield fail(f"{path} is only a pointer of git-lfs", f"git -C {path.parent} lfs pull")
                return
            if path.suffix != ".safetensors":
                return
            file.seek(0)
            wanted, size = _safetensors_bytes(file), path.stat().st_size
    except OSError as error:
        yield fail(f"{path} cannot be read: {error.strerror}", f"chmod -R a+rX {path.parent}, or see who owns it")
    except (ValueError, KeyError, TypeError, struct.error):
        yield fail(f"{path.name} is no safetensors file, or the beginning of one", "download it again")
    else:
        if wanted != size:
            text = f"{path.name} has {size} bytes, and {wanted} by its own header: the download broke off"
            yield fail(text, "download it again")


def _safetensors_bytes(file: BinaryIO) -> int:
    """How long the file should be: 8 bytes of length, a JSON header, then the tensors it lists."""
    (length,) = struct.unpack("<Q", file.read(8))
    if not 0 < length <= MAX_HEADER:
        raise ValueError(length)
    header = json.loads(file.read(length))
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return 8 + int(length) + max(ends, default=0)


def _missing_parts(folder: Path) -> Iterator[Finding]:
    try:
        named = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return
    missing = sorted(name for name in named if not (folder / name).exists())
    if missing:
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        yield fail(f"{folder}: {len(missing)} of {len(named)} weight files are missing ({some})", "download them again")


def _adapters(argument: str, source: ModelSource, settings: Settings) -> Iterator[Finding]:
    try:
        serve(argument, settings)
    except (SettingsError, EngineUnavailable) as error:
        yield fail(f"{source.alias}: {error}", f"see models.{source.alias} in the settings file")


def _context(source: ModelSource, settings: Settings) -> Iterator[Finding]:
    asked, own = settings.engine_of(source.alias).max_model_len, context_tokens(source)
    if asked is not None and own is not None and asked > own:
        yield warn(
            f"{source.alias}: CODEYARD_ENGINE_MAX_MODEL_LEN is {asked}, the model was made for {own} tokens",
            f"set it to at most {own}",
        )


# Memory --------------------------------------------------------------------------------------------


def weights_of(settings: Settings) -> list[Weights]:
    """Of every model that is there; what is not was found before."""
    found = []
    for argument in arguments(settings):
        try:
            source = parse_model(argument)
        except (SettingsError, EngineUnavailable):
            continue
        if Path(source.location).is_dir():
            found.append(Weights(source.alias, _on_disk(Path(source.location))))
    return found


def _on_disk(folder: Path) -> int:
    """Bytes an engine would load: the safetensors alone where a model comes in several formats."""
    sizes: dict[str, int] = {}
    for path in folder.iterdir():
        if path.suffix in WEIGHTS:
            sizes[path.suffix] = sizes.get(path.suffix, 0) + path.stat().st_size
    return sizes.get(".safetensors") or sum(sizes.values())

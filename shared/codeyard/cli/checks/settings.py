"""Where each setting comes from, with secrets masked; and variables that mean nothing to us, mostly misspelt.

The settings themselves are read and checked by shared.settings, which refuses an unknown name inside a group and
passes over an unknown group in silence: `CODEYARD_BROKR_URL` would leave a worker on the embedded file.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import BaseModel, SecretStr

from codeyard.cli.checks.check import Finding, Place, fail, ok, warn
from codeyard.shared.settings import Settings, masked

Source = Literal["argument", "environment", "file", "default"]

PREFIX = "CODEYARD_"
OTHERS = frozenset({"CODEYARD_CONFIG"})  # read beside the settings
TESTS = "CODEYARD_TEST_"  # the test suite's
HIDDEN = "***"
SECRET_NAME = re.compile(r"password|secret|token|credential|api_?key|static_key", re.IGNORECASE)
SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_\w+)?$|_PORT_\d+_(TCP|UDP)(_\w+)?$")
ALIKE = 0.8  # difflib's ratio: one or two letters off


@dataclass(frozen=True, slots=True)
class Effective:
    """One setting as it is used. `value` is fit to be shown."""

    variable: str
    value: Any
    source: Source


def file_used(config: Path | None, environment: Mapping[str, str]) -> Path | None:
    """The settings file that is read, as shared.settings chooses it; None: there is none."""
    named = config or (Path(environment["CODEYARD_CONFIG"]) if environment.get("CODEYARD_CONFIG") else None)
    found = named or Path("codeyard.yaml")
    return found if found.is_file() else None


def variables() -> dict[str, tuple[str, ...]]:
    """Every setting: its variable, and where it stands in the file."""
    found: dict[str, tuple[str, ...]] = {}
    for group, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= {f"{PREFIX}{group}_{name}".upper(): (group, name) for name in kind.model_fields}
        else:
            found[f"{PREFIX}{group}".upper()] = (group,)
    return found


def effective(place: Place) -> list[Effective]:
    """All settings, in the order they are declared, secrets masked."""
    path = file_used(place.config, place.environment)
    in_file = read_file(path) if path else {}
    in_environment = {name.upper(): value for name, value in place.environment.items()}
    shown = []
    for variable, where in variables().items():
        value: Any = place.settings
        for name in where:
            value = getattr(value, name)
        source: Source = "default"
        if _has(place.given, where):
            source = "argument"
        elif _in_environment(in_environment, variable, where):
            source = "environment"
        elif _has(in_file, where):
            source = "file"
        shown.append(Effective(variable, _shown(where[-1], value), source))
    return shown


async def check_settings(place: Place) -> list[Finding]:
    """Which are set, and what is set but means nothing."""
    strange = list(unknown_variables(place.environment))
    counts: dict[str, int] = {}
    for one in effective(place):
        counts[one.source] = counts.get(one.source, 0) + 1
    path = file_used(place.config, place.environment)
    sources = {"argument": "the command line", "environment": "the environment", "file": str(path)}
    told = [f"{counts[source]} from {name}" for source, name in sources.items() if counts.get(source)]
    total = sum(counts.values())
    text = f"{', '.join(told)}; {counts['default']} of {total} are defaults" if told else f"all {total} are defaults"
    return [*strange, ok(text)]


def explain_refusal(error: str, environment: Mapping[str, str]) -> list[Finding]:
    """Findings for settings that cannot be read: what the error says, and what each misspelt name may have meant."""
    shown = []
    for part in re.split(r"; (?=CODEYARD_)", error):
        name = part.partition(":")[0].strip()
        way_out = "docs/settings.md says what it may be"
        if environment.get(name, "").startswith("tcp://"):
            way_out = "Kubernetes made it for a service of that name: set enableServiceLinks: false in the pod"
        elif "Extra inputs" in part:
            part = f"{name} is no setting"
            way_out = _meant(name)
        shown.append(fail(part, way_out))
    return shown


def unknown_variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Names that begin like ours. Inside a group they stop every command; others are passed over."""
    known = variables()
    groups = [f"{PREFIX}{group}".upper() for group in Settings.model_fields]
    for name in sorted(environment):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known or upper in OTHERS or upper.startswith(TESTS):
            continue
        if upper in groups or upper.startswith(f"{PREFIX}MODELS_"):  # a group as JSON; a model by its alias
            continue
        if SERVICE_LINK.search(upper):
            yield warn(
                f"{name} was made by Kubernetes for a service, it is no setting",
                "set enableServiceLinks: false in the pod, or one of them will look like a setting one day",
            )
        else:
            yield warn(f"{name} is no setting, and is ignored", _meant(upper))


def read_file(path: Path) -> dict[str, Any]:
    """As it stands there; what cannot be read was refused before."""
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, [*variables(), *OTHERS], n=1, cutoff=ALIKE)
    return f"did you mean {close[0]}?" if close else "unset it, or see docs/settings.md for the names there are"


def _has(tree: Mapping[str, Any], where: tuple[str, ...]) -> bool:
    here: Any = tree
    for name in where:
        if not isinstance(here, Mapping) or name not in here or here[name] is None:
            return False
        here = here[name]
    return True


def _in_environment(environment: Mapping[str, str], variable: str, where: tuple[str, ...]) -> bool:
    if variable in environment:
        return True
    if len(where) == 1:  # CODEYARD_MODELS_<ALIAS>
        is_mapping = get_origin(Settings.model_fields[where[0]].annotation) is dict
        return is_mapping and any(name.startswith(f"{variable}_") for name in environment)
    try:
        group = json.loads(environment.get(f"{PREFIX}{where[0]}".upper(), "{}"))
    except ValueError:
        return False
    return isinstance(group, dict) and where[1] in group


def _shown(name: str, value: Any) -> Any:
    """Plain values for people and for JSON, with nothing in them that opens a door."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, BaseModel):
        return {key: _shown(key, getattr(value, key)) for key in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _shown(str(key), inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_shown(name, inner) for inner in value]
    if isinstance(value, str) and value and SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, str) and "://" in value:
        return without_secrets(value)
    if value is None or isinstance(value, bool | int | float | str):
        return str(value) if isinstance(value, os.PathLike) else value
    return str(value)


def without_secrets(url: str) -> str:
    """A URL without its password, whether before the host or among the parameters (`?password=`)."""
    parts = urlsplit(masked(url))
    if not parts.query:
        return masked(url)
    words = [
        f"{word.partition('=')[0]}={HIDDEN}" if SECRET_NAME.search(word.partition("=")[0]) else word
        for word in parts.query.split("&")
    ]
    return urlunsplit(parts._replace(query="&".join(words)))

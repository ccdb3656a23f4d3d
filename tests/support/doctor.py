"""Where a doctor is called in tests: settings, an environment and a file of the test's choice."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codeyard.cli.checks.check import Finding, Place, Status
from codeyard.shared.settings import Settings

ANSWER_S = 5.0


def place(
    environment: Mapping[str, str] | None = None,
    *,
    config: Path | None = None,
    given: Mapping[str, Any] | None = None,
    answer_s: float = ANSWER_S,
    **groups: Any,
) -> Place:
    """`groups` are settings; the environment has nothing but a PATH unless it is given."""
    around = {"PATH": os.environ["PATH"], **(environment or {})}
    return Place(Settings(**groups), around, config, given or {}, answer_s)


def only(findings: Sequence[Finding], status: Status) -> list[str]:
    """The texts with this status."""
    return [finding.text for finding in findings if finding.status is status]


def worst(findings: Sequence[Finding]) -> Finding:
    """The one finding that fails, or warns if none fails. More than one of a kind is a mistake of the test."""
    for status in (Status.FAIL, Status.WARN):
        if found := [finding for finding in findings if finding.status is status]:
            [one] = found
            return one
    raise AssertionError(f"nothing wrong in {findings}")


def healthy(findings: Sequence[Finding]) -> bool:
    """Something is said, and nothing is wrong."""
    return bool(findings) and {finding.status for finding in findings} <= {Status.OK, Status.SKIPPED}


def nvidia_smi(folder: Path, told: str, *, apps: str = "", status: int = 0, hangs: bool = False) -> dict[str, str]:
    """A machine whose nvidia-smi says this. Returns the environment in which it is found first."""
    folder.mkdir(exist_ok=True)
    (folder / "told").write_text(told)
    (folder / "apps").write_text(apps)
    program = folder / "nvidia-smi"
    answer = f'case "$*" in *compute-apps*) cat {folder}/apps;; *) cat {folder}/told; exit {status};; esac'
    program.write_text(f"#!/bin/sh\n{'exec sleep 60' if hangs else answer}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def model(folder: Path, *, gib: float = 0.0, config: str = '{"max_position_embeddings": 2048}') -> Path:
    """A model directory of that size. The weights are a hole in the disk: they take no room."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(max(1, int(gib * 2**30)))
    return folder

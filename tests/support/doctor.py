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

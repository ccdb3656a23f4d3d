"""Another Debian in a folder, for its RabbitMQ and Redis: RabbitMQ 4.0 and Redis 8.0 beside 3.10 and 7.0.

Made once by debootstrap (380 MB, a minute), kept outside the repository, used by chroot (see
codeyard.cli.drill.servers). Needs root and Debian's debootstrap; tests skip without.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.servers import ROOT_VARIABLE

SUITE = "trixie"
PACKAGES = "rabbitmq-server,redis-server"
MAKING_S = 900
FOLDER_VARIABLE = "CODEYARD_TEST_DEBIAN"
"""Names the folder; unset: `codeyard/debian-trixie` in the user's cache."""


def folder() -> Path:
    """The other Debian, made if it is not there. Skips the test where that cannot be done."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get(FOLDER_VARIABLE) or cache / "codeyard" / f"debian-{SUITE}")
    if os.geteuid() != 0:
        pytest.skip("running another Debian's servers by chroot needs root")
    if shutil.which("unshare") is None:
        pytest.skip("no unshare: install Debian's util-linux")
    if not (root / "usr/bin/redis-server").exists():
        _make(root)
    return root


def environment(root: Path) -> dict[str, str]:
    """Of a process whose servers are to come from there."""
    return {**os.environ, ROOT_VARIABLE: str(root)}


def _make(root: Path) -> None:
    """Under another name first: a folder that is only half made must not be taken for one."""
    if shutil.which("debootstrap") is None:
        pytest.skip("no debootstrap: install Debian's debootstrap")
    unfinished = root.with_name(f"{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    command = ("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(unfinished))
    made = subprocess.run(command, capture_output=True, text=True, timeout=MAKING_S)
    if made.returncode != 0:
        pytest.skip(f"debootstrap could not make {SUITE}: {made.stdout[-300:]}")
    unfinished.rename(root)

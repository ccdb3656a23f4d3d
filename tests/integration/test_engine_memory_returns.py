"""What a closed vLLM engine held is back: memory, processes, descriptors, files, the object itself."""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from codeyard.worker.engines.models import starter_directory

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

TOLERANCE = 0.05  # of the first cycle after the warm-up


async def cycles(num_cycles: int, folder: Path) -> list[dict[str, Any]]:
    """Of two models in turn, in a process of its own."""
    second = folder / "second"
    shutil.copytree(starter_directory(), second)
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "support.engine_cycles", str(num_cycles), "starter", f"second={second}"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert program.stdout is not None
    lines = [line async for line in program.stdout]
    assert await program.wait() == 0
    return [json.loads(line) for line in lines if line.startswith(b"{")]


@pytest.mark.parametrize(
    "num_cycles",
    [
        pytest.param(5, marks=pytest.mark.timeout(900), id="5"),
        pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(7_200)], id="50"),
    ],
)
async def test_models_that_come_and_go_leave_nothing(num_cycles: int, tmp_path: Path) -> None:
    """A worker that serves more models than fit does this all day; users of vLLM in one process report that the
    memory stays (vllm-project/vllm#21073, #1908, #3281)."""
    seen = await cycles(num_cycles, tmp_path)
    assert len(seen) == num_cycles
    print(*map(json.dumps, seen), sep="\n")  # shown by -rP

    first, *later = seen[1:]  # the one before imports everything
    for what in ("loaded_bytes", "closed_bytes"):
        most = first[what] * (1 + TOLERANCE)
        assert [one[what] for one in later if one[what] > most] == [], (what, [one[what] for one in seen])
    for one in seen:
        assert not one["engine_alive"]
        assert (one["processes"], one["files"]) == (0, 0)
    for one in later:
        assert one["descriptors"] == first["descriptors"]
        assert one["threads"] <= first["threads"]

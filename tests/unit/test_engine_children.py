"""An engine's processes end when they are told to, and when nobody is left to tell them."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from codeyard.worker.engines.children import Processes, descendants

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfd is Linux's")

BLOCKS = "import sys; print('up', flush=True); sys.stdin.read()"
HAS_A_CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BLOCKS!r}]).wait()"
# The worker that is killed: it starts the reaper for the process whose pid it is given.
HAS_A_REAPER = """
import asyncio, sys
from codeyard.worker.engines.children import Processes, Reaper
async def main():
    await Reaper.start(Processes([int(sys.argv[1])]))
    print("up", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def start(*arguments: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.fixture
def family() -> Iterator["subprocess.Popen[str]"]:
    """A process with one below it, both waiting for a pipe of ours."""
    with start(HAS_A_CHILD) as process:
        yield process
        process.kill()


def test_a_killed_process_takes_those_below_it_along(family: "subprocess.Popen[str]") -> None:
    """vLLM's workers are below its EngineCore, and they hold the GPU."""
    processes = Processes([family.pid])
    assert descendants([family.pid]) == list(processes.pids[1:])
    processes.kill()
    assert processes.wait(10)
    processes.forget()


def test_one_whose_parent_ended_first_is_still_known(family: "subprocess.Popen[str]") -> None:
    """It belongs to init now; nothing else would lead to it."""
    processes = Processes([family.pid])
    family.kill()
    family.wait(10)
    assert not processes.wait(0)
    processes.kill()
    assert processes.wait(10)
    processes.forget()


def test_the_reaper_ends_processes_whose_worker_was_killed_with_9(family: "subprocess.Popen[str]") -> None:
    """Nothing in the worker runs any more; the kernel closes the reaper's stdin."""
    processes = Processes([family.pid])
    with start(HAS_A_REAPER, str(family.pid)) as worker:
        assert not processes.wait(0)
        worker.kill()
    assert processes.wait(10)
    processes.forget()

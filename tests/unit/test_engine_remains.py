"""What a killed process leaves on the machine is found while it lives and removed when it has ended."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from codeyard.worker.engines.remains import SHARED, SOCKET_CHARS, Remains

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="/dev/shm is Linux's")

# As a process of vLLM's: it makes a segment, and is killed before it can remove it. No tracker of its own.
HOLDER = """
import sys
from multiprocessing import resource_tracker
resource_tracker.register = lambda *_: None
from multiprocessing.shared_memory import SharedMemory
held = SharedMemory(create=True, size=4096)
held.buf[0] = 1
print(held.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_killed_processs_segments_and_sockets_are_removed(holder: "subprocess.Popen[str]") -> None:
    """160 MB each, in memory, until the worker ends: vLLM makes two for every load."""
    assert holder.stdout is not None
    segment = SHARED / holder.stdout.readline().strip()
    remains = Remains()
    (Path(remains.folder) / "a-socket").touch()
    remains.note([holder.pid])
    holder.kill()
    holder.wait()
    assert segment.exists()

    remains.clear()

    assert not segment.exists()
    assert not Path(remains.folder).exists()


def test_a_segment_that_this_process_uses_stays(holder: "subprocess.Popen[str]") -> None:
    """It may be part of what goes on."""
    own = SharedMemory(create=True, size=4096)
    remains = Remains()
    remains.note([os.getpid()])
    remains.clear()
    assert (SHARED / own.name).exists()
    own.close()
    own.unlink()


def test_a_process_that_is_gone_left_nothing_to_find(holder: "subprocess.Popen[str]") -> None:
    """It may end by itself at any moment."""
    holder.kill()
    holder.wait()
    remains = Remains()
    remains.note([holder.pid])
    remains.clear()
    remains.clear()  # repeatable


def test_sockets_have_room_for_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux takes 107 characters, and people set TMPDIR."""
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    remains = Remains()
    assert len(remains.folder) + 1 + 36 <= SOCKET_CHARS
    remains.clear()

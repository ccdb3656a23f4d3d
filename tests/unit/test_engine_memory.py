"""Measured, never guessed: host memory by the kernel, device memory by NVIDIA's library or by the difference."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from codeyard.worker.engines.memory import Meter, accelerator_bytes, host_bytes, used_device_bytes
from codeyard.worker.engines.port import Memory

HOLDER = "import sys; held = bytearray(b'x') * 50_000_000; print('up', flush=True); sys.stdin.read()"
FORKED = """
import os, sys
held = bytearray(b"x") * 50_000_000
if child := os.fork():
    print(child, flush=True)
sys.stdin.read()
"""


class FakeNvml(SimpleNamespace):
    """NVIDIA's library as far as it is used, on a machine without a device."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(devices=[], open=0, broken=False)

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("no driver")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:
        return self.devices[index]  # type: ignore[no-any-return]  # a namespace's

    def nvmlDeviceGetComputeRunningProcesses(self, device: SimpleNamespace) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in device.processes.items()]

    def nvmlDeviceGetMemoryInfo(self, device: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(used=device.used)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return fake


def device(used: int, **processes: int | None) -> SimpleNamespace:
    """`p7=100`: process 7 holds 100 bytes."""
    return SimpleNamespace(used=used, processes={int(name[1:]): held for name, held in processes.items()})


def test_a_process_holds_what_it_has_touched() -> None:
    """The kernel counts, whoever asks."""
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        held = host_bytes([process.pid])
        process.kill()
    assert 50_000_000 < held < 90_000_000
    assert host_bytes([process.pid]) == 0


def test_pages_shared_by_several_processes_count_once() -> None:
    """An engine of eight processes does not hold eight times the libraries they share."""
    command = [sys.executable, "-c", FORKED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = host_bytes([process.pid, int(process.stdout.readline())])
        assert process.stdin is not None
        process.stdin.close()
    assert 50_000_000 < held < 90_000_000


def test_device_memory_is_that_of_these_processes_on_all_devices(nvml: FakeNvml) -> None:
    """Tensor parallelism has one process a device; others have theirs there too."""
    nvml.devices = [device(900, p7=100, p8=500), device(900, p7=30, p9=None)]
    assert accelerator_bytes([7, 9]) == 130
    assert Meter().measure([7, 9], "cuda:0").device_bytes == 130
    assert nvml.open == 0


async def test_where_the_driver_does_not_know_our_processes_the_difference_counts(nvml: FakeNvml) -> None:
    """In a container it lists them by the host's numbers, or not at all: zero would let a cache load for ever."""
    nvml.devices = [device(1_000, p4711=900), device(50)]
    assert accelerator_bytes([7]) is None
    meter = Meter()
    async with meter.across():
        nvml.devices = [device(3_000, p4711=2_900), device(60)]
    assert meter.measure([7], "cuda").device_bytes == 2_010
    async with meter.across():
        nvml.devices = [device(1_100, p4711=1_000), device(60)]
    assert meter.measure([7], "cuda").device_bytes == 110


async def test_a_load_that_fails_changes_nothing(nvml: FakeNvml) -> None:
    """The next one would start with a wrong sum."""
    nvml.devices = [device(1_000)]
    meter = Meter()

    async def load() -> None:
        async with meter.across():
            nvml.devices = [device(5_000)]
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        await load()
    assert meter.measure([7], "cuda").device_bytes == 0


def test_on_a_cpu_the_device_is_the_host() -> None:
    """There is one memory, and one budget."""
    measured = Meter().measure([os.getpid()], "cpu")
    assert measured == Memory(device_bytes=measured.host_bytes, host_bytes=measured.host_bytes)
    assert measured.host_bytes > 1_000_000


def test_without_a_driver_or_its_library_nothing_is_held(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop."""
    nvml.broken = True
    assert (accelerator_bytes([7]), used_device_bytes()) == (None, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (accelerator_bytes([7]), used_device_bytes()) == (None, 0)

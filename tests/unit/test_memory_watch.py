"""When the window shrinks, when idle engines go, when intake stops, and when all of it is over."""

import asyncio
import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeyard.shared.telemetry import Metrics
from codeyard.worker.engines.memory import host_bytes
from codeyard.worker.machine_memory import DeviceMemory
from codeyard.worker.memory_watch import (
    CALM_BELOW,
    LEAST_FACTOR,
    MemoryDecision,
    MemoryPolicy,
    MemorySample,
    MemorySampler,
    MemoryWatch,
    Usage,
)

MIB = 2**20
CALM = MemoryDecision()
shares = st.floats(min_value=0, max_value=2)


def host(share: float, device: float | None = None) -> MemorySample:
    limited = None if device is None else Usage(int(device * 1e6), 1_000_000)
    return MemorySample(Usage(int(share * 1e6), 1_000_000), limited)


def decided(*held: float) -> MemoryDecision:
    policy = MemoryPolicy()
    return [policy.decide(host(share)) for share in held][-1]


def test_below_90_percent_nothing_happens() -> None:
    """A worker that has room must not be slowed down."""
    assert decided(0.0) == decided(0.6) == decided(0.899) == CALM


def test_at_90_percent_the_window_shrinks_and_idle_engines_go_and_jobs_still_come() -> None:
    """The issue's numbers."""
    decision = decided(0.9)
    assert (decision.evict_idle, decision.intake) == (True, True)
    assert decision.window_factor == pytest.approx(0.75)
    assert decided(0.95).window_factor == pytest.approx(0.5)


def test_at_the_limit_intake_stops_and_comes_back_only_below_85_percent() -> None:
    """Between them it would be on and off with every job."""
    policy = MemoryPolicy()
    intake = [policy.decide(host(share)).intake for share in (0.99, 1.0, 0.95, 0.86, 0.849, 0.95, 0.999)]
    assert intake == [True, False, False, False, True, True, True]


def test_the_window_widens_again_without_a_jump() -> None:
    """On the way down it meets the full window where the pressure ends."""
    policy = MemoryPolicy()
    factors = [policy.decide(host(share)).window_factor for share in (0.92, 0.88, 0.86, 0.8501, 0.84)]
    assert factors == sorted(factors)
    assert factors[-2] == pytest.approx(1.0, abs=0.01)
    assert factors[-1] == 1.0


@pytest.mark.parametrize("sample", [host(0.95, 0.1), host(0.1, 0.95)])
def test_the_stricter_of_host_and_device_is_obeyed(sample: MemorySample) -> None:
    """Either of them ends the process."""
    decision = MemoryPolicy().decide(sample)
    assert decision.evict_idle
    assert decision.window_factor == pytest.approx(0.5)


def test_a_device_without_a_limit_decides_nothing() -> None:
    """vLLM fills 90 % of a GPU at start, and stays there."""
    assert MemoryPolicy().decide(MemorySample(Usage(1, 100), Usage(99, None))) == CALM


@given(st.lists(shares, min_size=1))
def test_whatever_happens_the_factor_is_in_range_and_calm_is_calm(held: list[float]) -> None:
    """A worker that was once short of memory must not stay narrow for ever, nor be stopped with room to spare."""
    policy = MemoryPolicy()
    for share in held:
        decision = policy.decide(host(share))
        used = int(share * 1e6) / 1e6
        assert LEAST_FACTOR <= decision.window_factor <= 1.0
        assert (decision.window_factor < 1.0) <= decision.evict_idle
        assert decision.intake or (decision.evict_idle and used >= CALM_BELOW)
        if used < CALM_BELOW:
            assert decision == CALM
        if used >= 1.0:
            assert decision == MemoryDecision(window_factor=LEAST_FACTOR, evict_idle=True, intake=False)


def no_device() -> DeviceMemory | None:
    return None


def take(size: int) -> bytearray:
    """Memory that is really there, not only promised."""
    block = bytearray(size)
    ctypes.memset((ctypes.c_char * size).from_buffer(block), 1, size)
    return block


async def test_a_process_that_fills_up_stops_its_intake_and_goes_on_when_it_has_let_go() -> None:
    """The real sampler on this very process: pages, not figures."""
    base = host_bytes([os.getpid()])
    watch = MemoryWatch(MemorySampler(base + 400 * MIB, None, device=no_device), Metrics())
    before = await watch.look()
    held = [take(base + 410 * MIB - host_bytes([os.getpid()]))]
    full = await watch.look()
    held.clear()
    after = await watch.look()

    assert (before, full.intake, full.window_factor, after) == (CALM, False, LEAST_FACTOR, CALM)


def test_the_memory_of_engine_processes_counts() -> None:
    """Weights lie in child processes."""
    sampler = MemorySampler(1.0, None, device=no_device)
    before = sampler().host.used_bytes
    program = "block = bytearray(b'x') * (200 * 2**20)\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        grown = sampler().host.used_bytes - before
        child.communicate(b"\n")
    assert grown > 190 * MIB


@pytest.mark.parametrize("available,expected", [(10_000, 9_000), (600, 500), (100, 0)])
def test_memory_that_others_took_is_not_ours_to_take(
    monkeypatch: pytest.MonkeyPatch, available: int, expected: int
) -> None:
    """The limit says 9,000; with 600 left on the machine, less the kernel's reserve of 100, it ends after 500."""
    from codeyard.worker import memory_watch
    from codeyard.worker.machine_memory import HostMemory

    monkeypatch.setattr(memory_watch, "host_memory", lambda: HostMemory(5_000, available))
    monkeypatch.setattr(memory_watch, "host_bytes", lambda _: 0)
    monkeypatch.setattr(memory_watch, "bytes_of", lambda limit, total: 9_000)
    limit = MemorySampler(1.0, None, device=no_device)().host.limit_bytes
    assert limit == max(1, expected)


def test_device_limits_are_shares_or_bytes_of_what_the_callable_tells() -> None:
    """Told without a limit, limited with one."""

    def device() -> DeviceMemory:
        return DeviceMemory(60, 100)

    assert MemorySampler(1.0, None, device=device)().device == Usage(60, None)
    assert MemorySampler(1.0, 0.8, device=device)().device == Usage(60, 80)
    assert MemorySampler(1.0, 70.0, device=device)().device == Usage(60, 70)


class Recorder:
    """Acts on decisions: keeps them, and says when there are enough."""

    def __init__(self, wanted: int) -> None:
        self.decisions: list[MemoryDecision] = []
        self.enough = asyncio.Event()
        self._wanted = wanted

    async def __call__(self, decision: MemoryDecision) -> None:
        self.decisions.append(decision)
        if len(self.decisions) == self._wanted:
            self.enough.set()


def told(*held: float) -> Callable[[], MemorySample]:
    samples = iter([host(share) for share in held])
    last = host(held[-1])
    return lambda: next(samples, last)


async def test_the_watch_calls_back_with_every_decision_until_it_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """Also with the same one: an engine that was busy may be idle now. The log says each change once."""
    recorder, metrics = Recorder(6), Metrics()
    watch = MemoryWatch(told(0.5, 0.92, 0.93, 1.0, 1.0, 0.5), metrics)
    with caplog.at_level(logging.WARNING, "codeyard.worker.memory_watch"):
        task = asyncio.create_task(watch.watch(recorder, every_s=0.001))
        async with asyncio.timeout(10):
            await recorder.enough.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert [decision.intake for decision in recorder.decisions] == [True, True, True, False, False, True]
    assert [decision.evict_idle for decision in recorder.decisions] == [False, True, True, True, True, False]
    assert [record.message for record in caplog.records] == [
        "memory_short",
        "memory_limit_reached",
        "memory_intake_resumes",
    ]


async def test_metrics_show_what_is_held_what_may_be_and_what_follows() -> None:
    """A dashboard shows the trouble before the log does."""
    metrics = Metrics()
    watch = MemoryWatch(told(0.95), metrics)
    await watch.look()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert value("codeyard_memory_used_bytes", kind="host") == 950_000
    assert value("codeyard_memory_limit_bytes", kind="host") == 1_000_000
    assert value("codeyard_memory_window_factor") == pytest.approx(0.5)
    assert value("codeyard_memory_used_bytes", kind="device") is None

"""Room for what runs: the window shrinks and idle engines go before memory is short, intake stops when it is.

    sample (what is held, what may be held) -> MemoryPolicy.decide -> MemoryDecision -> the worker

Promise: at 90 % of a limit the worker makes room, at the limit it takes no more work until it fell below
85 %; so the kernel, or the GPU, does not end it by surprise. What runs is left to finish.
The policy reads no clock and touches nothing; the thin rest measures. See docs/memory.md.
Called by: worker.service. Does not know about: engines, queues.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from codeyard.shared.telemetry import Metrics
from codeyard.worker.engines.children import descendants
from codeyard.worker.engines.memory import host_bytes
from codeyard.worker.machine_memory import DeviceMemory, bytes_of, device_memory, host_memory

log = logging.getLogger(__name__)

SHRINK_AT = 0.90  # of a limit, from here on the window shrinks and idle engines go
STOP_AT = 1.00  # of a limit, from here on intake stops
CALM_BELOW = 0.85  # of a limit: all is as before. Lower than where it began, or it would begin again at once
LEAST_FACTOR = 0.25  # of the window, at the limit: some go on, so that memory can come back
RESERVE = 0.02  # of the host's memory, left to the kernel and the machine's other programs
LOOK_S = 1.0  # between samples; one reads some files of /proc and takes milliseconds
REMIND_S = 60.0  # between log lines while intake is stopped


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes held, and how many may be: above 0, or None, then it is only told and decides nothing."""

    used_bytes: int
    limit_bytes: int | None = None

    @property
    def share(self) -> float:
        return self.used_bytes / self.limit_bytes if self.limit_bytes is not None else 0.0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """One look. `device` is None where there is none, or nobody can tell."""

    host: Usage
    device: Usage | None = None


@dataclass(frozen=True, slots=True)
class MemoryDecision:
    """What the worker should do until the next one.

    `window_factor`: of the scheduler's window, above 0 and up to 1; jobs over it are not stopped, fewer follow.
    `evict_idle`: close (or wake no more) engines without a lease. `intake`: claim and admit new jobs.
    """

    window_factor: float = 1.0
    evict_idle: bool = False
    intake: bool = True


class MemoryPolicy:
    """Remembers only which limits it has met, so that it does not begin and end at one and the same place."""

    def __init__(self) -> None:
        self._host = _Limit()
        self._device = _Limit()

    def decide(self, sample: MemorySample) -> MemoryDecision:
        """The stricter of what host and device ask for."""
        limits = [self._host]
        self._host.look(sample.host.share)
        if sample.device is not None:
            self._device.look(sample.device.share)
            limits.append(self._device)
        return MemoryDecision(
            window_factor=min(limit.window_factor for limit in limits),
            evict_idle=any(limit.pressed for limit in limits),
            intake=not any(limit.reached for limit in limits),
        )


class _Limit:
    """One of them. Between CALM_BELOW and SHRINK_AT it depends on where the share came from."""

    def __init__(self) -> None:
        self.pressed = False
        self.reached = False
        self.window_factor = 1.0

    def look(self, share: float) -> None:
        self.pressed = share >= SHRINK_AT or (self.pressed and share >= CALM_BELOW)
        self.reached = share >= STOP_AT or (self.reached and share >= CALM_BELOW)
        # A straight line from all of it at CALM_BELOW to LEAST_FACTOR at the limit: 0.75 at SHRINK_AT.
        steep = (min(share, STOP_AT) - CALM_BELOW) / (STOP_AT - CALM_BELOW)
        self.window_factor = 1.0 - steep * (1.0 - LEAST_FACTOR) if self.pressed else 1.0


class MemorySampler:
    """Measures this process and those below it, engines included. Calling it blocks for some milliseconds.

    Args:
        memory_limit, device_memory_limit: as in WorkerSettings; up to 1 a share, above it bytes.
        device: of the fullest GPU; None where there is none.
    """

    def __init__(
        self,
        memory_limit: float,
        device_memory_limit: float | None,
        *,
        device: Callable[[], DeviceMemory | None] = device_memory,
    ) -> None:
        self._memory_limit = memory_limit
        self._device_memory_limit = device_memory_limit
        self._device = device

    def __call__(self) -> MemorySample:
        own = [os.getpid()]
        used, host = host_bytes([*own, *descendants(own)]), host_memory()
        # Others may take what is left before we do: then that is where it ends, whatever the limit says.
        room = used + host.available_bytes - int(RESERVE * host.total_bytes)
        limit = max(1, min(bytes_of(self._memory_limit, host.total_bytes), room))
        device = self._device()
        if device is None:
            return MemorySample(Usage(used, limit))
        if self._device_memory_limit is None:
            return MemorySample(Usage(used, limit), Usage(device.used_bytes))
        device_limit = bytes_of(self._device_memory_limit, device.total_bytes)
        return MemorySample(Usage(used, limit), Usage(device.used_bytes, device_limit))


class MemoryWatch:
    """Sampler, policy and metrics together: `watch` is a task of the worker's."""

    def __init__(self, sample: Callable[[], MemorySample], metrics: Metrics) -> None:
        self._sample = sample
        self._metrics = metrics
        self._policy = MemoryPolicy()
        self._last = MemoryDecision()
        self._reminded_s = 0.0

    async def watch(self, act: Callable[[MemoryDecision], Awaitable[None]], *, every_s: float = LOOK_S) -> None:
        """Until cancelled: look, decide, and call `act` with each decision, the same one again included, since an
        idle engine may have appeared meanwhile."""
        while True:
            await act(await self.look())
            await asyncio.sleep(every_s)

    async def look(self) -> MemoryDecision:
        """One sample and what follows from it; tells metrics and log."""
        sample = await asyncio.to_thread(self._sample)
        decision = self._policy.decide(sample)
        self._tell(sample, decision)
        self._last = decision
        return decision

    def _tell(self, sample: MemorySample, decision: MemoryDecision) -> None:
        fields: dict[str, object] = {}
        for kind, usage in (("host", sample.host), ("device", sample.device)):
            if usage is not None:
                self._metrics.memory_used.labels(kind=kind).set(usage.used_bytes)
                fields[f"{kind}_used_bytes"] = usage.used_bytes
            if usage is not None and usage.limit_bytes is not None:
                self._metrics.memory_limit.labels(kind=kind).set(usage.limit_bytes)
                fields[f"{kind}_limit_bytes"] = usage.limit_bytes
        self._metrics.memory_window_factor.set(decision.window_factor if decision.intake else 0.0)
        now_s, before = time.monotonic(), self._last
        if not decision.intake and (before.intake or now_s - self._reminded_s >= REMIND_S):
            self._reminded_s = now_s
            hint = "no new jobs until it fell; fewer slots, a smaller model or a higher CODEYARD_WORKER_MEMORY_LIMIT"
            log.error("memory_limit_reached", extra={**fields, "hint": hint})
        elif decision.intake and not before.intake:
            log.warning("memory_intake_resumes", extra=fields)
        elif decision.evict_idle != before.evict_idle:
            event = "memory_short" if decision.evict_idle else "memory_calm"
            log.warning(event, extra={**fields, "window_factor": round(decision.window_factor, 2)})

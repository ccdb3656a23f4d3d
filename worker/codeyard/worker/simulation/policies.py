"""The policies of the comparison, by name: ours, and what else one could do."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from codeyard.shared.errors import SettingsError
from codeyard.shared.job import Lane
from codeyard.shared.settings import AdmissionSettings
from codeyard.worker.engines.port import EngineInfo
from codeyard.worker.scheduling.select import make_scheduler
from codeyard.worker.scheduling.straight import UNBOUNDED, Straight
from codeyard.worker.scheduling.weighted import WeightedLanes
from codeyard.worker.simulation.aimd import Aimd
from codeyard.worker.simulation.latency import LatencyTable
from codeyard.worker.simulation.plan import Policy
from codeyard.worker.simulation.traces import Trace

OURS = "adaptive"
FIXED = (8, 32, 64, 256, 512)
CLOSED = (8, 32, 64)
LOOK_AHEAD = 0.25  # of the window, in hand beyond it: WorkerSettings.look_ahead


@dataclass(frozen=True, slots=True)
class Known:
    """A policy one can ask for."""

    what: str
    make: Callable[[Trace, LatencyTable], Policy]


def known_policies() -> dict[str, Known]:
    """Every policy of the comparison, ours first."""
    policies = {OURS: Known("the adaptive policy of this project", _ours)}
    for window in FIXED:
        policies[f"fixed-{window}"] = Known(f"a fixed window of {window}, weighted lanes", _fixed(window))
    for batch in CLOSED:
        policies[f"closed-{batch}"] = Known(f"closed batches of {batch}, weighted lanes", _closed(batch))
    policies["aimd"] = Known("window by additive increase, multiplicative decrease (Clipper)", _aimd)
    policies["fcfs"] = Known("everything straight to the engine, first come first served", _straight(False))
    policies["priority"] = Known("everything straight to the engine, vLLM priorities", _straight(True))
    return policies


def is_fixed(name: str) -> bool:
    """Whether it is a fixed window: what the score is compared with."""
    return name.startswith("fixed-")


def policy(name: str, trace: Trace, table: LatencyTable) -> Policy:
    """Raises SettingsError for a name nobody knows."""
    if is_fixed(name) and (window := name.removeprefix("fixed-")).isdecimal() and int(window) > 0:
        return _fixed(int(window))(trace, table)
    try:
        known = known_policies()[name]
    except KeyError:
        raise SettingsError(f"no policy {name!r}; there are {', '.join(known_policies())} and fixed-N") from None
    return known.make(trace, table)


def _ours(trace: Trace, table: LatencyTable) -> Policy:
    settings = AdmissionSettings(promises=trace.promises)
    info = EngineInfo(
        name="simulated",
        version="simulated",
        model="simulated",
        revision="simulated",
        context_tokens=32_768,
        max_running=table.slots,
        continuous=True,
    )
    return Policy(OURS, lambda: make_scheduler(settings, info), _credit(table.slots))


def _fixed(window: int) -> Callable[[Trace, LatencyTable], Policy]:
    def make(trace: Trace, table: LatencyTable) -> Policy:
        slots = min(window, table.slots)
        return Policy(f"fixed-{window}", lambda: _weighted(slots, continuous=True), _credit(slots))

    return make


def _closed(batch: int) -> Callable[[Trace, LatencyTable], Policy]:
    def make(trace: Trace, table: LatencyTable) -> Policy:
        return Policy(f"closed-{batch}", lambda: _weighted(batch, continuous=False), _credit(batch))

    return make


def _aimd(trace: Trace, table: LatencyTable) -> Policy:
    per_token = [promise.per_token_s for promise in trace.promises.values() if promise.per_token_s]
    strictest_s = min(per_token, default=0.0)
    shares = _shares()
    return Policy(
        "aimd",
        lambda: Aimd(slots=table.slots, shares=shares, per_token_s=strictest_s),
        _credit(table.slots),
    )


def _straight(by_priority: bool) -> Callable[[Trace, LatencyTable], Policy]:
    def make(trace: Trace, table: LatencyTable) -> Policy:
        return Policy("priority" if by_priority else "fcfs", Straight, UNBOUNDED, by_priority)

    return make


def _weighted(slots: int, *, continuous: bool) -> WeightedLanes:
    settings = AdmissionSettings()
    return WeightedLanes(slots=slots, continuous=continuous, shares=_shares(), linger_s=settings.linger_s)


def _shares() -> dict[Lane, float]:
    return {lane: float(share) for lane, share in AdmissionSettings().shares.items()}


def _credit(window: int) -> int:
    return math.ceil(window * (1 + LOOK_AHEAD))

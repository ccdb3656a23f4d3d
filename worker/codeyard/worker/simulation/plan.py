"""What a run is made of: the policy its workers follow, how many there are, what befalls them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from codeyard.shared.job import Lane
from codeyard.shared.settings import Promise
from codeyard.worker.scheduling.port import Scheduler


@dataclass(frozen=True, slots=True)
class Policy:
    """How the workers of a run decide. `credit` is per worker and queue."""

    name: str
    make: Callable[[], Scheduler]
    credit: int
    by_priority: bool = True


@dataclass(frozen=True, slots=True)
class Loss:
    """At `at_s`, `workers` of them die; each is back after the table's start time."""

    at_s: float
    workers: int


@dataclass(frozen=True, slots=True)
class FleetPlan:
    workers: int
    length_s: float
    promises: Mapping[Lane, Promise]
    num_shards: int = 1  # of each lane
    shards_per_tenant: int = 1
    losses: tuple[Loss, ...] = ()

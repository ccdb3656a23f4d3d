"""What a tenant has left of its rates, as it is told."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meter:
    """One bucket. `limit`: what it holds when full; `reset_s`: until it is full again."""

    limit: float
    remaining: float
    reset_s: float


@dataclass(frozen=True, slots=True)
class Standing:
    """None: not limited."""

    requests: Meter | None = None
    tokens: Meter | None = None

"""Which model next: for a worker that may serve several, the one whose waiting is worth most now.

The worth of serving model m is the time its jobs have waited, weighted by their lane's share:

    worth(m) = sum over lanes of  share * depth * age of the oldest job

and switching to it costs `load_s` in which nothing is served. Staying is kept unless another model's
worth is greater than what is here by a factor, and it has waited for longer than its load takes: a model
that takes 70 s to load is not fetched for a job that came a second ago, and two models with even queues
do not take turns at every decision. While a model has served for less than its own load took, only an
empty queue lets it go: half of the time at most is spent loading.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from codeyard.shared.job import Lane

HYSTERESIS = 1.5  # times more worth than the present model


@dataclass(frozen=True, slots=True)
class ModelQueue:
    """What waits for one model."""

    depth: Mapping[Lane, int]  # ready jobs
    oldest_s: Mapping[Lane, float]  # how long the oldest has waited
    load_s: float  # what loading it takes, or took


def next_model(
    queues: Mapping[str, ModelQueue], shares: Mapping[Lane, float], *, present: str | None, served_s: float
) -> str | None:
    """The model to serve now; `present` if it should stay, None if there is none and nothing waits.

    Args:
        present: the model loaded now, and `served_s` for how long it has been.
    """
    worth = {name: _worth(queue, shares) for name, queue in queues.items()}
    here = worth.get(present, 0.0) if present is not None else 0.0
    others = [
        name
        for name, queue in queues.items()
        if name != present and worth[name] > 0 and (not here or _may_replace(queue, worth[name], here))
    ]
    if not others:
        return present
    if here and present is not None and served_s < queues[present].load_s:
        return present
    return max(others, key=lambda name: (worth[name], name))


def _may_replace(queue: ModelQueue, worth: float, here: float) -> bool:
    waited_s = max((queue.oldest_s.get(lane, 0.0) for lane in Lane if queue.depth.get(lane)), default=0.0)
    return worth > HYSTERESIS * here and waited_s >= queue.load_s


def _worth(queue: ModelQueue, shares: Mapping[Lane, float]) -> float:
    return sum(shares.get(lane, 1.0) * depth * queue.oldest_s.get(lane, 0.0) for lane, depth in queue.depth.items())

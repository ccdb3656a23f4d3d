"""A worker's notice: what it serves and how busy it is, told to the fleet about twice a second.

It lies in the store and ends by itself, so a worker that was killed is gone from the board within `TTL_S`.
Read by: producers (waits.py: estimated start, emptiest shard), rollouts (who is ready), `codeyard models`.
Documented for other languages in docs/wire-contract.md. Later versions may add fields; unknown ones are ignored.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from codeyard.shared.errors import MalformedMessage
from codeyard.shared.job import Lane
from codeyard.shared.rollout import Report
from codeyard.shared.store.port import Store

TTL_S = 5.0  # several notices fit into it


@dataclass(frozen=True, slots=True)
class ModelNotice:
    """One revision as one worker sees it. Counts are jobs, by lane."""

    alias: str
    revision: str
    tier: str  # awake | asleep | disk: where its weights are on this worker
    serving: bool = False
    slots: int = 0  # jobs it would let run at once now: its window; 0 while it is not loaded
    running: int = 0
    waiting: Mapping[Lane, int] = field(default_factory=dict)  # in this worker's hand
    backlog: Mapping[Lane, tuple[int, ...]] = field(
        default_factory=dict
    )  # ready at the broker, by shard; the whole fleet's
    rate: Mapping[Lane, float] = field(default_factory=dict)  # admissions per second while the lane had a line here
    job_s: float | None = None  # seconds in the engine, mean of the jobs that ended lately


@dataclass(frozen=True, slots=True)
class Notice:
    """One worker's word."""

    owner: str
    engine: str = ""  # name and version
    models: tuple[ModelNotice, ...] = ()
    reports: Mapping[str, Report] = field(default_factory=dict)  # on rollouts, by alias

    def encode(self) -> str:
        """JSON; the owner is the key it is stored under."""
        return _ADAPTER.dump_json(self, exclude={"owner"}, exclude_none=True).decode()

    @classmethod
    def decode(cls, owner: str, text: str | bytes) -> "Notice":
        """Raises MalformedMessage."""
        try:
            return _ADAPTER.validate_python({**_FIELDS.validate_json(text), "owner": owner})
        except ValidationError:
            raise MalformedMessage(f"the notice of {owner!r} in the store is not one of ours") from None


_ADAPTER = TypeAdapter(Notice)
_FIELDS = TypeAdapter(dict[str, object])


@dataclass(frozen=True, slots=True)
class LaneLoad:
    """One lane of one revision, over all workers that serve it, as they told it."""

    waiting: int  # jobs at the broker, and in workers' hands and not begun
    free: int  # slots without a job
    rate: float  # admissions per second; 0 where nothing is known

    def start_s(self, *, on_the_way: int, age_s: float = 0.0) -> float | None:
        """Seconds until a job submitted now would start; None if that is not known.

            wait = (jobs ahead in the lane - free slots) / admissions per second            Little's law

        Args:
            on_the_way: jobs of the lane published since the workers looked.
            age_s: how long ago they looked; the lane has drained since.
        """
        ahead = self.waiting + on_the_way - self.free - self.rate * age_s
        if ahead < 0:
            return 0.0
        return (ahead + 1) / self.rate if self.rate > 0 else None


def lane_load(workers: Sequence[ModelNotice], lane: Lane) -> LaneLoad | None:
    """Of the workers that serve one revision; None if none does.

    The rate is the sum of what they measured while the lane had a line (worker/scheduling/drain.py); one that
    has not seen a line counts as `slots / job_s`.
    """
    serving = [one for one in workers if one.serving and one.slots]
    if not serving:
        return None
    backlog = max(sum(one.backlog.get(lane, ())) for one in serving)  # each sees the whole queue
    return LaneLoad(
        waiting=backlog + sum(one.waiting.get(lane, 0) for one in serving),
        free=sum(max(0, one.slots - one.running - sum(one.waiting.values())) for one in serving),
        rate=sum(_rate(one, lane) for one in serving),
    )


def _rate(worker: ModelNotice, lane: Lane) -> float:
    if (measured := worker.rate.get(lane)) is not None:
        return measured
    return worker.slots / worker.job_s if worker.job_s else 0.0


async def fleet(store: Store) -> list[Notice]:
    """What every live worker told last. One of a later version that does not decode is left out.
    Raises StoreUnavailable."""
    found = []
    for owner, text in (await store.notices()).items():
        with contextlib.suppress(MalformedMessage):
            found.append(Notice.decode(owner, text))
    return found


def reports_of(notices: Sequence[Notice], alias: str) -> dict[str, Report | None]:
    """Every worker that serves an alias, and its report on the alias's rollout, if it made one."""
    return {
        notice.owner: notice.reports.get(alias)
        for notice in notices
        if any(model.alias == alias for model in notice.models)
    }

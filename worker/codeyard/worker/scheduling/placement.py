"""Which models to serve now, for a worker that may serve more than fit.

The worth of serving model m is the time its jobs have waited, weighted by their lane's share:

    worth(m) = sum over lanes of  share * depth * age of the oldest job

and getting it ready costs `ready_s` in which its memory serves nobody: 0 awake, about 2 s asleep, 30 s and
more from disk. A model that waits is opened at once where there is room, and else in place of served ones:

- those that have nothing to do, the least recently busy first;
- those worth less by a factor, if the one that waits has waited for as long as it takes to get ready, and
  they have served for as long as it took to get *them* ready. So at most half of the time goes into
  getting ready, and two models with even queues do not take turns at every look. To the worth of what is
  served belong its running jobs: as many would wait while it is away, which is for as long as both take
  to get ready;
- whatever has served that long, once the one that waits has waited for `starvation_s`: a flood for one
  model keeps no job of another waiting for more than that, plus the longest service of those before it.

With room left and nothing that waits, what comes next is made ready ahead (forecast.py says what): into
spare memory, or over idle models that are forecast less.

Pure: plain values in, a decision out. Called by: worker.station, loadtest/bench_models.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from codeyard.shared.job import Lane

HYSTERESIS = 1.5  # times the worth of what is served
STARVATION_S = 120.0
LIKELY = 0.5  # a model less likely than this to be next is not made ready ahead


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model as the worker sees it. Durations in seconds."""

    depth: Mapping[Lane, int]  # jobs that wait: at the broker, and in hand
    oldest_s: Mapping[Lane, float]  # how long the oldest of them has
    num_bytes: int  # of device memory, awake
    ready_s: float  # to get it ready from where it is now; 0 if it is awake
    load_s: float  # what it took, or would take, to get it ready: what it must serve for in turn
    serving: bool = False  # a line is open for it, or opening
    served_s: float = 0.0  # for how long
    running: Mapping[Lane, int] = field(default_factory=dict)  # jobs in the engine; they finish before it can go
    idle_s: float = 0.0  # since it last had work

    @property
    def waiting(self) -> int:
        return sum(self.depth.values())

    @property
    def waited_s(self) -> float:
        return max((self.oldest_s.get(lane, 0.0) for lane, depth in self.depth.items() if depth), default=0.0)


@dataclass(frozen=True, slots=True)
class Placement:
    """`close` these lines, then `open` those; make `preload` ready, if need be in place of `over`."""

    open: tuple[str, ...] = ()
    close: tuple[str, ...] = ()
    preload: str | None = None
    over: tuple[str, ...] = ()


def place(
    models: Mapping[str, ModelState],
    shares: Mapping[Lane, float],
    *,
    budget_bytes: int | None,
    forecast: Mapping[str, float] | None = None,
    starvation_s: float = STARVATION_S,
) -> Placement:
    """What to change now. Never asks for more than `budget_bytes` of open lines and preloads together.

    Args:
        models: all this worker may serve, by revision.
        budget_bytes: of device memory; None: everything fits.
        forecast: how likely each model's jobs come next, 0..1; absent: not at all.
    """
    room = _Room(models, budget_bytes, (name for name, state in models.items() if state.serving))
    opened, closed = [], []
    for name in _by_need(models, shares, starvation_s):
        victims = _victims(name, models, shares, room, starvation_s)
        if victims is not None:
            room.taken.difference_update(victims)
            room.taken.add(name)
            closed += victims
            opened.append(name)
    if opened:
        return Placement(tuple(opened), tuple(closed))
    return _ahead(models, budget_bytes, forecast or {})


def worth(state: ModelState, shares: Mapping[Lane, float]) -> float:
    """Seconds that its jobs have waited, weighted."""
    return sum(shares.get(lane, 1.0) * depth * state.oldest_s.get(lane, 0.0) for lane, depth in state.depth.items())


class _Room:
    """The budget while a decision is made: `taken` hold memory, or are about to."""

    def __init__(self, models: Mapping[str, ModelState], budget_bytes: int | None, taken: Iterable[str]) -> None:
        self._models = models
        self._budget_bytes = budget_bytes
        self.taken = set(taken)

    def fits(self, name: str, *, without: Iterable[str] = ()) -> bool:
        if self._budget_bytes is None:
            return True
        held = self.taken.difference(without, (name,))
        return sum(self._models[one].num_bytes for one in (*held, name)) <= self._budget_bytes


def _by_need(models: Mapping[str, ModelState], shares: Mapping[Lane, float], starvation_s: float) -> Iterator[str]:
    """Those that wait and are not served: the starving first, then by worth for the time it costs."""
    waiting = [name for name, state in models.items() if state.waiting and not state.serving]
    starving = [name for name in waiting if models[name].waited_s >= starvation_s]
    yield from sorted(starving, key=lambda name: (-models[name].waited_s, name))
    others = [name for name in waiting if name not in starving]
    yield from sorted(others, key=lambda name: (-worth(models[name], shares) / (1.0 + models[name].ready_s), name))


def _victims(
    name: str, models: Mapping[str, ModelState], shares: Mapping[Lane, float], room: _Room, starvation_s: float
) -> list[str] | None:
    """The fewest lines to close so that it fits, the least worth first; None if it must wait."""
    chosen: list[str] = []
    candidates = [one for one in room.taken if models[one].serving and _may_go(one, name, models, shares, starvation_s)]
    candidates.sort(key=lambda one: (_busy(models[one]), worth(models[one], shares), -models[one].idle_s, one))
    for victim in candidates:
        if room.fits(name, without=chosen):
            break
        chosen.append(victim)
    return chosen if room.fits(name, without=chosen) else None


def _may_go(
    served: str, waiting: str, models: Mapping[str, ModelState], shares: Mapping[Lane, float], starvation_s: float
) -> bool:
    here, there = models[served], models[waiting]
    if not _busy(here):
        return True
    if here.served_s < here.load_s:
        return False
    if there.waited_s >= starvation_s:
        return True
    if there.waited_s < there.ready_s:
        return False
    away_s = there.ready_s + here.load_s
    missed = sum(shares.get(lane, 1.0) * jobs * away_s for lane, jobs in here.running.items())
    return worth(there, shares) > HYSTERESIS * (worth(here, shares) + missed)


def _busy(state: ModelState) -> bool:
    return bool(state.waiting or any(state.running.values()))


def _ahead(models: Mapping[str, ModelState], budget_bytes: int | None, forecast: Mapping[str, float]) -> Placement:
    """Get the likeliest model ready, if there is room beside what is busy and what is about as likely."""
    ready = [name for name, state in models.items() if state.serving or not state.ready_s]
    wanted = [name for name in models if name not in ready and forecast.get(name, 0.0) >= LIKELY]
    for name in sorted(wanted, key=lambda one: (-forecast[one], one)):
        room = _Room(models, budget_bytes, ready)
        idle = [one for one in ready if not _busy(models[one]) and HYSTERESIS * forecast.get(one, 0.0) < forecast[name]]
        over: list[str] = []
        for one in sorted(idle, key=lambda one: (forecast.get(one, 0.0), one)):
            if room.fits(name, without=over):
                break
            over.append(one)
        if room.fits(name, without=over):
            return Placement(preload=name, over=tuple(over))
    return Placement()

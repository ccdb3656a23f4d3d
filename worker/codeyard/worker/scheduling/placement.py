"""Which models to serve now, for a worker that may serve more than fit.

The worth of serving model m is the time its jobs have waited, weighted by their lane's share:

    worth(m) = sum over lanes of  share * depth * age of the oldest job

and getting it ready costs `ready_s` in which its memory serves nobody: 0 awake, about 2 s asleep, 30 s and
more from disk; and what it displaces is fetched again if it has work coming. A model that waits is opened at
once where there is room, and else in place of others:

- those that have had nothing to do for a while, the least likely to come next first (forecast.py): a burst
  has gaps, and a model put away in one is fetched again in the same burst;
- but one that is clearly likelier to come next than one that is busy now is kept while the busy one ends, for
  as long as the jobs that wait can bear (`LINGER_S`; an interactive job not at all, nor one whose model takes
  long to get ready: it waits enough);
- if all are busy, those worth less by a factor, if the one that waits has waited for as long as it takes to get
  ready, and they have served for as long as it took to get *them* ready. To the worth of what is served belong
  its running jobs: as many would wait while it is away, which may be for `starvation_s`. So two models with
  even queues do not take turns at every look;
- whatever has served that long, once the one that waits has waited for `starvation_s`: a flood for one
  model keeps no job of another waiting for more than that, plus the longest service of those before it.

A line that opens is left to open. With nothing that waits, what comes next is made ready ahead if it is likely
and takes long: into spare memory, or over idle models that are forecast less. A guess that is wrong costs a
load, so one of a model that is ready in two seconds anyway is not worth it.

Pure: plain values in, a decision out. Called by: worker.station, loadtest/bench_models.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from codeyard.shared.job import Lane

HYSTERESIS = 1.5  # times the worth of what is served
STARVATION_S = 120.0
PAUSE_S = 4.0  # jobs of one burst come closer together than this, mostly
LINGER_S = {Lane.INTERACTIVE: 0.0, Lane.STANDARD: 60.0, Lane.BULK: 60.0}  # for a busy model to end
LIKELIER = 0.2  # by this much the idle model must be, for a job of another to wait
LIKELY = 0.8  # a model less likely than this to be next is not made ready ahead
SOON_S = 5.0  # one that is ready sooner than this is not made ready ahead, and only its jobs wait for a busy one


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model as the worker sees it. Durations in seconds."""

    depth: Mapping[Lane, int]  # jobs that wait: at the broker, and in hand
    oldest_s: Mapping[Lane, float]  # how long the oldest of them has
    num_bytes: int  # of device memory, awake
    ready_s: float  # to get it ready from where it is now; 0 if it is awake
    load_s: float  # what it took, or would take, to get it ready: what it must serve for in turn
    serving: bool = False  # a line is open for it, or opening
    served_s: float = 0.0  # for how long; 0 while it opens
    running: Mapping[Lane, int] = field(default_factory=dict)  # jobs in the engine; they finish before it can go
    idle_s: float = 0.0  # since it last had work

    @property
    def awake(self) -> bool:
        """Holds device memory, or is about to."""
        return self.serving or not self.ready_s

    @property
    def busy(self) -> bool:
        return bool(self.waiting or any(self.running.values()))

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
    may_open: bool = True,
    may_idle: bool = True,
) -> Placement:
    """What to change now. Never asks for more than `budget_bytes` of open lines and preloads together.

    Args:
        models: all this worker may serve, by revision.
        budget_bytes: of device memory; None: everything fits.
        forecast: how likely each model's jobs come next, 0..1; absent: not at all.
        may_open: False: memory is used up, nothing is opened.
        may_idle: False: memory is short, what has nothing to do is closed and nothing made ready ahead.
    """
    forecast = forecast or {}
    room = _Room(models, budget_bytes, (name for name, state in models.items() if state.awake))
    opened, closed = [], []
    for name in _by_need(models, shares, starvation_s) if may_open else ():
        victims = _victims(name, models, shares, room, starvation_s, forecast)
        if victims is not None:
            room.taken.difference_update(victims)
            room.taken.add(name)
            closed += [victim for victim in victims if models[victim].serving]
            opened.append(name)
    if not may_idle:
        idle = (name for name, state in models.items() if state.serving and not state.busy and state.idle_s >= PAUSE_S)
        closed += sorted(set(idle).difference(closed))
    if opened or closed or not may_idle:
        return Placement(tuple(opened), tuple(closed))
    if any(state.waiting and not state.serving for state in models.values()):
        return Placement()
    return _ahead(models, budget_bytes, forecast)


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
    name: str,
    models: Mapping[str, ModelState],
    shares: Mapping[Lane, float],
    room: _Room,
    starvation_s: float,
    forecast: Mapping[str, float],
) -> list[str] | None:
    """The fewest to put away so that it fits, the least missed first; None if it must wait."""
    idle = [one for one in room.taken if one != name and not models[one].busy]
    idle.sort(key=lambda one: (forecast.get(one, 0.0), -models[one].idle_s, one))
    victims = _fewest(name, idle, room)
    if victims is not None:
        busy = [one for one in room.taken if models[one].busy]
        return None if _lingers(models[name], victims, busy, models, forecast) else victims
    busy = [one for one in room.taken if _may_go(one, name, models, shares, starvation_s)]
    busy.sort(key=lambda one: (worth(models[one], shares), one))
    return _fewest(name, idle + busy, room)


def _fewest(name: str, candidates: Iterable[str], room: _Room) -> list[str] | None:
    """So many of these, from the first, that it fits; None if all are not enough."""
    chosen: list[str] = []
    for one in candidates:
        if room.fits(name, without=chosen):
            break
        chosen.append(one)
    return chosen if room.fits(name, without=chosen) else None


def _lingers(
    there: ModelState,
    victims: Iterable[str],
    busy: Iterable[str],
    models: Mapping[str, ModelState],
    forecast: Mapping[str, float],
) -> bool:
    """Whether the one that waits waits on, since these idle ones have work coming, as far as one can tell."""
    for one in victims:
        if models[one].idle_s < PAUSE_S and there.waited_s < PAUSE_S:
            return True  # between two jobs of one burst
        likelier = any(forecast.get(one, 0.0) >= LIKELIER + forecast.get(other, 0.0) for other in busy)
        if (
            likelier
            and there.ready_s < SOON_S
            and all(there.oldest_s.get(lane, 0.0) < LINGER_S[lane] for lane, n in there.depth.items() if n)
        ):
            return True
    return False


def _may_go(
    served: str, waiting: str, models: Mapping[str, ModelState], shares: Mapping[Lane, float], starvation_s: float
) -> bool:
    """Whether a busy one may."""
    here, there = models[served], models[waiting]
    if not (here.serving and here.busy) or here.served_s < here.load_s:
        return False
    if there.waited_s >= starvation_s:
        return True
    if there.waited_s < there.ready_s:
        return False
    away_s = there.ready_s + starvation_s + here.load_s
    missed = sum(shares.get(lane, 1.0) * jobs * away_s for lane, jobs in here.running.items())
    return worth(there, shares) > HYSTERESIS * (worth(here, shares) + missed)


def _ahead(models: Mapping[str, ModelState], budget_bytes: int | None, forecast: Mapping[str, float]) -> Placement:
    """Get the likeliest model ready, if there is room beside what is busy and what is about as likely."""
    awake = [name for name, state in models.items() if state.awake]
    wanted = [
        name
        for name, state in models.items()
        if name not in awake and forecast.get(name, 0.0) >= LIKELY and state.ready_s >= SOON_S
    ]
    for name in sorted(wanted, key=lambda one: (-forecast[one], one)):
        idle = [one for one in awake if not models[one].busy and models[one].idle_s >= PAUSE_S]
        less = [one for one in idle if HYSTERESIS * forecast.get(one, 0.0) < forecast[name]]
        less.sort(key=lambda one: (forecast.get(one, 0.0), one))
        over = _fewest(name, less, _Room(models, budget_bytes, awake))
        if over is not None:
            return Placement(preload=name, over=tuple(over))
    return Placement()

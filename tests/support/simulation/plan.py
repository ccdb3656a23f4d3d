"""A schedule as plain values: who runs, which jobs, which faults. Drawn from a seed, shrunk by shrink.py.

Every fault is one entry of one list, so that a failing plan can be made shorter by leaving entries out.
Times are virtual seconds since the run began. Called by: world.py, shrink.py, tests/simulation.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from random import Random

from codeyard.shared.job import Lane
from support.simulation.wire import DELIVER, CallFault, Phase

NUM_WORKERS = 3
NUM_CLIENTS = 2
NUM_JOBS = 10
BUSY_S = 8.0  # jobs are submitted and faults begin within this
LONGEST_PAUSE_S = 9.0  # longer than a lease and its grace
SKEW_S = 7_200.0  # of a process's wall clock, at most, either way


class Kind(StrEnum):
    """What the engine makes of a job."""

    PLAIN = "plain"
    FAILS_ONCE = "fails-once"
    BROKEN = "broken"  # fails each time
    REFUSED = "refused"  # can never succeed
    KILLS = "kills"  # the engine dies under it, each time
    HANGS = "hangs"  # never a token


class How(StrEnum):
    """One way to ask for a job."""

    SUBMIT = "submit"
    OTHER_BODY = "other body"  # the same key, another prompt
    FOREIGN = "foreign"  # published by a program that does not reserve


@dataclass(frozen=True, slots=True)
class Call:
    """One caller of one job. It repeats what had no answer, then waits for the end."""

    client: int
    at_s: float
    how: How = How.SUBMIT
    cancels_after_s: float | None = None  # after it was answered, whatever the answer
    follows: bool = False  # reads the events rather than the result
    num_tries: int = 4


@dataclass(frozen=True, slots=True)
class JobPlan:
    number: int
    calls: tuple[Call, ...]
    kind: Kind = Kind.PLAIN
    lane: Lane = Lane.STANDARD
    stream: bool = False
    seeded: bool = False  # cannot be continued: a takeover starts it over
    num_tokens: int = 4
    step_s: float = 0.2  # per token
    max_tokens: int = 64
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Death:
    """A process is killed: at a time, or at its nth callback, which is any await. Another starts in its stead."""

    process: str
    at_s: float | None = None
    at_step: int | None = None
    back_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Pause:
    """A process stands still: all of it, or only its event loop while leases are kept."""

    process: str
    at_s: float
    for_s: float
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Drain:
    """A worker is asked to stop; another starts when it has."""

    process: str
    at_s: float
    back_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Skew:
    process: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Away:
    """A server does not answer."""

    server: str  # store | broker
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class HangUp:
    """The broker cuts every connection of a process."""

    process: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Reorder:
    """What comes back after a cut does so in any order."""


@dataclass(frozen=True, slots=True)
class LetterFault:
    """Meets the nth message that a job queue takes."""

    what: str  # copied | lost | dropped (dead-lettered by the broker itself)
    nth: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Full:
    """Job queues hold no more than this."""

    max_length: int
    until_s: float


@dataclass(frozen=True, slots=True)
class Preempt:
    """A worker's scheduler takes one running job back for another."""

    process: str
    at_s: float


@dataclass(frozen=True, slots=True)
class EngineDies:
    process: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Redriving:
    """Somebody redrives what is dead, from a process of its own, and repeats it until it went through."""

    process: str
    at_s: float


Fault = (
    CallFault
    | Death
    | Pause
    | Drain
    | Skew
    | Away
    | HangUp
    | Reorder
    | LetterFault
    | Full
    | Preempt
    | EngineDies
    | Redriving
)


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    jobs: tuple[JobPlan, ...]
    faults: tuple[Fault, ...]
    num_workers: int = NUM_WORKERS
    num_clients: int = NUM_CLIENTS
    slots: int = 3  # of each engine
    acks_answer: bool = False  # as with the embedded file; False: as with AMQP
    latency_s: float = 0.004  # of one way
    order: int = 0  # another one, another interleaving of the same plan
    starts_s: tuple[float, ...] = field(default=(0.0, 0.0, 0.0))  # of the workers

    def without_fault(self, place: int) -> "Plan":
        return replace(self, faults=self.faults[:place] + self.faults[place + 1 :])

    def without_job(self, place: int) -> "Plan":
        return replace(self, jobs=self.jobs[:place] + self.jobs[place + 1 :])

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.num_workers} workers, {len(self.jobs)} jobs, {len(self.faults)} faults"]
        lines += [f"  job   {job}" for job in self.jobs]
        lines += [f"  fault {fault}" for fault in self.faults]
        return "\n".join(lines)


# The calls of the two ports that faults may meet, and about how often each is made in one run.
CALLS = {
    "store.reserve": 10,
    "store.mark_queued": 10,
    "store.claim": 12,
    "store.renew": 16,
    "store.append": 12,
    "store.commit": 10,
    "store.release": 3,
    "store.cancel": 2,
    "store.recover": 2,
    "store.read": 12,
    "store.events": 6,
    "store.due": 20,
    "store.aliases": 4,
    "store.notices": 6,
    "store.swap_alias": 3,
    "broker.publish": 12,
    "broker.defer": 2,
    "broker.dead_letter": 2,
    "broker.declare": 3,
    "broker.consume": 6,
    "broker.depth": 1,
    "consumer.receive": 12,
    "consumer.ack": 10,
    "consumer.requeue": 1,
    DELIVER: 14,
}
REDRIVE_CALLS = ("store.redrive", "store.redrive", "broker.publish", "store.mark_queued", "consumer.ack")
"""What somebody who redrives asks for, in this order. Drawn apart, so that the other schedules stay as they were."""

REDRIVEN = 0.25  # of all schedules
_WEIGHTED_KINDS = [Kind.PLAIN] * 14 + [Kind.FAILS_ONCE] * 3 + [Kind.BROKEN, Kind.REFUSED, Kind.KILLS]


def draw(seed: int) -> Plan:
    """The plan of a seed: always the same."""
    chance = Random(f"plan {seed}")
    jobs = tuple(_job(chance, number) for number in range(NUM_JOBS))
    faults = [_sure_fault(chance), *_turn(chance, seed)]
    faults += [_fault(chance) for _ in range(min(3, int(chance.expovariate(1.0))))]
    jobs, redrives = _redrives(Random(f"redrives {seed}"), jobs)
    return Plan(
        seed,
        jobs,
        (*faults, *redrives),
        slots=chance.choice((1, 2, 3, 4)),
        acks_answer=chance.random() < 0.5,
        latency_s=chance.choice((0.001, 0.004, 0.02)),
        starts_s=tuple(chance.choice((0.0, 0.0, 0.5, 2.0)) for _ in range(NUM_WORKERS)),
    )


def _job(chance: Random, number: int) -> JobPlan:
    at_s = round(chance.uniform(0.0, 0.6 * BUSY_S), 2)
    first = Call(
        client=chance.randrange(NUM_CLIENTS),
        at_s=at_s,
        how=How.FOREIGN if chance.random() < 0.06 else How.SUBMIT,
        cancels_after_s=round(chance.expovariate(1.0), 2) if chance.random() < 0.15 else None,
        follows=chance.random() < 0.3,
        num_tries=1 if chance.random() < 0.2 else 4,
    )
    calls = [first]
    if first.how is How.SUBMIT and chance.random() < 0.25:
        calls.append(
            Call(
                client=chance.randrange(NUM_CLIENTS),
                at_s=round(max(0.0, at_s + chance.choice((0.0, 0.01, chance.uniform(-1.0, 4.0)))), 2),
                how=How.OTHER_BODY if chance.random() < 0.3 else How.SUBMIT,
            )
        )
    drawn = chance.random()
    return JobPlan(
        number,
        tuple(calls),
        kind=Kind.HANGS if drawn < 0.003 else chance.choice(_WEIGHTED_KINDS),
        lane=chance.choice(tuple(Lane)),
        stream=chance.random() < 0.4,
        seeded=chance.random() < 0.25,
        num_tokens=chance.randint(1, 6),
        step_s=round(chance.choice((0.02, 0.2, 0.2, 1.0)) * chance.uniform(0.5, 1.5), 3),
        max_tokens=chance.choice((64, 64, 64, 3)),
        timeout_s=round(chance.uniform(0.5, 6.0), 2) if chance.random() < 0.1 else 600.0,
    )


def _redrives(chance: Random, jobs: tuple[JobPlan, ...]) -> tuple[tuple[JobPlan, ...], list[Fault]]:
    """In some schedules: a job that is sure to die early, and somebody who redrives, once or twice, maybe at once."""
    if chance.random() >= REDRIVEN:
        return jobs, []
    place = chance.randrange(len(jobs))
    dies = replace(jobs[place], kind=Kind.REFUSED, step_s=0.02)
    at_s = round(chance.uniform(2.0, BUSY_S), 2)
    faults: list[Fault] = [Redriving("o0", at_s)]
    if chance.random() < 0.5:
        faults.append(Redriving("o1", round(at_s + chance.choice((0.0, 0.02, chance.uniform(0.0, 6.0))), 2)))
    if chance.random() < 0.7:
        fault = _fault_of(chance, chance.choice(REDRIVE_CALLS), usual=2)
        faults.append(replace(fault, nth=1) if fault.call == "store.redrive" else fault)
    return (*jobs[:place], dies, *jobs[place + 1 :]), faults


def _fault(chance: Random) -> Fault:
    worker = f"w{chance.randrange(NUM_WORKERS)}"
    anyone = chance.choice((worker, worker, worker, f"p{chance.randrange(NUM_CLIENTS)}"))
    at_s = round(chance.uniform(0.05, BUSY_S), 2)
    drawn = chance.random()
    if drawn < 0.5:
        return _call_fault(chance)
    if drawn < 0.60:
        back_s = round(chance.uniform(0.2, 4.0), 2)
        if chance.random() < 0.6:
            return Death(anyone, at_step=int(chance.uniform(5, 900)), back_s=back_s)
        return Death(anyone, at_s=at_s, back_s=back_s)
    if drawn < 0.72:
        for_s = round(chance.uniform(0.5, LONGEST_PAUSE_S), 2)
        return Pause(anyone, at_s, for_s, whole=chance.random() < 0.7)
    if drawn < 0.76:
        return Drain(worker, at_s)
    if drawn < 0.80:
        return Skew(anyone, round(chance.uniform(-SKEW_S, SKEW_S)))
    if drawn < 0.84:
        return Away(chance.choice(("store", "broker")), at_s, round(chance.uniform(0.1, 6.0), 2))
    if drawn < 0.88:
        return HangUp(worker, at_s)
    if drawn < 0.90:
        return Reorder()
    if drawn < 0.95:
        what = chance.choice(("copied", "copied", "lost", "dropped"))
        after_s = round(chance.choice((0.0, 0.01, chance.uniform(0.0, 3.0))), 2)
        return LetterFault(what, chance.randint(1, 12), after_s if what == "copied" else 0.0)
    if drawn < 0.965:
        return Full(chance.randint(0, 2), until_s=at_s)
    if drawn < 0.985:
        return Preempt(worker, at_s)
    return EngineDies(worker, at_s)


def _sure_fault(chance: Random) -> Fault:
    """One that meets its process whatever happens before."""
    worker, at_s = f"w{chance.randrange(NUM_WORKERS)}", round(chance.uniform(2.1, 4.5), 2)
    drawn = chance.random()
    if drawn < 0.35:
        return HangUp(worker, at_s)
    if drawn < 0.65:
        return Pause(worker, at_s, round(chance.uniform(0.1, LONGEST_PAUSE_S), 2), whole=chance.random() < 0.7)
    if drawn < 0.85:
        return Death(worker, at_s, back_s=round(chance.uniform(0.2, 4.0), 2))
    return Away(chance.choice(("store", "broker")), at_s, round(chance.uniform(0.1, 2.0), 2))


def _call_fault(chance: Random) -> CallFault:
    return _fault_of(chance, chance.choice(list(CALLS)))


def _turn(chance: Random, seed: int) -> list[Fault]:
    """One call after the other, seed by seed, and what makes the rarer ones happen at all."""
    call = list(CALLS)[seed % len(CALLS)]
    causes: list[Fault] = []
    if call == "consumer.requeue":
        causes = [Drain(f"w{n}", round(chance.uniform(1.0, 4.0), 2)) for n in range(NUM_WORKERS)]
    elif call in ("broker.depth", "store.recover"):
        causes = [LetterFault("lost", chance.randint(1, 8))]
    return [_fault_of(chance, call), *causes]


def _fault_of(chance: Random, call: str, *, usual: int | None = None) -> CallFault:
    """`usual`: about how often the call is made, where CALLS does not say."""
    phase = Phase.SLOW if call == DELIVER else chance.choice(list(Phase))
    return CallFault(
        call,
        nth=1 + int(chance.random() ** 2 * (CALLS.get(call) or usual or 1)),
        phase=phase,
        told_s=round(chance.choice((0.05, 0.5, chance.uniform(0.0, LONGEST_PAUSE_S))), 3),
        late_s=round(chance.choice((0.05, chance.uniform(0.0, LONGEST_PAUSE_S))), 3),
    )

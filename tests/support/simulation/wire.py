"""The way of a call from a process to a server and back, and what may happen to it there.

A `Link` is what the in-memory adapters ask for: `DirectLink` does nothing but the call, for the contract
suite; `Wire` takes its (virtual) time and meets the faults of the plan. Called by: broker.py, store.py.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any, Protocol, TypeVar

from codeyard.shared.errors import FleetError
from support.simulation.loop import Process, SimulationLoop

T = TypeVar("T")
R = TypeVar("R")
Apply = Callable[[Sequence[R]], list[T]]
NEVER_S = 1e9
DELIVER = "broker.deliver"  # not a call: a message on its way to a consumer. It can only be SLOW
NOTHING: Sequence[None] = (None,)  # the group of a call that takes none


class Phase(StrEnum):
    """What a fault does to one call. The caller hears of it as an exception, unless it died."""

    BEFORE = "before"  # lost on its way there
    AFTER = "after"  # done, and the answer lost
    PART = "part"  # done for some of the group, and the answer lost
    LATE = "late"  # done after the caller was told that there was no answer
    DIES_BEFORE = "dies before"  # the caller's process ends, and the call with it
    DIES_AFTER = "dies after"  # it ends with the call done
    SLOW = "slow"  # nothing but late, the answer too
    STALLS = "stalls"  # done at once; the caller's process stands still from the call on, for told_s + late_s

    @property
    def side(self) -> str | None:
        """Of the call's effect."""
        if self in (Phase.BEFORE, Phase.DIES_BEFORE):
            return "before"
        return None if self in (Phase.SLOW, Phase.STALLS) else "after"


DEADLY = frozenset({Phase.DIES_BEFORE, Phase.DIES_AFTER})


@dataclass(frozen=True, slots=True)
class CallFault:
    """Meets the `nth` call of a name, by whichever process."""

    call: str  # "store.commit", "consumer.ack", ...
    nth: int  # from 1
    phase: Phase
    told_s: float = 0.05  # after the call: when the caller is told
    late_s: float = 0.0  # after that: when a LATE effect comes


class Link(Protocol):
    def call(
        self,
        name: str,
        group: Sequence[R],
        apply: "Apply[R, T]",
        *,
        within_s: float = NEVER_S,
        unknown: T | None = None,
    ) -> "Awaitable[list[T]]":
        """Have the server `apply` the group. Raises what the port raises if there was no answer, or answers
        `unknown` for each, where the port has such an answer."""

    def send(self, name: str, group: Sequence[R], apply: "Apply[R, T]", *, lost: Callable[[], object]) -> None:
        """The same without an answer; `lost` if the connection breaks over it."""

    def strike(self, name: str) -> Phase | None:
        """What happens now to something that needs no server: nothing, mostly."""

    @property
    def reachable(self) -> bool:
        """The server, from this process."""

    def later(self, delay_s: float, callback: Callable[[], object]) -> None:
        """In this process."""

    def arrive(self, callback: Callable[[], object]) -> None:
        """From the server to this process, after the time that takes."""


class DirectLink:
    """For the contract suite: real time, no faults."""

    async def call(
        self,
        name: str,
        group: Sequence[R],
        apply: "Apply[R, T]",
        *,
        within_s: float = NEVER_S,
        unknown: T | None = None,
    ) -> list[T]:
        await asyncio.sleep(0)
        return apply(group)

    def send(self, name: str, group: Sequence[R], apply: "Apply[R, T]", *, lost: Callable[[], object]) -> None:
        apply(group)

    def strike(self, name: str) -> Phase | None:
        return None

    @property
    def reachable(self) -> bool:
        return True

    def later(self, delay_s: float, callback: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(delay_s, callback)

    def arrive(self, callback: Callable[[], object]) -> None:
        callback()


class Weather:
    """Which calls meet which fault, and which servers are away. Shared by all wires of a world."""

    def __init__(
        self, loop: SimulationLoop, chance: Random, faults: Mapping[tuple[str, int], CallFault], *, latency_s: float
    ) -> None:
        self.loop = loop
        self.chance = chance
        self.latency_s = latency_s  # of one way, most of the time
        self.away: set[str] = set()  # servers that do not answer
        self.calm = False  # True: no more faults
        self.over = False  # True: the world has ended
        self.num_faults = 0  # of the plan, that met a call
        self.met: Counter[str] = Counter()  # faults that a call met: "store.commit after"
        self.trace: list[str] | None = None
        self.on_trouble: Callable[[str, float], object] = lambda process, for_s: None  # told of each fault
        self._faults = faults
        self._counts: Counter[str] = Counter()

    def fault(self, call: str) -> CallFault | None:
        self._counts[call] = count = self._counts[call] + 1
        fault = self._faults.get((call, count))
        if fault is None or self.calm:
            return None
        self.meet(call, fault.phase)
        self.num_faults += 1
        return fault

    def meet(self, call: str, phase: Phase) -> None:
        if phase.side is not None:
            self.met[f"{call} {phase.side}"] += 1

    def way_s(self) -> float:
        """How long one way takes now: mostly short, sometimes not."""
        drawn = self.chance.random()
        return self.latency_s * (drawn if drawn < 0.9 else 10 * drawn)

    def say(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.loop.now_s:9.3f}  {who:<12} {what}")


class Wire:
    """One process's way to one server."""

    def __init__(self, weather: Weather, process: Process, server: str, error: Callable[[str], FleetError]) -> None:
        self._weather = weather
        self._loop = weather.loop
        self._process = process
        self._server = server
        self._error = error
        self._outside = Context()  # what the server does belongs to no process

    def call(
        self,
        name: str,
        group: Sequence[R],
        apply: "Apply[R, T]",
        *,
        within_s: float = NEVER_S,
        unknown: T | None = None,
    ) -> "Awaitable[list[T]]":
        weather = self._weather
        answer: asyncio.Future[list[T]] = self._loop.create_future()
        if weather.over:
            return answer
        fault = weather.fault(name)
        if self._server in weather.away and fault is None:
            weather.meet(name, Phase.BEFORE)
            fault = CallFault(name, 0, Phase.BEFORE)
        there_s = weather.way_s()
        if fault is None:
            self._after(there_s, self._serve, name, group, apply, answer)
        else:
            unheard = None
            if unknown is not None and weather.chance.random() < 0.5:
                unheard = [unknown] * len(group)
            self._spoil(fault, name, group, apply, answer, there_s, within_s, unheard)
        return answer

    def send(self, name: str, group: Sequence[R], apply: "Apply[R, T]", *, lost: Callable[[], object]) -> None:
        weather, there_s = self._weather, self._weather.way_s()
        if weather.over or not self.reachable:
            return
        fault = weather.fault(name)
        if fault is None:
            self._after(there_s, self._do, name, group, apply)
            return
        self._troubled(fault)
        weather.say(self._process.name, f"{name} {_brief(group)} !! {fault.phase}")
        if fault.phase is Phase.STALLS:
            self._stall(fault)
            self._after(there_s, self._do, name, group, apply)
            return
        if fault.phase is Phase.SLOW:
            self._after(fault.told_s, self._do, name, group, apply)
        elif fault.phase.side == "after":
            self._after(there_s, self._do, name, group, apply, " (and cut)")
        self._after(there_s, self._process.die if fault.phase in DEADLY else lost)

    def strike(self, name: str) -> Phase | None:
        fault = self._weather.fault(name)
        if fault is None:
            return None
        self._troubled(fault)
        self._weather.say(self._process.name, f"{name} !! {fault.phase}")
        if fault.phase in DEADLY:
            self._after(0.0, self._process.die)
        if fault.phase is Phase.STALLS:
            self._stall(fault)
        return fault.phase

    @property
    def reachable(self) -> bool:
        return not self._process.dead and self._server not in self._weather.away

    def later(self, delay_s: float, callback: Callable[[], object]) -> None:
        self._loop.call_later(delay_s, callback, context=self._process.main.context.copy())

    def arrive(self, callback: Callable[[], object]) -> None:
        fault = self._weather.fault(DELIVER)
        delay_s = self._weather.way_s() if fault is None else fault.told_s
        self._loop.call_later(delay_s, callback, context=self._process.main.context.copy())

    # -------------------------------------------------------------------------------------------------

    def _stall(self, fault: CallFault) -> None:
        for thread in (self._process.main, self._process.keeper):
            self._loop.stop_thread(thread)
            self._after(fault.told_s + fault.late_s, self._loop.resume_thread, thread)

    def _troubled(self, fault: CallFault) -> None:
        self._weather.on_trouble(self._process.name, fault.told_s + fault.late_s)

    def _after(self, delay_s: float, callback: Callable[..., object], *args: Any) -> None:
        self._loop.call_later(delay_s, callback, *args, context=self._outside.copy())

    def _serve(self, name: str, group: Sequence[R], apply: "Apply[R, T]", answer: "asyncio.Future[list[T]]") -> None:
        try:
            outcomes = self._do(name, group, apply)
        except FleetError as error:  # the server refuses
            self._after(self._weather.way_s(), self._refuse, answer, error)
        else:
            self._after(self._weather.way_s(), self._tell, answer, outcomes)

    def _do(self, name: str, group: Sequence[R], apply: "Apply[R, T]", note: str = "") -> list[T]:
        weather = self._weather
        outcomes = apply(group)
        if weather.trace is not None:
            weather.say(self._process.name, f"{name}{note} {_brief(group)} -> {_brief(outcomes)}")
        return outcomes

    def _tell(self, answer: "asyncio.Future[list[T]]", outcomes: list[T]) -> None:
        if not answer.done() and not self._process.dead:
            answer.set_result(outcomes)

    def _refuse(self, answer: "asyncio.Future[list[T]]", error: FleetError) -> None:
        if not answer.done() and not self._process.dead:
            answer.set_exception(error)

    def _fail(self, answer: "asyncio.Future[Any]", name: str, unheard: list[Any] | None) -> None:
        if not answer.done() and not self._process.dead:
            self._weather.say(self._process.name, f"{name} has no answer")
            if unheard is None:
                answer.set_exception(self._error("simulated"))
            else:
                answer.set_result(unheard)

    def _spoil(
        self,
        fault: CallFault,
        name: str,
        group: Sequence[R],
        apply: "Apply[R, T]",
        answer: "asyncio.Future[list[T]]",
        there_s: float,
        within_s: float,
        unheard: list[T] | None,
    ) -> None:
        self._troubled(fault)
        self._weather.say(self._process.name, f"{name} {_brief(group)} !! {fault.phase}")
        told_s = min(fault.told_s, within_s)
        match fault.phase:
            case Phase.BEFORE:
                self._after(told_s, self._fail, answer, name, unheard)
            case Phase.AFTER:
                self._after(min(there_s, told_s), self._do, name, group, apply, " (unheard)")
                self._after(told_s, self._fail, answer, name, unheard)
            case Phase.PART:
                some = [item for item in group if self._weather.chance.random() < 0.5]
                self._after(min(there_s, told_s), self._do, name, some, apply, " (in part, unheard)")
                self._after(told_s, self._fail, answer, name, unheard)
            case Phase.LATE:
                self._after(told_s, self._fail, answer, name, unheard)
                self._after(told_s + fault.late_s, self._do, name, group, apply, " (late)")
            case Phase.DIES_BEFORE:
                self._after(there_s, self._process.die)
            case Phase.DIES_AFTER:
                self._after(there_s, self._do_and_die, name, group, apply)
            case Phase.SLOW:
                self._after(fault.told_s, self._serve, name, group, apply, answer)
            case Phase.STALLS:
                self._stall(fault)
                self._after(there_s, self._serve, name, group, apply, answer)

    def _do_and_die(self, name: str, group: Sequence[R], apply: "Apply[R, T]") -> None:
        self._do(name, group, apply, " (and died)")
        self._process.die()


def _brief(group: Sequence[Any]) -> str:
    """For the trace: ids cut short, bodies left out."""
    return "[" + ", ".join(_brief_one(one) for one in group) + "]"


def _brief_one(one: Any) -> str:
    if isinstance(one, str):
        return str(one)[:8]
    if (record := getattr(one, "record", None)) is not None and not hasattr(one, "job_id"):
        return f"{one.verdict}:{record.state}"
    if hasattr(one, "verdict"):
        fence = getattr(one, "fence", "")
        return f"{one.verdict}{' ' + fence[-6:] if fence else ''}"
    parts = []
    job_id = getattr(one, "job_id", None) or getattr(getattr(one, "job", None), "id", None)
    job_id = job_id or getattr(one, "message_id", None)
    if job_id:
        parts.append(job_id[:8])
    for name in ("publication", "fence"):
        if value := getattr(one, name, None):
            parts.append(f"{name[0]}={value[:4] if name == 'publication' else value[-6:]}")
    if (result := getattr(one, "result", None)) is not None:
        parts.append(str(result.state))
    if (events := getattr(one, "events", None)) is not None:
        parts.append(f"seq {[event.seq for event in events]}")
    return " ".join(parts) or type(one).__name__

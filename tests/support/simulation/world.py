"""One schedule, from a plan to its verdict.

The world starts the processes, carries out the faults, and watches until everything that was accepted has
ended and nothing is left at the broker. The same plan gives the same run, callback for callback.
Called by: many.py, shrink.py, tests/simulation.
"""

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from codeyard.shared.errors import BrokerUnavailable, StoreUnavailable
from codeyard.shared.job import job_id_for_key
from support.simulation import plan as plans
from support.simulation.audit import Audit, by_clock, letter_faults
from support.simulation.broker import BrokerServer, Letter, MemoryBroker
from support.simulation.fleet import QUEUES, TIMING, TOPOLOGY, Callers, WorkerProcess, key_of, redrive_the_dead
from support.simulation.loop import Process, SimulationLoop, virtual_clocks
from support.simulation.plan import Plan
from support.simulation.store import MemoryStore, StoreServer
from support.simulation.wire import CallFault, Weather, Wire

CALM_S = plans.BUSY_S + plans.LONGEST_PAUSE_S + 2.0  # no fault begins after this
LATEST_S = 400.0  # by then everything has ended
LOOK_S = 0.25
MAX_CALLBACKS = 300_000
RECOVERS_S = 6.0  # after a fault: the longest pause before a call is repeated, and the call


@dataclass(slots=True)
class Verdict:
    """Of one schedule."""

    plan: Plan
    violations: list[str]
    arrows: set[str]
    met: Counter[str]  # faults by call and side
    ended_s: float
    num_callbacks: int
    num_faults: int  # that met something
    trace: list[str] = field(default_factory=list)


def run(plan: Plan, *, trace: bool = False) -> Verdict:
    """Run one schedule. Raises nothing: what goes wrong is a violation."""
    loop = SimulationLoop(f"loop {plan.seed} {plan.order}")
    with virtual_clocks(loop, f"chance {plan.seed}"), _quiet() as errors:
        world = World(loop, plan, trace=trace)
        asyncio.set_event_loop(loop)
        try:
            ended = loop.run(max_callbacks=MAX_CALLBACKS)
            world.audit.violations += [f"{one}" for one in (*loop.troubles, *errors)]
            world.audit.finish("" if ended else world.unsettled() or "too many callbacks")
        finally:
            world.weather.over = True
            verdict = world.verdict()
            loop.bury()
            world.scatter()
            asyncio.set_event_loop(None)
    return verdict


class World:
    """See the module."""

    def __init__(self, loop: SimulationLoop, plan: Plan, *, trace: bool) -> None:
        self.plan = plan
        self.loop = loop
        calls = {(one.call, one.nth): one for one in plan.faults if isinstance(one, CallFault)}
        self.weather = Weather(loop, Random(f"weather {plan.seed}"), calls, latency_s=plan.latency_s)
        self.weather.trace = [] if trace else None
        self.audit = audit = Audit(plan, TIMING, self.weather.say)
        self.weather.on_trouble = self._trouble
        self.store = StoreServer(TIMING, lambda: by_clock(loop.now_s), witness=audit)
        self.broker = BrokerServer(TOPOLOGY, chance=Random(f"broker {plan.seed}"), witness=self)
        self.broker.shuffles = any(isinstance(one, plans.Reorder) for one in plan.faults)
        audit.records, audit.streams = self.store.records, self.store.streams
        self._processes: dict[str, Process] = {}  # by name: the one that lives
        self._all_processes: list[Process] = []
        self._workers: dict[str, WorkerProcess] = {}
        self._brokers: dict[str, MemoryBroker] = {}
        self._redriving = {one.process for one in plan.faults if isinstance(one, plans.Redriving)}  # not done yet
        self._generations: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()
        self._letter_faults = letter_faults(plan)
        self._num_letters = 0
        self._num_faults = 0
        self._skews = {one.process: one.seconds for one in plan.faults if isinstance(one, plans.Skew)}
        self._dooms = {
            one.process: one for one in plan.faults if isinstance(one, plans.Death) and one.at_step is not None
        }
        calls_of: dict[int, list[tuple[plans.JobPlan, plans.Call]]] = {n: [] for n in range(plan.num_clients)}
        for job in plan.jobs:
            audit.expect(job_id_for_key("default", key_of(job)), job)
            for call in job.calls:
                calls_of[call.client].append((job, call))
        self._callers = [Callers(loop, audit, calls_of[n]) for n in range(plan.num_clients)]
        loop.call_soon(self._begin)

    def verdict(self) -> Verdict:
        return Verdict(
            self.plan,
            self.audit.violations,
            self.audit.arrows,
            self.weather.met,
            self.loop.now_s,
            self.loop.num_callbacks,
            self._num_faults + self.weather.num_faults,
            self.weather.trace or [],
        )

    def scatter(self) -> None:
        """Take apart what holds itself, so that thousands of worlds leave the garbage collector little."""
        for process in self._all_processes:
            process.scatter()
        vars(self.weather).clear()
        vars(self).clear()

    def unsettled(self) -> str:
        """What is not done yet; "" if all is."""
        if left := [call for callers in self._callers for call in callers.left]:
            return f"{len(left)} callers wait, one for job {left[0][0].number}"
        if self._redriving:
            return f"{sorted(self._redriving)} have not redriven"
        for record in self.store.records.values():
            if not record.state.final:
                return f"{record.id[:8]} is {record.state}"
        for name, queue in self.broker.queues.items():
            if name != TOPOLOGY.dead_queue and (queue.ready or queue.deferred):
                return f"{len(queue.ready) + queue.deferred} messages in {name}"
        held = [number for seat in self.broker.seats for number in seat.held]
        return f"messages {held} unacked" if held else ""

    # The broker's witness ----------------------------------------------------------------------------

    def enqueued(self, letter: Letter) -> None:
        self.audit.enqueued(letter)
        if letter.queue not in QUEUES:
            return
        self._num_letters += 1
        fault = self._letter_faults.get(self._num_letters)
        if fault is None or self.weather.calm:
            return
        self._num_faults += 1
        self.weather.say("broker", f"message {letter.number} of {letter.message_id[:8]} is {fault.what}")
        if fault.what == "copied":
            self.loop.call_later(fault.after_s, self.broker.copy, letter)
        elif fault.what == "lost" and self.broker.move(letter, ""):
            self.audit.lost(letter)
        elif fault.what == "dropped" and self.broker.move(letter, TOPOLOGY.dropped_queue):
            self.audit.dropped(letter)

    def acked(self, letter: Letter) -> None:
        self.audit.acked(letter)

    # Processes ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.broker.declare((), 1_000_000)
        for fault in self.plan.faults:
            self._schedule(fault)
        for number in range(self.plan.num_workers):
            self.loop.call_later(self.plan.starts_s[number], self._start_worker, f"w{number}")
        for number in range(self.plan.num_clients):
            self.loop.call_later(0.0, self._start_client, f"p{number}")
        self.loop.call_later(CALM_S, self._calm_down)
        self.loop.call_later(LOOK_S, self._look)

    def _calm_down(self) -> None:
        self.weather.calm = True

    def _look(self) -> None:
        busy = any(call.at_s > self.loop.now_s for job in self.plan.jobs for call in job.calls)
        if self.loop.now_s > LATEST_S:
            self.loop.stop()
            self.audit.finish(self.unsettled() or "it took too long")
        elif not busy and not self.unsettled():
            self.weather.say("world", "all is settled")
            self.loop.stop()
        else:
            self.loop.call_later(LOOK_S, self._look)

    def _process(self, name: str) -> Process:
        generation = self._generations[name]
        self._generations[name] += 1
        process = Process(
            name if not generation else f"{name}.{generation}",
            skew_s=self._skews.get(name, 0.0),
            started_s=1_000.0 * (generation + 1),
        )
        if not generation and (doom := self._dooms.get(name)) is not None and doom.at_step is not None:
            process.dies_at_step = doom.at_step
        process.on_death.append(partial(self._died, name, process))
        self._processes[name] = process
        self._all_processes.append(process)
        return process

    def _start_worker(self, name: str) -> None:
        process = self._process(name)
        broker = self._brokers[name] = self._broker_of(process)
        process.main.context.run(self._make_worker, name, process, broker)

    def _make_worker(self, name: str, process: Process, broker: MemoryBroker) -> None:
        worker = self._workers[name] = WorkerProcess(
            self.loop,
            process,
            broker,
            partial(self._store_of, process),
            owner=f"{process.name}:{self.plan.seed}",
            slots=self.plan.slots,
            tries=self._tries,
        )
        self._spawn(process, worker.run())

    def _start_client(self, name: str) -> None:
        process = self._process(name)
        broker = self._brokers[name] = self._broker_of(process)
        self._spawn(process, self._callers[int(name[1:])].run(broker, self._store_of(process)))

    def _start_redriving(self, name: str) -> None:
        process = self._process(name)
        broker = self._brokers[name] = self._broker_of(process)
        self._spawn(process, self._redrive(name, broker, self._store_of(process)))

    async def _redrive(self, name: str, broker: MemoryBroker, store: MemoryStore) -> None:
        await redrive_the_dead(self.loop, broker, store)
        self._redriving.discard(name)

    def _spawn(self, process: Process, program: Coroutine[Any, Any, None]) -> None:
        task = self.loop.spawn(process.main, program, name=process.name)
        task.add_done_callback(partial(self._ended, process))

    def _ended(self, process: Process, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.audit.violations.append(f"{process.name} ended with {_innermost(error)!r}")

    def _broker_of(self, process: Process) -> MemoryBroker:
        wire = Wire(self.weather, process, "broker", BrokerUnavailable)
        return MemoryBroker(self.broker, wire, acks_answer=self.plan.acks_answer)

    def _store_of(self, process: Process) -> MemoryStore:
        return MemoryStore(self.store, Wire(self.weather, process, "store", StoreUnavailable))

    def _died(self, name: str, process: Process) -> None:
        self.weather.say(process.name, "dies")
        self.audit.trouble_until[process.name] = float("inf")
        self._brokers[name].hang_up()
        dooms = [one for one in self.plan.faults if isinstance(one, plans.Death) and one.process == name]
        back_s = dooms[0].back_s if dooms else 1.0
        starts = {"w": self._start_worker, "p": self._start_client, "o": self._start_redriving}
        again = starts[name[0]]
        self._outside(back_s, again, name)

    # Faults ------------------------------------------------------------------------------------------

    def _schedule(self, fault: plans.Fault) -> None:
        at = partial(self._outside_at)
        match fault:
            case plans.Death(at_s=float(at_s)):
                at(at_s, self._kill, fault.process)
            case plans.Pause():
                at(fault.at_s, self._pause, fault)
            case plans.Drain():
                at(fault.at_s, self._drain, fault)
            case plans.Away():
                at(fault.at_s, self._leave, fault)
            case plans.HangUp():
                at(fault.at_s, self._hang_up, fault.process)
            case plans.Full():
                self.broker.room = dict.fromkeys(QUEUES, fault.max_length)
                at(fault.until_s, self._widen)
            case plans.Preempt():
                at(fault.at_s, lambda: self._workers[fault.process].preempt())
            case plans.Redriving():
                at(fault.at_s, self._start_redriving, fault.process)
            case plans.EngineDies():
                at(fault.at_s, lambda: self._workers[fault.process].engine.die("simulated"))

    def _outside_at(self, at_s: float, callback: Callable[..., object], *args: Any) -> None:
        self.loop.call_at(at_s, self._if_there, callback, *args)

    def _if_there(self, callback: Callable[..., object], *args: Any) -> None:
        try:
            callback(*args)
            self._num_faults += 1
        except KeyError:
            self.weather.say("world", "a fault meets nobody")

    def _outside(self, delay_s: float, callback: Callable[..., object], *args: Any) -> None:
        self.loop.call_later(delay_s, callback, *args, context=Context())

    def _trouble(self, process: str, for_s: float) -> None:
        until = self.audit.trouble_until
        until[process] = max(until[process], by_clock(self.loop.now_s + for_s + RECOVERS_S))

    def _kill(self, name: str) -> None:
        self._processes[name].die()

    def _pause(self, fault: plans.Pause) -> None:
        process = self._processes[fault.process]
        threads = [process.main, process.keeper] if fault.whole else [process.main]
        self.weather.say(process.name, f"stands still for {fault.for_s} s")
        self._trouble(process.name, fault.for_s)
        for thread in threads:
            self.loop.stop_thread(thread)
            self.loop.call_later(fault.for_s, self.loop.resume_thread, thread)

    def _drain(self, fault: plans.Drain) -> None:
        process, worker = self._processes[fault.process], self._workers[fault.process]
        self.weather.say(process.name, "is asked to stop")
        self._trouble(process.name, float("inf"))
        worker.stop.set()
        self._restart_when_gone(fault, process)

    def _restart_when_gone(self, fault: plans.Drain, process: Process) -> None:
        self.loop.call_later(15.0 + fault.back_s, self._end_of, fault, process)

    def _end_of(self, fault: plans.Drain, process: Process) -> None:
        if not process.dead and self._processes[fault.process] is process:
            process.die()

    def _leave(self, fault: plans.Away) -> None:
        self.weather.say(fault.server, f"is away for {fault.for_s} s")
        self.weather.away.add(fault.server)
        for process in self._processes.values():
            self._trouble(process.name, fault.for_s)
        if fault.server == "broker":
            for broker in self._brokers.values():
                broker.hang_up()
        self.loop.call_later(fault.for_s, self.weather.away.discard, fault.server)

    def _hang_up(self, name: str) -> None:
        self.weather.say(name, "is cut off from the broker")
        self._brokers[name].hang_up()

    def _widen(self) -> None:
        self.broker.room = {}


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """No logging but what only a bug says, which is yielded; no garbage collection, whose finalizers would
    run at other moments in other processes."""
    said: list[str] = []

    class Bugs(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() in ("lease_renewal_failed",):
                said.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")

    handler, logger = Bugs(), logging.getLogger("codeyard")
    before, propagates, collects = logging.root.manager.disable, logger.propagate, gc.isenabled()
    logging.disable(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    gc.disable()
    try:
        yield said
    finally:
        if collects:
            gc.enable()
        logger.propagate = propagates
        logger.removeHandler(handler)
        logging.disable(before)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

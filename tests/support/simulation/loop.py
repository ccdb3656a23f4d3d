"""An event loop whose clock jumps and whose next callback is drawn, with processes that can stall and die.

Promise: no thread, no socket, no real wait; the same seed and program give the same run. What a callback
belongs to is told by its context: whatever a `Thread` starts, at any depth, is that thread's.
Called by: world.py. `codeyard.worker.simulation.virtual_time` is the loop for measurements, where order must
be the usual one; here every order that the program allows is wanted, and nothing is selected on at all.
"""

import asyncio
import contextlib
import contextvars
import heapq
import itertools
import random
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar
from typing import Any

MAX_CLOSES = 100  # of one coroutine
EPOCH_S = 1_800_000_000.0  # wall time at the beginning of every run


class Thread:
    """One line of execution of a process. `parked` holds its callbacks while it stands still."""

    __slots__ = ("context", "parked", "process")

    def __init__(self, process: "Process") -> None:
        self.process = process
        self.parked: list[_Handle] | None = None
        self.context = contextvars.copy_context()
        self.context.run(RUNNING.set, self)


class Process:
    """What dies, is stopped and misreads the clock together: a main thread, and one for the leases."""

    def __init__(self, name: str, *, skew_s: float = 0.0, started_s: float = 0.0) -> None:
        self.name = name
        self.skew_s = skew_s  # its wall clock is this far off
        self.started_s = started_s  # where its monotonic clock began
        self.dead = False
        self.steps = 0  # callbacks it ran
        self.dies_at_step = -1
        self.on_death: list[Callable[[], None]] = []
        self.main = Thread(self)
        self.keeper = Thread(self)

    def die(self) -> None:
        """At once: nothing of it runs again, not even what would clean up."""
        if not self.dead:
            self.dead = True
            for told in self.on_death:
                told()

    def scatter(self) -> None:
        """After its end: it holds itself in several ways, and with it its world."""
        for thread in (self.main, self.keeper):
            del thread.context
            thread.parked = None
        vars(self).clear()


RUNNING: ContextVar[Thread | None] = ContextVar("running thread", default=None)


class _Handle(asyncio.TimerHandle):
    __slots__ = ("args", "call", "context", "due_s", "gone", "thread")

    def __init__(
        self, due_s: float, call: Callable[..., object], args: tuple[Any, ...], context: Context, thread: Thread | None
    ) -> None:
        self.due_s = due_s
        self.call = call
        self.args = args
        self.context = context
        self.thread = thread
        self.gone = False

    def cancel(self) -> None:
        self.gone = True
        self.args = ()

    def cancelled(self) -> bool:
        return self.gone

    def when(self) -> float:
        return self.due_s

    def __repr__(self) -> str:
        return f"<{self.call} at {self.due_s:.3f}>"


class _Task(asyncio.Task[Any]):
    """Hashed by its number: a set of tasks has the same order in every run."""

    def __init__(self, coro: Coroutine[Any, Any, Any], number: int, **options: Any) -> None:
        self.number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number

    __eq__ = object.__eq__


class SimulationLoop(asyncio.BaseEventLoop):
    """See the module. `now_s` is virtual seconds since the run began."""

    def __init__(self, seed: str) -> None:
        super().__init__()
        self.now_s = 0.0
        self.num_callbacks = 0
        self.troubles: list[str] = []  # what asyncio would have logged
        self.tasks: list[asyncio.Task[Any]] = []
        self._chance = random.Random(seed)
        self._due: list[_Handle] = []
        self._timers: list[tuple[float, int, _Handle]] = []
        self._orders = itertools.count()
        self._numbers = itertools.count()
        self.set_task_factory(self._make_task)

    # What asyncio asks of a loop --------------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]  # the stubs speak of typed argument tuples
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        if context is None:
            context = contextvars.copy_context()
        handle = _Handle(self.now_s, callback, args, context, context.get(RUNNING))
        self._due.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        """To the process's main thread, like the loop that a thread of a real process would call it on."""
        thread = RUNNING.get()
        if thread is not None and thread is not thread.process.main:
            context = thread.process.main.context.copy()
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        if context is None:
            context = contextvars.copy_context()
        handle = _Handle(when, callback, args, context, context.get(RUNNING))
        if when <= self.now_s:
            self._due.append(handle)
        else:
            heapq.heappush(self._timers, (when, next(self._orders), handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.troubles.append(f"{context.get('message')}: {context.get('exception')!r}")

    # Running ----------------------------------------------------------------------------------------

    def spawn(self, thread: Thread, program: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        return self.create_task(program, name=name, context=thread.context.copy())

    async def pass_time(self, seconds: float) -> None:
        """What `asyncio.sleep` does, under a name that says that nobody waits."""
        passed = self.create_future()
        self.call_later(seconds, _wake, passed)
        await passed

    def stop_thread(self, thread: Thread) -> None:
        if thread.parked is None:
            thread.parked = []

    def resume_thread(self, thread: Thread) -> None:
        if thread.parked is not None:
            self._due += thread.parked
            thread.parked = None

    def run(self, *, max_callbacks: int) -> bool:
        """Until `stop`. False if that took more callbacks than `max_callbacks`, or nothing was left to do."""
        self._max_callbacks = max_callbacks
        self._ended_well = False
        self.run_forever()
        return self._ended_well

    def bury(self) -> None:
        """Let go of everything that was under way, without running any of it to its end, and close."""
        tasks = [task for task in self.tasks if not task.done()]
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own way to say so
            for _ in range(MAX_CLOSES):
                try:
                    task.get_coro().close()
                    break
                except RuntimeError:
                    continue  # it waits for something in its `finally`: closed there, too
                except BaseExceptionGroup:
                    break  # a task group's way to pass on that it was closed
        self.tasks.clear()
        self._due.clear()
        self._timers.clear()
        self.set_task_factory(None)
        self.close()

    def _run_once(self) -> None:
        """`run_forever` calls it until the loop is stopped; it returns when it is."""
        due, draw = self._due, self._chance.random
        while not self._stopping:  # type: ignore[attr-defined]  # set by `stop`
            if not due and not self._jump():
                self.stop()
                return
            if (num_due := len(due)) > 1:
                drawn = int(draw() * num_due)
                due[drawn], due[-1] = due[-1], due[drawn]
            handle = due.pop()
            if handle.gone:
                continue
            if (thread := handle.thread) is not None:
                if (process := thread.process).dead:
                    continue
                if thread.parked is not None:
                    thread.parked.append(handle)
                    continue
                process.steps += 1
                if process.steps == process.dies_at_step:
                    process.die()
                    continue
            self.num_callbacks += 1
            if self.num_callbacks > self._max_callbacks:
                self.stop()
                return
            handle.context.run(handle.call, *handle.args)
        self._ended_well = True

    def _jump(self) -> bool:
        """To the next timer that still counts. False if there is none."""
        timers = self._timers
        while timers:
            if timers[0][2].gone:
                heapq.heappop(timers)
                continue
            self.now_s = now_s = timers[0][0]
            while timers and timers[0][0] <= now_s:
                self._due.append(heapq.heappop(timers)[2])
            return True
        return False

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = _Task(coro, next(self._numbers), loop=loop, **options)
        self.tasks.append(task)
        return task


def _wake(passed: "asyncio.Future[None]") -> None:
    if not passed.done():
        passed.set_result(None)


@contextlib.contextmanager
def virtual_clocks(loop: SimulationLoop, seed: str) -> Iterator[None]:
    """Time, nonces and chance as our code sees them follow the loop and the seed, until the context ends."""
    chance = random.Random(seed)

    def wall_s() -> float:
        thread = RUNNING.get()
        return EPOCH_S + loop.now_s + (thread.process.skew_s if thread is not None else 0.0)

    def monotonic_s() -> float:
        thread = RUNNING.get()
        return loop.now_s + (thread.process.started_s if thread is not None else 0.0)

    def nonce() -> uuid.UUID:
        return uuid.UUID(int=chance.getrandbits(128), version=4)

    kept = time.time, time.monotonic, time.perf_counter, uuid.uuid4, random.getstate()
    time.time, time.monotonic, time.perf_counter, uuid.uuid4 = wall_s, monotonic_s, monotonic_s, nonce
    random.seed(seed)
    try:
        yield
    finally:
        time.time, time.monotonic, time.perf_counter, uuid.uuid4 = kept[:4]
        random.setstate(kept[4])

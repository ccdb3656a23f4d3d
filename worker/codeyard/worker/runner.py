"""Ask the scheduler which jobs run, start and stop them, hand their endings to the settler.

    offer -> waiting -> (scheduler admits) -> running -> ending -> settler
                ^--- preempted, engine died ---'

Owns: waiting and running jobs. Everything happens on the event loop; each running job is one task. The
engine is leased: one that dies, or hangs for `stall_s`, is given up for another; its jobs run again, apart.
Called by: worker.line. Does not know about: the broker, claims, how endings are settled.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.errors import EngineDead, EngineUnavailable
from codeyard.shared.job import JobId, Lane, estimate_tokens
from codeyard.shared.record import Failure, Result, State
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics
from codeyard.worker.engines.port import Adapter, Delta, Engine
from codeyard.worker.events import EventWriter
from codeyard.worker.execution import Again, ending, execute
from codeyard.worker.held import Finished, HandBack, HeldJob, Lost
from codeyard.worker.scheduling.drain import DrainRate
from codeyard.worker.scheduling.port import Candidate, EngineLoad, Scheduler
from codeyard.worker.settler import Settler

log = logging.getLogger(__name__)

FORCE_CLOSE_S = 10.0  # for an engine that died or hangs; then its jobs' tasks are cancelled
MAX_ENGINE_STARTS = 5  # failures in a row; then the worker ends and says why
TICK_S = 1.0  # deadlines of waiting jobs, look-ahead grown old, signs of life


class EngineLease(Protocol):
    """A loaded engine for as long as this runner needs it, from the cache that keeps it."""

    @property
    def engine(self) -> Engine: ...

    async def renew(self) -> Engine:
        """It died or hangs: free whatever it holds, by force, and load it anew. Raises EngineUnavailable."""


class Runner:
    def __init__(
        self,
        lease: EngineLease,
        scheduler: Scheduler,
        store: Store,
        settler: Settler,
        writer: EventWriter,
        metrics: Metrics,
        backlog: Mapping[Lane, int],
        *,
        model: str,
        revision: str,
        adapters: Mapping[str, Adapter],
        max_attempts: int,
        stall_s: float,
        hand_back_s: float,
        save_tokens: int,
        blobs: BlobStore | None = None,
    ) -> None:
        self._lease = lease
        self._engine: Engine | None = lease.engine
        self._model = model
        self._adapters = {revision: None, **adapters}  # by the revision that jobs are pinned to
        self._scheduler = scheduler
        self._store = store
        self._blobs = blobs
        self._settler = settler
        self._writer = writer
        self._metrics = metrics
        self._backlog = backlog  # ready messages by lane; the service keeps it fresh
        self._max_attempts = max_attempts
        self._stall_s = stall_s
        self._hand_back_s = hand_back_s
        self._save_tokens = save_tokens
        self.drain_rate = DrainRate()
        self.window_factor = 1.0  # of the scheduler's window: less while memory is short
        self._waiting: dict[JobId, HeldJob] = {}
        self._running: dict[JobId, HeldJob] = {}
        self._job_tasks: dict[JobId, asyncio.Task[None]] = {}
        self._successors: dict[JobId, HeldJob] = {}  # claimed anew while the old run winds down
        self._tasks: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._moved_s = time.monotonic()  # last sign of life of a running engine
        self._steps = 0

    def waiting(self) -> Counter[Lane]:
        """Jobs in hand that have not begun, by lane."""
        return Counter(held.job.lane for held in self._waiting.values())

    @property
    def window(self) -> int:
        return self._scheduler.window

    @property
    def num_running(self) -> int:
        return len(self._running)

    # What the other parts tell ---------------------------------------------------------------------

    def offer(self, held: HeldJob) -> None:
        """A claimed job, or one that comes back to run again. Takes the place of an older claim."""
        self.lose(held.id)
        if held.id in self._running:
            self._successors[held.id] = held
        elif self._draining:
            self._settler.put(HandBack(held))
        else:
            held.stop_reason, held.abandoned = None, False
            self._waiting[held.id] = held
            self._scheduler.offer(_candidate(held), time.monotonic())
            self._changed.set()

    def lose(self, job_id: JobId) -> None:
        """Another owner has it, or it is final: stop, and write nothing more."""
        if held := self._leave_waiting(job_id):
            self._settler.put(Lost(held))
        self._stop_running(job_id, "lost")

    def cancel(self, job_id: JobId) -> None:
        if held := self._leave_waiting(job_id):
            self._settler.put(_ended_waiting(held, State.CANCELLED, "cancelled", "cancelled on request"))
        self._stop_running(job_id, "cancelled")

    async def drain(self, within_s: float) -> None:
        """Hand back what waits, let what runs finish; when the grace is over hand that back too."""
        self._draining = True
        for job_id in list(self._waiting):
            if held := self._leave_waiting(job_id):
                self._settler.put(HandBack(held))
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("drain_cut_short", extra={"num_jobs": len(self._running)})
            for job_id in list(self._running):
                self._stop_running(job_id, "drained")
            try:
                async with asyncio.timeout(FORCE_CLOSE_S):
                    await self._idle.wait()
            except TimeoutError:
                if self._engine is not None:
                    await self._bury(self._engine)

    # Deciding and running --------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Raises EngineUnavailable when the engine cannot be started again."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._watch(), name="engine watch")
                while True:
                    if self._engine is None:
                        self._engine = await self._restart()
                    wake_in_s = self._decide(self._engine, tasks)
                    try:
                        async with asyncio.timeout(wake_in_s):
                            await self._changed.wait()
                    except TimeoutError:
                        pass
                    self._changed.clear()
        finally:
            self._engine = None  # who still holds this runner (a traceback, a task) does not hold an engine

    def _decide(self, engine: Engine, tasks: asyncio.TaskGroup) -> float | None:
        now_s = time.monotonic()
        load = EngineLoad(kv_cache_used=engine.load().kv_cache_used, window_factor=self.window_factor)
        decision = self._scheduler.decide(now_s, self._backlog, load)
        for job_id in decision.preempt:
            self._stop_running(job_id, "preempted")
        if decision.admit:
            self._metrics.batch_size.observe(len(decision.admit))
            if not self._running:
                self._moved_s = now_s
        admitted = [self._waiting.pop(job_id) for job_id in decision.admit]
        self._running.update((held.id, held) for held in admitted)
        waiting = self.waiting()
        for held in admitted:
            lane = held.job.lane
            self.drain_rate.admitted(lane, line=waiting[lane] + self._backlog.get(lane, 0), now_s=now_s)
            task = tasks.create_task(self._run(held, engine, len(self._running)), name=f"job {held.id}")
            self._job_tasks[held.id] = task
        self._note_running()
        self._metrics.window.labels(model=self._model).set(self._scheduler.window)
        return decision.wake_in_s

    async def _run(self, held: HeldJob, engine: Engine, batch_size: int) -> None:
        started_s = time.monotonic()
        attempt = await execute(
            held,
            engine,
            self._store,
            self._blobs,
            adapters=self._adapters,
            batch_size=batch_size,
            save_tokens=self._save_tokens,
            on_delta=self._on_delta,
        )
        del self._running[held.id], self._job_tasks[held.id]
        now_s = time.monotonic()
        self._scheduler.ended(held.id, now_s)
        self.drain_rate.ended(now_s - started_s)
        self._writer.forget(held.id)
        if isinstance(attempt.error, EngineDead):
            self._engine_died(held, engine, attempt.error)
        elif attempt.error is not None:
            log.debug("attempt_failed", extra={"job": held.id}, exc_info=attempt.error)
        end = ending(held, attempt, max_attempts=self._max_attempts)
        if isinstance(end, Again):
            self.offer(held)
        else:
            self._settler.put(end)
        if successor := self._successors.pop(held.id, None):
            self.offer(successor)
        self._note_running()
        self._changed.set()

    def _on_delta(self, held: HeldJob, delta: Delta) -> None:
        self._moved_s = time.monotonic()
        if delta.token_ids:
            self._scheduler.progressed(held.id, len(delta.token_ids), self._moved_s)
        news = held.job.stream or held.log.num_new >= self._save_tokens
        if news and delta.finish_reason is None:
            self._writer.touch(held)

    # Stopping jobs ---------------------------------------------------------------------------------

    def _leave_waiting(self, job_id: JobId) -> HeldJob | None:
        held = self._waiting.pop(job_id, None)
        if held is not None:
            self._scheduler.withdraw(job_id, time.monotonic())
        return held

    def _stop_running(self, job_id: JobId, reason: str) -> None:
        held = self._running.get(job_id)
        if held is None or held.stop_reason not in (None, "preempted"):
            return
        held.stop_reason = reason
        if self._engine is not None and self._tasks is not None:
            self._tasks.create_task(_abort(self._engine, job_id), name=f"abort {job_id}")

    def _note_running(self) -> None:
        self._metrics.running.labels(model=self._model).set(len(self._running))
        if self._running:
            self._idle.clear()
        else:
            self._idle.set()

    # The engine's life -----------------------------------------------------------------------------

    def _engine_died(self, held: HeldJob, engine: Engine, error: EngineDead) -> None:
        """The engine goes. The job may be what killed it, so it runs again apart from the others."""
        if self._engine is engine:
            log.error("engine_died", extra={"error": str(error), "num_jobs": len(self._running) + 1})
            self._engine = None
            assert self._tasks is not None
            self._tasks.create_task(self._bury(engine), name="close dead engine")
        held.alone_crashes += int(held.alone)
        held.suspect, held.alone = True, False

    async def _bury(self, engine: Engine) -> None:
        """Free what it held, and end the tasks of jobs it does not end itself."""
        mine = [self._job_tasks[job_id] for job_id in self._running]
        await _force_close(engine)
        if mine:
            _, stuck = await asyncio.wait(mine, timeout=FORCE_CLOSE_S)
            for held in self._running.values():
                if self._job_tasks[held.id] in stuck:
                    held.abandoned = True
                    self._job_tasks[held.id].cancel()

    async def _restart(self) -> Engine:
        while self._running:  # the old engine's jobs end first: their ids must be free
            await self._changed.wait()
            self._changed.clear()
        for num_try in range(MAX_ENGINE_STARTS):
            try:
                engine = await self._lease.renew()
            except EngineUnavailable as error:
                log.error("engine_not_started", extra={"error": str(error), "num_tries": num_try + 1})
                await asyncio.sleep(2.0**num_try)
            else:
                self._metrics.engine_restarts.inc()
                log.info("engine_restarted", extra={"engine": engine.info.version})
                return engine
        raise EngineUnavailable(f"the engine died and did not start again in {MAX_ENGINE_STARTS} tries")

    async def _watch(self) -> None:
        """Every tick: deadlines of waiting jobs, look-ahead grown old, an engine that does not move."""
        while True:
            await asyncio.sleep(min(TICK_S, self._stall_s / 4))
            now_s = time.monotonic()
            for held in list(self._waiting.values()):
                if held.deadline_s <= now_s:
                    self._leave_waiting(held.id)
                    text = f"not started within its {held.job.timeout_s:g} s"
                    self._settler.put(_ended_waiting(held, State.EXPIRED, "deadline_exceeded", text))
                elif held.claimed_s + self._hand_back_s <= now_s and held.job.id not in self._successors:
                    self._leave_waiting(held.id)
                    self._settler.put(HandBack(held))
            if self._engine is not None and self._running:
                await self._check_life(self._engine, now_s)

    async def _check_life(self, engine: Engine, now_s: float) -> None:
        steps = engine.load().steps
        if steps != self._steps:
            self._steps, self._moved_s = steps, now_s
        silent_s = now_s - self._moved_s
        if silent_s >= self._stall_s and self._engine is engine:
            log.error("engine_stalled", extra={"silent_s": round(silent_s, 1), "num_jobs": len(self._running)})
            self._moved_s = now_s
            await self._bury(engine)


def _candidate(held: HeldJob) -> Candidate:
    num_generated = len(held.log.token_ids)
    return Candidate(
        job_id=held.id,
        lane=held.job.lane,
        tenant=held.job.tenant,
        prompt_tokens=estimate_tokens(held.job.prompt) + num_generated,
        max_tokens=held.job.sampling.max_tokens - num_generated,
        submitted_s=held.submitted_s,
        deadline_s=held.deadline_s,
        suspect=held.suspect,
        attempt=held.attempt,
    )


def _ended_waiting(held: HeldJob, state: State, code: str, message: str) -> Finished:
    failure = Failure(code=code, message=message)
    return Finished(held, Result(state=state, text=held.log.text, error=failure))


async def _abort(engine: Engine, job_id: JobId) -> None:
    try:
        await engine.abort(job_id)
    except Exception as error:
        # An engine that cannot abort is dying, or stalls; the watch deals with it.
        log.warning("job_not_aborted", extra={"job": job_id, "error": str(error)})


async def _force_close(engine: Engine) -> None:
    try:
        async with asyncio.timeout(FORCE_CLOSE_S):
            await engine.close(force=True)
    except Exception as error:
        # It may have died in any way; what matters is that the worker goes on.
        log.error("engine_not_closed", exc_info=error)

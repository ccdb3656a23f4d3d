"""A fleet of workers on one broker, simulated event by event with the real policy objects.

    arrivals -> broker (a queue per lane and shard) -> worker: scheduler -> engine -> done

1. A job arrives. A worker with credit on its queue gets it at once, in turn; else it waits at the broker.
2. The worker offers it to its scheduler and asks for a decision: jobs enter the engine, or are preempted.
3. The engine's stretch ends: first tokens, finished jobs. Each finished one frees its credit, which the
   broker fills from the queue. Then a decision, and the next stretch begins.
4. A worker may be lost: what it held returns to the head of its queue when its lease is over, and the
   worker comes back after the time an engine takes to start.

Credit is what RabbitMQ calls prefetch: the most unsettled deliveries a worker holds of one queue.
Memory grows with what waits, not with what has been. The clock, the arrivals and the order of workers
are all there is to a run: the same arguments give the same run, to the last digit.
"""

import gc
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

from codeyard.shared.job import JobId, Lane
from codeyard.shared.notice import LaneLoad, ModelNotice, lane_load
from codeyard.shared.settings import Promise
from codeyard.shared.sharding import shards_of
from codeyard.worker.scheduling.drain import DrainRate
from codeyard.worker.scheduling.port import Candidate, EngineLoad
from codeyard.worker.simulation.engine import NEVER, SimEngine, SimJob
from codeyard.worker.simulation.latency import LatencyTable
from codeyard.worker.simulation.metrics import LaneStats, RunStats, Sample
from codeyard.worker.simulation.plan import FleetPlan, Loss, Policy

LEASE_S = 3.0  # a lost worker's jobs return after this
DEPTH_POLL_S = 0.5  # a worker's idea of the broker's depth is this old at most
SAMPLES = 100
TENANTS_MOST = 32  # reported one by one
_DEADLINE_S = 86_400.0
_NO_PROMISE = Promise()


class _Worker:
    __slots__ = (
        "alive", "credit", "drain", "due_s", "engine", "held", "number", "probe", "probe_tokens", "scheduler",
        "waiting", "wake_s",
    )  # fmt: skip

    def __init__(self, number: int, policy: Policy, table: LatencyTable, queues: int, credit: int) -> None:
        self.number = number
        self.scheduler = policy.make()
        self.engine = SimEngine(table, by_priority=policy.by_priority)
        self.credit = [credit] * queues
        self.held: dict[JobId, SimJob] = {}
        self.waiting = dict.fromkeys(Lane, 0)  # of them, those not in the engine
        self.drain = DrainRate()
        self.due_s = NEVER  # the time of its live entry in the event heap
        self.wake_s = NEVER  # when its scheduler wants to be asked again
        self.probe = ""
        self.probe_tokens = 0
        self.alive = True


class Fleet:
    """One run. `run()` once."""

    def __init__(self, plan: FleetPlan, policy: Policy, table: LatencyTable, stats: RunStats) -> None:
        self._plan = plan
        self._policy = policy
        self._table = table
        self._stats = stats
        queues = len(Lane) * plan.num_shards
        self._queues: list[deque[SimJob]] = [deque() for _ in range(queues)]
        self._credit = math.ceil(policy.credit / plan.shards_per_tenant)
        self._hands: dict[str, tuple[int, ...]] = {}
        self._workers = [_Worker(number, policy, table, queues, self._credit) for number in range(plan.workers)]
        self._takers: list[deque[_Worker]] = [deque(self._workers) for _ in range(queues)]  # those with credit
        self._events: list[tuple[float, int, _Worker | Callable[[float], None]]] = []
        self._order = 0
        self._backlog: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._board: dict[Lane, LaneLoad | None] = {}  # what the workers told last
        self._board_s = -math.inf
        self._on_the_way = dict.fromkeys(Lane, 0)  # arrivals since
        self._promises = {lane: plan.promises.get(lane, _NO_PROMISE) for lane in Lane}
        self._urgent = 0

    def run(self, arrivals: Iterator[SimJob], *, tick: Callable[[float], None] | None = None) -> RunStats:
        """Until the plan's length is over. `tick` hears the share that is done, now and then.

        The cycle collector is off meanwhile: nothing here makes cycles that grow, and walking every job
        over and over costs a fifth of the run.
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            return self._run(arrivals, tick)
        finally:
            if collects:
                gc.enable()

    def _run(self, arrivals: Iterator[SimJob], tick: Callable[[float], None] | None) -> RunStats:
        started = time.perf_counter()
        end_s = self._plan.length_s
        self._every(DEPTH_POLL_S, self._poll_depth)
        self._every(end_s / SAMPLES, self._sample, tick)
        for loss in self._plan.losses:
            self._at(loss.at_s, lambda now_s, loss=loss: self._lose(loss, now_s))  # type: ignore[misc]  # bound now
        events = self._events
        arrival = next(arrivals, None)
        while True:
            next_s = events[0][0] if events else NEVER
            if arrival is not None and arrival.arrived_s <= next_s:
                if arrival.arrived_s > end_s:
                    break
                self._arrive(arrival)
                arrival = next(arrivals, None)
                continue
            if next_s > end_s:
                break
            now_s, _, what = heapq.heappop(events)
            if not isinstance(what, _Worker):
                what(now_s)
            elif what.due_s == now_s:
                what.due_s = NEVER
                self._turn(what, now_s)
        self._cut_off(end_s)
        self._stats.wall_s = time.perf_counter() - started
        return self._stats

    # A job's way ------------------------------------------------------------------------------------

    def _arrive(self, job: SimJob) -> None:
        now_s = job.arrived_s
        stats = self._stats
        stats.lanes[job.lane].arrived += 1
        if (tenant := self._tenant(job)) is not None:
            tenant.arrived += 1
        job.estimate_s = self._estimate_s(job.lane, now_s)
        self._on_the_way[job.lane] += 1
        if job.lane is Lane.INTERACTIVE:
            self._urgent += 1
        base = _LANE_PLACE[job.lane] * self._plan.num_shards
        if self._plan.num_shards > 1:
            job.shard = min(self._hand(job.tenant), key=lambda shard: len(self._queues[base + shard]))
        queue = base + job.shard
        takers = self._takers[queue]
        if not takers or self._queues[queue]:
            self._queues[queue].append(job)
            return
        worker = takers.popleft()
        worker.credit[queue] -= 1
        if worker.credit[queue]:
            takers.append(worker)
        self._offer(worker, job, now_s)
        self._decide(worker, now_s)
        self._reschedule(worker)

    def _hand(self, tenant: str) -> tuple[int, ...]:
        if (hand := self._hands.get(tenant)) is None:
            plan = self._plan
            hand = shards_of(tenant, shards=plan.num_shards, per_tenant=plan.shards_per_tenant)
            self._hands[tenant] = hand
        return hand

    def _estimate_s(self, lane: Lane, now_s: float) -> float:
        """As a producer estimates it: from notices up to a period old, and its own arrivals since."""
        if now_s - self._board_s >= DEPTH_POLL_S:
            notices = self._notices(now_s)
            self._board = {lane: lane_load(notices, lane) for lane in Lane}
            self._board_s = now_s
            self._on_the_way = dict.fromkeys(Lane, 0)
        age_s = now_s - self._board_s
        load = self._board[lane]
        return (load.start_s(on_the_way=self._on_the_way[lane], age_s=age_s) if load else None) or 0.0

    def _notices(self, now_s: float) -> list[ModelNotice]:
        shards = self._plan.num_shards
        backlog = {
            lane: tuple(len(queue) for queue in self._queues[place * shards : (place + 1) * shards])
            for lane, place in _LANE_PLACE.items()
        }
        return [
            ModelNotice(
                alias="",
                revision="",
                tier="awake",
                serving=True,
                slots=worker.scheduler.window,
                running=len(worker.held) - sum(worker.waiting.values()),
                waiting=dict(worker.waiting),
                backlog=backlog,
                rate=worker.drain.rates(now_s),
                job_s=worker.drain.job_s,
            )
            for worker in self._workers
            if worker.alive
        ]

    def _offer(self, worker: _Worker, job: SimJob, now_s: float) -> None:
        worker.held[job.id] = job
        worker.waiting[job.lane] += 1
        worker.scheduler.offer(
            Candidate(
                job.id,
                job.lane,
                job.tenant,
                job.prompt + job.done,
                job.max_tokens - job.done,
                job.arrived_s,
                job.arrived_s + _DEADLINE_S,
            ),
            now_s,
        )

    def _decide(self, worker: _Worker, now_s: float) -> None:
        """Ask the scheduler and do what it says."""
        self._stats.decisions += 1
        load = EngineLoad(kv_cache_used=worker.engine.kv_used())
        decision = worker.scheduler.decide(now_s, self._backlog, load)
        for job_id in decision.preempt:
            self._preempt(worker, worker.held[job_id], now_s)
        if decision.admit:
            jobs = [worker.held[job_id] for job_id in decision.admit]
            for job in jobs:
                worker.waiting[job.lane] -= 1
                line = worker.waiting[job.lane] + self._depth(job.lane)
                worker.drain.admitted(job.lane, line=line, now_s=now_s)
                if job.started_s < 0:
                    self._started(job, now_s)
            worker.engine.submit(jobs, now_s)
        worker.wake_s = now_s + decision.wake_in_s if decision.wake_in_s is not None else NEVER

    def _started(self, job: SimJob, now_s: float) -> None:
        job.started_s = now_s
        waited_s = now_s - job.arrived_s
        self._stats.lanes[job.lane].wait.add(waited_s)
        if (tenant := self._tenant(job)) is not None:
            tenant.wait.add(waited_s)
        right = self._stats.calibration[job.lane]
        right[0] += abs(job.estimate_s - waited_s) <= max(0.25, 0.25 * waited_s)
        right[1] += 1

    def _preempt(self, worker: _Worker, job: SimJob, now_s: float) -> None:
        tokens = worker.engine.abort(job, now_s)
        job.done += tokens
        self._stats.preempted += 1
        worker.scheduler.progressed(job.id, tokens, now_s)
        worker.scheduler.ended(job.id, now_s)
        self._offer(worker, job, now_s)

    def _turn(self, worker: _Worker, now_s: float) -> None:
        """The engine's stretch is over, or the scheduler wanted to be asked again."""
        engine, scheduler = worker.engine, worker.scheduler
        if engine.due_s > now_s:
            self._decide(worker, now_s)
            self._reschedule(worker)
            return
        first, finished = engine.advance(now_s)
        for job in first:
            scheduler.progressed(job.id, 1, now_s)
            if job.first_s < 0:
                job.first_s = now_s + self._table.frontend_s
        for job in finished:
            tokens = job.completion - job.done - 1
            if job.id == worker.probe:
                tokens -= worker.probe_tokens
                worker.probe = ""
            if tokens > 0:
                scheduler.progressed(job.id, tokens, now_s)
            scheduler.ended(job.id, now_s)
            self._finished(worker, job, now_s)
        self._probe(worker, now_s)
        self._decide(worker, now_s)
        engine.resume(now_s)
        self._reschedule(worker)

    def _probe(self, worker: _Worker, now_s: float) -> None:
        """One job reports each token it gets, as all do in a real worker: the policy sees steps as they are."""
        job = worker.held.get(worker.probe)
        if job is None or not job.in_engine or job.ends_at < 0:
            job = worker.engine.probe()
            worker.probe = job.id if job else ""
            worker.probe_tokens = 0
        if job is not None:
            generated = job.completion - job.done - 1 - (job.ends_at - worker.engine.clock_at(now_s))
            if generated > worker.probe_tokens:
                worker.scheduler.progressed(job.id, generated - worker.probe_tokens, now_s)
                worker.probe_tokens = generated

    def _finished(self, worker: _Worker, job: SimJob, now_s: float) -> None:
        worker.drain.ended(now_s - job.started_s)
        done_s = now_s + self._table.frontend_s
        promise = self._promises[job.lane]
        self._stats.lanes[job.lane].ended(job, done_s, promise)
        if (tenant := self._tenant(job)) is not None:
            tenant.ended(job, done_s, promise)
        if job.lane is Lane.INTERACTIVE:
            self._urgent -= 1
        del worker.held[job.id]
        queue = _LANE_PLACE[job.lane] * self._plan.num_shards + job.shard
        if self._queues[queue]:
            self._offer(worker, self._queues[queue].popleft(), now_s)
            return
        worker.credit[queue] += 1
        if worker.credit[queue] == 1:
            self._takers[queue].append(worker)

    # The clock --------------------------------------------------------------------------------------

    def _reschedule(self, worker: _Worker) -> None:
        due_s = min(worker.engine.due_s, worker.wake_s)
        if due_s != worker.due_s:
            worker.due_s = due_s
            if due_s < NEVER:
                self._at(due_s, worker)

    def _at(self, at_s: float, what: "_Worker | Callable[[float], None]") -> None:
        self._order += 1
        heapq.heappush(self._events, (at_s, self._order, what))

    def _every(
        self, period_s: float, what: Callable[[float], None], tick: Callable[[float], None] | None = None
    ) -> None:
        def again(now_s: float) -> None:
            what(now_s)
            if tick is not None:
                tick(now_s / self._plan.length_s)
            self._at(now_s + period_s, again)

        self._at(period_s, again)

    def _poll_depth(self, now_s: float) -> None:
        for lane in Lane:
            self._backlog[lane] = self._depth(lane)

    def _depth(self, lane: Lane) -> int:
        base = _LANE_PLACE[lane] * self._plan.num_shards
        return sum(len(queue) for queue in self._queues[base : base + self._plan.num_shards])

    def _sample(self, now_s: float) -> None:
        workers = [worker for worker in self._workers if worker.alive]
        self._stats.samples.append(
            Sample(
                at_s=now_s,
                depth={lane: self._depth(lane) for lane in Lane},
                in_engines=sum(worker.engine.running for worker in workers),
                window=sum(worker.scheduler.window for worker in workers) / max(1, len(workers)),
                tokens=sum(worker.engine.tokens for worker in self._workers),
                urgent=self._urgent,
            )
        )

    # Loss and end -----------------------------------------------------------------------------------

    def _lose(self, loss: Loss, now_s: float) -> None:
        alive = [worker for worker in self._workers if worker.alive]
        for worker in alive[: loss.workers]:
            worker.alive = False
            worker.due_s = NEVER
            self._stats.busy_s += worker.engine.busy_s
            for takers in self._takers:
                if worker in takers:
                    takers.remove(worker)
            held = list(worker.held.values())
            worker.held = {}
            self._at(now_s + LEASE_S, lambda at_s, held=held: self._bring_back(held, at_s))  # type: ignore[misc]
            self._at(now_s + self._table.start_s, lambda at_s, worker=worker: self._restart(worker, at_s))  # type: ignore[misc]

    def _bring_back(self, jobs: list[SimJob], now_s: float) -> None:
        """To the head of their queues, to start over from what they had before this run."""
        for job in reversed(jobs):
            job.in_engine = False
            job.runs += 1
            queue = _LANE_PLACE[job.lane] * self._plan.num_shards + job.shard
            takers = self._takers[queue]
            if takers:
                worker = takers.popleft()
                worker.credit[queue] -= 1
                if worker.credit[queue]:
                    takers.append(worker)
                self._offer(worker, job, now_s)
                self._decide(worker, now_s)
                self._reschedule(worker)
            else:
                self._queues[queue].appendleft(job)

    def _restart(self, worker: _Worker, now_s: float) -> None:
        fresh = _Worker(worker.number, self._policy, self._table, len(self._queues), self._credit)
        self._workers[worker.number] = fresh
        for queue, takers in enumerate(self._takers):
            while self._queues[queue] and fresh.credit[queue]:
                fresh.credit[queue] -= 1
                self._offer(fresh, self._queues[queue].popleft(), now_s)
            if fresh.credit[queue]:
                takers.append(fresh)
        self._decide(fresh, now_s)
        self._reschedule(fresh)

    def _cut_off(self, end_s: float) -> None:
        """The run is over: judge what is on its way by what is certain now."""
        for worker in self._workers:
            if worker.alive:
                self._stats.busy_s += worker.engine.busy_s
                if worker.engine.due_s < NEVER:
                    self._stats.busy_s += end_s - max(0.0, worker.engine.began_s)
            for job in worker.held.values():
                tokens = job.done
                if job.in_engine and job.ends_at >= 0:
                    tokens = job.completion - max(0, job.ends_at - worker.engine.clock_at(end_s))
                self._judge_cut_off(job, tokens, end_s)
        for queue in self._queues:
            for job in queue:
                self._judge_cut_off(job, job.done, end_s)

    def _judge_cut_off(self, job: SimJob, tokens: int, end_s: float) -> None:
        promise = self._promises[job.lane]
        self._stats.lanes[job.lane].cut_off(job, tokens, end_s, promise)
        if (tenant := self._tenant(job)) is not None:
            tenant.cut_off(job, tokens, end_s, promise)

    def _tenant(self, job: SimJob) -> LaneStats | None:
        """Where the job's tenant is counted: one by one up to TENANTS_MOST, so that memory stays flat."""
        tenants = self._stats.tenants
        if job.tenant not in tenants and len(tenants) < TENANTS_MOST:
            tenants[job.tenant] = LaneStats()
        return tenants.get(job.tenant)


_LANE_PLACE = {lane: place for place, lane in enumerate(Lane)}

"""The policy: a window that follows the queue and the promises, shared by lanes, fair to tenants.

Each decision answers four questions, in this order; every formula is derived where it lives.

1. *How wide?* (window.py, on the constants fitted in step_time.py.) With B the strictest promise per
   token among the lanes that have work, less a margin, `widest` jobs run; without such a lane, as many
   as the engine has slots. Narrowing counts at once, widening after `calm_s` without such work. Nothing
   is admitted while the KV cache is nearly full.
2. *How fast?* A full window admitted at once stalls everybody while it is prefilled, and an urgent job
   that comes then. So prompts are paced to `prompt_room` tokens per step of B seconds; while no promise
   per token holds, of a quarter of the strictest promise to the first token: an arrival waits for the
   step that runs and the one on its way, then for its own. A job that has waited a part of its own
   promise, or whose tenant was served clearly less than another that waits, may run ahead of the pace, but
   not far: the next one waits for what it took.
3. *Who?* The lane whose turn it is by weight (lanes.py), in it the tenant served least (tenants.py), of
   it the oldest job. Bulk leaves some slots free for the lanes above, and a tenant that alone has a line
   half as many for the others of its lane: so nobody waits for a slot because of one tenant's flood. A
   lane with work from which nothing was admitted for `starvation_s` is next, whatever its share.
4. *Whom to stop?* If a lane with a promise has work while more jobs run than the promise allows, or its
   head is late, short of its share, and no slot is left, the youngest bulk jobs are preempted: they have
   the least to lose. At most `preempt_share` of what runs, until nobody was preempted for `calm_s`: each
   is prefilled again.

An engine that takes closed batches gets the same answers when it is empty, after a linger counted from
the first job in hand. Suspects run apart (suspects.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

from codeyard.shared.job import JobId, Lane
from codeyard.shared.settings import AdmissionSettings, Promise
from codeyard.worker.scheduling.lanes import LaneTurns
from codeyard.worker.scheduling.mix import MixEstimate
from codeyard.worker.scheduling.port import Candidate, Decision, EngineLoad
from codeyard.worker.scheduling.step_time import OBSERVE_TOKENS, PRIOR, StepCost, StepTime
from codeyard.worker.scheduling.suspects import Quarantine
from codeyard.worker.scheduling.tenants import COMPLETION_WEIGHT, Tenants
from codeyard.worker.scheduling.window import Mix, prompt_room, widest

PATIENCE_SHARE = 0.1  # of its own promise to the first token: then a job may run ahead of the pace
DEBT_STEPS = 4.0  # so far, in steps' worth: others wait until it is paid back
OVERLOAD_DEBT_STEPS = 1.0  # and so far if its lane has more than its share of work
LATE_SHARE = 0.33  # of its own promise to the first token: then somebody makes room for it
PACE_STEPS = 2.0  # prompt tokens that may follow at once, in steps' worth: what an engine has on its way
FLOOD_HELD = 0.5  # of the slots that bulk leaves free, a tenant that alone has a line leaves to the others
OVERSHOOT = 1.1  # running jobs over the window before anybody is preempted
FIRST_DELTA = 4  # tokens; a first report of more comes from a job that does not stream
STEPS_TO_FIRST = 4.0  # steps from admission to first token, at most: the one that runs, one on its way, its own


@dataclass(slots=True)
class _Run:
    """A job in the engine. `mark_*` is where the observation of its steps began: at its first token, or
    at its admission if it does not stream."""

    job: Candidate
    cost: float  # charged at admission
    tokens: int = 0
    joined_at: int = 0  # when the engine's token clock stood here
    mark_s: float = 0.0
    mark_tokens: int = 0
    mark_job_s: float = 0.0
    mark_prompts: float = 0.0


@dataclass(frozen=True, slots=True)
class _Limits:
    """Of one decision."""

    window: int
    promised: bool  # a lane with a promise per token has work
    pace_s: float  # a step may take this long
    room: float  # prompt tokens it may prefill


class AdaptiveScheduler:
    """See the module. `slots` and `continuous` describe the engine."""

    def __init__(self, settings: AdmissionSettings, *, slots: int, continuous: bool, prior: StepCost = PRIOR) -> None:
        self._settings = settings
        self._slots = slots
        self._continuous = continuous
        self._promises = {lane: settings.promises.get(lane, Promise()) for lane in Lane}
        firsts = [promise.first_token_s for promise in self._promises.values() if promise.first_token_s]
        self._first_token_s = min(firsts, default=math.inf)
        self._turns = LaneTurns(settings.shares)
        self._lanes = {lane: Tenants(settings.tenant_weights, slack=settings.tenant_slack) for lane in Lane}
        self._in_hand_s: dict[Lane, dict[JobId, float]] = {lane: {} for lane in Lane}  # oldest first
        self._admitted_s: dict[Lane, float] = dict.fromkeys(Lane, -math.inf)  # the last one
        self._suspects = Quarantine(slots=slots)
        self._apart = False
        self._running: dict[JobId, _Run] = {}
        self._count: dict[Lane, int] = dict.fromkeys(Lane, 0)  # running
        self._bulk: dict[JobId, None] = {}  # running, youngest last
        self._preempting: set[JobId] = set()
        self._step = StepTime(prior)
        self._now_s = 0.0
        self._refilled_s = 0.0
        self._job_s = 0.0  # integral of running jobs over time
        self._prompts = 0.0  # prompt tokens prefilled so far
        self._room = math.inf  # prompt tokens the pace allows now; negative is a debt
        self._mix = MixEstimate()
        self._seen_s: dict[Lane, float] = dict.fromkeys(Lane, -math.inf)  # when the lane last had work
        self._preempted_s = -math.inf  # when, and how many within `calm_s` of each other
        self._preempted = 0
        self._since_s: float | None = None  # closed batches: when the first waiting job came in hand
        self._window = slots

    @property
    def window(self) -> int:
        return self._window

    # What happens -----------------------------------------------------------------------------------

    def offer(self, job: Candidate, now_s: float) -> None:
        self._advance(now_s)
        if job.suspect:
            self._suspects.add(job)
        else:
            self._lanes[job.lane].add(job)
            self._in_hand_s[job.lane][job.job_id] = now_s
        if self._since_s is None:
            self._since_s = now_s

    def withdraw(self, job_id: JobId, now_s: float) -> None:
        self._advance(now_s)
        if self._suspects.remove(job_id) is None:
            for lane, tenants in self._lanes.items():
                if tenants.remove(job_id) is not None:
                    del self._in_hand_s[lane][job_id]
        if not self._waiting():
            self._since_s = None

    def progressed(self, job_id: JobId, tokens: int, now_s: float) -> None:
        self._advance(now_s)
        run = self._running.get(job_id)
        if run is None or tokens < 1:
            return
        if run.tokens == 0:
            self._prompts += run.job.prompt_tokens
            if tokens <= FIRST_DELTA:
                self._mark(run, tokens)  # its steps are counted from its first token
            else:  # it does not stream and says all at its end: its steps are counted from its admission
                run.mark_tokens = 1 - int(STEPS_TO_FIRST)
        run.tokens += tokens
        self._mix.reached(run.joined_at + run.tokens - 1)
        steps = run.tokens - run.mark_tokens
        if steps >= OBSERVE_TOKENS:
            self._observe(run, steps)

    def ended(self, job_id: JobId, now_s: float) -> None:
        self._advance(now_s)
        run = self._running.pop(job_id, None)
        if run is None:
            return
        job, tenants = run.job, self._lanes[run.job.lane]
        self._count[job.lane] -= 1
        self._seen_s[job.lane] = now_s
        self._bulk.pop(job_id, None)
        unused = run.cost - job.prompt_tokens - COMPLETION_WEIGHT * run.tokens
        tenants.charge(job.tenant, -unused)
        preempted = job_id in self._preempting
        if preempted:
            self._preempting.discard(job_id)
            self._turns.preempted(job.lane, max(0.0, unused))
        by_itself = run.tokens > 0 and not preempted
        self._mix.left(run.tokens, by_itself=by_itself)
        if by_itself:
            tenants.learn(job.tenant, run.tokens)

    # What to do -------------------------------------------------------------------------------------

    def decide(self, now_s: float, backlog: Mapping[Lane, int], load: EngineLoad) -> Decision:
        self._advance(now_s)
        if not self._running:
            self._apart = False
        if self._apart:
            return Decision()
        if not self._waiting():
            return Decision()
        if len(self._suspects):
            return self._admit_suspects()
        limits = self._limits(backlog)
        if load.window_factor < 1.0:
            limits = replace(limits, window=max(1, int(limits.window * load.window_factor)))
        preempt = self._preempt(limits)
        if self._full(load):
            return Decision(preempt=preempt)
        if not self._continuous:
            if self._running:
                return Decision()
            left_s = self._linger_left(limits, backlog)
            if left_s > 0:
                return Decision(wake_in_s=left_s)
        admit, wake_in_s = self._admit(limits)
        return Decision(admit=admit, preempt=preempt, wake_in_s=wake_in_s)

    def _limits(self, backlog: Mapping[Lane, int]) -> _Limits:
        """Question 1."""
        budgets = []
        for lane, promise in self._promises.items():
            if self._count[lane] or self._lanes[lane] or backlog.get(lane, 0):
                self._seen_s[lane] = self._now_s
            if promise.per_token_s and self._now_s - self._seen_s[lane] <= self._settings.calm_s:
                budgets.append(promise.per_token_s)
        cost, mix = self._step.cost, self._mix.mix
        pace_s = self._first_token_s / STEPS_TO_FIRST
        window = self._slots
        if budgets:
            budget_s = self._settings.margin * min(budgets)
            pace_s = min(pace_s, budget_s)
            # A closed batch is prefilled before it decodes: nobody is replaced meanwhile.
            replaced = mix if self._continuous else Mix(prompt=0.0, prompt_squared=0.0, completion=mix.completion)
            decoding = widest(cost, replaced, budget_s=budget_s)
            # Besides those that decode, some are on their way to their first token.
            window = min(window, decoding + math.ceil(decoding * STEPS_TO_FIRST / mix.completion))
        if abs(window - self._window) > 0.03 * self._window or window == self._slots:
            self._window = window  # smaller moves are noise of the fit
        room = math.inf
        if pace_s < math.inf:
            room = prompt_room(cost, mix, budget_s=pace_s, running=len(self._running))
            elapsed_s = self._now_s - self._refilled_s
            self._room = min(PACE_STEPS * room, self._room + room * elapsed_s / pace_s)
        self._refilled_s = self._now_s
        return _Limits(self._window, bool(budgets), pace_s, room)

    def _admit(self, limits: _Limits) -> tuple[tuple[JobId, ...], float | None]:
        """Questions 2 and 3: the jobs, and when to ask again if the pace held one back."""
        admitted: list[JobId] = []
        held = min(math.ceil(self._settings.held_slots * limits.window), limits.window - 1)
        held = held if self._first_token_s < math.inf else 0
        while (free := limits.window - len(self._running)) > 0:
            lanes = [lane for lane, waiting in self._lanes.items() if waiting and free > self._leaves_free(lane, held)]
            starving = self._starving()
            if not lanes and starving is None:
                break
            lane = starving or self._turns.next(lanes)
            wait_s = 0.0 if starving else self._pace_s(lane, limits)
            if wait_s > 0:
                others = [other for other in lanes if other is not lane and self._hurries(other)]
                if not others or self._pace_s(others[0], limits) > 0:
                    return tuple(admitted), wait_s
                lane = others[0]
            admitted.append(self._start(lane))
        return tuple(admitted), None

    def _leaves_free(self, lane: Lane, held: int) -> int:
        """Slots the next job of this lane must leave: bulk to the lanes above, one tenant's line to other tenants."""
        if lane is Lane.BULK:
            return held
        waiting = self._lanes[lane]
        return int(FLOOD_HELD * held) if len(waiting) > held and waiting.flooded() else 0

    def _pace_s(self, lane: Lane, limits: _Limits) -> float:
        """Seconds until the pace lets the head of this lane through."""
        if math.isinf(limits.room) or self._room >= 0:
            return 0.0
        allowed = 0.0
        if self._hurries(lane):
            allowed = -limits.room * (DEBT_STEPS if self._short(lane) else OVERLOAD_DEBT_STEPS)
        if self._room >= allowed:
            return 0.0
        return (allowed - self._room) / limits.room * limits.pace_s + 1e-6

    def _hurries(self, lane: Lane) -> bool:
        """May the head of this lane run ahead of the pace: late, or held up by another tenant's line?"""
        return self._impatient(lane, PATIENCE_SHARE) or (
            bool(self._promises[lane].first_token_s) and self._lanes[lane].ahead()
        )

    def _impatient(self, lane: Lane, share: float) -> bool:
        """Has the head of this lane waited for this share of its promise?"""
        promise_s = self._promises[lane].first_token_s
        job = self._lanes[lane].next() if promise_s else None
        return job is not None and self._now_s - job.submitted_s > share * promise_s

    def _short(self, lane: Lane) -> bool:
        """Is the lane short of its share? Else its jobs wait because of its own jobs, not of others'."""
        with_work = [other for other, waiting in self._in_hand_s.items() if waiting or self._count[other]]
        return self._turns.short_of(lane, with_work)

    def _starving(self) -> Lane | None:
        """A lane with work in hand from which nothing was admitted for too long."""
        for lane, since in self._in_hand_s.items():
            if since and self._now_s - self._settings.starvation_s >= self._admitted_s[lane]:
                oldest_s = next(iter(since.values()))
                if self._now_s - oldest_s >= self._settings.starvation_s:
                    return lane
        return None

    def _start(self, lane: Lane) -> JobId:
        tenants = self._lanes[lane]
        job = tenants.take()
        del self._in_hand_s[lane][job.job_id]
        self._admitted_s[lane] = self._now_s
        cost = tenants.cost(job)
        tenants.charge(job.tenant, cost)
        self._turns.charge(lane, cost)
        self._enter(job, cost)
        return job.job_id

    def _enter(self, job: Candidate, cost: float) -> None:
        run = _Run(job, cost, joined_at=self._mix.joined())
        self._mark(run, 0)
        self._running[job.job_id] = run
        self._count[job.lane] += 1
        if job.lane is Lane.BULK:
            self._bulk[job.job_id] = None
        self._room -= job.prompt_tokens
        self._mix.admitted(job.prompt_tokens)
        if not self._waiting():
            self._since_s = None

    def _preempt(self, limits: _Limits) -> tuple[JobId, ...]:
        """Question 4."""
        if self._now_s - self._preempted_s >= self._settings.calm_s:
            self._preempted = 0
        most = int(self._settings.preempt_share * len(self._running)) - self._preempted
        if not self._bulk or not self._continuous or most < 1:
            return ()
        running = len(self._running) - len(self._preempting)
        if limits.promised and running > OVERSHOOT * limits.window:
            excess = running - limits.window
        elif running >= limits.window:
            excess = self._late() - len(self._preempting)
        else:
            return ()
        chosen = list(islice(reversed(self._bulk), max(0, min(excess, most))))
        if chosen:
            self._preempted_s = self._now_s
            self._preempted += len(chosen)
            self._preempting.update(chosen)
            for job_id in chosen:
                del self._bulk[job_id]
        return tuple(chosen)

    def _late(self) -> int:
        """Jobs of lanes above bulk that are about to miss their promise though their lane is short of its share."""
        return sum(
            len(waiting)
            for lane, waiting in self._lanes.items()
            if lane is not Lane.BULK and self._impatient(lane, LATE_SHARE) and self._short(lane)
        )

    def _admit_suspects(self) -> Decision:
        if self._running:
            return Decision()
        self._apart = True
        group = self._suspects.take_group()
        for job in group:
            cost = self._lanes[job.lane].cost(job)
            self._lanes[job.lane].charge(job.tenant, cost)
            self._enter(job, cost)
        return Decision(admit=tuple(job.job_id for job in group))

    # Keeping count ----------------------------------------------------------------------------------

    def _advance(self, now_s: float) -> None:
        elapsed_s = now_s - self._now_s
        if elapsed_s > 0:
            self._job_s += elapsed_s * len(self._running)
            self._now_s = now_s

    def _mark(self, run: _Run, tokens: int) -> None:
        run.mark_s = self._now_s
        run.mark_tokens = run.tokens + tokens
        run.mark_job_s = self._job_s
        run.mark_prompts = self._prompts

    def _observe(self, run: _Run, steps: int) -> None:
        elapsed_s = self._now_s - run.mark_s
        if elapsed_s > 0:
            self._step.observe(
                steps=steps,
                elapsed_s=elapsed_s,
                jobs=(self._job_s - run.mark_job_s) / elapsed_s,
                prompt_tokens=self._prompts - run.mark_prompts,
                now_s=self._now_s,
            )
        self._mark(run, 0)

    def _full(self, load: EngineLoad) -> bool:
        """Is the KV cache so full that what runs needs the rest?"""
        used = load.kv_cache_used
        return used is not None and used >= self._settings.kv_cache_cap and bool(self._running)

    def _linger_left(self, limits: _Limits, backlog: Mapping[Lane, int]) -> float:
        if self._waiting() >= limits.window or not any(backlog.values()) or self._since_s is None:
            return 0.0
        return self._since_s + self._settings.linger_s - self._now_s

    def _waiting(self) -> int:
        return len(self._suspects) + sum(map(len, self._in_hand_s.values()))

"""AdaptiveScheduler as a whole: what it promises, whatever happens to it."""

import math
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeyard.shared.job import JobId, Lane
from codeyard.shared.settings import AdmissionSettings, Promise
from codeyard.worker.engines.port import EngineInfo
from codeyard.worker.scheduling.adaptive import AdaptiveScheduler
from codeyard.worker.scheduling.port import Candidate, Decision, EngineLoad
from codeyard.worker.scheduling.select import make_scheduler
from codeyard.worker.scheduling.straight import Straight
from codeyard.worker.scheduling.weighted import WeightedLanes

SLOTS = 64
BASE_S, PER_JOB_S, PER_PROMPT_TOKEN_S = 0.005, 1e-4, 2e-5
NO_PROMISES = AdmissionSettings(promises={})


def job(name: JobId, lane: Lane = Lane.BULK, *, tenant: str = "t", prompt: int = 100, at_s: float = 0.0) -> Candidate:
    return Candidate(name, lane, tenant, prompt, 128, at_s, 1e9)


class Gpu:
    """An engine whose every step takes exactly what the model says; each running job gets a token a step."""

    def __init__(self, scheduler: AdaptiveScheduler, *, per_job_s: float = PER_JOB_S, streams: bool = True) -> None:
        self.streams = streams  # else each job reports its tokens at its end, all at once
        self.scheduler = scheduler
        self.per_job_s = per_job_s
        self.now_s = 0.0
        self.left: dict[JobId, int] = {}  # tokens to go
        self.fresh: list[JobId] = []
        self.prompts: dict[JobId, int] = {}
        self.preempted: list[JobId] = []
        self.first_s: dict[JobId, float] = {}
        self.jobs: dict[JobId, Candidate] = {}

    def offer(self, candidate: Candidate, tokens: int = 50) -> None:
        self.jobs[candidate.job_id] = candidate
        self.prompts[candidate.job_id] = candidate.prompt_tokens
        self._tokens = getattr(self, "_tokens", {})
        self._tokens[candidate.job_id] = tokens
        self.scheduler.offer(candidate, self.now_s)

    def decide(self, backlog: dict[Lane, int] | None = None, kv: float | None = None) -> Decision:
        decision = self.scheduler.decide(self.now_s, backlog or {}, EngineLoad(kv_cache_used=kv))
        for name in decision.preempt:
            self.preempted.append(name)
            self._tokens[name] = self.left.pop(name)
            self.scheduler.ended(name, self.now_s)
            self.scheduler.offer(self.jobs[name], self.now_s)
        for name in decision.admit:
            self.left[name] = self._tokens[name]
            self.fresh.append(name)
        return decision

    def step(self) -> float:
        """One engine step; returns its seconds."""
        fresh = [name for name in self.fresh if name in self.left]
        self.fresh = []
        step_s = BASE_S + self.per_job_s * len(self.left)
        step_s += PER_PROMPT_TOKEN_S * sum(self.prompts[name] for name in fresh)
        self.now_s += step_s
        for name in list(self.left):
            self.first_s.setdefault(name, self.now_s)
            self.left[name] -= 1
            if self.streams or not self.left[name]:
                self.scheduler.progressed(name, 1 if self.streams else self._tokens[name], self.now_s)
            if not self.left[name]:
                del self.left[name]
                self.scheduler.ended(name, self.now_s)
        return step_s

    def run(self, until_s: float) -> Iterator[float]:
        while self.now_s < until_s:
            self.decide()
            yield self.step()


# Whatever happens ----------------------------------------------------------------------------------

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.sampled_from(list(Lane)), st.sampled_from("abc"), st.integers(1, 3_000)),
        st.tuples(st.just("step"), st.integers(1, 8)),
        st.tuples(st.just("end"), st.integers(0, 100)),
        st.tuples(st.just("withdraw"), st.integers(0, 100)),
        st.tuples(st.just("suspect"), st.sampled_from(list(Lane))),
        st.tuples(st.just("wait"), st.floats(0.0, 3.0)),
    ),
    max_size=120,
)


def play(events: list[tuple[object, ...]], scheduler: AdaptiveScheduler, kv: float | None = None) -> list[Decision]:
    """Run a script of events against a scheduler, checking after each decision what must always hold."""
    running: dict[JobId, bool] = {}  # suspect?
    waiting: dict[JobId, Candidate] = {}
    decisions: list[Decision] = []
    now_s, number = 0.0, 0
    for event in events:
        now_s += 0.01
        match event:
            case ("offer", Lane() as lane, str(tenant), int(prompt)):
                number += 1
                waiting[str(number)] = job(str(number), lane, tenant=tenant, prompt=prompt, at_s=now_s)
                scheduler.offer(waiting[str(number)], now_s)
            case ("suspect", Lane() as lane):
                number += 1
                waiting[str(number)] = Candidate(str(number), lane, "t", 10, 10, now_s, 1e9, suspect=True)
                scheduler.offer(waiting[str(number)], now_s)
            case ("step", int(tokens)):
                for name in running:
                    scheduler.progressed(name, tokens, now_s)
            case ("end", int(place)) if running:
                name = list(running)[place % len(running)]
                del running[name]
                scheduler.ended(name, now_s)
            case ("withdraw", int(place)) if waiting:
                name = list(waiting)[place % len(waiting)]
                del waiting[name]
                scheduler.withdraw(name, now_s)
            case ("wait", float(seconds)):
                now_s += seconds
        before = len(running)
        decision = scheduler.decide(now_s, {}, EngineLoad(kv_cache_used=kv))
        decisions.append(decision)
        for name in decision.preempt:
            assert name in running, "only what runs can be preempted"
        assert len(decision.preempt) <= 0.5 * before, "at most the configured share"
        for name in decision.admit:
            candidate = waiting.pop(name)  # admitted twice, or unknown: KeyError
            running[name] = candidate.suspect
        for name in decision.preempt:
            del running[name]
            scheduler.ended(name, now_s)
            waiting[name] = job(name, Lane.BULK, at_s=now_s)
            scheduler.offer(waiting[name], now_s)
        if decision.admit:
            assert len(running) <= max(before, scheduler.window), "never above the window"
        assert len({*running.values()}) <= 1, "suspects never run beside others"
    return decisions


@settings(max_examples=80, deadline=None)
@given(EVENTS)
def test_no_history_leads_above_the_window_or_puts_suspects_beside_others(events: list[tuple[object, ...]]) -> None:
    """The invariants a worker relies on; every job is admitted at most once per offer."""
    play(events, AdaptiveScheduler(AdmissionSettings(), slots=8, continuous=True))


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_the_same_calls_give_the_same_decisions(events: list[tuple[object, ...]]) -> None:
    """No clock, no randomness, no order of a set: a simulated decision is the worker's decision."""
    settings_ = AdmissionSettings()

    first = play(events, AdaptiveScheduler(settings_, slots=8, continuous=True))
    second = play(events, AdaptiveScheduler(settings_, slots=8, continuous=True))

    assert first == second


class ClosedEngine(AdaptiveScheduler):
    """Fails the moment a running batch is joined."""

    def __init__(self) -> None:
        super().__init__(AdmissionSettings(), slots=8, continuous=False)
        self.inside: set[JobId] = set()

    def decide(self, now_s: float, backlog: Mapping[Lane, int], load: EngineLoad) -> Decision:
        decision = super().decide(now_s, backlog, load)
        assert not (self.inside and decision.admit)
        self.inside.update(decision.admit)
        return decision

    def ended(self, job_id: JobId, now_s: float) -> None:
        self.inside.discard(job_id)
        super().ended(job_id, now_s)


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_a_closed_batch_is_never_joined(events: list[tuple[object, ...]]) -> None:
    """An engine that takes closed batches is only ever given one when it is empty."""
    play(events, ClosedEngine())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=100))
def test_without_promises_a_free_slot_is_never_kept_while_a_job_waits(prompts: list[int]) -> None:
    """Work-conserving: nothing paces and nothing is held back when nothing was promised."""
    scheduler = AdaptiveScheduler(NO_PROMISES, slots=16, continuous=True)
    for number, prompt in enumerate(prompts):
        scheduler.offer(job(str(number), prompt=prompt), 0.0)

    admitted = scheduler.decide(0.0, {}, EngineLoad()).admit

    assert len(admitted) == min(16, len(prompts))


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_every_job_is_admitted_in_the_end(events: list[tuple[object, ...]]) -> None:
    """Whatever was offered: once the engine drains and time passes, nothing is left behind."""
    scheduler = AdaptiveScheduler(AdmissionSettings(), slots=8, continuous=True)
    gpu = Gpu(scheduler)
    for number, event in enumerate(events):
        if event[0] == "offer":
            _, lane, tenant, prompt = event
            assert isinstance(lane, Lane)
            gpu.offer(job(str(number), lane, tenant=str(tenant), prompt=int(str(prompt))), tokens=3)
    for _ in range(4_000):
        decision = gpu.decide()
        gpu.step()
        if not gpu.left and not decision.admit:
            if decision.wake_in_s is None:
                break
            gpu.now_s += decision.wake_in_s

    assert set(gpu.first_s) == set(gpu.jobs)


# The window ----------------------------------------------------------------------------------------


def fill(gpu: Gpu, lane: Lane, count: int, *, tokens: int = 50, prompt: int = 100) -> None:
    for _ in range(count):
        gpu.offer(job(f"{lane}-{len(gpu.jobs)}", lane, prompt=prompt, at_s=gpu.now_s), tokens)


def promised(per_token_s: float, **more: object) -> AdmissionSettings:
    return AdmissionSettings.model_validate(
        {"promises": {"interactive": {"first_token_s": 0.5, "per_token_s": per_token_s}}, **more}
    )


@pytest.mark.parametrize("streams", [True, False])
def test_interactive_work_narrows_the_window_to_what_the_promise_allows(streams: bool) -> None:
    """10 ms a token at 5 ms + 0.1 ms a job leaves room for fewer than 50 of 64, prefill included. It is
    learned from jobs that stream, and from those that say nothing before their end."""
    gpu = Gpu(AdaptiveScheduler(promised(0.010), slots=SLOTS, continuous=True), streams=streams)
    for _ in range(20):
        fill(gpu, Lane.INTERACTIVE, 20)
        steps = list(gpu.run(gpu.now_s + 0.2))

    assert sum(steps) / len(steps) <= 0.010
    assert 20 <= gpu.scheduler.window < 45


def test_bulk_alone_uses_every_slot() -> None:
    """Nobody is waiting for a token: the GPU is there to be filled. A few slots stay free for arrivals."""
    gpu = Gpu(AdaptiveScheduler(promised(0.010), slots=SLOTS, continuous=True))
    fill(gpu, Lane.BULK, 1_000)

    for _ in gpu.run(3.0):
        pass

    assert gpu.scheduler.window == SLOTS
    assert len(gpu.left) >= SLOTS - math.ceil(0.03 * SLOTS) - 1


def test_the_window_stays_narrow_for_a_while_after_the_last_interactive_job() -> None:
    """Hysteresis: interactive work that comes and goes must not make the window swing each time."""
    gpu = Gpu(AdaptiveScheduler(promised(0.010, calm_s=2.0), slots=SLOTS, continuous=True))
    fill(gpu, Lane.BULK, 2_000)
    fill(gpu, Lane.INTERACTIVE, 1)
    for _ in gpu.run(1.0):
        pass
    narrow = gpu.scheduler.window
    for _ in gpu.run(1.9):
        pass
    still = gpu.scheduler.window
    for _ in gpu.run(4.0):
        pass

    assert narrow < SLOTS
    assert still < SLOTS
    assert gpu.scheduler.window == SLOTS


def test_a_burst_is_answered_within_one_decision() -> None:
    """The first jobs of a burst enter at the very decision that sees them."""
    gpu = Gpu(AdaptiveScheduler(AdmissionSettings(), slots=SLOTS, continuous=True))
    fill(gpu, Lane.INTERACTIVE, 30)

    assert len(gpu.decide().admit) >= 5


def test_a_burst_of_prompts_does_not_stall_those_who_are_reading() -> None:
    """400 long prompts at once would be 8 s of prefill; paced, no step exceeds a few times the promise."""
    gpu = Gpu(AdaptiveScheduler(promised(0.020), slots=SLOTS, continuous=True))
    fill(gpu, Lane.INTERACTIVE, 4, tokens=400)
    for _ in gpu.run(0.5):
        pass
    fill(gpu, Lane.BULK, 400, prompt=1_000)

    steps = list(gpu.run(3.0))

    assert max(steps) <= 3 * 0.020
    assert sum(steps) / len(steps) <= 0.020


def test_nothing_is_admitted_while_the_kv_cache_is_nearly_full() -> None:
    """What runs needs the rest of it: more would only be thrown out again."""
    gpu = Gpu(AdaptiveScheduler(AdmissionSettings(), slots=SLOTS, continuous=True))
    fill(gpu, Lane.BULK, 10)
    gpu.decide()
    fill(gpu, Lane.INTERACTIVE, 10)

    assert gpu.decide(kv=0.95).admit == ()
    assert gpu.decide(kv=0.5).admit != ()


def test_a_full_kv_cache_never_stops_an_idle_engine() -> None:
    """Prefix caching reports a full cache with nothing running; waiting for it to fall would be for ever."""
    gpu = Gpu(AdaptiveScheduler(AdmissionSettings(), slots=SLOTS, continuous=True))
    fill(gpu, Lane.BULK, 1)

    assert len(gpu.decide(kv=1.0).admit) == 1


# Preemption ----------------------------------------------------------------------------------------


def test_the_youngest_bulk_jobs_make_room_when_interactive_work_comes() -> None:
    """They have the least to lose; they stay in hand and finish later with all their tokens."""
    gpu = Gpu(AdaptiveScheduler(promised(0.008), slots=SLOTS, continuous=True))
    fill(gpu, Lane.BULK, 200, tokens=200)
    for _ in gpu.run(1.0):
        pass
    oldest = next(iter(gpu.left))
    wide = len(gpu.left)
    fill(gpu, Lane.INTERACTIVE, 1)

    for _ in gpu.run(gpu.now_s + 0.3):
        pass

    assert gpu.preempted
    assert len(gpu.preempted) <= 0.5 * wide
    assert oldest not in gpu.preempted
    for _ in gpu.run(gpu.now_s + 15.0):
        pass
    assert set(gpu.jobs) == set(gpu.first_s)


def test_with_a_share_of_zero_nobody_is_preempted() -> None:
    """The operator may forbid it."""
    gpu = Gpu(AdaptiveScheduler(promised(0.008, preempt_share=0.0), slots=SLOTS, continuous=True))
    fill(gpu, Lane.BULK, 200, tokens=200)
    for _ in gpu.run(1.0):
        pass
    fill(gpu, Lane.INTERACTIVE, 5)

    for _ in gpu.run(gpu.now_s + 0.5):
        pass

    assert gpu.preempted == []


def test_a_lane_in_overload_does_not_preempt_for_ever() -> None:
    """Standard work beyond its share is late for no fault of bulk; preempting would only throw work away."""
    limits = AdmissionSettings(promises={Lane.STANDARD: Promise(first_token_s=0.2, per_token_s=0.0)})
    gpu = Gpu(AdaptiveScheduler(limits, slots=16, continuous=True))
    fill(gpu, Lane.BULK, 500)
    fill(gpu, Lane.STANDARD, 2_000)

    for _ in gpu.run(10.0):
        pass

    assert len(gpu.preempted) <= 16


# Lanes ---------------------------------------------------------------------------------------------


def test_bulk_is_admitted_within_the_starvation_bound_under_a_flood_above_it() -> None:
    """With a share of one in a million, only the bound lets it in."""
    shares = {Lane.INTERACTIVE: 1_000_000, Lane.STANDARD: 1, Lane.BULK: 1}
    limits = AdmissionSettings(promises={}, shares=shares, starvation_s=2.0)
    gpu = Gpu(AdaptiveScheduler(limits, slots=4, continuous=True))
    fill(gpu, Lane.INTERACTIVE, 4)
    gpu.decide()
    fill(gpu, Lane.INTERACTIVE, 20)
    fill(gpu, Lane.BULK, 2)
    gpu.scheduler._turns.charge(Lane.BULK, 1e9)  # it has had more than its share for years

    while gpu.now_s < 6.0:
        fill(gpu, Lane.INTERACTIVE, 1)
        gpu.decide()
        gpu.step()

    first = sorted(at_s for name, at_s in gpu.first_s.items() if name.startswith("bulk"))
    assert len(first) == 2
    assert first[0] <= 2.0 + 0.5
    assert first[1] <= 4.0 + 1.0


@pytest.mark.parametrize("slots", [1, 2])
def test_an_engine_with_few_slots_serves_bulk_too(slots: int) -> None:
    """The slots kept free for the lanes above are never all there are."""
    scheduler = AdaptiveScheduler(AdmissionSettings(), slots=slots, continuous=True)
    for number in range(3):
        scheduler.offer(job(f"bulk-{number}"), 0.0)

    assert len(scheduler.decide(0.0, {}, EngineLoad()).admit) == 1


def test_bulk_leaves_slots_for_the_lanes_above() -> None:
    """vLLM preempts for memory, never for a slot: an interactive job must find one."""
    limits = promised(0.0, held_slots=0.1)
    gpu = Gpu(AdaptiveScheduler(limits, slots=20, continuous=True))
    fill(gpu, Lane.BULK, 100, prompt=1)
    for _ in gpu.run(0.2):
        pass
    gpu.decide()
    fill(gpu, Lane.INTERACTIVE, 2)

    assert len(gpu.left) == 18
    assert len(gpu.decide().admit) == 2


# Tenants -------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.tuples(st.integers(5, 200), st.integers(5, 200)),
    prompts=st.tuples(st.integers(10, 500), st.integers(10, 500)),
)
def test_two_backlogged_tenants_get_equal_service_however_different_their_jobs(
    lengths: tuple[int, int], prompts: tuple[int, int]
) -> None:
    """The bound of tenants.py: twice the slack, what runs at once, and one more."""
    slots, slack = 8, 1_000.0
    limits = AdmissionSettings(promises={}, tenant_slack=slack)
    gpu = Gpu(AdaptiveScheduler(limits, slots=slots, continuous=True))
    served = [0.0, 0.0]
    for number in range(600):
        tenant = number % 2
        gpu.offer(job(f"{tenant}-{number}", tenant=str(tenant), prompt=prompts[tenant]), lengths[tenant])
    costs = [prompts[tenant] + 2.0 * lengths[tenant] for tenant in (0, 1)]
    done: dict[JobId, None] = {}

    for _ in range(4_000):
        running = set(gpu.left)
        decision = gpu.decide()
        gpu.step()
        for name in (running | set(decision.admit)) - set(gpu.left):
            if name not in done:
                done[name] = None
                served[int(name[0])] += costs[int(name[0])]
        if min(sum(name[0] == str(tenant) for name in done) for tenant in (0, 1)) > 250 or len(done) > 280:
            break
        left = [300 - sum(name[0] == str(tenant) for name in done) for tenant in (0, 1)]
        if min(left) < slots + 1:
            break
        guess_error = 2.0 * abs(128 - min(lengths)) + 2.0 * abs(128 - max(lengths))
        bound = 2 * slack + (slots + 1) * (max(costs) + guess_error)
        assert abs(served[0] - served[1]) <= bound


ONE_PROMISE = AdmissionSettings(
    promises={Lane.STANDARD: Promise(first_token_s=2.0, per_token_s=0.02)}, held_slots=0.1, tenant_slack=1_000.0
)


def test_one_tenants_flood_leaves_slots_for_the_others_of_its_lane() -> None:
    """Else each job of the others waits until one of the flood's ends."""
    gpu = Gpu(AdaptiveScheduler(ONE_PROMISE, slots=SLOTS, continuous=True))
    gpu.offer(job("modest", Lane.STANDARD, tenant="modest"), 5)
    for number in range(600):
        gpu.offer(job(f"greedy-{number}", Lane.STANDARD, tenant="greedy"))
    for _ in gpu.run(3.0):
        pass
    gpu.decide()
    free = gpu.scheduler.window - len(gpu.left)
    for number in range(free):
        gpu.offer(job(f"late-{number}", Lane.STANDARD, tenant="modest", prompt=1, at_s=gpu.now_s))

    assert free >= 2
    assert set(gpu.decide().admit) == {f"late-{number}" for number in range(free)}


def test_a_job_behind_another_tenants_line_does_not_wait_for_the_pace() -> None:
    """The line keeps the pace at its limit; who did not cause that starts with the next decision."""
    gpu = Gpu(AdaptiveScheduler(ONE_PROMISE, slots=SLOTS, continuous=True))
    for number in range(20):
        gpu.offer(job(f"greedy-{number}", Lane.STANDARD, tenant="greedy"))
    gpu.scheduler._lanes[Lane.STANDARD].charge("greedy", 1e6)
    gpu.decide()  # as many as the pace lets through

    held_up = gpu.decide().admit
    gpu.offer(job("modest", Lane.STANDARD, tenant="modest"))

    assert len(gpu.left) < 20
    assert held_up == ()
    assert gpu.decide().admit == ("modest",)


# Choosing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, kind", [("adaptive", AdaptiveScheduler), ("fixed", WeightedLanes), ("straight", Straight)]
)
def test_settings_choose_the_policy(policy: str, kind: type[object]) -> None:
    """One name in the settings; a fixed window never exceeds the engine's slots."""
    info = EngineInfo("simulated", "1", "m", "r", 1_024, 16, True)

    scheduler = make_scheduler(AdmissionSettings.model_validate({"policy": policy, "window": 99}), info)

    assert isinstance(scheduler, kind)
    assert policy == "straight" or scheduler.window == 16

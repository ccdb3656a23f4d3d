"""The small objects the adaptive policy is made of, one by one."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeyard.shared.job import Lane
from codeyard.shared.sharding import shards_of
from codeyard.worker.scheduling.lanes import LaneTurns
from codeyard.worker.scheduling.mix import MixEstimate
from codeyard.worker.scheduling.port import Candidate
from codeyard.worker.scheduling.step_time import PRIOR, StepCost, StepTime
from codeyard.worker.scheduling.tenants import Tenants
from codeyard.worker.scheduling.window import Mix, prompt_room, widest

H200 = StepCost(base_s=0.0047, per_job_s=3e-5, per_prompt_token_s=2.2e-5)
CODE = Mix(prompt=433.0, prompt_squared=520.0**2, completion=166.0)


# Step time -----------------------------------------------------------------------------------------


def test_the_fit_finds_the_engine_from_its_tokens_alone() -> None:
    """Windows and prompts vary, as they do while a window fills; the constants come out within 5 %."""
    rng, fit = random.Random(1), StepTime()
    for number in range(400):
        jobs, prompts = rng.uniform(1, 256), rng.uniform(0, 30_000)
        fit.observe(
            steps=16,
            elapsed_s=16 * H200.step_s(jobs, prompts / 16),
            jobs=jobs,
            prompt_tokens=prompts,
            now_s=number / 100,
        )

    found = fit.cost
    for value, truth in zip(
        (found.base_s, found.per_job_s, found.per_prompt_token_s),
        (H200.base_s, H200.per_job_s, H200.per_prompt_token_s),
        strict=True,
    ):
        assert value == pytest.approx(truth, rel=0.05)


def test_the_fit_follows_an_engine_that_becomes_twice_as_slow() -> None:
    """A throttled GPU: old observations fade within a few times their memory."""
    rng, fit = random.Random(1), StepTime()
    for slower, start in ((1.0, 0.0), (2.0, 30.0)):
        for number in range(600):
            jobs, prompts = rng.uniform(50, 150), rng.uniform(0, 20_000)
            elapsed_s = 16 * slower * H200.step_s(jobs, prompts / 16)
            fit.observe(steps=16, elapsed_s=elapsed_s, jobs=jobs, prompt_tokens=prompts, now_s=start + number / 20)

    assert fit.cost.step_s(100, 300) == pytest.approx(2 * H200.step_s(100, 300), rel=0.1)


def test_nothing_observed_is_the_prior() -> None:
    """The first decision of a worker is made before any token."""
    assert StepTime().cost == PRIOR


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.floats(1e-6, 5.0), st.floats(0, 512), st.floats(0, 1e5)),
        min_size=1,
        max_size=40,
    )
)
def test_every_constant_stays_positive_whatever_is_observed(seen: list[tuple[int, float, float, float]]) -> None:
    """Noise must never make a wider window look faster, or the policy would run away."""
    fit = StepTime()
    for number, (steps, elapsed_s, jobs, prompts) in enumerate(seen):
        fit.observe(steps=steps, elapsed_s=elapsed_s, jobs=jobs, prompt_tokens=prompts, now_s=float(number))

    cost = fit.cost
    assert min(cost.base_s, cost.per_job_s, cost.per_prompt_token_s) > 0


# Window --------------------------------------------------------------------------------------------


@given(st.floats(0.006, 0.2))
def test_at_the_widest_window_the_promise_holds_on_average(budget_s: float) -> None:
    """The formula's own equation, put in again: the steady state's step fits the budget."""
    jobs = widest(H200, CODE, budget_s=budget_s)

    assert jobs == 1 or H200.step_s(jobs, jobs * CODE.prompt / CODE.completion) <= budget_s


@given(st.floats(0.001, 0.2), st.floats(0.001, 0.2))
def test_a_looser_promise_never_narrows_the_window(one: float, other: float) -> None:
    """Monotone, so that the strictest promise of several is the one that counts."""
    low, high = sorted((one, other))

    assert widest(H200, CODE, budget_s=low) <= widest(H200, CODE, budget_s=high)


def test_a_promise_below_the_empty_step_still_runs_one_job() -> None:
    """What cannot be kept must not stop the work."""
    assert widest(H200, CODE, budget_s=0.001) == 1


def test_the_pace_allows_at_least_what_replaces_finished_jobs() -> None:
    """Else a full window would slowly run empty behind a queue."""
    jobs = widest(H200, CODE, budget_s=0.036)

    assert prompt_room(H200, CODE, budget_s=0.036, running=jobs) >= jobs * CODE.prompt / CODE.completion


# Mix -----------------------------------------------------------------------------------------------


def test_the_mean_completion_is_right_soon_after_a_start() -> None:
    """200 jobs start together; when half of them have ended, the plain mean of those is far too low."""
    rng, mix = random.Random(3), MixEstimate()
    lengths = sorted(min(512, max(8, int(rng.lognormvariate(4.9, 0.7)))) for _ in range(200))
    joined = [mix.joined() for _ in lengths]
    truth = sum(lengths) / len(lengths)

    for length, at in list(zip(lengths, joined, strict=True))[:100]:
        mix.reached(at + length - 1)
        mix.left(length, by_itself=True)

    plain = sum(lengths[:100]) / 100
    assert plain < 0.6 * truth
    assert mix.mix.completion == pytest.approx(truth, rel=0.25)


# Lanes ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(list(Lane)), st.floats(1, 1_000)), max_size=50))
def test_lanes_with_work_differ_from_their_shares_by_a_job_at_most(history: list[tuple[Lane, float]]) -> None:
    """Whatever happened before: the bound of start-time fair queueing, for two backlogged lanes."""
    shares = {Lane.INTERACTIVE: 8.0, Lane.STANDARD: 3.0, Lane.BULK: 1.0}
    turns, got = LaneTurns(shares), dict.fromkeys(Lane, 0.0)
    for lane, cost in history:
        turns.charge(lane, cost)
    pair = (Lane.STANDARD, Lane.BULK)
    for _ in pair:  # both have work from here on; a lead out of the history is lost first
        turns.charge(turns.next(pair), 1_000.0)
    for _ in range(3_000):
        lane = turns.next(pair)
        turns.charge(lane, 100.0)
        got[lane] += 100.0

    assert abs(got[Lane.STANDARD] / 3.0 - got[Lane.BULK]) <= 1_000.0 + 1_000.0 + 100.0


def test_a_lane_with_more_than_its_share_is_not_short_of_it() -> None:
    """Only a lane that gets less than it may is owed a preemption."""
    turns = LaneTurns({Lane.STANDARD: 3.0, Lane.BULK: 1.0})
    pair = (Lane.STANDARD, Lane.BULK)
    for _ in range(200):
        turns.charge(turns.next(pair), 100.0)

    assert not turns.short_of(Lane.STANDARD, pair)
    assert turns.short_of(Lane.INTERACTIVE, Lane)


# Tenants -------------------------------------------------------------------------------------------


def waiting(name: str, tenant: str, at_s: float = 0.0) -> Candidate:
    return Candidate(name, Lane.STANDARD, tenant, 100, 100, at_s, 1e9)


def test_a_light_tenant_is_ahead_of_one_that_never_stops() -> None:
    """A hundred waiting jobs of another tenant are not ahead of its first."""
    tenants = Tenants({}, slack=500.0)
    for number in range(100):
        tenants.add(waiting(f"greedy{number}", "greedy", at_s=float(number)))
    for _ in range(50):
        job = tenants.take()
        tenants.charge(job.tenant, tenants.cost(job))

    tenants.add(waiting("modest", "modest", at_s=1_000.0))

    assert tenants.take().job_id == "modest"


def test_equals_are_served_in_the_order_they_came() -> None:
    """Even waits can be promised; strict turns would make the wait depend on who else is there."""
    tenants = Tenants({}, slack=1e6)
    rng = random.Random(5)
    for number in range(100):
        tenants.add(waiting(str(number), rng.choice("abc"), at_s=float(number)))
    order = []
    for _ in range(100):
        job = tenants.take()
        tenants.charge(job.tenant, tenants.cost(job))
        order.append(int(job.job_id))

    assert order == sorted(order)


def test_a_tenant_of_twice_the_weight_gets_twice_the_service() -> None:
    """Weights divide what a tenant is charged."""
    tenants = Tenants({"big": 2.0}, slack=0.0)
    for number in range(300):
        tenants.add(waiting(f"b{number}", "big"))
        tenants.add(waiting(f"s{number}", "small"))
    taken = Counter[str]()
    for _ in range(300):
        job = tenants.take()
        tenants.charge(job.tenant, tenants.cost(job))
        taken[job.tenant] += 1

    assert taken["big"] == pytest.approx(200, abs=3)


def test_idling_earns_a_bounded_credit() -> None:
    """A tenant that comes back after a month takes a few turns, not a month's worth."""
    tenants = Tenants({}, slack=600.0)
    for number in range(1_000):
        tenants.add(waiting(f"busy{number}", "busy", at_s=float(number)))
    for _ in range(500):
        job = tenants.take()
        tenants.charge(job.tenant, tenants.cost(job))
    for number in range(500):
        tenants.add(waiting(f"back{number}", "back", at_s=2_000.0 + number))
    first = [tenants_take(tenants) for _ in range(40)]

    cost = 100 + 2 * 100
    assert first.count("busy") >= (40 - 2 * 600 / cost) / 2 - 4


def test_a_job_held_up_by_another_tenants_line_is_known_as_such() -> None:
    """It is ahead once another that waits was served more by the slack; equals are in nobody's way."""
    tenants = Tenants({}, slack=500.0)
    for tenant in "abc":
        tenants.add(waiting(f"{tenant}1", tenant))
        tenants.add(waiting(f"{tenant}2", tenant))
    equals = tenants.ahead()
    tenants.charge("a", 5_000.0)
    beside_a = tenants.ahead()
    tenants.remove("a1")
    tenants.remove("a2")

    assert (equals, beside_a) == (False, True)
    assert not tenants.ahead(), "the one that was behind left"
    assert not Tenants({}, slack=0.0).ahead()


def test_a_line_is_a_flood_only_where_there_are_other_tenants() -> None:
    """Nothing is to be left free for tenants that do not exist."""
    tenants = Tenants({}, slack=0.0)
    for number in range(3):
        tenants.add(waiting(f"a{number}", "a"))
    alone = tenants.flooded()
    tenants.add(waiting("b", "b"))
    beside_b = tenants.flooded()
    tenants.remove("b")

    assert (alone, beside_b) == (False, False)
    assert tenants.flooded(), "all that waits is one tenant's"


def tenants_take(tenants: Tenants) -> str:
    job = tenants.take()
    tenants.charge(job.tenant, tenants.cost(job))
    return job.tenant


TENANT_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abcde"), st.floats(0, 100)),
        st.tuples(st.just("take"), st.just(""), st.just(0.0)),
        st.tuples(st.just("remove"), st.just(""), st.floats(0, 1)),
        st.tuples(st.just("charge"), st.sampled_from("abcde"), st.floats(-500, 500)),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(TENANT_EVENTS, st.sampled_from([0.0, 300.0, 1e6]))
def test_no_waiting_job_is_lost_or_taken_twice(events: list[tuple[str, str, float]], slack: float) -> None:
    """Three heaps with stale entries: whatever is corrected, withdrawn or returned, each job leaves once."""
    tenants, there = Tenants({}, slack=slack), dict[str, Candidate]()
    for number, (what, tenant, value) in enumerate(events):
        if what == "add":
            there[str(number)] = waiting(str(number), tenant, at_s=value)
            tenants.add(there[str(number)])
        elif what == "charge":
            tenants.charge(tenant, value)
        elif what == "remove" and there:
            name = sorted(there)[int(value * (len(there) - 1))]
            assert tenants.remove(name) is there.pop(name)
        elif what == "take" and there:
            head = tenants.next()
            job = tenants.take()
            assert job is head
            assert there.pop(job.job_id) is job
            tenants.charge(job.tenant, tenants.cost(job))
    while there:
        del there[tenants.take().job_id]

    assert tenants.next() is None
    assert len(tenants) == 0


# Sharding ------------------------------------------------------------------------------------------


@given(st.text(max_size=40), st.integers(1, 32), st.data())
def test_a_hand_is_different_shards_and_always_the_same(tenant: str, shards: int, data: st.DataObject) -> None:
    """Producers in any process must agree, or a tenant would own every shard."""
    per_tenant = data.draw(st.integers(1, shards))

    hand = shards_of(tenant, shards=shards, per_tenant=per_tenant)

    assert len(set(hand)) == per_tenant
    assert all(0 <= shard < shards for shard in hand)
    assert hand == shards_of(tenant, shards=shards, per_tenant=per_tenant)


def test_few_tenants_lie_wholly_within_anothers_hand() -> None:
    """The bound of sharding.py: 1 in 70 for 4 of 8; 1 in 1,820 for 4 of 16."""
    greedy = {
        8: set(shards_of("greedy", shards=8, per_tenant=4)),
        16: set(shards_of("greedy", shards=16, per_tenant=4)),
    }
    buried = {
        shards: sum(set(shards_of(f"tenant-{n}", shards=shards, per_tenant=4)) <= hand for n in range(7_000))
        for shards, hand in greedy.items()
    }

    assert buried[8] == pytest.approx(100, rel=0.3)
    assert buried[16] <= 12


@pytest.mark.parametrize("per_tenant", [0, 9])
def test_a_hand_larger_than_the_deck_is_refused(per_tenant: int) -> None:
    """A setting that cannot be meant."""
    with pytest.raises(ValueError, match="between 1 and 8"):
        shards_of("t", shards=8, per_tenant=per_tenant)

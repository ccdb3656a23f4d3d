"""Which models a worker serves: decided from plain values, held to its bounds by hypothesis."""

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from codeyard.shared.job import Lane
from codeyard.worker.cache.forecast import Transitions
from codeyard.worker.scheduling.placement import (
    LINGER_S,
    PAUSE_S,
    STARVATION_S,
    ModelState,
    Placement,
    place,
    worth,
)

SHARES = {Lane.INTERACTIVE: 8.0, Lane.STANDARD: 3.0, Lane.BULK: 1.0}


def model(
    lane: Lane = Lane.STANDARD, depth: int = 0, oldest_s: float = 0.0, *, ready_s: float = 10.0, size: int = 1
) -> ModelState:
    """One that waits on disk."""
    return ModelState({lane: depth}, {lane: oldest_s}, size, ready_s, 10.0, idle_s=30.0)


def served(state: ModelState, served_s: float = 100.0, running: int = 0) -> ModelState:
    return replace(state, ready_s=0.0, serving=True, served_s=served_s, running={Lane.BULK: running} if running else {})


def decide(budget: int | None = 1, forecast: dict[str, float] | None = None, **models: ModelState) -> Placement:
    return place(models, SHARES, budget_bytes=budget, forecast=forecast)


def test_the_model_that_is_missed_most_comes_first() -> None:
    """Age times depth, weighted by lane."""
    a, b = model(Lane.BULK, 10, 5.0), model(Lane.INTERACTIVE, 2, 5.0)

    assert worth(a, SHARES) == 50.0
    assert decide(a=a, b=b) == Placement(open=("b",))
    assert decide(budget=2, a=a, b=b) == Placement(open=("b", "a"))
    assert decide(budget=None, a=a, b=b) == Placement(open=("b", "a"))


def test_of_equal_need_the_cheaper_is_first() -> None:
    """Two seconds from sleep against ten from disk."""
    assert decide(a=model(depth=3, oldest_s=5.0), b=model(depth=3, oldest_s=5.0, ready_s=2.0)).open == ("b",)


def test_even_queues_do_not_make_two_models_take_turns() -> None:
    """Each switch costs a load in which nobody is served."""
    assert decide(a=served(model(depth=10, oldest_s=20.0)), b=model(depth=11, oldest_s=20.0)) == Placement()


def test_a_model_is_not_fetched_for_a_job_that_just_came() -> None:
    """It is switched to once the wait is worth the load, and what is there has served as long as its own took."""

    def asked(oldest_s: float, served_s: float) -> Placement:
        return decide(a=served(model(Lane.BULK, 1, 1.0), served_s, running=3), b=model(Lane.INTERACTIVE, 50, oldest_s))

    assert asked(1.0, served_s=100.0) == Placement()
    assert asked(15.0, served_s=5.0) == Placement()
    assert asked(15.0, served_s=100.0) == Placement(open=("b",), close=("a",))


def test_a_model_without_work_goes_at_once() -> None:
    """Nothing is gained by keeping it; with nothing anywhere, nothing changes. The longest idle goes first."""
    idle, job = served(model(), served_s=0.0), model(depth=1, oldest_s=0.5)

    assert decide(a=idle, b=job) == Placement(open=("b",), close=("a",))
    assert decide(a=idle) == Placement()
    assert decide() == Placement()
    older = replace(idle, idle_s=50.0)
    assert decide(budget=2, a=idle, b=older, c=job) == Placement(open=("c",), close=("b",))


def test_a_model_between_two_jobs_of_a_burst_is_not_put_away() -> None:
    """It would be fetched again in the same burst. A job of another waits for as long as such a pause, no longer."""
    pausing = replace(served(model()), idle_s=PAUSE_S - 1)

    assert decide(a=pausing, b=model(depth=1, oldest_s=PAUSE_S - 1)) == Placement()
    assert decide(a=pausing, b=model(depth=1, oldest_s=PAUSE_S)).close == ("a",)
    assert decide(a=replace(pausing, idle_s=PAUSE_S), b=model(depth=1, oldest_s=0.5)).close == ("a",)


def test_of_two_idle_models_the_likelier_one_is_kept() -> None:
    """Whichever was used last: what comes next is what counts."""
    idle, older, job = served(model()), replace(served(model()), idle_s=99.0), model(depth=1, oldest_s=1.0)

    assert decide(budget=2, a=idle, b=older, c=job, forecast={"a": 0.2, "b": 0.6}).close == ("a",)
    assert decide(budget=2, a=idle, b=older, c=job, forecast={"a": 0.6, "b": 0.2}).close == ("b",)


def test_a_likely_model_is_kept_while_a_busy_one_ends() -> None:
    """A minute at most; no interactive job waits for that, nor one that waits for a load from disk anyway."""
    idle, busy = served(model()), served(model(), running=3)

    def asked(lane: Lane, oldest_s: float, likely: float = 0.6, ready_s: float = 2.0) -> tuple[str, ...]:
        there = model(lane, 2, oldest_s, ready_s=ready_s)
        return decide(budget=2, a=idle, b=busy, c=there, forecast={"a": likely, "b": 0.1}).close

    assert asked(Lane.STANDARD, 50.0) == asked(Lane.BULK, 50.0) == ()
    assert asked(Lane.STANDARD, LINGER_S[Lane.STANDARD]) == ("a",)
    assert asked(Lane.INTERACTIVE, 0.5) == ("a",)
    assert asked(Lane.STANDARD, 1.0, likely=0.2) == ("a",)
    assert asked(Lane.STANDARD, 1.0, ready_s=30.0) == ("a",)
    there = model(depth=1, oldest_s=1.0, ready_s=2.0)
    assert decide(budget=2, a=idle, b=idle, c=there, forecast={"a": 0.6}).close == ("b",)


def test_a_line_that_opens_is_left_to_open() -> None:
    """Cancelling a load for another, and that one for the first, would serve nobody."""
    opening = replace(served(model(depth=1, oldest_s=1.0), served_s=0.0), ready_s=30.0)

    assert decide(a=opening, b=model(Lane.INTERACTIVE, 99, STARVATION_S)) == Placement()


def test_a_large_model_takes_the_place_of_as_many_as_it_needs() -> None:
    """And is not begun where no closing makes room for it."""
    idle, large = served(model()), model(depth=1, oldest_s=20.0, size=2)

    assert decide(budget=3, a=idle, b=idle, c=idle, d=large) == Placement(open=("d",), close=("a", "b"))
    assert decide(budget=1, a=idle, d=large) == Placement()


def test_a_flood_for_one_model_does_not_starve_another() -> None:
    """However much more the flood is worth."""
    flood = served(model(Lane.INTERACTIVE, 10_000, 500.0), running=64)

    assert decide(a=flood, b=model(Lane.BULK, 1, STARVATION_S - 1)) == Placement()
    assert decide(a=flood, b=model(Lane.BULK, 1, STARVATION_S)) == Placement(open=("b",), close=("a",))
    assert decide(a=replace(flood, served_s=9.0), b=model(Lane.BULK, 1, STARVATION_S)) == Placement()


def test_what_comes_next_is_made_ready_while_nothing_waits() -> None:
    """Into spare memory, or over an idle model that is clearly less likely; never over a busy one."""
    idle, busy, cold = served(model()), served(model(), running=1), model()

    assert decide(budget=2, forecast={"b": 0.8}, a=busy, b=cold) == Placement(preload="b")
    assert decide(budget=2, forecast={"b": 0.7}, a=busy, b=cold) == Placement()
    assert decide(budget=1, forecast={"b": 0.8, "a": 0.3}, a=idle, b=cold) == Placement(preload="b", over=("a",))
    assert decide(budget=1, forecast={"b": 0.8, "a": 0.6}, a=idle, b=cold) == Placement()
    assert decide(budget=2, forecast={"b": 0.9}, a=busy, b=replace(cold, ready_s=2.0)) == Placement()
    assert decide(budget=1, forecast={"b": 0.9}, a=busy, b=cold) == Placement()
    assert decide(budget=2, forecast={}, a=busy, b=cold) == Placement()
    assert decide(budget=1, forecast={"b": 0.9}, a=idle, b=cold, c=model(depth=1, oldest_s=1.0)).open == ("c",)


def test_when_memory_is_short_what_has_nothing_to_do_is_closed() -> None:
    """Beside what makes room for others; nothing is made ready ahead. At the limit nothing is opened either."""
    idle, busy, waits = served(model()), served(model(), running=1), model(depth=1, oldest_s=9.0)
    between = replace(idle, idle_s=PAUSE_S - 1)
    models = {"a": idle, "b": busy, "c": between, "d": idle, "e": waits}

    short = place(models, SHARES, budget_bytes=4, may_idle=False)
    full = place(models, SHARES, budget_bytes=4, may_idle=False, may_open=False)

    assert short == Placement(open=("e",), close=("a", "d"))
    assert full == Placement(close=("a", "d"))
    assert place({"a": busy, "b": model()}, SHARES, budget_bytes=4, forecast={"b": 0.9}, may_idle=False) == Placement()


STATES = st.builds(
    ModelState,
    depth=st.dictionaries(st.sampled_from(Lane), st.integers(0, 50)),
    oldest_s=st.dictionaries(st.sampled_from(Lane), st.floats(0, 400)),
    num_bytes=st.integers(1, 4),
    ready_s=st.sampled_from([0.0, 2.0, 30.0]),
    load_s=st.sampled_from([2.0, 30.0]),
    serving=st.booleans(),
    served_s=st.floats(0, 200),
    running=st.dictionaries(st.sampled_from(Lane), st.integers(0, 3)),
    idle_s=st.floats(0, 100),
)
WORLDS = st.dictionaries(st.sampled_from("abcdef"), STATES)


@given(WORLDS, st.integers(1, 8), st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1)))
def test_a_decision_never_asks_for_more_memory_than_there_is(
    models: dict[str, ModelState], budget: int, forecast: dict[str, float]
) -> None:
    """Whatever is asked of it: what is open and what is made ready fit together, nobody is closed for nothing,
    and nobody who has begun only now is closed while busy."""
    before = {name for name, state in models.items() if state.serving}
    decision = place(models, SHARES, budget_bytes=budget, forecast=forecast)

    assert decision == place(dict(reversed(models.items())), SHARES, budget_bytes=budget, forecast=forecast)
    assert set(decision.close) <= before
    assert not set(decision.open) & before
    after = before - set(decision.close) | set(decision.open)
    if decision.open:
        assert sum(models[name].num_bytes for name in after) <= budget
        assert decision.preload is None
    else:
        assert not decision.close
    for name in decision.close:
        state = models[name]
        assert state.served_s >= state.load_s or not (state.waiting or any(state.running.values()))
    if decision.preload is not None:
        ready = {name for name, state in models.items() if state.serving or not state.ready_s}
        kept = ready - set(decision.over) | {decision.preload}
        assert sum(models[name].num_bytes for name in kept) <= budget
        assert not any(models[name].waiting or any(models[name].running.values()) for name in decision.over)


@given(
    st.lists(st.sets(st.sampled_from("abd")), min_size=8, max_size=8),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1)),
    st.sampled_from(Lane),
    st.sampled_from([2.0, 30.0]),
)
@settings(max_examples=25)
def test_whatever_the_others_do_and_the_forecast_says_nobody_starves(
    floods: list[set[str]], forecast: dict[str, float], lane: Lane, ready_s: float
) -> None:
    """Three models are flooded or idle, twenty seconds each, on room for two; one job of the fourth waits. It is
    opened when it has starved, or when what opened last has served for as long as its load took."""
    since_s = {"a": 0.0, "b": 0.0}  # of those served: when the line has opened
    busy_s = dict.fromkeys("abd", -1_000.0)
    for now_s in range(0, 20 * len(floods), 2):
        busy = floods[now_s // 20]
        busy_s.update(dict.fromkeys(busy, float(now_s)))
        models = {
            name: ModelState(
                {Lane.INTERACTIVE: 100 if name in busy else 0},
                {Lane.INTERACTIVE: 60.0 if name in busy else 0.0},
                1,
                0.0 if name in since_s else ready_s,
                ready_s,
                serving=name in since_s,
                served_s=max(0.0, now_s - since_s.get(name, now_s)),
                running={Lane.INTERACTIVE: 16} if name in busy and name in since_s else {},
                idle_s=now_s - busy_s[name],
            )
            for name in "abd"
        }
        models["c"] = model(lane, 1, float(now_s), ready_s=ready_s)
        decision = place(models, SHARES, budget_bytes=2, forecast=forecast)
        if "c" in decision.open:
            return
        since_s = {name: at_s for name, at_s in since_s.items() if name not in decision.close}
        since_s |= dict.fromkeys(decision.open, now_s + ready_s)
        assert now_s <= STARVATION_S + 2 * ready_s
    raise AssertionError("it was never opened")


@given(WORLDS)
def test_with_room_for_all_nobody_waits(models: dict[str, ModelState]) -> None:
    """Work-conserving: what waits is opened, what is open stays."""
    decision = place(models, SHARES, budget_bytes=None)

    assert set(decision.open) == {name for name, state in models.items() if state.waiting and not state.serving}
    assert decision.close == ()


def test_the_forecast_learns_what_follows_what() -> None:
    """And forgets at a rate: a habit that changed does not stay for ever."""
    habits = Transitions(half_life=8.0)
    assert habits.forecast("abc") == {"a": 0.0, "b": 0.0, "c": 0.0}
    for name in "abcabcabcabca":
        habits.began(name)
    assert max(habits.forecast("abc").items(), key=lambda item: item[1])[0] == "b"
    for name in "cacacacacacaca":
        habits.began(name)
    assert max(habits.forecast("bc").items(), key=lambda item: item[1])[0] == "c"


def test_work_begins_once_however_often_a_queue_fills_and_empties() -> None:
    """Two models that work at the same time follow each other once, not at every look."""
    looked, told = Transitions(pause_s=5.0), Transitions()
    for second in range(40):
        if second % 2:
            looked.has_work("a", float(second))
        if second >= 20:
            looked.has_work("b", float(second))
    looked.has_work("a", 60.0)
    for name in "aba":
        told.began(name)

    assert looked.forecast("abc") == told.forecast("abc")


def test_of_models_that_take_turns_the_one_whose_turn_is_over_is_needed_last() -> None:
    """The least recently used one is the next; what waits is needed at once."""
    habits = Transitions()
    for name in "abcdef" * 6:
        habits.began(name)

    soon = habits.soon("abcdef")

    assert sorted(soon, key=soon.__getitem__, reverse=True) == list("abcdef")
    assert habits.soon("abc", waiting="c")["c"] == math.inf


@given(st.lists(st.sampled_from("abcd"), max_size=3_000))
def test_a_forecast_is_a_distribution(began: list[str]) -> None:
    """Whatever was observed, also after its weights were rescaled."""
    habits = Transitions(half_life=2.0)
    for name in began:
        habits.began(name)

    likely = habits.forecast("abcd")

    assert all(0.0 <= share <= 1.0 for share in likely.values())
    assert abs(sum(likely.values()) - bool(began)) < 1e-9

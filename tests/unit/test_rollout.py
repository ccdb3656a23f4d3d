"""A rollout's steps are plain functions: each arrow of the picture in shared/rollout.py, and what never happens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeyard.shared.alias import Alias, Phase, Target
from codeyard.shared.errors import RolloutRefused, UnknownModel
from codeyard.shared.rollout import Readiness, Report, advance, begin, change, promote, roll_back, waits_for
from codeyard.shared.store.port import Store

OLD = Alias("coder", "coder-1", 4_096, shards=4, shards_per_tenant=2)
NEW = Target("coder-2", "/models/two", 8_192)


def ready(target: Target = NEW, rollout: str = "r") -> Report:
    return Report(rollout, Readiness.READY, target)


def begun(percent: int = 100) -> Alias:
    return begin(OLD, "/models/two", rollout_id="r", percent=percent, now=1.0)


def step(alias: Alias, workers: Mapping[str, Report | None], *, old_has_work: bool = True) -> Alias:
    return advance(alias, workers, old_has_work=old_has_work)


def phase(alias: Alias) -> Phase:
    assert alias.rollout is not None
    return alias.rollout.phase


def reason(alias: Alias) -> str:
    assert alias.rollout is not None
    return alias.rollout.reason


def test_the_alias_moves_only_when_every_worker_is_ready() -> None:
    """One that has not loaded it yet would take its jobs and make them wait, or never serve them."""
    alias = begun()

    assert step(alias, {}) == alias  # nobody serves it: nothing is known
    waiting = {"a": ready(), "b": Report("r", Readiness.LOADING), "c": None, "d": ready(rollout="another")}
    assert step(alias, waiting) == alias
    assert waits_for(alias, waiting) == ["b", "c", "d"]
    moved = step(alias, {"a": ready(), "b": ready()})

    assert (moved.revision, moved.location, moved.context_tokens) == ("coder-2", "/models/two", 8_192)
    assert (moved.shards, moved.shards_per_tenant) == (4, 2)
    assert phase(moved) is Phase.DRAIN


def test_the_old_revision_is_let_go_when_nothing_is_left_for_it() -> None:
    """Jobs pinned to it still have to run."""
    moved = step(begun(), {"a": ready()})

    assert step(moved, {"a": ready()}, old_has_work=True) == moved
    assert phase(step(moved, {"a": ready()}, old_has_work=False)) is Phase.DONE


def test_a_share_first_then_all() -> None:
    """`--percent 10` and later `--percent 100`."""
    canary = step(begun(percent=10), {"a": ready()})

    assert (phase(canary), canary.revision) == (Phase.CANARY, "coder-1")
    pinned = [canary.pin(f"{number}").revision for number in range(4_000)]
    assert 0.07 < pinned.count("coder-2") / 4_000 < 0.13
    assert step(canary, {"a": ready()}, old_has_work=False) == canary  # it waits to be told
    wider = promote(canary, 50)
    moved_on = [old for number, old in enumerate(pinned) if old == "coder-2" and wider.pin(f"{number}").revision != old]
    assert moved_on == []  # a job submitted again stays where it was
    assert (phase(promote(wider, 100)), promote(wider, 100).revision) == (Phase.DRAIN, "coder-2")


@pytest.mark.parametrize(
    "workers, says",
    [
        ({"a": ready(), "b": Report("r", Readiness.FAILED, error="no config.json")}, "worker b: no config.json"),
        ({"a": ready(), "b": ready(Target("coder-3", "/models/two"))}, "different weights there: coder-2, coder-3"),
        ({"a": ready(Target("coder-1", "/models/two"))}, "served already"),
    ],
)
def test_a_revision_that_cannot_be_served_never_takes_a_job(workers: dict[str, Report], says: str) -> None:
    """It is found out before, not by callers."""
    failed = step(begun(), workers)

    assert (phase(failed), failed.target) == (Phase.FAILED, OLD.target)
    assert says in reason(failed)
    assert {failed.pin(f"{number}") for number in range(100)} == {OLD.target}
    with pytest.raises(RolloutRefused, match="no rollout to go back from"):
        roll_back(failed, "again")


@pytest.mark.parametrize("steps", range(4))
def test_it_goes_back_in_one_write_from_everywhere(steps: int) -> None:
    """Whatever was reached, new jobs go to the old revision at once."""
    alias = begun(percent=10)
    if steps > 0:
        alias = step(alias, {"a": ready()})
    if steps > 1:
        alias = promote(alias, 100)
    if steps > 2:
        alias = step(alias, {"a": ready()}, old_has_work=False)

    back = roll_back(alias, "worse answers")

    assert (phase(back), back.target, reason(back)) == (Phase.ROLLED_BACK, OLD.target, "worse answers")
    assert {back.pin(f"{number}") for number in range(100)} == {OLD.target}
    assert phase(begin(back, "/models/three", rollout_id="s", percent=100, now=2.0)) is Phase.PREPARE


def test_one_rollout_at_a_time() -> None:
    """Two people must not move it under each other; the message says what to do."""
    with pytest.raises(RolloutRefused, match=r"rollout to /models/two at prepare.*roll it back"):
        begin(begun(), "/models/three", rollout_id="s", percent=100, now=2.0)
    for percent in (0, 101):
        with pytest.raises(RolloutRefused, match="1 to 100"):
            begin(OLD, "/models/two", rollout_id="r", percent=percent, now=1.0)
        with pytest.raises(RolloutRefused, match="1 to 100"):
            promote(begun(), percent)
    with pytest.raises(RolloutRefused, match="no rollout that could take"):
        promote(OLD, 50)


REPORTS = st.one_of(
    st.none(),
    st.builds(
        Report,
        st.sampled_from(["r", "s"]),
        st.just(Readiness.READY),
        st.sampled_from([NEW, Target("coder-3", "/models/two")]),
    ),
    st.builds(Report, st.just("r"), st.sampled_from([Readiness.LOADING, Readiness.FAILED])),
)
WORLDS = st.lists(st.tuples(st.dictionaries(st.sampled_from("abc"), REPORTS), st.booleans()), max_size=8)


@given(WORLDS, st.integers(1, 100))
def test_no_job_is_pinned_to_what_a_worker_cannot_serve(
    worlds: list[tuple[dict[str, Report | None], bool]], percent: int
) -> None:
    """Whatever workers report in whatever order: the new revision takes jobs only after a moment at which
    every live worker had it ready, and a rollout that is over stays so."""
    alias, was_ready = begun(percent), False
    for workers, old_has_work in worlds:
        reports = [report for report in workers.values() if report is not None and report.rollout == "r"]
        all_ready = len(reports) == len(workers) > 0 and {report.readiness for report in reports} == {Readiness.READY}
        was_ready |= all_ready and len({report.target for report in reports}) == 1
        before, alias = alias, step(alias, workers, old_has_work=old_has_work)
        if {alias.pin(f"{number}") for number in range(200)} != {OLD.target}:
            assert was_ready
        if phase(before).over:
            assert alias == before


class _Contended:
    """A store on which somebody else moves the alias between every read and write, some times."""

    def __init__(self, alias: Alias, times: int) -> None:
        self.alias, self.times = alias, times

    async def aliases(self) -> Mapping[str, Alias]:
        return {self.alias.name: self.alias}

    async def swap_alias(self, expected: Alias | None, new: Alias) -> Alias:
        if self.times:
            self.times -= 1
            self.alias = replace(self.alias, context_tokens=(self.alias.context_tokens or 0) + 1)
        if self.alias == expected:
            self.alias = new
        return self.alias


async def test_a_change_is_decided_anew_when_the_alias_moved() -> None:
    """Nobody's write is lost under another's."""
    store = cast(Store, _Contended(OLD, times=2))

    alias = await change(store, "coder", lambda now: replace(now, revision=f"{now.revision}+"))

    assert (alias.revision, alias.context_tokens) == ("coder-1+", 4_098)
    assert await store.aliases() == {"coder": alias}
    assert await change(store, "coder", lambda now: now) == alias
    with pytest.raises(UnknownModel):
        await change(store, "nobody", lambda now: now)

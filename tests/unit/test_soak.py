"""The soak's verdict: it must turn with the samples, or an hour was spent for nothing."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from loadtest import soak
from loadtest.soak import Plan, Report
from loadtest.soak_load import MIX, STEP, Kind, Ledger
from loadtest.soak_verdict import AT_REST, Growth, Sample, growths, quietest
from loadtest.soak_view import as_json, plot
from loadtest.soak_watch import Around

from codeyard.shared.errors import FleetError

MIB = 2**20
WARM_UP_S, END_S = 600.0, 3_600.0


def sample(at_s: float, *, rss: float = 100 * MIB, descriptors: int = 20, tasks: int | None = 40) -> Sample:
    return Sample(at_s, int(rss), int(rss / 2), descriptors, threads=4, tasks=tasks, cpu_s=at_s / 10)


def an_hour(of: Callable[[float], Sample]) -> list[Sample]:
    """A look every ten seconds."""
    return [of(at_s) for at_s in map(float, range(0, int(END_S), 10))]


def judged(samples: list[Sample], *, before: Sample | None = None, after: Sample | None = None) -> Mapping[str, Growth]:
    rests = ({"worker 0": before or sample(0)}, {"worker 0": after or before or sample(0)})
    rows = growths({"worker 0": samples}, rests, warm_up_s=WARM_UP_S, judged=["worker 0"])
    return {row.what: row for row in rows}


def test_what_stays_the_same_is_kept_in_every_measure() -> None:
    """Jobs come and go: descriptors and tasks move with them, and memory breathes."""
    rows = judged(
        an_hour(lambda at_s: sample(at_s, rss=(100 + at_s % 30 / 60) * MIB, descriptors=20 + int(at_s) % 70 // 10))
    )

    assert {row.kept for what, row in rows.items() if what != "unique_bytes"} == {True}
    assert rows["unique_bytes"].kept is None


def test_what_fills_up_during_the_warm_up_is_not_growth() -> None:
    """Caches, pools and code that is imported late."""
    rows = judged(an_hour(lambda at_s: sample(at_s, rss=(50 + min(at_s, WARM_UP_S) / 12) * MIB)))

    assert rows["rss_bytes"].kept
    assert rows["rss_bytes"].share == 0


def test_memory_that_rises_by_three_percent_is_found_and_by_one_percent_is_not() -> None:
    """Over the time that is judged, in a straight line, as a leak per job does."""
    rises = [
        judged(an_hour(lambda at_s, by=by: sample(at_s, rss=100 * MIB * (1 + by * at_s / END_S))))  # type: ignore[misc]
        for by in (0.03, 0.01)
    ]

    assert [rows["rss_bytes"].kept for rows in rises] == [False, True]
    assert rises[0]["rss_bytes"].line_share_per_hour == pytest.approx(0.03, rel=0.05)


def test_memory_that_falls_back_in_the_last_minutes_is_found_by_the_line() -> None:
    """The last window alone would praise a process that was lucky at the end."""

    def climbing(at_s: float) -> Sample:
        return sample(at_s, rss=100 * MIB * (1 + (0.2 * at_s / END_S if at_s < 0.9 * END_S else 0.0)))

    row = judged(an_hour(climbing))["rss_bytes"]

    assert row.share < 0 < 0.02 < row.line_share
    assert not row.kept


def test_descriptors_that_grow_beyond_the_noise_under_load_are_found() -> None:
    """One for every hundredth job, say."""
    rows = judged(an_hour(lambda at_s: sample(at_s, descriptors=20 + int(at_s) // 300)))

    assert rows["descriptors"].kept is False
    assert rows["tasks"].kept


@pytest.mark.parametrize("more", [AT_REST, AT_REST + 1])
def test_a_leak_that_hides_among_the_jobs_in_flight_is_found_at_rest(more: int) -> None:
    """Under load forty tasks come and go; at rest three more than an hour ago are three too many."""
    busy = an_hour(lambda at_s: sample(at_s, tasks=40 + int(at_s) * 7 % 400 // 10))

    rows = judged(busy, before=sample(0, tasks=12), after=sample(0, tasks=12 + more))

    assert rows["tasks"].kept is (more <= AT_REST)
    assert rows["tasks"].rest == (12, 12 + more)


def test_servers_are_reported_and_not_judged() -> None:
    """They have no tasks of ours, and their memory is theirs."""
    rows = growths(
        {"redis": an_hour(lambda at_s: sample(at_s, rss=100 * MIB + at_s * MIB, tasks=None))},
        ({}, {}),
        warm_up_s=WARM_UP_S,
        judged=["worker 0"],
    )

    assert {row.kept for row in rows} == {None}
    assert "tasks" not in {row.what for row in rows}


def test_a_verdict_on_too_few_samples_is_refused() -> None:
    """Nobody shall read "kept" from nine numbers."""
    with pytest.raises(ValueError, match="too few"):
        judged([sample(WARM_UP_S + n) for n in range(9)])


def test_the_quietest_look_counts_at_rest() -> None:
    """A connection that is about to close is no leak."""
    looks = [sample(1, descriptors=22), sample(2, descriptors=20), sample(3, descriptors=21)]

    assert quietest(looks).at_s == 2


def test_a_full_round_of_the_mix_has_every_kind_in_its_share() -> None:
    """A step that shares a factor with the length would leave kinds out."""
    round_of = [MIX[number * STEP % len(MIX)] for number in range(len(MIX))]

    assert sorted(round_of) == sorted(MIX)
    assert set(MIX) == set(Kind)


def test_a_ledger_is_balanced_only_when_every_job_ended_as_it_had_to() -> None:
    """A job that is still under way is not yet accounted for; a wrong one never is."""
    ledger = Ledger()
    ledger.sent[Kind.POLLED] = 3
    ledger.ended[Kind.POLLED] = 2
    assert (ledger.in_flight, ledger.balanced) == (1, False)

    ledger.ended[Kind.POLLED] += 1
    assert ledger.balanced

    ledger.sent[Kind.CHAT], ledger.num_wrong = 1, 1
    assert (ledger.in_flight, ledger.balanced) == (0, False)


def test_a_report_is_good_only_if_nothing_grew_and_shows_in_json_and_picture(tmp_path: Path) -> None:
    """The exit status is made of it."""
    names = ("gateway", "worker 0", "redis", "rabbitmq")
    samples = {name: an_hour(sample) for name in names}
    rest = {name: sample(0) for name in names}
    rows = growths(samples, (rest, rest), warm_up_s=WARM_UP_S, judged=["gateway", "worker 0"])
    around = [Around(one.at_s, 5, 1, 0, MIB, 100, 7, 6) for one in samples["redis"]]
    good = Report(Plan(60, WARM_UP_S, 20, 10, profile=False), "2 cores", 0.1, Ledger(), rows, samples, around)
    bad = replace(good, growths=[*rows, replace(rows[0], kept=False)])

    plot(good, tmp_path / "soak.png")
    told = json.loads(json.dumps(as_json(bad)))

    assert (good.good, bad.good, told["good"]) == (True, False, False)
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert set(told["samples"]) == set(names)
    assert told["growths"][0]["what"] == "rss_bytes"


def test_a_fleet_that_does_not_keep_up_ends_the_soak_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said inside a group of tasks inside another; nobody shall read a traceback for it."""

    async def gives_up(*_: object) -> Report:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fails())
        raise AssertionError("the group lets it through")

    async def fails() -> None:
        raise FleetError("500 jobs are in flight")

    monkeypatch.setattr(soak, "_told", gives_up)

    ended = CliRunner().invoke(soak.main, ["--minutes", "10"])

    assert ended.exit_code == 1
    assert ended.output == "Error: 500 jobs are in flight\n"

"""The simulator: the engine model against its measurement, the fleet's bookkeeping, traces, reports, the command."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from codeyard.shared.errors import SettingsError
from codeyard.shared.job import Lane
from codeyard.shared.settings import Promise
from codeyard.worker.simulation.calibrate import calibrate
from codeyard.worker.simulation.checks import Check, over_seeds
from codeyard.worker.simulation.cli import simulate
from codeyard.worker.simulation.compare import simulate_one, simulate_replay
from codeyard.worker.simulation.engine import NEVER, SimEngine, SimJob
from codeyard.worker.simulation.latency import LatencyTable, load_table
from codeyard.worker.simulation.many import Task, sources
from codeyard.worker.simulation.metrics import Histogram, LaneStats, RunStats
from codeyard.worker.simulation.plan import Loss
from codeyard.worker.simulation.policies import known_policies, policy
from codeyard.worker.simulation.report import cells, run_as_json, totals, verdicts
from codeyard.worker.simulation.traces import Stream, Trace, arrivals, load_scenarios, replay, run_length_s


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return load_table()


@pytest.fixture(scope="module")
def steady() -> Trace:
    return load_scenarios().traces["steady"]


def small(table: LatencyTable, trace: Trace, **more: object) -> RunStats:
    plan: dict[str, object] = {"policy_name": "adaptive", "workers": 2, "load": 0.95, "jobs": 800, "seed": 7, **more}
    return simulate_one("steady", trace, table, **plan)  # type: ignore[arg-type]  # keywords of one call, checked there


def sim_job(number: int, *, prompt: int = 100, completion: int = 10, lane: Lane = Lane.BULK) -> SimJob:
    return SimJob(number, 0.0, lane, "t", prompt, completion, 512)


def drain(engine: SimEngine, refill: list[SimJob] | None = None) -> dict[str, tuple[float, float]]:
    """Run until idle. Returns when each job had its first and its last token."""
    firsts: dict[str, float] = {}
    ends: dict[str, tuple[float, float]] = {}
    while engine.due_s < NEVER:
        now_s = engine.due_s
        first, finished = engine.advance(now_s)
        for job in first:
            firsts.setdefault(job.id, now_s)
        for job in finished:
            ends[job.id] = (firsts[job.id], now_s)
        if refill:
            engine.submit([refill.pop()], now_s)
        engine.resume(now_s)
    return ends


# The engine ----------------------------------------------------------------------------------------


def test_the_simulated_engine_is_the_measured_one(table: LatencyTable) -> None:
    """Closed loops at every measured window: time per token within 5 %, tokens per second within 15 %."""
    for loop in calibrate(table):
        assert abs(loop.errors["per_token"]) <= 0.05, loop.measured.window
        assert abs(loop.errors["tokens_s"]) <= 0.15, loop.measured.window
        assert abs(loop.errors["first_token"]) <= 0.45, loop.measured.window


def test_a_job_alone_takes_its_prefill_and_a_step_for_each_token(table: LatencyTable) -> None:
    """The model's formula, by hand."""
    engine = SimEngine(table, by_priority=False)
    engine.submit([sim_job(0, prompt=1_000, completion=11)], 0.0)

    first_s, end_s = drain(engine)["0"]

    assert first_s == pytest.approx(1_000 * table.prefill_s)
    assert end_s - first_s == pytest.approx(10 * table.decode_s[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 300)), min_size=1, max_size=60))
def test_every_job_finishes_once_with_all_its_tokens(jobs: list[tuple[int, int]]) -> None:
    """Whatever the lengths, prompts longer than a step included: tokens are counted once."""
    engine = SimEngine(load_table(), by_priority=True)
    made = [sim_job(n, prompt=prompt, completion=completion) for n, (prompt, completion) in enumerate(jobs)]
    engine.submit(made[: len(made) // 2], 0.0)
    ends = drain(engine, made[len(made) // 2 :]) if made[len(made) // 2 :] else drain(engine)

    if len(made) > 1:
        assert len(ends) == len(made)
        assert engine.tokens == sum(job.completion for job in made)
    assert engine.running == 0
    assert engine.kv_used() == 0.0


def test_an_aborted_job_keeps_what_it_generated_and_frees_its_slot(table: LatencyTable) -> None:
    """Preemption: abort, submit again later, and the tokens add up to the completion."""
    engine = SimEngine(table, by_priority=False)
    job = sim_job(0, prompt=100, completion=100)
    engine.submit([job], 0.0)
    first_s = engine.due_s
    engine.advance(first_s)
    engine.resume(first_s)

    job.done = engine.abort(job, first_s + 40.5 * table.decode_s[1])
    assert job.done == 41
    assert engine.running == 0
    assert engine.abort(job, 1.0) == 0

    drain(engine)
    now_s = 10.0
    engine.submit([job], now_s)
    ends = drain(engine)
    assert ends["0"][1] - ends["0"][0] == pytest.approx((100 - 41 - 1) * table.decode_s[1])
    assert engine.tokens == 100


def test_beyond_the_slots_the_urgent_wait_less_only_where_priorities_are_on(table: LatencyTable) -> None:
    """The two base lines: first come first served, and vLLM's priorities."""
    waits = {}
    for by_priority in (False, True):
        engine = SimEngine(table, by_priority=by_priority)
        flood = [sim_job(n, completion=50) for n in range(2 * table.slots)]
        engine.submit([*flood, sim_job(9_999, lane=Lane.INTERACTIVE)], 0.0)
        waits[by_priority] = drain(engine)["9999"][0]

    assert waits[True] < 0.2 * waits[False]


def test_a_full_kv_cache_throws_jobs_out_and_they_still_finish(table: LatencyTable) -> None:
    """Preemption by recomputation, as the engine does it: slow, never lost."""
    fields = {name: getattr(table, name) for name in table.__slots__}
    engine = SimEngine(LatencyTable(**{**fields, "kv_tokens": 3_000}), by_priority=False)
    engine.submit([sim_job(n, prompt=400, completion=300) for n in range(6)], 0.0)

    ends = drain(engine)

    assert len(ends) == 6


# The fleet -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(known_policies()))
def test_no_job_is_lost_under_any_policy(name: str, table: LatencyTable, steady: Trace) -> None:
    """Arrived = finished, or judged at the cut; and tokens are those of the engines."""
    run = small(table, steady, policy_name=name, load=0.5)

    arrived = sum(lane.arrived for lane in run.lanes.values())
    finished = sum(lane.finished for lane in run.lanes.values())
    assert 700 < arrived < 900
    assert 0 < finished <= arrived
    assert run.busy_share <= 1.0 + 1e-9
    assert run.samples[-1].tokens == pytest.approx(sum(lane.tokens for lane in run.lanes.values()), rel=0.15)


def test_the_same_seed_gives_the_same_run_and_another_does_not(table: LatencyTable, steady: Trace) -> None:
    """A comparison is only fair if nothing else varies."""

    def outcome(seed: int) -> dict[str, object]:
        found = run_as_json(small(table, steady, seed=seed))
        del found["simulated_in_s"]
        return found

    assert outcome(3) == outcome(3)
    assert outcome(3) != outcome(4)


def test_a_lost_workers_jobs_are_finished_by_the_others(table: LatencyTable) -> None:
    """They return to the queue when the lease is over; everything that arrived early is done in the end."""
    trace = Trace(
        what="early", promises={}, streams=(Stream(lane=Lane.BULK, share=1.0, shape=((0.1, 1.0), (1.0, 0.0))),)
    )
    calm = small(table, trace, jobs=300, load=0.05, workers=3)
    hit = small(table, trace, jobs=300, load=0.05, workers=3, losses=(Loss(0.5, 2),))

    assert calm.lanes[Lane.BULK].finished == calm.lanes[Lane.BULK].arrived
    assert hit.lanes[Lane.BULK].finished == calm.lanes[Lane.BULK].finished
    assert (hit.lanes[Lane.BULK].latency.quantile(0.99) or 0) > 3.0 + (calm.lanes[Lane.BULK].latency.quantile(0.5) or 0)


def test_an_interactive_trickle_keeps_its_promise_only_under_the_policy(table: LatencyTable) -> None:
    """The reason for all this, small: a flood straight to the engine against the same flood scheduled."""
    flood = load_scenarios().traces["flood"]
    ours = simulate_one("flood", flood, table, policy_name="adaptive", workers=2, load=1.3, jobs=2_000, seed=5)
    fcfs = simulate_one("flood", flood, table, policy_name="fcfs", workers=2, load=1.3, jobs=2_000, seed=5)

    assert ours.lanes[Lane.INTERACTIVE].kept_share >= 0.99
    assert fcfs.lanes[Lane.INTERACTIVE].kept_share <= 0.5
    assert ours.tokens_s >= 0.8 * fcfs.tokens_s


def test_an_unknown_policy_is_named_in_the_error(table: LatencyTable, steady: Trace) -> None:
    """With what there is to choose from."""
    with pytest.raises(SettingsError, match=r"no policy 'best'.*adaptive"):
        policy("best", steady, table)


# Traces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(load_scenarios().traces))
def test_a_trace_arrives_in_order_at_the_asked_rate_and_mix(name: str, table: LatencyTable) -> None:
    """Load means what it says, whatever the shape."""
    trace = load_scenarios().traces[name]
    length_s = run_length_s(trace, table, workers=10, load=0.9, jobs=4_000)
    jobs = list(arrivals(trace, table, jobs=4_000, length_s=length_s, seed=1))

    assert len(jobs) == pytest.approx(4_000, rel=0.08)
    assert all(one.arrived_s <= other.arrived_s for one, other in pairwise(jobs))
    assert jobs[-1].arrived_s <= length_s
    assert len({job.id for job in jobs}) == len(jobs)
    for lane in Lane:
        share = sum(stream.share for stream in trace.streams if stream.lane is lane)
        assert sum(job.lane is lane for job in jobs) / len(jobs) == pytest.approx(share, abs=0.03)


def test_tuning_and_report_seeds_are_different() -> None:
    """The table reports seeds that nobody tuned on."""
    scenarios = load_scenarios()

    assert not {*scenarios.tuning_seeds} & {*scenarios.report_seeds}
    assert len(scenarios.report_seeds) == 10


def test_a_recorded_trace_is_replayed(tmp_path: Path, table: LatencyTable, steady: Trace) -> None:
    """CSV in, the same jobs out, in lanes and for tenants as recorded."""
    path = tmp_path / "mine.csv"
    path.write_text(
        "arrived_s,lane,tenant,prompt_tokens,completion_tokens\n0.0,interactive,a,100,20\n0.5,bulk,b,50,10\n"
    )

    run = simulate_replay("mine", steady, table, replay(path), policy_name="adaptive", workers=1, length_s=5.0)

    assert {name: stats.tokens for name, stats in run.tenants.items()} == {"a": 20, "b": 10}


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ("0.0,urgent,a,1,1\n", "job 1"),
        ("1.0,bulk,a,1,1\n0.5,bulk,a,1,1\n", "job 2: arrives before"),
        ("0.0,bulk,a,many,1\n", "job 1"),
    ],
)
def test_a_bad_line_of_a_recording_is_named(rows: str, complaint: str, tmp_path: Path) -> None:
    """The person with the file wants to know where to look."""
    path = tmp_path / "bad.csv"
    path.write_text("arrived_s,lane,tenant,prompt_tokens,completion_tokens\n" + rows)

    with pytest.raises(SettingsError, match=complaint):
        list(replay(path))


def test_a_latency_table_that_is_none_is_refused(tmp_path: Path) -> None:
    """By name, before anything runs."""
    path = tmp_path / "table.json"
    path.write_text("{}")

    with pytest.raises(SettingsError, match=r"table\.json"):
        load_table(path)


# Numbers -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_right_within_two_percent(values: list[float], share: float) -> None:
    """Memory that does not grow costs that much, and no more."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)

    exact = sorted(values)[int(share * (len(values) - 1))]
    assert histogram.quantile(share) == pytest.approx(exact, rel=0.021)


def test_a_job_cut_off_is_judged_only_by_what_is_certain() -> None:
    """Unfinished is not broken; late already is."""
    promise, stats = Promise(first_token_s=1.0, per_token_s=0.1), LaneStats()
    waits, late, started = sim_job(0), sim_job(1), sim_job(2)
    waits.arrived_s, late.arrived_s, started.arrived_s = 9.5, 5.0, 9.0
    started.first_s = 9.2
    stats.cut_off(waits, 0, 10.0, promise)
    stats.cut_off(late, 0, 10.0, promise)
    stats.cut_off(started, 9, 10.0, promise)

    assert (stats.kept, stats.broken) == (1, 1)
    assert stats.kept_tokens == 9


def test_a_run_that_breaks_its_promises_scores_nothing(table: LatencyTable, steady: Trace) -> None:
    """However many tokens it made."""
    run = small(table, steady)
    run.lanes[Lane.INTERACTIVE].broken = run.lanes[Lane.INTERACTIVE].kept

    assert run.tokens_s > 0
    assert run.score == 0.0


def test_cells_average_over_seeds_and_compare_with_the_best_fixed_window(table: LatencyTable, steady: Trace) -> None:
    """The verdicts are computed from the runs, never typed in."""
    runs = [
        small(table, steady, policy_name=name, seed=seed, load=0.5)
        for name in ("adaptive", "fixed-64", "fixed-8")
        for seed in (1, 2)
    ]

    (cell,) = cells(runs)

    assert cell.best_fixed == "fixed-64"
    assert cell.scores["adaptive"] == pytest.approx((runs[0].score + runs[1].score) / 2)
    assert cell.of_best_fixed == pytest.approx(cell.scores["adaptive"] / cell.scores["fixed-64"])
    assert totals([cell]) == cell.scores
    assert len(verdicts([cell])) == 2


# The command ---------------------------------------------------------------------------------------

SMALL = ["--workers", "1", "--jobs", "150"]


def test_the_command_prints_json_that_holds_every_run() -> None:
    """And nothing else on standard output."""
    answer = CliRunner().invoke(simulate, [*SMALL, "--policy", "adaptive", "--policy", "fixed-64", "--json"])

    body = json.loads(answer.stdout)
    assert answer.exit_code == 0
    assert [run["policy"] for run in body["runs"]] == ["adaptive", "fixed-64"]
    assert "simulated" in body["what"]


def test_the_command_prints_tables_with_a_row_for_each_lane_and_tenant() -> None:
    """What a person asks first: how many, how long, for whom."""
    answer = CliRunner().invoke(simulate, [*SMALL, "--trace", "greedy", "--tenants"])

    assert answer.exit_code == 0
    for word in ("Runs", "Lanes", "standard", "bulk", "Tenants", "standard-0", "greedy"):
        assert word in answer.stdout


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--trace", "quiet"], "no trace 'quiet'"),
        (["--policy", "best"], "no policy 'best'"),
        (["--loss", "soon"], "AT_S:WORKERS"),
        (["--trace", "gone.csv"], "no file gone.csv"),
    ],
)
def test_the_command_explains_what_it_cannot_do(arguments: list[str], complaint: str) -> None:
    """One line, exit code 1, no traceback."""
    answer = CliRunner().invoke(simulate, [*SMALL, *arguments])

    assert answer.exit_code == 1
    assert complaint in answer.output


def test_the_command_lists_and_calibrates() -> None:
    """`--list` names every trace and policy; `--calibrate` shows each measured window."""
    listed = CliRunner().invoke(simulate, ["--list"]).stdout
    calibrated = json.loads(CliRunner().invoke(simulate, ["--calibrate", "--json"]).stdout)

    assert all(name in listed for name in [*load_scenarios().traces, *known_policies()])
    assert [row["window"] for row in calibrated] == [1, 4, 16, 64, 256, 512]


def test_a_kept_run_is_not_made_again_and_others_are(tmp_path: Path) -> None:
    """A long comparison goes on where it stopped: the second answer holds the first one's runs, timing and all."""
    asked = [*SMALL, "--json", "--keep", str(tmp_path)]
    first = json.loads(CliRunner().invoke(simulate, [*asked, "--policy", "fixed-64"]).stdout)
    again = json.loads(CliRunner().invoke(simulate, [*asked, "--policy", "fixed-64", "--policy", "aimd"]).stdout)

    assert again["runs"][0] == first["runs"][0]
    assert [run["policy"] for run in again["runs"]] == ["fixed-64", "aimd"]
    assert len(list(tmp_path.iterdir())) == 2


def test_runs_in_several_processes_are_those_of_one(tmp_path: Path) -> None:
    """In the order they were asked for, whichever ends first."""

    def runs(*more: str) -> list[dict[str, object]]:
        asked = [*SMALL, "--json", "--policy", "adaptive", "--policy", "fixed-8", *more]
        found: list[dict[str, object]] = json.loads(CliRunner().invoke(simulate, asked).stdout)["runs"]
        return [{name: value for name, value in run.items() if name != "simulated_in_s"} for run in found]

    assert runs() == runs("--processes", "2")


def test_what_is_left_is_said_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of an hour's run says how far it is."""
    monkeypatch.setattr("codeyard.worker.simulation.cli.SAY_EVERY_S", 0.0)

    answer = CliRunner().invoke(simulate, [*SMALL, "--policy", "fixed-8", "--policy", "fixed-64", "--json"])

    assert "1 of 2 runs" in answer.stderr
    assert "2 of 2 runs" in answer.stderr


def test_a_runs_key_follows_its_own_policy_and_all_that_it_imports() -> None:
    """A change to ours makes ours again, and leaves the others'; a change to the simulator makes all again."""
    ours, fixed = (set(sources(f"codeyard.worker.scheduling.{name}")) for name in ("adaptive", "weighted"))

    assert {"codeyard.worker.scheduling.tenants", "codeyard.worker.scheduling.select"} <= ours
    assert "codeyard.worker.scheduling.adaptive" not in fixed
    for common in ("simulation.fleet", "simulation.engine", "simulation.policies", "scheduling.lanes"):
        assert f"codeyard.worker.{common}" in ours & fixed


def test_a_runs_key_holds_everything_it_was_asked_with(table: LatencyTable, steady: Trace) -> None:
    """A result is never taken for that of another run."""
    task = Task("steady", steady, table, "adaptive", 2, 0.9, 100, 1)
    others = [
        replace(task, seed=2),
        replace(task, policy="fixed-8"),
        replace(task, load=0.8),
        replace(task, jobs=101),
        replace(task, losses=(Loss(1.0, 1),)),
        replace(task, trace=steady.model_copy(update={"promises": {}})),
        replace(task, table=replace(table, prefill_s=2 * table.prefill_s)),
    ]

    assert len({task.key(), *(other.key() for other in others)}) == 1 + len(others)
    assert replace(task).key() == task.key()


def test_a_check_under_several_seeds_is_judged_by_its_mean_and_tells_its_spread() -> None:
    """The worst of nineteen tenants under one seed is an anecdote."""
    under = [
        [Check("ratio", value, "<= 1.3", value <= 1.3), Check("share", value, ">= 1.4", False)] for value in (1, 2)
    ]

    ratio, share = over_seeds(under)

    assert (ratio.name, ratio.value, ratio.kept) == ("ratio, mean of 2 seeds (1.00 to 2.00)", 1.5, False)
    assert share.kept
    assert over_seeds(under[:1]) == under[0]

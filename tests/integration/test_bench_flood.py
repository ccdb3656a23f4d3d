"""The flood comparison itself: tiny, on the simulated engine, so that it works when somebody needs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loadtest.flood_report import OFF, ON, markdown, percentile, summarize, targets
from loadtest.flood_side import SideRun, Stream
from loadtest.flood_trace import flood, interactive_until_s

from codeyard.shared.job import Lane

ROOT = Path(__file__).parents[2]
TINY = ("--quick", "--engine", "simulated", "--slots", "8", "--bulk", "40", "--interactive", "6", "--seconds", "1.5")


@pytest.mark.process
def test_both_sides_run_the_same_flood_and_every_job_is_in_the_figures(
    rabbitmq_url: str, redis_url: str, tmp_path: Path
) -> None:
    """Figures of a run in which jobs were lost or not read would be worth nothing."""
    found, table = tmp_path / "flood.json", tmp_path / "flood.md"

    ended = _bench(rabbitmq_url, redis_url, *TINY, "--json", str(found), "--markdown", str(table))

    assert ended.returncode == 0, ended.stdout + ended.stderr
    body = json.loads(found.read_text())
    trace = flood(bulk=40, interactive=6, seconds=1.5, seed=1)
    assert [side["jobs"] for side in body["sides"].values()] == [len(trace)] * 2
    for side in body["sides"].values():
        assert side["not_succeeded"] == 0
        assert side["engine"].startswith("simulated")
        assert 0 < side["worker_first_p99_s"] <= side["first_p99_s"] + 0.001  # the log has whole milliseconds
        assert side["per_token_p50_s"] > 0
        assert side["bulk_tokens_s"] > 0
    assert body["sides"][ON]["bulk_tokens"] == body["sides"][OFF]["bulk_tokens"]
    assert len(body["targets"]) == 4
    for aim in body["targets"]:
        assert aim["name"] in table.read_text()
        assert aim["name"] in ended.stdout


@pytest.mark.process
def test_a_flood_that_is_not_worked_off_in_time_ends_the_run_and_says_so(
    rabbitmq_url: str, redis_url: str, tmp_path: Path
) -> None:
    """A measurement that hangs, or reports half of its jobs, is worse than none."""
    ended = _bench(rabbitmq_url, redis_url, *TINY, "--limit", "0.2", "--json", str(tmp_path / "flood.json"))

    assert ended.returncode == 1
    assert "not worked off within 0.2 s" in ended.stderr
    assert not (tmp_path / "flood.json").exists()


def test_the_trace_is_a_flood_over_a_trickle_and_the_same_every_time() -> None:
    """Sides that got different jobs could not be compared."""
    trace = flood(bulk=300, interactive=60, seconds=30.0, seed=3)
    bulk = [job.at_s for job in trace if job.lane is Lane.BULK]

    assert trace == flood(bulk=300, interactive=60, seconds=30.0, seed=3)
    assert trace != flood(bulk=300, interactive=60, seconds=30.0, seed=4)
    assert trace == sorted(trace, key=lambda job: job.at_s)
    assert max(bulk) <= 10.0
    assert 14.0 < interactive_until_s(trace) <= 18.0
    assert len({job.prompt for job in trace}) == len(trace)


def test_a_target_is_kept_only_by_what_was_seen() -> None:
    """The verdict is what people will read: it must turn with the figures, and on none say missed."""
    off = _run(OFF, first_s=5.0, chunks_s=[0.1] * 20, bulk_tokens=1_000)
    good = _run(ON, first_s=1.0, chunks_s=[0.2] * 20, bulk_tokens=850)
    slow = _run(ON, first_s=1.1, chunks_s=[0.2] * 18 + [0.3] * 2, bulk_tokens=840)
    silent = _run(ON, first_s=None, chunks_s=[], bulk_tokens=0)

    assert _kept(off, good) == [True, True, True, True]
    assert _kept(off, slow) == [False, False, False, False]
    assert _kept(off, silent) == [False, False, False, False]


def test_percentiles_are_values_that_were_seen() -> None:
    """An average of neighbours would soften the one late job that p99 is about."""
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert percentile([1.0, 9.0], 0.99) == 9.0
    assert percentile([], 0.5) is None


def _run(side: str, *, first_s: float | None, chunks_s: list[float], bulk_tokens: int) -> SideRun:
    """One interactive job with these gaps, and bulk that ended at ten seconds."""
    [planned, *_] = [job for job in flood(bulk=1, interactive=20, seconds=5.0, seed=1) if job.lane is Lane.INTERACTIVE]
    run = SideRun(side, "simulated", load_before=0.0, start_s=1.0, num_jobs=2)
    stream = Stream(planned)
    if first_s is not None:
        stream.chunks = [(first_s + sum(chunks_s[:n]), 4) for n in range(len(chunks_s) + 1)]
    run.streams.append(stream)
    run.bulk_ends, run.last_end_s = [(10.0, bulk_tokens)], 10.0
    return run


def _kept(off: SideRun, on: SideRun) -> list[bool]:
    summaries = {run.side: summarize(run.side, [run], interactive_s=10.0) for run in (on, off)}
    aims = targets(summaries)
    assert markdown(summaries, aims, []).count("**missed**") == sum(not aim.kept for aim in aims)
    return [aim.kept for aim in aims]


def _bench(broker_url: str, store_url: str, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "loadtest.bench_flood", "--broker", broker_url, "--store", store_url, *options],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},  # no line of the tables is broken
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

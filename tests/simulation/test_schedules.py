"""The protocol holds in every schedule: nothing lost, nothing twice, whatever dies in between.

`pytest tests/simulation --seed N` runs one of them alone and prints the shortest trace of what goes wrong.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.simulation import world
from support.simulation.many import Report
from support.simulation.plan import NUM_JOBS, NUM_WORKERS, draw
from support.simulation.shrink import explain

pytestmark = pytest.mark.timeout(600)  # the machine may be busy; no duration is checked

LONG_SCHEDULES = 20_000
TWICE = range(12)  # seeds run in processes that hash differently

FINGERPRINT = """
import hashlib, sys
from support.simulation import world
from support.simulation.plan import draw
for seed in range(int(sys.argv[1]), int(sys.argv[2])):
    verdict = world.run(draw(seed), trace=True)
    print(hashlib.sha256("\\n".join(verdict.trace).encode()).hexdigest(), verdict.num_callbacks)
"""


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given: int = request.config.getoption("--seed")
    return given


def test_the_schedule_of_a_seed_holds(seed: int) -> None:
    """How a failure elsewhere is looked at: shrunk, with its trace."""
    verdict = world.run(draw(seed))

    assert not verdict.violations, explain(draw(seed))


def test_every_schedule_of_ci_holds(schedules: Report) -> None:
    """Issue 6: two thousand schedules for every change."""
    assert schedules.num_schedules == 2_000
    assert not schedules.failing, _told(schedules)


@pytest.mark.long
@pytest.mark.timeout(3_000)
def test_twenty_thousand_schedules_hold(run_schedules: Callable[[range], Report]) -> None:
    """Issue 6: the rarer interleavings, in `make test-long`."""
    report = run_schedules(range(LONG_SCHEDULES))

    assert report.num_schedules == LONG_SCHEDULES
    assert not report.failing, _told(report)


def test_a_schedule_has_three_workers_ten_jobs_and_a_fault(schedules: Report) -> None:
    """What a schedule is may not shrink unseen."""
    plans = [draw(seed) for seed in range(200)]

    assert all(plan.num_workers >= NUM_WORKERS >= 3 for plan in plans)
    assert all(len(plan.jobs) >= NUM_JOBS >= 10 for plan in plans)
    assert all(world.run(plan).num_faults for plan in plans[:40])
    assert schedules.num_faults >= schedules.num_schedules


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    """Else a seed that failed on one machine is no use on another."""
    here = [_fingerprint(seed) for seed in TWICE]

    assert [_fingerprint(seed) for seed in TWICE] == here
    assert _elsewhere("1") == here
    assert _elsewhere("2") == here


def _fingerprint(seed: int) -> str:
    verdict = world.run(draw(seed), trace=True)
    trace = "\n".join(verdict.trace)
    return f"{hashlib.sha256(trace.encode()).hexdigest()} {verdict.num_callbacks}"


def _elsewhere(hash_seed: str) -> list[str]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, str(TWICE.start), str(TWICE.stop)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def _told(report: Report) -> str:
    """The first failing seed in its shortest form, and the names of the others."""
    [first, *others] = sorted(report.failing)
    return f"seeds {[first, *others]} fail; replay one with: pytest tests/simulation --seed {first}\n" + explain(
        draw(first)
    )

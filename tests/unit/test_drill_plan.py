"""What a drill plans follows from its seed, and every kind of fault gets its turn."""

from collections import Counter
from pathlib import Path

import pytest

from codeyard.cli.drill.command import KINDS
from codeyard.cli.drill.plan import FAILING, FaultKind, planned_job, schedule
from codeyard.cli.drill.producing import Gate
from codeyard.shared.record import State


def test_the_command_names_every_kind_of_fault() -> None:
    """Its list is kept apart so that `--help` need not import the fleet."""
    assert list(KINDS) == [kind.value for kind in FaultKind]


def test_the_same_seed_plans_the_same_drill_and_another_seed_another() -> None:
    """A drill that failed must be repeatable as far as chance goes."""
    assert schedule(7, 40, list(FaultKind)) == schedule(7, 40, list(FaultKind))
    assert schedule(7, 40, list(FaultKind)) != schedule(8, 40, list(FaultKind))
    assert planned_job(7, 3, can_fail=True) == planned_job(7, 3, can_fail=True)
    assert planned_job(7, 3, can_fail=True).prompt != planned_job(8, 3, can_fail=True).prompt


@pytest.mark.parametrize("num_faults", [1, 11, 25, 200])
def test_faults_are_in_order_within_the_drill_and_spread_over_all_kinds(num_faults: int) -> None:
    """None may wait for a share of jobs that is never reached, and none may be left out by chance."""
    faults = schedule(1, num_faults, list(FaultKind))

    times = [fault.at for fault in faults]
    counts = Counter(fault.kind for fault in faults)
    assert times == sorted(times)
    assert 0 < times[0] <= times[-1] < 0.97
    assert len(faults) == num_faults
    assert max(counts.values()) - min(counts[kind] for kind in FaultKind) <= 1


def test_a_fleet_without_faults_has_an_empty_schedule() -> None:
    """A drill may also be run to see that nothing is wrong without any."""
    assert schedule(1, 5, []) == []
    assert schedule(1, 0, list(FaultKind)) == []


def test_jobs_of_every_sort_are_planned() -> None:
    """Streams, failures, cancels and deadlines: each end of a job's life is under fire."""
    jobs = [planned_job(1, number, can_fail=True) for number in range(1_000)]

    assert len({job.prompt for job in jobs}) == 1_000
    assert {job.lane for job in jobs} == {"interactive", "standard", "bulk"}
    expected = Counter(job.expected for job in jobs)
    assert {frozenset({State.SUCCEEDED}), frozenset({State.FAILED})} <= set(expected)
    assert {State.CANCELLED, State.EXPIRED} <= set().union(*expected)
    assert 0 < sum(job.stream for job in jobs) < 1_000
    assert {job.prompt.startswith(FAILING) for job in jobs if job.expected == {State.FAILED}} == {True}


def test_where_the_engine_knows_no_faults_no_job_is_to_fail() -> None:
    """Somebody's own fleet, and real engines."""
    jobs = [planned_job(1, number, can_fail=False) for number in range(1_000)]

    assert not any(State.FAILED in job.expected for job in jobs)
    assert not any(FAILING in job.prompt for job in jobs)


def test_producers_go_only_as_far_as_the_gate_is_open(tmp_path: Path) -> None:
    """Else all is submitted before the last faults come, and they break a fleet that has nothing to do."""
    gate = Gate(tmp_path / "gate", num_jobs=200)
    jobs = [planned_job(1, number, can_fail=True) for number in range(200)]

    gate.open_to(0.25)
    some = sum(gate.lets_through(job) for job in jobs)
    gate.open_to(1.0)

    assert some == 50
    assert all(gate.lets_through(job) for job in jobs)

"""The schedules that CI runs, once for all tests that look at them; what they covered is printed at the end."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.simulation.many import Report, run_many

HERE = Path(__file__).parent
ONE_SEED = "test_the_schedule_of_a_seed_holds"
CI_SCHEDULES = 2_000
PROCESSES = min(2, os.cpu_count() or 1)

_reports = pytest.StashKey[list[Report]]()


@pytest.fixture(scope="session")
def run_schedules(request: pytest.FixtureRequest) -> Callable[[range], Report]:
    """Runs these seeds in some processes, and has the coverage printed."""

    def run(seeds: range) -> Report:
        report = run_many(seeds, processes=PROCESSES)
        request.config.stash.setdefault(_reports, []).append(report)
        return report

    return run


@pytest.fixture(scope="session")
def schedules(run_schedules: Callable[[range], Report]) -> Report:
    """Of the CI seeds."""
    return run_schedules(range(CI_SCHEDULES))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--seed` the schedule of that seed alone, without it all but that."""
    wanted = config.getoption("--seed") is not None
    here = {item for item in items if item.path.is_relative_to(HERE)}
    left_out = {item for item in here if (item.name == ONE_SEED) is not wanted}
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for report in config.stash.get(_reports, []):
        terminalreporter.section("simulated schedules")
        terminalreporter.write("\n".join([*report.lines(), ""]))

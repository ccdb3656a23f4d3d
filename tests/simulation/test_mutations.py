"""A green simulation means something: break the protocol in any of these ways, and it is found."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from support.simulation import world
from support.simulation.mutations import MUTATIONS, Caught, hunt
from support.simulation.plan import draw
from support.simulation.shrink import shrink

from .conftest import CI_SCHEDULES, PROCESSES

pytestmark = pytest.mark.timeout(600)  # the machine may be busy; no duration is checked

NAMES = [mutation.name for mutation in MUTATIONS]


@pytest.fixture(scope="module")
def hunts() -> Iterator[Mapping[str, "Future[Caught | None]"]]:
    """One hunt for each mutation, some at a time."""
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        yield {name: pool.submit(hunt, name, CI_SCHEDULES) for name in NAMES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_protocol_is_caught(
    hunts: Mapping[str, "Future[Caught | None]"], name: str, record_property: Callable[[str, object], None]
) -> None:
    """Within as many schedules as CI runs, so CI would have found it."""
    caught = hunts[name].result()

    assert caught is not None, f"{name}: no schedule of {CI_SCHEDULES} fails"
    record_property("caught", f"seed {caught.seed}: {caught.violation}")


def test_there_are_ten_mutations_and_more() -> None:
    """Issue 6 asks for ten."""
    assert len(set(NAMES)) >= 10


def test_a_failing_schedule_is_shrunk_to_what_makes_it_fail() -> None:
    """Ten jobs and some faults say little; one job and the one fault say what is wrong."""
    [mutation] = [one for one in MUTATIONS if one.name == "fence ignored at commit"]
    with mutation.apply():
        failing = next(plan for plan in map(draw, range(CI_SCHEDULES)) if world.run(plan).violations)
        short = shrink(failing, lambda plan: bool(world.run(plan).violations))
        again = world.run(short, trace=True)

    assert again.violations
    assert (len(failing.jobs), len(short.jobs), len(short.faults)) == (10, 1, 1)
    assert any("AUDIT" in line for line in again.trace)
    assert not world.run(short).violations, "the plan holds where nothing is broken"

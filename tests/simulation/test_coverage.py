"""What the CI schedules must have met: every call of the ports cut on both sides, every change of state."""

import inspect

import pytest
from support.simulation.many import Report
from support.simulation.plan import CALLS, REDRIVE_CALLS
from support.simulation.wire import DELIVER

from codeyard.shared.broker.port import Broker, Consumer
from codeyard.shared.store.port import Store

pytestmark = pytest.mark.timeout(600)  # the machine may be busy; no duration is checked

# Not of a job's life: what people look at, what a process tells of itself, and what follows the end.
APART = {"store.recent", "store.states", "store.announce", "store.ping", "broker.ping"}
APART |= {"store.note_callbacks", "store.callbacks_due", "store.take_callbacks"}
LOCAL = {"close", "stop"}  # these touch no server, or only let go of it

DIAGRAM = {  # DESIGN.md, section 3, and the call that takes each arrow
    "reserved -> queued by mark_queued",
    "queued -> running by claim",
    "running -> queued by retry",
    "running -> queued by hand-back",
    "running -> queued by mark_queued",  # the owner was lost
    "running -> succeeded by commit",
    "running -> failed by commit",
    "running -> cancelled by commit",
    "running -> expired by commit",
    "reserved -> cancelled by cancel",
    "reserved -> expired by recover",
    "queued -> cancelled by cancel",
    "queued -> expired by recover",
    "queued -> expired by claim",
}
BESIDES = {  # docs/protocol.md
    "none -> reserved by reserve",
    "none -> running by claim",  # published by a program that does not reserve
    "reserved -> running by claim",  # a worker was faster than the submitter
    "running -> running by claim",  # the owner's lease was over
    "running -> running by recover",  # the reconciler publishes it again
    "queued -> queued by recover",  # its message was lost
    "running -> cancelled by claim",
    "running -> cancelled by hand-back",
    "running -> expired by claim",
    "failed -> queued by redrive",
}


def test_faults_may_meet_every_call_of_both_ports() -> None:
    """A call that is new must be met by faults too, or be named here as apart from a job's life."""
    ports = {"broker": Broker, "consumer": Consumer, "store": Store}
    calls = {f"{name}.{call}" for name, port in ports.items() for call in _calls(port)}

    assert calls - APART == {*CALLS, *REDRIVE_CALLS} - {DELIVER}


def test_every_port_call_was_faulted_before_and_after_its_effect(schedules: Report) -> None:
    """A call that was never cut is a call whose repetition nobody tried."""
    missing = [
        f"{call} {side}"
        for call in {*CALLS, *REDRIVE_CALLS}
        for side in ("before", "after")
        if call != DELIVER and not schedules.met[f"{call} {side}"]
    ]

    assert not missing


def test_every_arrow_of_the_state_diagram_was_taken(schedules: Report) -> None:
    """Also those that only faults lead to."""
    assert not (DIAGRAM | BESIDES) - set(schedules.arrows)


def test_most_schedules_take_the_arrows_that_matter(schedules: Report) -> None:
    """A fleet that settles everything before the first fault would cover little of what follows one."""
    for arrow in ("running -> running by claim", "running -> queued by retry", "running -> cancelled by commit"):
        assert schedules.arrows[arrow] >= schedules.num_schedules / 20


def _calls(port: type) -> set[str]:
    return {
        name
        for name, method in inspect.getmembers(port, inspect.iscoroutinefunction)
        if not name.startswith("_") and name not in LOCAL
    }

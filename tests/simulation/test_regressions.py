"""What the simulation has found in our own code: the shortest plan of each, kept.

A plan is written out, not a seed: what a seed draws may change, what once went wrong may not come back.
"""

import pytest
from support.simulation import world
from support.simulation.mutations import MUTATIONS, RARE
from support.simulation.plan import Call, Death, JobPlan, Kind, LetterFault, Plan
from support.simulation.wire import CallFault, Phase

TAKEN_TWICE = Plan(
    seed=163,
    jobs=(JobPlan(0, (Call(client=0, at_s=1.0),), num_tokens=4, step_s=1.0),),
    faults=(LetterFault("copied", nth=1, after_s=0.1),),
    num_workers=1,
)
SLOW_RELEASE = Plan(
    seed=103,
    jobs=(JobPlan(0, (Call(client=0, at_s=1.0),), kind=Kind.FAILS_ONCE),),
    faults=(CallFault("store.release", nth=1, phase=Phase.SLOW, told_s=4.0),),
)
STOOD_STILL = Plan(  # four jobs on one slot: nobody claims the last one before it is given up
    seed=6,
    jobs=tuple(JobPlan(n, (Call(client=n // 3, at_s=1.0 + n // 3),), num_tokens=10, step_s=2.0) for n in range(4)),
    faults=(CallFault("broker.publish", nth=4, phase=Phase.STALLS, told_s=13.0),),
    num_workers=1,
    slots=1,
)
DROPPED = Plan(
    seed=1,
    jobs=(JobPlan(0, (Call(client=0, at_s=1.0),)),),
    faults=(LetterFault("dropped", nth=1), CallFault("store.commit", nth=1, phase=Phase.DIES_BEFORE)),
)
GIVEN_UP = Plan(  # the client stands still, asks again, and waits for its own former self when that is given up
    seed=1050,
    jobs=(JobPlan(0, (Call(client=0, at_s=1.0),)),),
    faults=(CallFault("store.reserve", nth=1, phase=Phase.STALLS, told_s=6.6),),
)
ANSWERED_TWICE = Plan(  # both copies wait for a dead owner's lease at one worker, and the second answer is first
    seed=32,
    jobs=(JobPlan(0, (Call(client=0, at_s=1.0),), stream=True, num_tokens=4, step_s=0.9),),
    faults=(LetterFault("copied", nth=1, after_s=0.1), Death("w0", at_s=2.6, back_s=5.0)),
    num_workers=2,
    latency_s=0.02,
    starts_s=(0.0, 0.5),
)
FOUND = {
    "an adopted delivery is forgotten": TAKEN_TWICE,
    "a retry's copy is published before the job waits for it": SLOW_RELEASE,
    "a confirm that came too late is an acceptance": STOOD_STILL,
    "a dropped message is acked before its job is failed": DROPPED,
    "who attaches to a job that is given up is told that it is accepted": GIVEN_UP,
    "two answers to one message are two runs under one fence": ANSWERED_TWICE,
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_does_not_come_back(name: str) -> None:
    """Each was a way to lose a message or to keep it for ever."""
    assert not world.run(FOUND[name]).violations


@pytest.mark.parametrize("name", FOUND)
def test_the_plan_still_shows_the_mistake(name: str) -> None:
    """Else the plan guards nothing."""
    [mutation] = [one for one in (*MUTATIONS, *RARE) if one.name == name]

    with mutation.apply():
        assert world.run(FOUND[name]).violations

"""The shortest plan that still fails, and what happened in it.

Faults and jobs are left out one after the other for as long as the rest still fails, under a few
interleavings each; then what is left is made plainer. Called by: tests/simulation.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from support.simulation import world
from support.simulation.plan import LetterFault, Plan
from support.simulation.wire import CallFault

ORDERS = 3  # interleavings tried of each shorter plan
FEW_JOBS, MORE_ORDERS = 4, 16  # a small world runs fast, and has fewer interleavings that fail
MAX_RUNS = 1_000
MAX_TRACE = 200  # lines


def shrink(plan: Plan, fails: Callable[[Plan], bool], *, max_runs: int = MAX_RUNS) -> Plan:
    """`plan` fails; so does what is returned, from which nothing more can be left out."""
    num_runs, progress = 0, True
    while progress and num_runs < max_runs:
        progress = False
        for shorter in _shorter(plan):
            num_orders = ORDERS if len(shorter.jobs) > FEW_JOBS else MORE_ORDERS
            for order in dict.fromkeys((plan.order, *range(num_orders))):
                num_runs += 1
                if fails(tried := replace(shorter, order=order)):
                    plan, progress = tried, True
                    break
            if progress or num_runs >= max_runs:
                break
    return plan


def explain(plan: Plan) -> str:
    """The shortest failing plan there is to be found below this one, its violations and its trace."""
    short = shrink(plan, lambda one: bool(world.run(one).violations))
    verdict = world.run(short, trace=True)
    trace = verdict.trace[-MAX_TRACE:]
    return "\n".join([str(short), *(f"  VIOLATED {one}" for one in verdict.violations), *trace])


def _shorter(plan: Plan) -> Iterator[Plan]:
    """Each plan that is one step plainer, the largest steps first."""
    if len(plan.jobs) > 3:
        yield replace(plan, jobs=plan.jobs[: len(plan.jobs) // 2])
        yield replace(plan, jobs=plan.jobs[len(plan.jobs) // 2 :])
    for place in reversed(range(len(plan.faults))):
        yield plan.without_fault(place)
    for place in reversed(range(len(plan.jobs))):
        yield plan.without_job(place)
        yield from _earlier(plan.without_job(place))
    for place, job in enumerate(plan.jobs):
        for call in range(len(job.calls)) if len(job.calls) > 1 else ():
            calls = job.calls[:call] + job.calls[call + 1 :]
            yield replace(plan, jobs=(*plan.jobs[:place], replace(job, calls=calls), *plan.jobs[place + 1 :]))
    if plan.num_workers > 1 and not any(f"w{plan.num_workers - 1}" in repr(fault) for fault in plan.faults):
        yield replace(plan, num_workers=plan.num_workers - 1)


def _earlier(plan: Plan) -> Iterator[Plan]:
    """The same with one fault at an earlier call or message: those of a job that was left out count no more."""
    for place, fault in enumerate(plan.faults):
        if isinstance(fault, CallFault | LetterFault):
            for nth in sorted({1, fault.nth // 2, fault.nth - 2, fault.nth - 1}):
                if 1 <= nth < fault.nth:
                    faults = (*plan.faults[:place], replace(fault, nth=nth), *plan.faults[place + 1 :])
                    yield replace(plan, faults=faults)

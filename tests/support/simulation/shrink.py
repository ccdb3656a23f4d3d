"""The shortest plan that still fails, and what happened in it.

Faults and jobs are left out one after the other for as long as the rest still fails, under a few
interleavings each; then what is left is made plainer. Called by: tests/simulation.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from support.simulation import world
from support.simulation.plan import Plan

ORDERS = 3  # interleavings tried of each shorter plan
MAX_RUNS = 600
MAX_TRACE = 200  # lines


def shrink(plan: Plan, fails: Callable[[Plan], bool], *, max_runs: int = MAX_RUNS) -> Plan:
    """`plan` fails; so does what is returned, from which nothing more can be left out."""
    num_runs, progress = 0, True
    while progress and num_runs < max_runs:
        progress = False
        for shorter in _shorter(plan):
            tried = [replace(shorter, order=order) for order in dict.fromkeys((plan.order, *range(ORDERS)))]
            num_runs += len(tried)
            found = next((one for one in tried if fails(one)), None)
            if found is not None:
                plan, progress = found, True
                break
            if num_runs >= max_runs:
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
    for place, job in enumerate(plan.jobs):
        for call in range(len(job.calls)) if len(job.calls) > 1 else ():
            calls = job.calls[:call] + job.calls[call + 1 :]
            yield replace(plan, jobs=(*plan.jobs[:place], replace(job, calls=calls), *plan.jobs[place + 1 :]))
    if plan.num_workers > 1 and not any(f"w{plan.num_workers - 1}" in repr(fault) for fault in plan.faults):
        yield replace(plan, num_workers=plan.num_workers - 1)

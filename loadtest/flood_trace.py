"""The flood: which jobs come, and when. The same for every side, from a seed.

The shape is the `flood` trace of `codeyard simulate` (worker/codeyard/worker/data/scenarios.json): bulk for
the whole run comes in its first third, over an interactive trickle that ends at three fifths; then a pause
without interactive. Lengths are cut to the starter model's 256 tokens. Prompts are real: signatures with
docstrings of the standard library. Called by: bench_flood.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from codeyard.cli.demo_prompts import standard_library_prompts
from codeyard.shared.job import Lane
from codeyard.worker.simulation.latency import load_table
from codeyard.worker.simulation.traces import Pareto, arrivals, load_scenarios

MAX_PROMPTS = 400  # different ones; then again, each with a number before it
BULK_TOKENS = Pareto(alpha=2.0, least=96, most=168)  # at most; the starter model ends many answers before
INTERACTIVE_TOKENS = Pareto(alpha=2.0, least=64, most=128)
_NO_PROMPTS = Pareto(alpha=1.0, least=1, most=1)  # the lengths are those of the real ones


@dataclass(frozen=True, slots=True)
class Planned:
    """One job to submit `at_s` seconds into the run; interactive ones are read as streams."""

    at_s: float
    lane: Lane
    tenant: str
    prompt: str
    max_tokens: int


def flood(*, bulk: int, interactive: int, seconds: float, seed: int) -> list[Planned]:
    """About so many jobs of each lane (Poisson), in order of arrival. Same arguments, same jobs."""
    scenario = load_scenarios().traces["flood"]
    total = bulk + interactive
    changes = {
        Lane.BULK: {"share": bulk / total, "completions": BULK_TOKENS},
        Lane.INTERACTIVE: {"share": interactive / total, "completions": INTERACTIVE_TOKENS},
    }
    streams = tuple(
        stream.model_copy(update={"prompts": _NO_PROMPTS, **changes[stream.lane]}) for stream in scenario.streams
    )
    trace = scenario.model_copy(update={"streams": streams})
    prompts = standard_library_prompts(MAX_PROMPTS, seed=seed)
    jobs = arrivals(trace, load_table(), jobs=total, length_s=seconds, seed=seed)
    return [
        Planned(job.arrived_s, job.lane, job.tenant, _prompt(prompts, number), job.completion)
        for number, job in enumerate(jobs)
    ]


def interactive_until_s(trace: Sequence[Planned]) -> float:
    """When the last interactive job comes."""
    return max((job.at_s for job in trace if job.lane is Lane.INTERACTIVE), default=0.0)


def _prompt(prompts: list[str], number: int) -> str:
    """No two alike: a prompt the engine has seen costs it nothing."""
    prompt = prompts[number % len(prompts)]
    return prompt if number < len(prompts) else f"# {number}\n{prompt}"

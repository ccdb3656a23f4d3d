"""How many jobs may run, and how fast prompts may follow, so that a promise per token holds.

A job that is decoding waits one step for each token, so a promise of B seconds per token bounds the mean
step over the job's life: step_s(n, p) <= B (see step_time). In a steady state every finished job is
replaced, so a step prefills on average p = n * P / K prompt tokens, with P and K the mean prompt and
completion of the mix:

    a * n + base <= B                      a = per_job + per_prompt_token * P / K

That keeps the promise on average, and breaks it for every other job. During k steps about n * k / K jobs
are replaced, each bringing a prompt of its own length; the sum of their prompts has variance n * k / K * P2,
P2 being the mean squared prompt. Per token of a job half as long as the mean (k = K / 2; a longer one
averages better) that is a deviation of per_prompt_token * sqrt(2 * n * P2) / K seconds, of which
`DEVIATIONS` are kept free:

    a * n + b * sqrt(n) + base <= B        b = DEVIATIONS * per_prompt_token * sqrt(2 * P2) / K

a quadratic in sqrt(n): `widest`. Long prompts among short ones narrow the window by themselves.

A burst admitted at once would prefill far more than n * P / K a step and stall everybody. With n jobs
decoding, what a step of B seconds has room for beyond them is

    p <= (B - base - per_job * n - b * sqrt(n) / 2) / per_prompt_token                   `prompt_room`

and admissions are paced to that many prompt tokens per B seconds. Few jobs: much room, a fast start. At
the widest window the room is n * P / K, what replacing the finished ones takes, and half of what is kept
free for their spread: with none of it, a debt once made would never be paid back.
"""

import math
from dataclasses import dataclass

from codeyard.worker.scheduling.step_time import StepCost

DEVIATIONS = 1.5  # so that jobs of half the mean length keep the promise nine times in ten, longer ones nearly always


@dataclass(frozen=True, slots=True)
class Mix:
    """What the jobs are like, as means over those admitted and ended lately."""

    prompt: float  # tokens
    prompt_squared: float
    completion: float


def widest(cost: StepCost, mix: Mix, *, budget_s: float) -> int:
    """Most jobs that keep `budget_s` per token while finished ones are replaced; at least 1."""
    a = cost.per_job_s + cost.per_prompt_token_s * mix.prompt / mix.completion
    b = _deviation_s(cost, mix)
    free_s = max(0.0, budget_s - cost.base_s)
    root = (math.sqrt(b * b + 4.0 * a * free_s) - b) / (2.0 * a)
    return max(1, int(root * root))


def prompt_room(cost: StepCost, mix: Mix, *, budget_s: float, running: int) -> float:
    """Prompt tokens one step may prefill beside `running` jobs within `budget_s`; at least 5 % of what an
    empty one could, so that nothing waits for ever."""
    room_s = budget_s - cost.step_s(running) - 0.5 * _deviation_s(cost, mix) * math.sqrt(running)
    return max(0.05 * budget_s, room_s) / cost.per_prompt_token_s


def _deviation_s(cost: StepCost, mix: Mix) -> float:
    """`b` of the module's formula: seconds per token, for each square root of a running job."""
    return DEVIATIONS * cost.per_prompt_token_s * math.sqrt(2.0 * mix.prompt_squared) / mix.completion

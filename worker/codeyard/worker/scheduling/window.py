"""How many jobs may run, and how fast prompts may follow, so that a promise per token holds.

A job that is decoding waits one step for each token, so a promise of B seconds per token is a bound on
the mean step: step_s(n, p) <= B (see step_time). In a steady state every finished job is replaced, so a
step prefills on average p = n * r prompt tokens, r being prompt tokens per generated token of the mix:

    base + per_job * n + per_prompt_token * r * n <= B
    n <= (B - base) / (per_job + per_prompt_token * r)                                   `widest`

That holds on average; a burst admitted at once would prefill far more than n * r a step and stall
everybody. With n jobs decoding, what a step of B seconds has room for beyond them is

    p <= (B - base - per_job * n) / per_prompt_token                                     `prompt_room`

and admissions are paced to that many prompt tokens per B seconds. Few jobs: much room, a fast start. At
the widest window the room is exactly n * r: the two bounds are one.
"""

from codeyard.worker.scheduling.step_time import StepCost


def widest(cost: StepCost, *, budget_s: float, prompt_per_token: float) -> int:
    """Most jobs whose steps, prefill included, take `budget_s` on average; at least 1."""
    per_job_s = cost.per_job_s + cost.per_prompt_token_s * prompt_per_token
    return max(1, int((budget_s - cost.base_s) / per_job_s))


def prompt_room(cost: StepCost, *, budget_s: float, running: int) -> float:
    """Prompt tokens one step may prefill beside `running` jobs within `budget_s`; at least what 5 % of it takes."""
    room_s = max(0.05 * budget_s, budget_s - cost.step_s(running))
    return room_s / cost.per_prompt_token_s

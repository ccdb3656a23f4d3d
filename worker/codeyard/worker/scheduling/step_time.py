"""How long an engine step takes: fitted while running, from nothing but tokens and times.

A step of a continuously batching engine decodes one token for each of n running jobs and prefills some
prompt tokens p on the side. Its time is very nearly affine in both,

    step_s(n, p) = base + per_job * n + per_prompt_token * p

because weights are read once a step (base), each job adds its attention and sampling (per_job), and
prefill is arithmetic (per_prompt_token). A job that is decoding gets one token a step, so when it got k
tokens in T seconds, there were k steps, and dividing by k

    T / k = base + per_job * (mean n) + per_prompt_token * (prompt tokens prefilled meanwhile) / k

which is one linear observation of the three constants. They are the least squares solution over the
observations of the last `MEMORY_S` or so, older ones fading out, so the fit follows a GPU that is
throttled and a mix that changes. A curve that is not straight is fitted where the engine now works.
A weak prior (`PRIOR`, worth one observation) decides what the data leaves open: n and p rise together
in a steady state, and then only their sum is known, which is all the policy needs there.
"""

import math
from dataclasses import dataclass

MEMORY_S = 10.0
OBSERVE_TOKENS = 16  # a job's progress makes an observation each time it got this many
_FLOOR = (1e-5, 1e-7, 1e-8)  # no constant is smaller; keeps every ratio finite


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds: of an empty step, for each job in it, for each prompt token prefilled in it."""

    base_s: float
    per_job_s: float
    per_prompt_token_s: float

    def step_s(self, jobs: float, prompt_tokens: float = 0.0) -> float:
        return self.base_s + self.per_job_s * jobs + self.per_prompt_token_s * prompt_tokens


PRIOR = StepCost(base_s=0.01, per_job_s=1e-4, per_prompt_token_s=3e-5)  # a 7B model on a GPU, give or take three
_SCALE = (1.0, 64.0, 400.0)  # jobs, prompt tokens a step: what counts as one unit of evidence


class StepTime:
    """The running fit. `cost` is the present answer."""

    def __init__(self, prior: StepCost = PRIOR) -> None:
        self._prior = (prior.base_s, prior.per_job_s, prior.per_prompt_token_s)
        # Symmetric: sums of w * x_i * x_j, and of w * x_i * y.
        self._xx = [0.0] * 6
        self._xy = [0.0] * 3
        self._at_s: float | None = None
        self._cost: StepCost | None = prior

    @property
    def cost(self) -> StepCost:
        if self._cost is None:
            self._cost = StepCost(*self._solve())
        return self._cost

    def observe(self, *, steps: int, elapsed_s: float, jobs: float, prompt_tokens: float, now_s: float) -> None:
        """`steps` steps took `elapsed_s` with `jobs` running on average and `prompt_tokens` prefilled in all."""
        if steps < 1 or elapsed_s <= 0.0:
            return
        if self._at_s is not None and now_s > self._at_s:
            fade = math.exp((self._at_s - now_s) / MEMORY_S)
            self._xx = [value * fade for value in self._xx]
            self._xy = [value * fade for value in self._xy]
        self._at_s = now_s
        weight = min(steps, 64) / OBSERVE_TOKENS
        p, y = prompt_tokens / steps, elapsed_s / steps
        wn, wp = weight * jobs, weight * p
        xx, xy = self._xx, self._xy
        xx[0] += weight
        xx[1] += wn
        xx[2] += wp
        xx[3] += wn * jobs
        xx[4] += wn * p
        xx[5] += wp * p
        xy[0] += weight * y
        xy[1] += wn * y
        xy[2] += wp * y
        self._cost = None

    def _solve(self) -> tuple[float, float, float]:
        """Least squares with the prior; what comes out below its floor is set there and the rest solved again."""
        ridge = [scale * scale for scale in _SCALE]
        rows = [
            [self._xx[0] + ridge[0], self._xx[1], self._xx[2]],
            [self._xx[1], self._xx[3] + ridge[1], self._xx[4]],
            [self._xx[2], self._xx[4], self._xx[5] + ridge[2]],
        ]
        right = [self._xy[i] + ridge[i] * self._prior[i] for i in range(3)]
        fixed: dict[int, float] = {}
        while True:
            free = [i for i in range(3) if i not in fixed]
            solution = _gauss(
                [[rows[i][j] for j in free] for i in free],
                [right[i] - sum(rows[i][j] * value for j, value in fixed.items()) for i in free],
            )
            below = [i for i, value in zip(free, solution, strict=True) if value < _FLOOR[i]]
            if not below:
                found = {**dict(zip(free, solution, strict=True)), **fixed}
                return found[0], found[1], found[2]
            fixed[below[0]] = _FLOOR[below[0]]


def _gauss(rows: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small positive definite system."""
    size = len(rows)
    rows = [[*row, value] for row, value in zip(rows, right, strict=True)]
    for i in range(size):
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            for j in range(i, size + 1):
                rows[k][j] -= factor * rows[i][j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution

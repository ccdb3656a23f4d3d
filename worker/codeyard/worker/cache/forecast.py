"""Which model's jobs come next: what tends to follow what.

What is queued already is known and needs no forecast; that is for placement.py. This is for the time when
nothing waits: a table of which model's work began after which, with counts that are forgotten at a rate, so
that last week's habits do not outvote today's. Estimated as

    P(next = b | last = a) = (n(a, b) + n(b) / n) / (n(a) + 1)

the counts after `a`, smoothed by one observation of how frequent b is anywhere (add-one to the unigram;
Chen and Goodman 1999, section 2.1, with a unigram prior). Pure. Called by: worker.station.
"""

import math
from collections.abc import Collection, Iterable

from codeyard.worker.scheduling.placement import PAUSE_S

HALF_LIFE = 64.0  # observations until one counts half
STEPS = 6  # ahead, at most
LATER = 0.7  # what each step further counts less


class Transitions:
    """Observe which model's work begins; ask what comes next."""

    def __init__(self, *, half_life: float = HALF_LIFE, pause_s: float = PAUSE_S) -> None:
        self._pause_s = pause_s
        self._had_work_s: dict[str, float] = {}
        self._growth = 2.0 ** (1.0 / half_life)
        self._weight = 1.0  # of the next observation: growing instead of shrinking all others
        self._after: dict[str, dict[str, float]] = {}
        self._anywhere: dict[str, float] = {}
        self._last: str | None = None

    def has_work(self, model: str, now_s: float) -> None:
        """It has jobs now, waiting or running: its work has begun if it had none for a while. Call it as often
        as you look; a model that has work all the time began once, however its queue fills and empties."""
        if now_s - self._had_work_s.get(model, -math.inf) > self._pause_s:
            self.began(model)
        self._had_work_s[model] = now_s

    def began(self, model: str) -> None:
        """Work for this model has begun to come, after work for another or after none."""
        if model == self._last:
            return
        if self._last is not None:
            row = self._after.setdefault(self._last, {})
            row[model] = row.get(model, 0.0) + self._weight
        self._anywhere[model] = self._anywhere.get(model, 0.0) + self._weight
        self._last = model
        self._weight *= self._growth
        if self._weight > 1e12:
            self._rescale()

    def forecast(self, models: Iterable[str]) -> dict[str, float]:
        """How likely each of these is next, 0..1; nothing known gives 0 for all."""
        return self._following(self._last or "", models)

    def soon(self, models: Collection[str], waiting: Collection[str] = ()) -> dict[str, float]:
        """How soon each of these is needed, more for sooner; those that wait at once (infinity). For the others
        the chances of the next steps, each counting `LATER` of the one before: of models that take turns, the one
        whose turn is after next is worth more than the one whose turn is over."""
        rows = {model: self._following(model, models) for model in models}
        chances = self.forecast(models)
        soon = dict(chances)
        for step in range(1, STEPS):
            chances = {model: sum(chances[one] * rows[one][model] for one in rows) for model in rows}
            soon = {model: soon[model] + LATER**step * chances[model] for model in rows}
        return soon | dict.fromkeys(waiting, math.inf)

    def _following(self, last: str, models: Iterable[str]) -> dict[str, float]:
        total = sum(self._anywhere.values())
        row = self._after.get(last, {})
        prior = self._weight / self._growth  # one observation, as heavy as the newest
        row_total = sum(row.values())
        return {
            model: (row.get(model, 0.0) + prior * self._anywhere.get(model, 0.0) / total) / (row_total + prior)
            if total
            else 0.0
            for model in models
        }

    def _rescale(self) -> None:
        scale = 1.0 / self._weight
        for row in (self._anywhere, *self._after.values()):
            for model in row:
                row[model] *= scale
        self._weight = 1.0

"""Whose turn is it: lanes share the window by weight, and none waits for a lane that has no work.

Start-time fair queueing with lanes as flows (Goyal et al., SIGCOMM 1996): a lane's clock advances by
cost / share whenever one of its jobs is admitted, and the lane whose clock is earliest is next. Over any
stretch in which two lanes both have work, the work admitted for them differs from their shares by at
most one job each. A lane that had no work is set forward to the others when it comes back: an idle
night earns no burst at the expense of those who worked.
"""

from collections.abc import Iterable, Mapping

from codeyard.shared.job import Lane


class LaneTurns:
    """The clocks. `shares` are relative weights; a lane without one counts as 1."""

    def __init__(self, shares: Mapping[Lane, float]) -> None:
        self._shares = {lane: float(shares.get(lane, 1)) for lane in Lane}
        self._clock = dict.fromkeys(Lane, 0.0)
        self._recent = dict.fromkeys(Lane, 0.0)  # cost admitted lately
        self._now = 0.0  # where the lane served last stood when it was served

    def next(self, with_work: Iterable[Lane]) -> Lane:
        """The lane to admit from, among those that have work (at least one). Ties go to the urgent."""
        return min(with_work, key=lambda lane: (max(self._clock[lane], self._now), _URGENCY[lane]))

    def charge(self, lane: Lane, cost: float) -> None:
        """Work worth `cost` (any unit, always the same one) was admitted from this lane."""
        self._now = max(self._now, self._clock[lane])
        self._clock[lane] = self._now + cost / self._shares[lane]
        for each in _URGENCY:
            self._recent[each] *= _FADE
        self._recent[lane] += cost

    def preempted(self, lane: Lane, unused: float) -> None:
        """Of what was charged, this much was not used after all. The turn is not given back: it was another's need."""
        self._recent[lane] = max(0.0, self._recent[lane] - unused)

    def short_of(self, lane: Lane, with_work: Iterable[Lane]) -> bool:
        """Was clearly less admitted from this lane lately than its share among those with work?

        A lane that always has more work than its share never is: it waits for no fault of the others.
        """
        share = self._shares[lane] / (self._shares[lane] + sum(self._shares[other] for other in {*with_work} - {lane}))
        return self._recent[lane] < _CLEARLY * share * sum(self._recent.values())


_FADE = 0.98  # a memory of about 50 jobs
_CLEARLY = 0.8
_URGENCY = {lane: place for place, lane in enumerate(Lane)}

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
        self._now = 0.0  # where the lane served last stood when it was served

    def next(self, with_work: Iterable[Lane]) -> Lane:
        """The lane to admit from, among those that have work (at least one). Ties go to the urgent."""
        return min(with_work, key=lambda lane: (max(self._clock[lane], self._now), _URGENCY[lane]))

    def charge(self, lane: Lane, cost: float) -> None:
        """Work worth `cost` (any unit, always the same one) was admitted from this lane."""
        self._now = max(self._now, self._clock[lane])
        self._clock[lane] = self._now + cost / self._shares[lane]


_URGENCY = {lane: place for place, lane in enumerate(Lane)}

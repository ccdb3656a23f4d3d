"""How long a job submitted now will wait for the engine: Little's law on what is measured.

The wait of a job at the end of a line is the line's length over the rate at which it drains. A lane's
rate is how often its jobs were admitted lately, but only while a line was there: an empty lane drains as
fast as jobs come, which says nothing about how fast it could. So the estimate is

    wait = jobs ahead in the lane / admissions per second while the lane had a line

with admissions counted over the last `SPAN_S` in buckets, and with no line: no wait. The lanes share by
weight, so a lane's own rate already holds what the others take from it.

Pure: times are passed in. Called by: the gateway (with the depth of a lane at the broker, and rates the
workers publish) and the simulator.
"""

from collections.abc import Mapping

from codeyard.shared.job import Lane

SPAN_S = 1.0
BUCKETS = 8


class WaitEstimate:
    """Drain rates of the lanes of one model, and the waits they give."""

    def __init__(self, *, workers: int) -> None:
        self._bucket_s = SPAN_S / BUCKETS
        self._counts = {lane: [0] * BUCKETS for lane in Lane}
        self._bucket = dict.fromkeys(Lane, 0)
        self._free = workers  # a line as short as this is jobs on their way, not jobs that wait

    def started(self, lane: Lane, now_s: float) -> None:
        """A job of the lane was admitted to an engine."""
        self._turn_to(lane, now_s)
        self._counts[lane][self._bucket[lane] % BUCKETS] += 1

    def rate(self, lane: Lane, now_s: float) -> float:
        """Admissions per second over the last SPAN_S."""
        self._turn_to(lane, now_s)
        into_s = now_s - self._bucket[lane] * self._bucket_s
        return sum(self._counts[lane]) / max(self._bucket_s, SPAN_S - self._bucket_s + into_s)

    def estimate_s(self, lane: Lane, ahead: Mapping[Lane, int], now_s: float) -> float:
        """Seconds until a job submitted now would be admitted, with `ahead` jobs waiting by lane."""
        line = ahead[lane]
        if line <= self._free:
            return 0.0
        return line / max(self.rate(lane, now_s), 1.0 / SPAN_S)

    def _turn_to(self, lane: Lane, now_s: float) -> None:
        bucket = int(now_s / self._bucket_s)
        counts = self._counts[lane]
        for stale in range(max(self._bucket[lane] + 1, bucket - BUCKETS + 1), bucket + 1):
            counts[stale % BUCKETS] = 0
        self._bucket[lane] = max(self._bucket[lane], bucket)

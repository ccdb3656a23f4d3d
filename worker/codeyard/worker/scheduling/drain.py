"""How fast a worker takes jobs from its lanes, for the estimated start of a job submitted now.

A lane's rate is how often its jobs were admitted lately, but only while a line was there: an empty lane
drains as fast as jobs come, which says nothing about how fast it could. Over the last admissions of a line,

    rate = (admissions since the first of them) / (now - the time of the first)

which falls by itself while nothing is admitted. Where a lane has had no line, what is known is the engine:
by Little's law it takes `slots / job_s` jobs a second, `job_s` being the mean time a job spends in it; the
reader (producer/waits.py) uses that.

Pure: times are passed in. Called by: worker.runner.
"""

from collections import deque

from codeyard.shared.job import Lane

MOST = 64  # admissions looked back on
FEWEST = 4  # fewer say too little
SPAN_S = 5.0  # and not further than this
JOBS = 32.0  # that the mean of `job_s` looks back on, about


class DrainRate:
    def __init__(self) -> None:
        self._admitted: dict[Lane, deque[float]] = {lane: deque(maxlen=MOST) for lane in Lane}
        self._job_s: float | None = None
        self._num_jobs = 0

    def admitted(self, lane: Lane, *, line: int, now_s: float) -> None:
        """A job of the lane joined the engine; `line` more of it wait, here and at the broker."""
        times = self._admitted[lane]
        if not line:
            times.clear()
        else:
            times.append(now_s)

    def ended(self, run_s: float) -> None:
        """A job left the engine after this long."""
        self._num_jobs += 1
        share = max(1.0 / self._num_jobs, 1.0 / JOBS)
        self._job_s = run_s if self._job_s is None else self._job_s + share * (run_s - self._job_s)

    @property
    def job_s(self) -> float | None:
        """Seconds a job spends in the engine, mean over those that ended lately."""
        return self._job_s

    def rates(self, now_s: float) -> dict[Lane, float]:
        """Admissions per second, of the lanes that have had a line lately."""
        found = {}
        for lane, times in self._admitted.items():
            while times and now_s - times[0] > SPAN_S:
                times.popleft()
            if len(times) >= FEWEST and now_s > times[0]:
                found[lane] = (len(times) - 1) / (now_s - times[0])
        return found

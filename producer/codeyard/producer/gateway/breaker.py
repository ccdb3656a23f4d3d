"""When to stop asking what does not answer, and when to try again: a circuit breaker, pure.

    closed     everything is let through; outcomes of the last `window_s` are counted
    open       nothing is let through for `open_s`, or until it answered somebody else's question
    half-open  one probe is let through; its outcome closes the breaker or opens it again. A probe that is
               not heard of for `probe_s` is followed by another

It opens when at least `requests` outcomes lie in the window and at least `share` of them are failures. The
clock is passed in, in seconds, and never goes back. An outcome may come long after its admission, as a job's
does, and from elsewhere; so `admit` gives a ticket, and `record` says whose outcome it is: after the breaker
opened, what was let through before it says nothing any more.
Why not a library: the kept ones (pybreaker, purgatory) count failures in a row, not in a window, and wrap a call
whose end is the outcome. Called by: gateway.health, gateway.fallback.
"""

from collections import deque
from enum import IntEnum

from codeyard.shared.settings import BreakerSettings

Ticket = int
"""Of one admission. Tickets of probes are above 0 and unique in a breaker's life."""
TRAFFIC: Ticket = 0  # admitted while closed


class Position(IntEnum):
    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._position = Position.CLOSED
        self._outcomes: deque[tuple[float, bool]] = deque()  # when, and whether it was good; while closed
        self._failures = 0  # of them
        self._until_s = 0.0  # while open: then a probe may go; half-open: then another one may
        self._newest_probe: Ticket = 0
        self._oldest_probe: Ticket = 1  # of this half-open spell; earlier ones say nothing

    @property
    def position(self) -> Position:
        return self._position

    def refuses_for_s(self, now_s: float) -> float:
        """Seconds for which `admit` will refuse; 0 if it would not."""
        return 0.0 if self._position is Position.CLOSED else max(0.0, self._until_s - now_s)

    def admit(self, now_s: float) -> Ticket | None:
        """A ticket for one attempt, or None: do not try."""
        if self._position is Position.CLOSED:
            return TRAFFIC
        if now_s < self._until_s:
            return None
        if self._position is Position.OPEN:
            self._position = Position.HALF_OPEN
            self._oldest_probe = self._newest_probe + 1
        self._newest_probe += 1
        self._until_s = now_s + self._settings.probe_s
        return self._newest_probe

    def record(self, good: bool, now_s: float, ticket: Ticket) -> None:
        """The outcome of what was admitted with this ticket."""
        if self._position is Position.CLOSED:
            self._count(good, now_s)
        elif self._position is Position.HALF_OPEN and ticket >= self._oldest_probe:
            if good:
                self._close()
            else:
                self._open(now_s)

    def answered(self, now_s: float) -> None:
        """Asked aside from all this, it answered: the next attempt may be the probe, without waiting any longer."""
        if self._position is Position.OPEN:
            self._until_s = min(self._until_s, now_s)

    def unused(self, ticket: Ticket, now_s: float) -> None:
        """What was admitted told nothing, either way: another probe may go at once."""
        if self._position is Position.HALF_OPEN and ticket == self._newest_probe:
            self._until_s = now_s

    def _count(self, good: bool, now_s: float) -> None:
        self._outcomes.append((now_s, good))
        self._failures += not good
        while self._outcomes[0][0] <= now_s - self._settings.window_s:
            self._failures -= not self._outcomes.popleft()[1]
        enough = len(self._outcomes) >= self._settings.requests
        if enough and self._failures >= self._settings.share * len(self._outcomes):
            self._open(now_s)

    def _open(self, now_s: float) -> None:
        self._position = Position.OPEN
        self._until_s = now_s + self._settings.open_s
        self._forget()

    def _close(self) -> None:
        self._position = Position.CLOSED
        self._forget()

    def _forget(self) -> None:
        self._outcomes.clear()
        self._failures = 0

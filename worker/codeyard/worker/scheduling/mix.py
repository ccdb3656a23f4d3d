"""What the jobs are like: prompt and completion lengths, and the engine's token clock they are read from.

Every decoding job gets one token a step, so the engine has one clock: a job that was admitted when the
clock stood at v and that now has k tokens shows that it stands at v + k - 1 at least. Any job that reports
moves the clock for all, be it only at its end. The area under *jobs running over the clock* is the tokens
generated, those of unfinished jobs included (and the few steps of each before its first token).

The mean completion has to be right soon after a start, when only short jobs have ended: their plain mean
is too low. Tokens generated per ended job is too high then (the long ones have generated much and ended
seldom). Both come right in time, from opposite sides; their geometric mean is used.
"""

import math

from codeyard.worker.scheduling.window import Mix

FIRST_GUESS = 128.0  # completion tokens, before anything is known
_GUESS_WEIGHT = 4.0  # jobs that guess is worth
_KEEP = 0.995  # of what was known, at each job: a memory of 200 jobs


class MixEstimate:
    """Told of admissions, tokens and ends; `mix` is the present answer."""

    def __init__(self) -> None:
        self._admitted = 0
        self._prompt = 0.0
        self._prompt_squared = 0.0
        self._ended = _GUESS_WEIGHT
        self._ended_tokens = _GUESS_WEIGHT * FIRST_GUESS
        self._generated = _GUESS_WEIGHT * FIRST_GUESS
        self._running = 0
        self.clock = 0  # tokens

    @property
    def mix(self) -> Mix:
        plain, per_end = self._ended_tokens / self._ended, self._generated / self._ended
        return Mix(self._prompt, self._prompt_squared, max(1.0, math.sqrt(plain * per_end)))

    def admitted(self, prompt_tokens: int) -> None:
        self._admitted += 1
        share = max(1.0 - _KEEP, 1.0 / self._admitted)
        self._prompt += share * (prompt_tokens - self._prompt)
        self._prompt_squared += share * (prompt_tokens * prompt_tokens - self._prompt_squared)

    def joined(self) -> int:
        """A job was admitted. Returns the clock it joined at."""
        self._running += 1
        return self.clock

    def reached(self, clock: int) -> None:
        """Some job shows that the clock stands here at least."""
        if clock > self.clock:
            self._generated += self._running * (clock - self.clock)
            self.clock = clock

    def left(self, tokens: int, *, by_itself: bool) -> None:
        """A job left with this many tokens; an aborted one says nothing of lengths."""
        self._running -= 1
        if by_itself:
            self._ended = _KEEP * self._ended + 1.0
            self._ended_tokens = _KEEP * self._ended_tokens + tokens
            self._generated *= _KEEP

"""What every engine owes around its model: which prompts it takes, where a completion ends, what text it is.

The text is a function of the token ids and the stop strings alone, whichever engine made them and in
whatever pieces they came. So a stream is its result cut in pieces, and a job taken over by another
worker goes on at the very character where the first one was lost.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from codeyard.shared.chat import TokenLogprob
from codeyard.shared.errors import JobRejected
from codeyard.worker.engines.port import Delta, EngineJob

INCOMPLETE = "\ufffd"  # what a tokenizer shows for bytes that are no whole character yet
CONTEXT_IDS = 6  # tokens before the first new one that may change its text (leading blanks, split characters)
LEAST_LOGPROB = -9999.0  # of a token that cannot come; JSON has no infinity
WINDOW_IDS = 24  # decoded again with each new token, at most

Decode = Callable[[list[int]], str]


def check_prompt(prompt_ids: Sequence[int], *, vocabulary: int, context_tokens: int, only_count: bool = False) -> None:
    """Raises JobRejected for a prompt that the model can never take. One that is only counted may be too long."""
    if not prompt_ids:
        raise JobRejected("invalid_prompt", "the prompt has no tokens")
    if (foreign := max(prompt_ids)) >= vocabulary:
        raise JobRejected("invalid_prompt", f"token {foreign} is outside the model's vocabulary of {vocabulary}")
    if len(prompt_ids) >= context_tokens and not only_count:
        text = f"the prompt has {len(prompt_ids)} tokens; with its answer the model takes {context_tokens}"
        raise JobRejected("prompt_too_long", text)


def refuse_formats(job: EngineJob, engine: str) -> None:
    """Of an engine without structured outputs. Raises JobRejected for a job that asks for any."""
    if job.sampling.output_format is not None:
        raise JobRejected("unsupported", f"the {engine} engine has no structured outputs; the vllm engine has them")


def decoder(tokenizer: Any, ends: Collection[int], *, special: bool = False) -> Decode:
    """Ids to text; with `special` tokens in it, but for those that end it."""

    def decode(ids: list[int]) -> str:
        shown = [token for token in ids if token not in ends] if special else ids
        return tokenizer.decode(shown, skip_special_tokens=not special)  # type: ignore[no-any-return]  # untyped

    return decode


def token_logprob(decode: Decode, token: int, logprob: float, top: Iterable[tuple[int, float]] = ()) -> TokenLogprob:
    """A token's, with (token, log probability) of the likeliest in its place, in any order."""

    def one(of: int, odds: float, others: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(token_id=of, text=decode([of]), logprob=max(odds, LEAST_LOGPROB), top=others)

    best = sorted(top, key=lambda pair: -pair[1])
    return one(token, logprob, tuple(one(*pair) for pair in best))


class Completion:
    """One job's answer as it grows: token ids go in, deltas come out.

    `decode` turns ids into text without special tokens. `ends` are the model's end-of-text ids. The
    job's prefix is replayed, its text counts as given. Ends by itself at a stop string (which is cut
    off), an end-of-text id, or `limit` tokens; where none are asked for before the first.
    """

    def __init__(
        self, job: EngineJob, prompt_ids: Sequence[int], decode: Decode, *, ends: Collection[int], context_tokens: int
    ) -> None:
        self._stream = job.stream
        self._stop = job.sampling.stop
        self._ends = ends
        self._num_prompt = len(prompt_ids)
        self.limit = min(job.sampling.max_tokens, context_tokens - len(prompt_ids))
        self.token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []  # not given yet
        self.finish_reason: str | None = None
        self._stopped_by: str | None = None  # of the stop strings
        self._text = _Text(decode, prompt_ids[-CONTEXT_IDS:])
        self._unstopped = ""  # decoded but not given: a stop string may begin in it
        self._ready = ""  # text to give with the next delta
        self._num_given = 0  # token ids
        self.push(job.prefix_token_ids)
        self._ready, self._num_given = "", len(self.token_ids)

    @property
    def room(self) -> int:
        """Tokens it may still take."""
        return self.limit - len(self.token_ids)

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """New tokens, and where they were asked for one log probability for each. What follows the end is
        dropped. With stop strings each token is looked at alone, so that where it ends does not depend on how
        many came together."""
        step = 1 if self._stop else max(1, len(token_ids))
        num_before = len(self.token_ids)
        for start in range(0, len(token_ids), step):
            if self.finish_reason is None:
                self._take(token_ids[start : start + step])
        self._logprobs.extend(logprobs[: len(self.token_ids) - num_before])
        if not token_ids and self.room <= 0:
            self._finish("length")

    def end(self, reason: str) -> None:
        """The engine says so: "abort", or an end of its own."""
        if self.finish_reason is None:
            self._finish(reason)

    def delta(self) -> Delta | None:
        """What is new since the last one; None if there is nothing to tell yet."""
        ended = self.finish_reason is not None
        if not ended and not (self._stream and (self._ready or self._num_given < len(self.token_ids))):
            return None
        delta = Delta(
            text=self._ready,
            token_ids=tuple(self.token_ids[self._num_given :]),
            finish_reason=self.finish_reason,
            prompt_tokens=self._num_prompt if ended else 0,
            logprobs=tuple(self._logprobs),
            stop=self._stopped_by,
        )
        self._ready, self._num_given, self._logprobs = "", len(self.token_ids), []
        return delta

    def _take(self, token_ids: Sequence[int]) -> None:
        ended = next((n for n, token in enumerate(token_ids) if token in self._ends), None)
        taken = token_ids[: self.room if ended is None else min(ended + 1, self.room)]
        self.token_ids.extend(taken)
        text = self._unstopped + self._text.push(taken)
        if (found := _first_stop(text, self._stop)) is not None:
            self._unstopped = ""
            self._end_at(found, text)
            return
        given = len(text) - may_begin(text, self._stop)
        self._ready, self._unstopped = self._ready + text[:given], text[given:]
        if taken and taken[-1] in self._ends:
            self._finish("stop")
        elif self.room <= 0:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        rest = self._unstopped + self._text.rest()
        self._unstopped = ""
        if (found := _first_stop(rest, self._stop)) is not None:
            self._end_at(found, rest)
            return
        self._ready += rest
        self.finish_reason = reason

    def _end_at(self, stop: str, text: str) -> None:
        self._ready += text[: text.find(stop)]
        self.finish_reason, self._stopped_by = "stop", stop


class _Text:
    """Decodes as tokens come. A character whose bytes are not all there waits for the rest.

    Only a window of the last tokens is decoded again, so a long answer costs as much per token as a
    short one. It starts in the prompt: some tokenizers write a token differently at the beginning.
    """

    def __init__(self, decode: Decode, context_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(context_ids)
        self._num_given = len(self._whole(self._decode(self._window)))

    def push(self, token_ids: Sequence[int]) -> str:
        self._window.extend(token_ids)
        text = self._decode(self._window)
        whole = self._whole(text)
        new = whole[self._num_given :]
        self._num_given = max(self._num_given, len(whole))
        if len(self._window) > WINDOW_IDS and len(whole) == len(text):
            self._window = self._window[-CONTEXT_IDS:]
            self._num_given = len(self._whole(self._decode(self._window)))
        return new

    def rest(self) -> str:
        """What is held back, as it is."""
        return self._decode(self._window)[self._num_given :]

    @staticmethod
    def _whole(text: str) -> str:
        return text.rstrip(INCOMPLETE)


def _first_stop(text: str, stops: Sequence[str]) -> str | None:
    """The stop string that is complete first (of those, the longest); None if there is none."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[2] if found else None


def may_begin(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters could be the beginning of a stop string."""
    longest = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)

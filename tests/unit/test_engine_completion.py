"""Where a completion ends and what text it is, whatever pieces its tokens come in."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeyard.shared.errors import JobRejected
from codeyard.shared.job import Lane, Sampling
from codeyard.worker.engines.completion import Completion, check_prompt
from codeyard.worker.engines.port import EngineJob

END = 0
PROMPT = list(b"def f():")


def decode(ids: list[int]) -> str:
    """A tokenizer of bytes, as hard as byte-level BPE gets; END is its special token."""
    return bytes(token for token in ids if token != END).decode(errors="replace")


def completion_of(
    *, prefix: bytes = b"", max_tokens: int = 100, stop: tuple[str, ...] = (), stream: bool = True, context: int = 1000
) -> Completion:
    sampling = Sampling(max_tokens=max_tokens, stop=stop)
    job = EngineJob("j", "def f():", sampling, Lane.STANDARD, stream, tuple(prefix))
    return Completion(job, PROMPT, decode, ends={END}, context_tokens=context)


def outcome(completion: Completion, pieces: list[bytes]) -> tuple[str, bytes, str | None]:
    """(text, token ids, finish reason) after the pieces, as a reader of its deltas sees it."""
    text, ids, reason = "", b"", None
    for piece in pieces:
        completion.push(tuple(piece))
        if (delta := completion.delta()) is not None:
            text, ids, reason = text + delta.text, ids + bytes(delta.token_ids), delta.finish_reason
    return text, ids, reason


def test_a_character_waits_until_all_its_bytes_are_there() -> None:
    """A reader must not see half an umlaut that later turns into a whole one."""
    completion = completion_of()
    completion.push(tuple("x\u00e9".encode()[:2]))
    first = completion.delta()
    completion.push(tuple("\u00e9".encode()[1:]))
    second = completion.delta()
    assert first is not None
    assert second is not None
    assert (first.text, second.text) == ("x", "\u00e9")
    assert len(first.token_ids) == 2  # the ids do not wait: a takeover continues from them


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    """Text that is held back is late, not lost."""
    assert outcome(completion_of(max_tokens=2), [b"a\xc3"]) == ("a\ufffd", b"a\xc3", "length")


def test_a_stop_string_ends_the_text_before_it_and_never_shows() -> None:
    """Its first half may be streamed only when it is known not to be one."""
    text, ids, reason = outcome(completion_of(stop=("\n\n",)), [b"a\n", b"b\n", b"\nccc"])
    assert (text, reason) == ("a\nb", "stop")
    assert ids == b"a\nb\n\n"  # up to the token that completed it


@pytest.mark.parametrize(
    "answer, stop",
    [(b"xabc", "b"), (b"a\n\n", "\n\n"), (b"a\0", None), (b"a\n\0", None), (b"acdefghijk", None)],
)
def test_the_last_delta_says_which_stop_string_it_was(answer: bytes, stop: str | None) -> None:
    """Callers with several of them cannot tell from the text, which ends before it."""
    completion = completion_of(stop=("\n\n", "b", "never"), max_tokens=9)
    completion.push(tuple(answer))

    last = completion.delta()

    assert last is not None
    assert last.finish_reason is not None
    assert last.stop == stop


def test_the_stop_string_that_is_complete_first_wins() -> None:
    """Not the one listed first: what comes must not depend on how many tokens came at once."""
    assert outcome(completion_of(stop=("abc", "b")), [b"xabc"])[0] == "xa"


def test_the_end_of_text_is_counted_but_has_no_text() -> None:
    """As vLLM counts it, and usage must be the same on every engine."""
    assert outcome(completion_of(), [b"ab\x00cd"]) == ("ab", b"ab\x00", "stop")


def test_the_answer_is_cut_where_the_context_ends() -> None:
    """A model has no place for more, whatever was asked for."""
    assert outcome(completion_of(context=len(PROMPT) + 3), [b"abcdef"]) == ("abc", b"abc", "length")


def test_without_streaming_there_is_one_delta() -> None:
    """The worker would otherwise write events that nobody reads."""
    completion = completion_of(stream=False, max_tokens=3)
    completion.push((97,))
    assert completion.delta() is None
    completion.push((98, 99))
    delta = completion.delta()
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.prompt_tokens) == ("abc", "length", len(PROMPT))


def test_an_aborted_job_keeps_what_it_has() -> None:
    """A preempted job continues from there."""
    completion = completion_of(stream=False)
    completion.push(tuple(b"ab"))
    completion.end("abort")
    delta = completion.delta()
    assert delta is not None
    assert (delta.text, bytes(delta.token_ids), delta.finish_reason) == ("ab", b"ab", "abort")


@pytest.mark.parametrize("prefix", [b"ab\x00", b"abc"])
def test_a_prefix_that_is_a_whole_answer_ends_at_once_with_nothing_new(prefix: bytes) -> None:
    """Its owner died between the last token and the commit; generating on would change the answer."""
    delta = completion_of(prefix=prefix, max_tokens=3).delta()
    assert delta is not None
    assert (delta.text, delta.token_ids) == ("", ())
    assert delta.finish_reason == ("stop" if prefix.endswith(b"\x00") else "length")


answers = st.one_of(
    st.text(alphabet="ab\n \u00e9\u20ac\U0001f600", max_size=80).map(str.encode), st.binary(max_size=60)
)
stops = st.lists(st.text(alphabet="ab\n\u20ac", min_size=1, max_size=3), max_size=2).map(tuple)


@given(answers, stops, st.lists(st.integers(0, 80), max_size=6))
def test_text_and_end_do_not_depend_on_the_pieces(answer: bytes, stop: tuple[str, ...], cuts: list[int]) -> None:
    """Engines hand out one token or many at a time, and a stream must be its result cut in pieces."""
    edges = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [answer[a:b] for a, b in pairwise(edges)]
    whole = [answer[:1], answer[1:]]
    assert outcome(completion_of(stop=stop, max_tokens=70), [*pieces, b"\0"]) == outcome(
        completion_of(stop=stop, max_tokens=70, stream=False), [*whole, b"\0"]
    )


@given(answers, stops, st.integers(0, 80))
def test_a_takeover_at_any_token_continues_to_the_character(answer: bytes, stop: tuple[str, ...], cut: int) -> None:
    """The stream of a job that changed its worker is the stream of one that did not."""
    undisturbed = outcome(completion_of(stop=stop, max_tokens=70), [answer, b"\0"])
    first = outcome(completion_of(stop=stop, max_tokens=70), [answer[:cut]])
    second = completion_of(stop=stop, max_tokens=70, prefix=first[1])
    rest = outcome(second, [answer[cut:], b"\0"])
    assert (first[0] + rest[0], first[1] + rest[1], rest[2]) == undisturbed


@pytest.mark.parametrize(
    "prompt,code",
    [([1] * 10, "prompt_too_long"), ([1, 9], "invalid_prompt"), ([], "invalid_prompt")],
)
def test_a_prompt_that_can_never_run_is_rejected_with_its_reason(prompt: list[int], code: str) -> None:
    """Before the engine sees it: there it could take its neighbours down."""
    with pytest.raises(JobRejected) as caught:
        check_prompt(prompt, vocabulary=9, context_tokens=10)
    assert caught.value.code == code

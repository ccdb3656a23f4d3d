"""Log probabilities as vLLM gives them, one for one with the tokens."""

from types import SimpleNamespace

from codeyard.worker.engines.completion import LEAST_LOGPROB
from codeyard.worker.engines.vllm_params import logprobs_of


def odds(logprob: float, rank: int | None) -> SimpleNamespace:
    return SimpleNamespace(logprob=logprob, rank=rank)


def decode(ids: list[int]) -> str:
    return "".join(chr(97 + token) for token in ids)


def test_the_likeliest_are_given_best_first_and_the_chosen_one_only_if_it_is_among_them() -> None:
    """vLLM adds the token that was drawn to those that were asked for."""
    output = SimpleNamespace(token_ids=[7], logprobs=[{7: odds(-5.0, 40), 2: odds(-1.0, 2), 1: odds(-0.5, 1)}])
    [one] = logprobs_of(output, decode, num_top=2)
    assert (one.token_id, one.text, one.logprob) == (7, "h", -5.0)
    assert [(other.token_id, other.logprob) for other in one.top] == [(1, -0.5), (2, -1.0)]
    assert logprobs_of(output, decode, num_top=0)[0].top == ()


def test_an_end_without_a_new_token_has_none() -> None:
    """vLLM 0.25.1 repeats those of all earlier tokens when a stream is aborted; that must not fail the job."""
    earlier = [{1: odds(-0.5, 1)}, {2: odds(-0.5, 1)}]
    assert logprobs_of(SimpleNamespace(token_ids=[], logprobs=earlier), decode, num_top=1) == []
    assert logprobs_of(SimpleNamespace(token_ids=[], logprobs=None), decode, num_top=1) == []
    [last] = logprobs_of(SimpleNamespace(token_ids=[2], logprobs=earlier), decode, num_top=1)
    assert last.token_id == 2


def test_a_token_that_cannot_come_has_a_number_all_the_same() -> None:
    """JSON has no infinity."""
    output = SimpleNamespace(token_ids=[1], logprobs=[{1: odds(float("-inf"), None)}])
    [one] = logprobs_of(output, decode, num_top=3)
    assert (one.logprob, one.top) == (LEAST_LOGPROB, ())

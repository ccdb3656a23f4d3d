"""Which acks go out for a group: `multiple` only where it can end nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from codeyard.shared.broker.rabbitmq_consumer import _steps

numbers = st.sets(st.integers(min_value=1, max_value=40))


@given(unacked=numbers, wanted=numbers)
def test_exactly_the_asked_for_deliveries_are_ended_each_once(unacked: set[int], wanted: set[int]) -> None:
    """Played back as the server does it: `multiple` ends every unacked number up to the one it names."""
    ending = unacked & wanted
    left, ended = set(unacked), list[int]()

    for step in _steps(unacked, ending):
        hit = {number for number in left if number <= step.last} if step.multiple else {step.last} & left
        assert hit == step.covers
        ended += hit
        left -= hit

    assert sorted(ended) == sorted(ending)


def test_a_worker_that_settles_everything_it_has_sends_one_frame() -> None:
    """The common case of a drained group."""
    [step] = _steps({7, 8, 9}, {9, 7, 8})

    assert (step.last, step.multiple) == (9, True)


def test_one_older_delivery_still_in_hand_forbids_multiple() -> None:
    """A long generation holds number 1 while its successors finish: an ack up to 3 would end it unsettled."""
    assert [(step.last, step.multiple) for step in _steps({1, 2, 3}, {2, 3})] == [(2, False), (3, False)]

"""Which refusals of a RabbitMQ channel are believed."""

from codeyard.shared.broker.port import Message, PublishOutcome
from codeyard.shared.broker.rabbitmq_refusals import Proven
from codeyard.shared.broker.rabbitmq_topology import Outgoing

CONFIRMED, FULL, UNKNOWN = PublishOutcome.CONFIRMED, PublishOutcome.FULL, PublishOutcome.UNKNOWN


def to(queue: str) -> Outgoing:
    return Outgoing("jobs", queue, Message(queue, "id", b"", {}), {})


def test_a_refusal_where_the_channel_never_had_a_confirm_is_doubted() -> None:
    """Such a channel may have asked a leader that is dead, and would refuse until that one is back."""
    proven = Proven()

    doubted = proven.doubtful([to("a"), to("b"), to("a")], [FULL, CONFIRMED, UNKNOWN])

    assert doubted == [0]
    assert proven.doubtful([to("b"), to("a")], [FULL, FULL]) == [1]


def test_a_queue_that_filled_up_under_us_is_believed_at_once() -> None:
    """Back-pressure must not cost a channel and half a second each time."""
    proven = Proven()

    assert proven.doubtful([to("a"), to("a"), to("a")], [CONFIRMED, FULL, FULL]) == []
    assert proven.doubtful([to("a")], [FULL]) == []

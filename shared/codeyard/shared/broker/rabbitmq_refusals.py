"""Whether a refused publish means that its queue is full.

A quorum queue refuses what exceeds its length. But the server also refuses in its name (seen on 3.10.8): a channel
that publishes to a queue for the first time asks the queue's leader how things stand, and asks the dead one while
another is being elected; it then refuses everything for that queue until the dead node is back, hours later. Clients
that lost their node reconnect just then. A channel opened after the election is told the truth.

So on a route on which a channel has had a confirm, its refusals are believed. On another the channel is given up, and
what it refused is published again on a new one `SETTLE_S` later.
Called by: rabbitmq_publishing, producer.pika_publisher.
"""

from collections.abc import Sequence

from codeyard.shared.broker.port import PublishOutcome
from codeyard.shared.broker.rabbitmq_topology import Outgoing

SETTLE_S = 0.5  # elections among three nodes took 0.2 to 0.4 s


class Proven:
    """The routes on which one channel has had a message confirmed."""

    def __init__(self) -> None:
        self._routes: set[tuple[str, str]] = set()

    def doubtful(self, window: Sequence[Outgoing], outcomes: Sequence[PublishOutcome]) -> list[int]:
        """Learn from what became of a window; returns which of its refusals say nothing about their queue."""
        routes = [(item.exchange, item.routing_key) for item in window]
        confirmed = {
            route for route, outcome in zip(routes, outcomes, strict=True) if outcome is PublishOutcome.CONFIRMED
        }
        self._routes |= confirmed
        return [
            index
            for index, (route, outcome) in enumerate(zip(routes, outcomes, strict=True))
            if outcome is PublishOutcome.FULL and route not in self._routes
        ]

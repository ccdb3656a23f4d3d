"""The Broker port: durable queues, one per model revision, lane and shard.

Promise, for every adapter:
- A method that touches the server takes a *group* and gives one outcome per item, in order.
- A publish is persistent and confirmed; CONFIRMED means the broker has it on disk.
- A delivery ends by ack or requeue, or comes back by itself when its consumer dies.
- An exception is `BrokerUnavailable`: the fate of the whole group is unknown, and repeating it is safe
  (a duplicate message is settled by the claim table).
Called by: producer.submission (publish), shared.reconciler, worker. Knows nothing of records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from codeyard.shared.job import JobId

HeaderValue = str | int | float  # over RabbitMQ a float becomes the next whole number, see to_its_queue


@dataclass(frozen=True, slots=True)
class Message:
    """What is published. `queue` is where it goes; header names are in shared.envelope."""

    queue: str
    message_id: JobId
    body: bytes
    headers: Mapping[str, HeaderValue]


class PublishOutcome(StrEnum):
    CONFIRMED = "confirmed"
    FULL = "full"  # the queue is at its maximum length
    UNROUTABLE = "unroutable"  # no such queue: nobody ever declared the model
    UNKNOWN = "unknown"  # no answer in time: it may be there or not


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """One arrival of a message at one consumer. Nothing in it is trusted before it is decoded.

    Hashed by identity: the same message delivered again is another delivery.
    """

    queue: str
    message_id: str
    body: bytes
    headers: Mapping[str, object]
    redelivered: bool
    timestamp: float | None  # when it was published, seconds since the epoch, by the publisher's clock
    tag: object  # the adapter's own


class Publisher(Protocol):
    async def publish(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        """Persistent, mandatory, confirmed, pipelined. Items without an answer within `timeout_s` are
        UNKNOWN. Raises BrokerUnavailable if there is no connection within `timeout_s`."""

    async def close(self) -> None: ...


class Consumer(Protocol):
    """Deliveries of several queues. Reconnects and consumes again by itself, with backoff and jitter."""

    async def receive(self, most: int) -> list[Delivery]:
        """At least one delivery, at most `most`; waits for the first only. Cancelling loses none."""

    async def ack(self, group: Sequence[Delivery]) -> None:
        """End these for good. One whose connection is gone is skipped: it will be redelivered."""

    async def requeue(self, group: Sequence[Delivery]) -> None:
        """Offer these again, to anyone, soon. Skips those whose connection is gone."""

    async def stop(self) -> None:
        """Take no more. What `receive` gave out can still be acked; what it did not goes back at once."""

    async def close(self) -> None:
        """Stop, and what is unacked goes back to its queue."""


class Broker(Publisher, Protocol):
    async def declare(self, queues: Sequence[str]) -> None:
        """Make these job queues and what they need (exchanges, delay and dead queues). Repeatable."""

    async def consume(self, prefetch: Mapping[str, int]) -> Consumer:
        """Consume queues, each with its own most unacked deliveries. The queues must be declared.
        Besides job queues, `topology.dead_queue` and `topology.dropped_queue` may be named."""

    async def defer(self, group: Sequence[tuple[Message, float]], *, timeout_s: float) -> list[PublishOutcome]:
        """Publish so that each arrives in its queue after about the given seconds: the smallest of
        `topology.DELAY_STEPS_S` that is not shorter, or the longest."""

    async def dead_letter(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        """Publish to the dead-letter queue. `queue` stays as a header, reason and history are headers already."""

    async def depth(self, queues: Sequence[str]) -> list[int]:
        """Ready messages per queue; 0 for one that does not exist. May be a little stale."""

    async def ping(self) -> str:
        """Name and version of the server, e.g. "rabbitmq 3.10.8". Raises BrokerUnavailable."""

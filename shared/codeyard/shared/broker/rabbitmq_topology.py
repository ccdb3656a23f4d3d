"""What there is on a RabbitMQ server, as plain values: exchanges, queues, and where a message is sent.

    publish ---> <ns>.jobs (direct) ---> <ns>.jobs.<revision>.<lane>.<shard> ---> consumer
                     ^                        | what the broker itself drops
    defer ---> <ns>.delay.<step> (fanout)     '---> <ns>.dropped
               and its queue, after its TTL
    dead_letter ---> <ns>.dead

Every queue is a quorum queue, and its arguments are the same for every server version (3.10 to 4.x),
because they are part of declare equivalence. Called by: shared.broker.rabbitmq, producer.pika_publisher.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

from codeyard.shared.broker.port import HeaderValue, Message
from codeyard.shared.job import MESSAGE_TYPE
from codeyard.shared.topology import DELAY_STEPS_S, Topology, delay_step

DELIVERY_LIMIT = 1_000_000_000  # 4.x drops after 20 unless told; attempts are counted in the record, not here
CONTENT_TYPE = "application/json"
PERSISTENT = 2  # AMQP's delivery_mode
ORIGIN_HEADER = "queue"  # of a dead letter: the job queue it was meant for


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: str  # direct | fanout


@dataclass(frozen=True, slots=True)
class Queue:
    name: str
    arguments: Mapping[str, str | int]
    exchange: str | None = None  # bound to this one, under its own name
    # A queue without an exchange is published to by name, through the default exchange.


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message and where it goes."""

    exchange: str
    routing_key: str
    message: Message
    headers: Mapping[str, str | int]


def exchanges(topology: Topology) -> list[Exchange]:
    return [
        Exchange(topology.jobs_exchange, "direct"),
        Exchange(topology.dropped_queue, "fanout"),
        *(Exchange(topology.delay_queue(step), "fanout") for step in DELAY_STEPS_S),
    ]


def queues(topology: Topology, job_queues: Iterable[str], *, max_length: int) -> list[Queue]:
    """The queues every fleet has, then `job_queues`; `max_length` in messages, per queue."""
    bounded: dict[str, str | int] = {
        "x-queue-type": "quorum",
        "x-delivery-limit": DELIVERY_LIMIT,
        "x-max-length": max_length,
        "x-overflow": "reject-publish",  # the publisher learns of it; also a condition of at-least-once below
    }
    own = {topology.dead_queue, topology.dropped_queue}
    return [
        Queue(topology.dead_queue, bounded),
        Queue(topology.dropped_queue, bounded, exchange=topology.dropped_queue),
        *(
            Queue(
                topology.delay_queue(step),
                bounded | _dead_letters_to(topology.jobs_exchange) | {"x-message-ttl": step * 1_000},
                exchange=topology.delay_queue(step),
            )
            for step in DELAY_STEPS_S
        ),
        *(
            Queue(name, bounded | _dead_letters_to(topology.dropped_queue), exchange=topology.jobs_exchange)
            for name in dict.fromkeys(job_queues)
            if name not in own
        ),
    ]


def _dead_letters_to(exchange: str) -> dict[str, str | int]:
    # At least once, because the default moves a message without waiting for the target's confirm. No
    # routing key of its own: the message keeps the one it came with, which names its job queue.
    return {"x-dead-letter-exchange": exchange, "x-dead-letter-strategy": "at-least-once"}


def to_its_queue(topology: Topology, message: Message) -> Outgoing:
    return _outgoing(topology.jobs_exchange, message.queue, message)


def to_delay(topology: Topology, message: Message, delay_s: float) -> Outgoing:
    return _outgoing(topology.delay_queue(delay_step(delay_s)), message.queue, message)


def to_dead_queue(topology: Topology, message: Message) -> Outgoing:
    return _outgoing("", topology.dead_queue, message, {ORIGIN_HEADER: message.queue})


def _outgoing(
    exchange: str, routing_key: str, message: Message, more: Mapping[str, str] = MappingProxyType({})
) -> Outgoing:
    headers = {name: _writable(value) for name, value in message.headers.items()}
    return Outgoing(exchange, routing_key, message, {**headers, **more})


def _writable(value: HeaderValue) -> str | int:
    """Neither client can write a double: pika no float at all, aio-pika only single precision, where the present
    time is off by a minute. The one we send is a deadline in seconds; a little later does no harm."""
    if not isinstance(value, float):
        return value
    return math.ceil(value) if math.isfinite(value) else str(value)


def now() -> datetime:
    """For the `timestamp` property, which counts whole seconds."""
    return datetime.now(UTC)


def delivered_headers(headers: Mapping[str, object], *, dropped: bool) -> dict[str, object]:
    """The publisher's headers, without what the broker added on the way (`x-death`, `x-delivery-count`).

    Of a message the broker itself `dropped`, that is told in the words of a dead letter: `queue` and `reason`.
    """
    plain = {name: value for name, value in headers.items() if not name.startswith("x-")}
    deaths = headers.get("x-death")
    if dropped and isinstance(deaths, list) and deaths and isinstance(deaths[0], Mapping):
        plain[ORIGIN_HEADER] = deaths[0].get("queue")
        plain["reason"] = deaths[0].get("reason")
    return plain


__all__ = [
    "CONTENT_TYPE",
    "MESSAGE_TYPE",
    "PERSISTENT",
    "Exchange",
    "Outgoing",
    "Queue",
    "delivered_headers",
    "exchanges",
    "now",
    "queues",
    "to_dead_queue",
    "to_delay",
    "to_its_queue",
]

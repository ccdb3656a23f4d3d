"""How fast jobs reach RabbitMQ: one confirm at a time, our group publish, and pika's group publish.

    CODEYARD_BROKER_URL=amqp://guest:guest@127.0.0.1/ python loadtest/bench_publish.py [--jobs 4096] [--rounds 5]

All three publish the same messages, persistent, mandatory and confirmed, to a quorum queue of their own,
in turn in each round, so that what else the machine does falls on all alike. Prints the median and the
range of the rounds in messages per second, and the CPU of this process per message. The queues are
deleted at the end. "one by one" publishes fewer messages, because it is slow; the rate is what counts.
"""

import argparse
import asyncio
import os
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import aio_pika

from codeyard.producer.pika_publisher import PikaPublisher
from codeyard.shared.broker.port import HeaderValue, Message, PublishOutcome
from codeyard.shared.broker.rabbitmq import RabbitBroker
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import DELAY_STEPS_S, Topology

TIMEOUT_S = 60.0
ONE_BY_ONE_SHARE = 8  # of the messages

Publish = Callable[[Sequence[Message]], Awaitable[None]]


@dataclass
class Way:
    name: str
    publish: Publish
    share: int = 1
    rates: list[float] = field(default_factory=list)  # messages/s
    cpu_s: list[float] = field(default_factory=list)  # per message

    async def measure(self, group: Sequence[Message]) -> None:
        group = group[: len(group) // self.share]
        began_s, cpu_began_s = time.perf_counter(), time.process_time()
        await self.publish(group)
        self.rates.append(len(group) / (time.perf_counter() - began_s))
        self.cpu_s.append((time.process_time() - cpu_began_s) / len(group))

    def report(self) -> str:
        return (
            f"{self.name:<28} {statistics.median(self.rates):>9,.0f} /s   "
            f"({min(self.rates):,.0f} to {max(self.rates):,.0f})   "
            f"{statistics.median(self.cpu_s) * 1e6:>5.0f} µs CPU per message"
        )


def all_confirmed(outcomes: Sequence[PublishOutcome]) -> None:
    if set(outcomes) != {PublishOutcome.CONFIRMED}:
        raise SystemExit(f"not confirmed: { {kind: outcomes.count(kind) for kind in set(outcomes)} }")


async def main(url: str, num_jobs: int, rounds: int, body_bytes: int) -> None:
    settings = BrokerSettings(url=url)
    topology = Topology(f"bench-{uuid.uuid4().hex[:8]}")
    queue = topology.job_queue("bench", Lane.BULK)
    broker = await RabbitBroker.open(settings, topology)
    pika_publisher = PikaPublisher(settings, topology)
    connection = await aio_pika.connect(url)
    channel = await connection.channel(on_return_raises=True)
    await broker.declare([queue])
    exchange = await channel.get_exchange(topology.jobs_exchange)

    async def one_by_one(group: Sequence[Message]) -> None:
        for item in group:
            message = aio_pika.Message(
                item.body,
                headers=dict(item.headers),
                message_id=item.message_id,
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await exchange.publish(message, item.queue, mandatory=True, timeout=TIMEOUT_S)

    async def by_group(group: Sequence[Message]) -> None:
        all_confirmed(await broker.publish(group, timeout_s=TIMEOUT_S))

    async def by_pika(group: Sequence[Message]) -> None:
        all_confirmed(await pika_publisher.publish(group, timeout_s=TIMEOUT_S))

    ways = [
        Way("aio-pika, one by one", one_by_one, ONE_BY_ONE_SHARE),
        Way("RabbitBroker, one group", by_group),
        Way("PikaPublisher, one group", by_pika),
    ]
    try:
        print(f"{await broker.ping()}, {num_jobs} messages of {body_bytes} bytes, {rounds} rounds")
        for _ in range(rounds):
            for way in ways:
                headers: Mapping[str, HeaderValue] = {"publication": uuid.uuid4().hex, "tenant": "bench", "attempt": 0}
                group = [Message(queue, str(uuid.uuid4()), b"x" * body_bytes, headers) for _ in range(num_jobs)]
                await way.measure(group)
                await (await channel.get_queue(queue, ensure=False)).purge()
        for way in ways:
            print(way.report())
    finally:
        steps = [topology.delay_queue(step) for step in DELAY_STEPS_S]
        for name in (queue, topology.dead_queue, topology.dropped_queue, *steps):
            await channel.queue_delete(name)
        for name in (topology.jobs_exchange, topology.dropped_queue, *steps):
            await channel.exchange_delete(name)
        await connection.close()
        await pika_publisher.close()
        await broker.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4_096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--body-bytes", type=int, default=1_000)
    arguments = parser.parse_args()
    broker_url = os.environ.get("CODEYARD_BROKER_URL", "")
    if not broker_url.startswith("amqp"):
        parser.error("set CODEYARD_BROKER_URL to an amqp:// URL")
    asyncio.run(main(broker_url, arguments.jobs, arguments.rounds, arguments.body_bytes))

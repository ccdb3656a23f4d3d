"""What becomes of deliveries when a whole process dies, consumer or server."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.brokers import PATIENCE_S, Yard, numbered, take, take_bodies
from support.servers import RabbitServer

from codeyard.shared.broker.port import PublishOutcome

HOLD_DELIVERIES = """
import asyncio, sys
from codeyard.shared.connect import open_broker
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology

async def main(url, namespace, queue, count):
    broker = await open_broker(BrokerSettings(url=url), Topology(namespace))
    consumer = await broker.consume({queue: count})
    held = []
    while len(held) < count:
        held += await consumer.receive(count)
    await consumer.ack(held[:1])
    await broker.depth([queue])
    print("holding", flush=True)
    await asyncio.Event().wait()

url, namespace, queue, count = sys.argv[1:]
asyncio.run(main(url, namespace, queue, int(count)))
"""


@asynccontextmanager
async def holding_process(yard: Yard, count: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has taken `count` deliveries of the yard's queue, and acked the first of them."""
    arguments = (yard.url, yard.topology.namespace, yard.queue, str(count))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD_DELIVERIES, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
        assert line == b"holding\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.process
@pytest.mark.parametrize("yard", ["sqlite", pytest.param("rabbitmq", marks=pytest.mark.services)], indirect=True)
async def test_what_a_killed_process_held_comes_back_to_the_others(yard: Yard) -> None:
    """kill -9: no goodbye, no requeue, and nothing lost."""
    broker = await yard.declared()
    await broker.publish(numbered(yard.queue, 3), timeout_s=5)

    async with holding_process(yard, count=3) as process:
        heir = await broker.consume({yard.queue: 10})
        process.kill()
        await process.wait()
        back = await take(heir, 2)

    assert sorted(delivery.body for delivery in back) == [b"1", b"2"]
    assert all(delivery.redelivered for delivery in back)


@pytest.mark.services
@pytest.mark.process
async def test_confirmed_messages_survive_a_killed_server_and_everyone_finds_it_again(
    private_rabbitmq: RabbitServer,
) -> None:
    """Confirmed means on disk, not in the server's memory. Clients of both kinds and a consumer reconnect."""
    yard = Yard(private_rabbitmq.url)
    broker = await yard.declared(yard.settings(timeout_s=60))
    # A queue's own registration is on disk only two seconds after its declare (3.10.8: killed before, it comes
    # back without a leader and answers nobody). An orderly restart makes sure of it.
    await asyncio.to_thread(private_rabbitmq.stop)
    await asyncio.to_thread(private_rabbitmq.start)
    publisher = yard.pika(yard.settings(timeout_s=60))
    consumer = await broker.consume({yard.other: 10})
    group = numbered(yard.queue, 200)
    assert set(await broker.publish(group, timeout_s=30)) == {PublishOutcome.CONFIRMED}

    await asyncio.to_thread(private_rabbitmq.kill)
    await asyncio.to_thread(private_rabbitmq.start)

    for client in (broker, publisher):
        again = [PublishOutcome.UNKNOWN]
        while again == [PublishOutcome.UNKNOWN]:  # at most the one that notices the loss
            again = await client.publish(numbered(yard.other, 1), timeout_s=30)
        assert again == [PublishOutcome.CONFIRMED]
    await asyncio.wait_for(take(consumer, 2), 30)
    heir = await broker.consume({yard.queue: 300})
    await take_bodies(heir, [item.body for item in group])
    await yard.tidy()

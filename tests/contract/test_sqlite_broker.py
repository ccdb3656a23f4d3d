"""What is the embedded broker's own: order, prefetch kept in the file, wake-ups, the death of a consumer."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.brokers import PATIENCE_S, message, numbered, take

from codeyard.shared.broker.port import Delivery, PublishOutcome
from codeyard.shared.broker.sqlite import SqliteBroker
from codeyard.shared.broker.sqlite_consumer import SqliteConsumer
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology

TOPOLOGY = Topology("yard")
FIRST, SECOND = TOPOLOGY.job_queue("m-1", Lane.INTERACTIVE), TOPOLOGY.job_queue("m-1", Lane.BULK)


class Wall:
    """A clock that the test turns; another instance on the same file acts as another process."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
async def broker(tmp_path: Path, wall: Wall) -> AsyncIterator[SqliteBroker]:
    broker = await opened(tmp_path, wall)
    await broker.declare([FIRST, SECOND])
    yield broker
    await broker.close()


async def opened(folder: Path, wall: Wall, *, max_length: int = 1_000) -> SqliteBroker:
    settings = BrokerSettings(url=f"sqlite:///{folder / 'yard.db'}", queue_max_length=max_length)
    return await SqliteBroker.open(settings, TOPOLOGY, clock=wall)


async def consumer_of(broker: SqliteBroker, prefetch: dict[str, int]) -> SqliteConsumer:
    consumer = await broker.consume(prefetch)
    assert isinstance(consumer, SqliteConsumer)
    return consumer


async def waiting(consumer: SqliteConsumer, most: int = 10) -> asyncio.Task[list[Delivery]]:
    """A `receive` that has found nothing and waits."""
    looking = asyncio.Event()
    loop, look = asyncio.get_running_loop(), consumer.look

    def told(*arguments: object) -> None:
        look(*arguments)  # type: ignore[arg-type]  # passed on as they came
        loop.call_soon_threadsafe(looking.set)

    consumer.look = told  # type: ignore[assignment,method-assign]  # to learn that the watcher asks it
    task = asyncio.create_task(consumer.receive(most))
    async with asyncio.timeout(PATIENCE_S):
        await looking.wait()
    return task


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.body for delivery in deliveries]


async def test_a_message_deferred_comes_when_its_time_has_come_and_not_before(broker: SqliteBroker, wall: Wall) -> None:
    """By the file's clock; a waiting consumer is woken by time alone."""
    consumer = await consumer_of(broker, {FIRST: 10})
    later = message(FIRST, b"later")
    assert await broker.defer([(later, 3.0)], timeout_s=5) == [PublishOutcome.CONFIRMED]
    wall.now += 4.9
    assert await broker.depth([FIRST]) == [0]
    receiving = await waiting(consumer)

    wall.now += 0.2

    async with asyncio.timeout(PATIENCE_S):
        assert bodies(await receiving) == [b"later"]


async def test_a_deferred_message_queues_up_behind_those_that_were_ready_before(
    broker: SqliteBroker, wall: Wall
) -> None:
    """A retry must not overtake fresh work, as it does not on RabbitMQ."""
    await broker.defer([(message(FIRST, b"retry"), 5.0)], timeout_s=5)
    wall.now += 1
    await broker.publish([message(FIRST, b"fresh")], timeout_s=5)
    wall.now += 10
    await broker.publish([message(FIRST, b"later")], timeout_s=5)
    consumer = await consumer_of(broker, {FIRST: 10})

    assert bodies(await consumer.receive(10)) == [b"fresh", b"retry", b"later"]


async def test_a_requeued_message_comes_first_again_and_says_so(broker: SqliteBroker) -> None:
    """At the head of its queue, as on RabbitMQ."""
    await broker.publish(numbered(FIRST, 3), timeout_s=5)
    consumer = await consumer_of(broker, {FIRST: 10})
    taken = await consumer.receive(2)

    await consumer.requeue(taken[1:])

    again = await consumer.receive(10)
    assert [(one.body, one.redelivered) for one in again] == [(b"1", True), (b"2", False)]


async def test_one_deep_queue_does_not_keep_the_other_lanes_away(broker: SqliteBroker) -> None:
    """`receive` shares out what it brings; only what one queue lacks goes to the other."""
    await broker.publish([*numbered(SECOND, 50), *numbered(FIRST, 2)], timeout_s=5)
    consumer = await consumer_of(broker, {SECOND: 40, FIRST: 40})

    taken = await consumer.receive(10)

    assert sorted(one.queue for one in taken) == sorted([FIRST] * 2 + [SECOND] * 8)


async def test_prefetch_is_counted_in_the_file_so_that_a_cancelled_ack_costs_no_place(broker: SqliteBroker) -> None:
    """The worker's ack may be cut short; the message is gone, and its place must be free."""
    await broker.publish(numbered(FIRST, 4), timeout_s=5)
    consumer = await consumer_of(broker, {FIRST: 2})
    taken = await take(consumer, 2)
    acking = asyncio.create_task(consumer.ack(taken))
    await asyncio.sleep(0)  # it is on its way now
    acking.cancel()
    with suppress(asyncio.CancelledError):
        await acking
    await consumer.ack(taken)

    assert bodies(await take(consumer, 2)) == [b"2", b"3"]


async def test_a_cancelled_receive_loses_nothing(broker: SqliteBroker) -> None:
    """What it took on its way out comes with the next one."""
    consumer = await consumer_of(broker, {FIRST: 10})
    await broker.publish(numbered(FIRST, 5), timeout_s=5)
    receiving = asyncio.create_task(consumer.receive(3))
    await asyncio.sleep(0)  # its call is on its way
    receiving.cancel()
    with suppress(asyncio.CancelledError):
        await receiving

    assert bodies(await take(consumer, 5)) == [b"0", b"1", b"2", b"3", b"4"]


async def test_what_a_stopped_consumer_did_not_give_out_goes_back_unseen(broker: SqliteBroker) -> None:
    """Even if it was just being taken; what was given out can still be acked."""
    consumer, other = await consumer_of(broker, {FIRST: 10}), await consumer_of(broker, {FIRST: 10})
    await broker.publish(numbered(FIRST, 3), timeout_s=5)
    [given] = await consumer.receive(1)
    receiving = asyncio.create_task(consumer.receive(10))
    await asyncio.sleep(0)  # its call is on its way
    receiving.cancel()

    await consumer.stop()
    await consumer.ack([given])

    rest = await take(other, 2)
    assert [(one.body, one.redelivered) for one in rest] == [(b"1", False), (b"2", False)]
    assert await broker.depth([FIRST]) == [0]


async def test_stopping_while_messages_are_being_taken_gives_none_to_two(broker: SqliteBroker) -> None:
    """Given out, or back in the queue: never both, never neither."""
    consumer, other = await consumer_of(broker, {FIRST: 10}), await consumer_of(broker, {FIRST: 10})
    await broker.publish(numbered(FIRST, 4), timeout_s=5)
    receiving = asyncio.create_task(consumer.receive(3))
    await asyncio.sleep(0)  # its call is on its way

    await consumer.stop()
    given = await receiving
    rest = await take(other, 4 - len(given))
    await consumer.ack(given)
    await other.ack(rest)

    assert sorted(bodies([*given, *rest])) == [b"0", b"1", b"2", b"3"]
    await consumer.close()
    await other.close()
    assert await broker.depth([FIRST]) == [0]


async def test_a_waiting_consumer_is_woken_by_a_publish_of_another_process(
    tmp_path: Path, broker: SqliteBroker
) -> None:
    """Nothing tells it but the file itself."""
    elsewhere = await opened(tmp_path, Wall())
    receiving = await waiting(await consumer_of(broker, {FIRST: 10}))

    await elsewhere.publish([message(FIRST, b"hello")], timeout_s=5)

    async with asyncio.timeout(PATIENCE_S):
        assert bodies(await receiving) == [b"hello"]
    await elsewhere.close()


async def test_a_full_consumer_is_woken_by_its_own_ack(broker: SqliteBroker) -> None:
    """It waits for room, not for a message."""
    await broker.publish(numbered(FIRST, 2), timeout_s=5)
    consumer = await consumer_of(broker, {FIRST: 1})
    [held] = await consumer.receive(1)
    receiving = await waiting(consumer)

    await consumer.ack([held])

    async with asyncio.timeout(PATIENCE_S):
        assert bodies(await receiving) == [b"1"]


async def test_what_a_dead_consumer_held_comes_to_one_that_waits(tmp_path: Path, broker: SqliteBroker) -> None:
    """Its lock is free, whatever the file says: here the lock goes without a word, as a kill -9 does it."""
    await broker.publish(numbered(FIRST, 2), timeout_s=5)
    dying = await consumer_of(broker, {FIRST: 10})
    await take(dying, 2)
    receiving = await waiting(await consumer_of(broker, {FIRST: 10}))

    dying._lock.release()

    async with asyncio.timeout(PATIENCE_S):
        deliveries = await receiving
    assert [(one.body, one.redelivered) for one in deliveries] == [(b"0", True), (b"1", True)]
    await dying.ack(deliveries)  # not its own any more
    assert len(os.listdir(tmp_path / "yard.db-consumers")) == 1


async def test_a_living_consumer_keeps_what_it_holds(broker: SqliteBroker) -> None:
    """Probing a lock must not take it away."""
    await broker.publish(numbered(FIRST, 2), timeout_s=5)
    living = await consumer_of(broker, {FIRST: 1})
    [held] = await living.receive(1)
    other = await consumer_of(broker, {FIRST: 10})

    assert bodies(await other.receive(10)) == [b"1"]
    receiving = await waiting(other)
    await living.ack([held])
    assert await broker.depth([FIRST]) == [0]
    receiving.cancel()
    with suppress(asyncio.CancelledError):
        await receiving


async def test_a_closed_consumer_leaves_no_lock_behind_and_gives_back_what_it_held(
    tmp_path: Path, broker: SqliteBroker
) -> None:
    """Lock files of a year of workers would slow every probe."""
    await broker.publish(numbered(FIRST, 2), timeout_s=5)
    consumer = await consumer_of(broker, {FIRST: 10})
    await take(consumer, 2)

    await consumer.close()
    await consumer.close()

    assert await broker.depth([FIRST]) == [2]
    assert os.listdir(tmp_path / "yard.db-consumers") == []
    with pytest.raises(BrokerUnavailable, match="closed"):
        await consumer.receive(1)


async def test_a_queue_that_nobody_declared_cannot_be_consumed(tmp_path: Path, broker: SqliteBroker) -> None:
    """A worker that waited on a misspelt queue would wait for ever."""
    with pytest.raises(BrokerUnavailable, match="no queue nowhere"):
        await broker.consume({FIRST: 1, "nowhere": 1})
    assert os.listdir(tmp_path / "yard.db-consumers") == []


async def test_room_and_depth_count_ready_messages_only(tmp_path: Path, wall: Wall, broker: SqliteBroker) -> None:
    """As `x-max-length` of a queue does: what a worker holds is no longer in the way."""
    small = await opened(tmp_path, wall, max_length=2)
    await small.declare([FIRST])
    outcomes = await small.publish(numbered(FIRST, 3), timeout_s=5)
    consumer = await consumer_of(broker, {FIRST: 1})
    [held] = await consumer.receive(1)
    depth_while_held = await small.depth([FIRST, SECOND, "nowhere"])
    outcomes += await small.publish(numbered(FIRST, 2), timeout_s=5)
    await consumer.requeue([held])

    assert outcomes == ["confirmed", "confirmed", "full", "confirmed", "full"]
    assert depth_while_held == [1, 0, 0]
    assert await small.depth([FIRST]) == [3]
    await small.close()

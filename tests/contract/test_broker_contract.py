"""What the Broker port promises, held against every adapter."""

import asyncio
import time

import pytest
from support.brokers import Yard, comes_to, message, numbered, take, take_bodies

from codeyard.shared.broker.port import Broker, Message, PublishOutcome

CONFIRMED, FULL, UNROUTABLE = PublishOutcome.CONFIRMED, PublishOutcome.FULL, PublishOutcome.UNROUTABLE


async def test_a_confirmed_message_outlives_the_client_that_published_it(yard: Yard) -> None:
    """Confirmed means the broker has it: whoever asks later finds it, as it was sent."""
    first = await yard.declared()
    sent = message(yard.queue, b'{"prompt": "\xc3\xa9"}', tenant="acme", attempt=2, deadline=1_800_000_000)

    outcomes = await first.publish([sent], timeout_s=5)
    await first.close()
    second = await yard.open()
    consumer = await second.consume({yard.queue: 10})
    [delivery] = await take(consumer, 1)

    assert outcomes == [CONFIRMED]
    assert (delivery.queue, delivery.message_id, delivery.body) == (yard.queue, sent.message_id, sent.body)
    assert delivery.headers == sent.headers
    assert delivery.redelivered is False
    assert delivery.timestamp == pytest.approx(time.time(), abs=60)


async def test_a_deadline_with_a_fraction_never_arrives_as_an_earlier_one(yard: Yard) -> None:
    """RabbitMQ's clients cannot write a double: in single precision a deadline would be off by a minute."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 1})
    sent = Message(yard.queue, "id", b"{}", {"deadline": 1_800_000_000.25})

    await broker.publish([sent], timeout_s=5)
    [delivery] = await take(consumer, 1)

    assert delivery.headers["deadline"] in (1_800_000_000.25, 1_800_000_001)


async def test_every_item_of_a_group_has_its_own_outcome(yard: Yard) -> None:
    """One bad item never fails its neighbours."""
    broker = await yard.declared()
    group = [message(yard.queue), message("nobody.declared.this"), message(yard.other), message("nor.this")]

    outcomes = await broker.publish(group, timeout_s=5)

    assert outcomes == [CONFIRMED, UNROUTABLE, CONFIRMED, UNROUTABLE]


async def test_publishing_before_anyone_declared_anything_is_unroutable(yard: Yard) -> None:
    """A fleet without a single worker ever started has no exchange either: the caller learns UnknownModel."""
    broker = await yard.open()

    first = await broker.publish([message(yard.queue), message(yard.queue)], timeout_s=5)
    again = await broker.publish([message(yard.queue)], timeout_s=5)

    assert first + again == [UNROUTABLE] * 3


async def test_the_same_id_twice_in_one_group_keeps_its_outcomes_apart(yard: Yard) -> None:
    """A retry beside its first try, to another queue: what returns must not be taken for its twin."""
    broker = await yard.declared()
    here, gone = message(yard.queue), message("nobody.declared.this")
    twin = [here, Message(gone.queue, here.message_id, b"{}", {}), here]

    outcomes = await broker.publish(twin, timeout_s=5)

    assert outcomes == [CONFIRMED, UNROUTABLE, CONFIRMED]


async def test_a_full_queue_refuses_and_its_neighbours_in_the_group_do_not(yard: Yard) -> None:
    """The limit is soft on RabbitMQ: what is under way when it is reached still gets in."""
    small = yard.settings(max_length=5)
    broker = await yard.declared(small)

    tries = 0
    while (await broker.publish([message(yard.queue)], timeout_s=5)) == [CONFIRMED] and tries < 100:
        tries += 1
    group = [message(yard.other), message(yard.queue), message(yard.other), message("nobody.declared.this")]
    outcomes = await broker.publish(group, timeout_s=5)

    assert 5 <= tries < 100
    assert outcomes == [CONFIRMED, FULL, CONFIRMED, UNROUTABLE]


async def test_a_group_of_a_thousand_is_confirmed_in_order(yard: Yard) -> None:
    """Pipelined does not mean shuffled."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 2_000})

    outcomes = await broker.publish(numbered(yard.queue, 1_000), timeout_s=30)
    deliveries = await take(consumer, 1_000)

    assert outcomes == [CONFIRMED] * 1_000
    assert [int(delivery.body) for delivery in deliveries] == list(range(1_000))


async def test_an_empty_group_is_nothing(yard: Yard) -> None:
    """Callers need not look whether there is something to do."""
    broker = await yard.declared()

    assert await broker.publish([], timeout_s=5) == []
    assert await broker.defer([], timeout_s=5) == []
    assert await broker.dead_letter([], timeout_s=5) == []
    assert await broker.depth([]) == []


async def test_each_queue_has_its_own_prefetch(yard: Yard) -> None:
    """What is over it stays at the broker, where another worker can have it and the depth counts it."""
    broker = await yard.declared()
    await broker.publish(numbered(yard.queue, 5) + numbered(yard.other, 5), timeout_s=5)

    consumer = await broker.consume({yard.queue: 2, yard.other: 3})
    held = await take(consumer, 5)

    assert sorted(delivery.queue for delivery in held) == sorted([yard.queue] * 2 + [yard.other] * 3)
    assert await comes_to(lambda: broker.depth([yard.queue, yard.other]), [3, 2]) == [3, 2]

    await consumer.ack([next(delivery for delivery in held if delivery.queue == yard.queue)])
    [next_one] = await take(consumer, 1)

    assert next_one.queue == yard.queue


async def test_receive_gives_no_more_than_asked_for(yard: Yard) -> None:
    """The rest waits for the next call, in order."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 10})
    await broker.publish(numbered(yard.queue, 3), timeout_s=5)

    first = await consumer.receive(1)
    rest = await take(consumer, 2)

    assert [delivery.body for delivery in first + rest] == [b"0", b"1", b"2"]


async def test_requeued_deliveries_come_back_marked(yard: Yard) -> None:
    """A hand-back is offered to anyone again, and whoever gets it knows that it is not the first time."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 10})
    await broker.publish(numbered(yard.queue, 3), timeout_s=5)
    held = await take(consumer, 3)

    await consumer.requeue([held[0], held[2]])
    back = await take(consumer, 2)

    assert sorted(delivery.body for delivery in back) == [b"0", b"2"]
    assert all(delivery.redelivered for delivery in back)


async def test_an_ack_is_final_and_what_was_not_acked_comes_back(yard: Yard) -> None:
    """Acked out of order, with one in the middle left out: exactly that one is offered to the next consumer."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 10})
    await broker.publish(numbered(yard.queue, 5), timeout_s=5)
    held = await take(consumer, 5)

    await consumer.ack([held[4], held[1]])
    await consumer.ack([held[0], held[3]])
    await consumer.close()
    heir = await broker.consume({yard.queue: 10})
    [left] = await take(heir, 1)
    await heir.ack([left])

    assert left.body == b"2"
    assert left.redelivered
    assert await comes_to(lambda: broker.depth([yard.queue]), [0]) == [0]


async def test_settling_twice_changes_nothing(yard: Yard) -> None:
    """A second ack, or a requeue after it, must not cost the neighbours their connection."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 10})
    await broker.publish(numbered(yard.queue, 2), timeout_s=5)
    first, second = await take(consumer, 2)

    await consumer.ack([first])
    await consumer.ack([first])
    await consumer.requeue([first])
    await consumer.requeue([second])
    [back] = await take(consumer, 1)

    assert back.body == b"1"


async def test_two_consumers_share_a_queue(yard: Yard) -> None:
    """Each message goes to one of them, and neither starves."""
    broker = await yard.declared()
    one = await broker.consume({yard.queue: 5})
    two = await (await yard.open()).consume({yard.queue: 5})

    await broker.publish(numbered(yard.queue, 10), timeout_s=5)
    held = await take(one, 5) + await take(two, 5)

    assert sorted(int(delivery.body) for delivery in held) == list(range(10))


async def test_a_cancelled_receive_loses_nothing(yard: Yard) -> None:
    """Intake cancels its receive whenever something else is more urgent."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 100})
    received: list[bytes] = []

    for number in range(20):
        receiving = asyncio.create_task(consumer.receive(1))
        await broker.publish([message(yard.queue, str(number).encode())], timeout_s=5)
        receiving.cancel()
        [ended] = await asyncio.gather(receiving, return_exceptions=True)
        if isinstance(ended, list):
            received += [delivery.body for delivery in ended]
    missing = [str(number).encode() for number in range(20) if str(number).encode() not in received]
    received += [delivery.body for delivery in await take_bodies(consumer, missing)]

    assert sorted(received, key=int) == [str(number).encode() for number in range(20)]


async def test_a_stopped_consumer_takes_no_more_and_can_still_ack(yard: Yard) -> None:
    """Draining: what was given out is finished, what was not goes to the next worker at once."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 10})
    await broker.publish(numbered(yard.queue, 3), timeout_s=5)
    [held] = await take(consumer, 1)

    await consumer.stop()
    await broker.publish([message(yard.queue, b"3")], timeout_s=5)
    heir = await broker.consume({yard.queue: 10})
    others = await take(heir, 3)
    await consumer.ack([held])
    await consumer.close()
    await heir.ack(others)

    assert held.body == b"0"
    assert sorted(delivery.body for delivery in others) == [b"1", b"2", b"3"]
    assert await comes_to(lambda: broker.depth([yard.queue]), [0]) == [0]


async def test_a_deferred_message_arrives_after_its_step_and_unchanged(yard: Yard) -> None:
    """Not before, and looking like one published just now: what the broker noted on the way is not passed on."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 10})
    sent = message(yard.queue, b"later", attempt=1)

    published_s = time.monotonic()
    outcomes = await broker.defer([(sent, 0.7)], timeout_s=5)
    [delivery] = await take(consumer, 1)
    waited_s = time.monotonic() - published_s

    assert outcomes == [CONFIRMED]
    assert waited_s >= 0.7
    assert (delivery.queue, delivery.message_id, delivery.body) == (yard.queue, sent.message_id, b"later")
    assert delivery.headers == sent.headers


async def test_a_message_can_be_deferred_again_and_again(yard: Yard) -> None:
    """RabbitMQ drops a message that it has dead-lettered in a circle; ours is a fresh one each time."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 10})
    sent = message(yard.queue, b"again")

    for _ in range(3):
        assert await broker.defer([(sent, 0.5)], timeout_s=5) == [CONFIRMED]
        [delivery] = await take(consumer, 1)
        await consumer.ack([delivery])

    assert delivery.body == b"again"


async def test_a_dead_letter_is_kept_with_its_reason_and_its_queue(yard: Yard) -> None:
    """`codeyard dead` shows it, and redrive needs to know where it came from."""
    broker = await yard.declared()
    sent = message(yard.queue, b"poison", reason="poison", attempt=3)

    outcomes = await broker.dead_letter([sent], timeout_s=5)
    consumer = await broker.consume({yard.topology.dead_queue: 10})
    [letter] = await take(consumer, 1)

    assert outcomes == [CONFIRMED]
    assert (letter.queue, letter.message_id, letter.body) == (yard.topology.dead_queue, sent.message_id, b"poison")
    assert letter.headers == {**sent.headers, "queue": yard.queue}


async def test_depth_counts_ready_messages_and_is_zero_for_what_does_not_exist(yard: Yard) -> None:
    """The scheduler asks about every lane, also those nobody has declared yet."""
    broker = await yard.declared()
    await broker.publish(numbered(yard.queue, 3), timeout_s=5)

    async def depths() -> list[int]:
        return await broker.depth([yard.queue, "nobody.declared.this", yard.other, yard.queue])

    assert await comes_to(depths, [3, 0, 0, 3]) == [3, 0, 0, 3]


async def test_declaring_again_changes_nothing(yard: Yard) -> None:
    """Every worker declares at its start, several at once."""
    broker = await yard.declared()
    await broker.publish(numbered(yard.queue, 2), timeout_s=5)

    async def declare_with(other: Broker) -> None:
        await other.declare([yard.queue, yard.queue])

    await asyncio.gather(declare_with(broker), declare_with(await yard.open()))

    assert await comes_to(lambda: broker.depth([yard.queue]), [2]) == [2]


async def test_a_ping_names_the_server(yard: Yard) -> None:
    """`codeyard doctor` shows it."""
    broker = await yard.open()

    name, version = (await broker.ping()).split()

    assert name == yard.kind
    assert version[0].isdigit()


async def test_closing_twice_is_allowed(yard: Yard) -> None:
    """Shutdown paths meet."""
    broker = await yard.declared()
    consumer = await broker.consume({yard.queue: 1})

    await consumer.close()
    await consumer.close()
    await broker.close()
    await broker.close()

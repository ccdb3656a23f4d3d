"""What others do on the same RabbitMQ, and how its refusals reach us."""

import asyncio
import inspect
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import aiormq.exceptions
import pamqp.exceptions
import pika
import pytest
from pamqp.commands import Basic
from support.brokers import PATIENCE_S, Yard, comes_to, logged, message, numbered, take

from codeyard.shared.broker.port import PublishOutcome
from codeyard.shared.broker.rabbitmq_link import translated
from codeyard.shared.errors import BrokerUnavailable, SettingsError

CONFIRMED = PublishOutcome.CONFIRMED


def changed(url: str, *, password: str | None = None, vhost: str = "") -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    credentials = f"{parts.username}:{password or parts.password}"
    return urlunsplit(parts._replace(netloc=f"{credentials}@{host}", path=f"/{vhost}"))


@pytest.mark.services
async def test_what_the_broker_itself_drops_lands_in_the_dropped_queue(rabbitmq: Yard) -> None:
    """A foreign consumer that rejects, or an operator's policy: the job must not vanish, it is committed as failed."""
    broker = await rabbitmq.declared()
    sent = message(rabbitmq.queue, b"rejected", attempt=1)
    await broker.publish([sent], timeout_s=5)

    async with await aio_pika.connect(rabbitmq.url) as foreigner:
        queue = await (await foreigner.channel()).get_queue(rabbitmq.queue)
        foreign = await queue.get()
        await foreign.reject(requeue=False)
        consumer = await broker.consume({rabbitmq.topology.dropped_queue: 10})
        [dropped] = await take(consumer, 1)

    assert (dropped.queue, dropped.message_id, dropped.body) == (
        rabbitmq.topology.dropped_queue,
        sent.message_id,
        b"rejected",
    )
    assert dropped.headers == {**sent.headers, "queue": rabbitmq.queue, "reason": "rejected"}


@pytest.mark.services
async def test_a_message_on_the_wire_is_what_the_contract_says(rabbitmq: Yard) -> None:
    """Workers in other languages read these properties; both clients write the same."""
    broker = await rabbitmq.declared()
    await broker.publish([message(rabbitmq.queue, b"{}")], timeout_s=5)
    await rabbitmq.pika().publish([message(rabbitmq.queue, b"{}")], timeout_s=5)

    async with await aio_pika.connect(rabbitmq.url) as foreigner:
        queue = await (await foreigner.channel()).get_queue(rabbitmq.queue)
        seen = [await queue.get(), await queue.get()]
        for one in seen:
            await one.ack()

    for one in seen:
        assert (one.type, one.content_type, one.delivery_mode) == ("codeyard.job.v1", "application/json", 2)
        assert (one.exchange, one.routing_key) == (rabbitmq.topology.jobs_exchange, rabbitmq.queue)
        assert one.message_id
        assert one.timestamp is not None


UNDECODABLE = {
    "timestamp": pika.BasicProperties(message_id="m", timestamp=2**62),
    "text": pika.BasicProperties(message_id=b"\xff\xfe", type="t"),
    "header name": pika.BasicProperties(message_id="m", headers={b"\xff": "x"}),
}


@pytest.mark.services
@pytest.mark.parametrize("properties", UNDECODABLE.values(), ids=UNDECODABLE.keys())
async def test_a_message_nobody_can_decode_does_not_stop_the_lane(
    rabbitmq: Yard, properties: pika.BasicProperties
) -> None:
    """It would end the connection, come back first, and end it again, for every worker there is."""
    broker = await rabbitmq.declared()
    consumer = await broker.consume({rabbitmq.queue: 1})

    def publish_as_a_foreigner() -> None:
        connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
        connection.channel().basic_publish(rabbitmq.topology.jobs_exchange, rabbitmq.queue, b"odd", properties)
        connection.close()

    await asyncio.to_thread(publish_as_a_foreigner)
    await broker.publish([message(rabbitmq.queue, b"fine")], timeout_s=5)
    [odd] = await take(consumer, 1)
    await consumer.ack([odd])
    [fine] = await take(consumer, 1)

    assert (odd.body, odd.redelivered, fine.body) == (b"odd", False, b"fine")


@pytest.mark.services
async def test_a_queue_deleted_under_its_consumer_is_made_again(rabbitmq: Yard) -> None:
    """The server cancels the consumer. Without it the lane would be dead until someone restarts the worker."""
    broker = await rabbitmq.declared()
    consumer = await broker.consume({rabbitmq.queue: 10, rabbitmq.other: 10})

    with logged("queue_missing", "codeyard.shared.broker.rabbitmq_consumer") as missed:
        async with await aio_pika.connect(rabbitmq.url) as operator:
            await (await operator.channel()).queue_delete(rabbitmq.queue)
        await asyncio.wait_for(missed.wait(), PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        while await broker.publish([message(rabbitmq.queue, b"after")], timeout_s=5) != [CONFIRMED]:
            pass  # unroutable until the consumer has made it again
    [delivery] = await take(consumer, 1)

    assert delivery.body == b"after"


@pytest.mark.services
async def test_a_closed_channel_costs_only_its_own_queue(rabbitmq: Yard) -> None:
    """The ack timeout closes one channel; deliveries of the other lanes stay in hand."""
    broker = await rabbitmq.declared()
    consumer = await broker.consume({rabbitmq.queue: 10, rabbitmq.other: 10})
    await broker.publish([message(rabbitmq.queue, b"a"), message(rabbitmq.other, b"b")], timeout_s=5)
    held = {delivery.queue: delivery for delivery in await take(consumer, 2)}

    channel = held[rabbitmq.queue].tag.subscription.channel  # type: ignore[attr-defined]  # the adapter's own
    await channel.basic_ack(999_999)  # an unknown delivery: the server closes the channel over it
    [again] = await take(consumer, 1)
    await consumer.ack([held[rabbitmq.queue], held[rabbitmq.other], again])

    assert (again.body, again.redelivered) == (b"a", True)

    async def depths() -> list[int]:
        return await broker.depth([rabbitmq.queue, rabbitmq.other])

    await consumer.close()
    assert await comes_to(depths, [0, 0]) == [0, 0]


@pytest.mark.services
async def test_another_maximum_length_is_refused_with_the_setting_to_mend(rabbitmq: Yard) -> None:
    """It is part of the queue; two workers that disagree must not fight over it, nor retry for ever."""
    await rabbitmq.declared()
    other = await rabbitmq.open(rabbitmq.settings(max_length=77))

    with pytest.raises(SettingsError, match="CODEYARD_BROKER_QUEUE_MAX_LENGTH"):
        await other.declare([rabbitmq.queue])


@pytest.mark.services
async def test_a_missing_queue_in_a_depth_does_not_spoil_the_next_question(rabbitmq: Yard) -> None:
    """RabbitMQ closes the channel that asks for a queue that is not there."""
    broker = await rabbitmq.declared()
    await broker.publish(numbered(rabbitmq.queue, 2), timeout_s=5)

    for _ in range(3):
        assert await broker.depth(["not.there"]) == [0]
        assert (await broker.ping()).startswith("rabbitmq ")

    assert await broker.depth([rabbitmq.queue]) == [2]


@pytest.mark.services
@pytest.mark.parametrize("how", ["password", "vhost"])
async def test_a_refused_client_is_told_at_once_and_why(rabbitmq: Yard, how: str) -> None:
    """Waiting cannot mend a wrong password; the message says what to look at and does not repeat it."""
    await rabbitmq.declared()
    url = changed(rabbitmq.url, password="not-it") if how == "password" else changed(rabbitmq.url, vhost="nowhere")
    settings = rabbitmq.settings(url=url, timeout_s=300)
    wanted = r"refused" if how == "password" else r"nowhere"

    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(BrokerUnavailable, match=wanted) as of_aio_pika:
            await rabbitmq.open(settings)
        with pytest.raises(BrokerUnavailable, match=wanted) as of_pika:
            await rabbitmq.pika(settings).publish([message(rabbitmq.queue)], timeout_s=300)

    assert "not-it" not in f"{of_aio_pika.value}{of_pika.value}"


@pytest.mark.services
async def test_pika_keeps_every_outcome_apart(rabbitmq: Yard) -> None:
    """The same outcomes as the other client, item by item, also for an id that is there twice."""
    broker = await rabbitmq.declared(rabbitmq.settings(max_length=5))
    while await broker.publish([message(rabbitmq.queue)], timeout_s=5) == [CONFIRMED]:
        pass
    publisher = rabbitmq.pika()
    twin = message("nobody.declared.this")
    group = [message(rabbitmq.other), twin, message(rabbitmq.queue), twin, message(rabbitmq.other)]

    outcomes = await publisher.publish(group, timeout_s=5)

    assert outcomes == [
        CONFIRMED,
        PublishOutcome.UNROUTABLE,
        PublishOutcome.FULL,
        PublishOutcome.UNROUTABLE,
        CONFIRMED,
    ]


@pytest.mark.services
async def test_pika_publishes_a_thousand_in_order_and_before_anyone_declared_is_unroutable(rabbitmq: Yard) -> None:
    """The blocking client's `submit_many`; and its caller learns UnknownModel as from the other client."""
    publisher = rabbitmq.pika()
    before = await publisher.publish(numbered(rabbitmq.queue, 3), timeout_s=5)
    broker = await rabbitmq.declared()
    consumer = await broker.consume({rabbitmq.queue: 2_000})

    outcomes = await publisher.publish(numbered(rabbitmq.queue, 1_500), timeout_s=30)
    deliveries = await take(consumer, 1_500)

    assert before == [PublishOutcome.UNROUTABLE] * 3
    assert outcomes == [CONFIRMED] * 1_500
    assert [int(delivery.body) for delivery in deliveries] == list(range(1_500))


LIBRARY_EXCEPTIONS = sorted(
    {
        member
        for module in (aio_pika.exceptions, aiormq.exceptions, pamqp.exceptions)
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Exception)
    }
    | {OSError, ConnectionResetError, TimeoutError, EOFError},
    key=lambda kind: f"{kind.__module__}.{kind.__qualname__}",
)


@pytest.mark.parametrize("kind", LIBRARY_EXCEPTIONS, ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
def test_no_exception_of_the_library_leaves_the_adapter(kind: type[Exception]) -> None:
    """Nothing above the adapters ever sees one; a new one of a new version fails here."""
    error = kind.__new__(kind, "one", "two")
    error.frame = Basic.Nack()  # type: ignore[attr-defined]  # some want it for their text

    with pytest.raises(BrokerUnavailable), translated("trying"):
        raise error


async def test_a_cancellation_made_by_the_library_is_a_lost_connection_and_our_own_is_not() -> None:
    """aiormq cancels whoever waits on a channel it closes. Taken for our own, it would end the worker silently."""
    with pytest.raises(BrokerUnavailable), translated("trying"):
        raise asyncio.CancelledError

    async def cancelled() -> None:
        with translated("trying"):
            await asyncio.Event().wait()

    task = asyncio.create_task(cancelled())
    await asyncio.wait([task], timeout=0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

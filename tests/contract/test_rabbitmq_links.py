"""RabbitMQ behind a link that is cut before and after the effect of each call, stalls, or leads nowhere."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from support.brokers import PATIENCE_S, Yard, comes_to, logged, message, numbered, take, take_bodies
from support.proxy import TcpProxy

from codeyard.shared.broker.port import Publisher, PublishOutcome
from codeyard.shared.errors import BrokerUnavailable

pytestmark = pytest.mark.services

CONFIRMED, UNKNOWN = PublishOutcome.CONFIRMED, PublishOutcome.UNKNOWN
BASIC_ACK = b"\x00\x3c\x00\x50"  # class 60, method 80: an ack as it is on the wire
QUEUE_DECLARE = b"\x00\x32\x00\x0a"


@pytest_asyncio.fixture
async def proxy(rabbitmq: Yard) -> AsyncIterator[TcpProxy]:
    async with TcpProxy.to(rabbitmq.url) as proxy:
        yield proxy


Opener = Callable[[Yard, TcpProxy], Awaitable[Publisher]]


async def _aio_pika(yard: Yard, proxy: TcpProxy) -> Publisher:
    return await yard.open(yard.settings(url=proxy.url(yard.url)))


async def _pika(yard: Yard, proxy: TcpProxy) -> Publisher:
    return yard.pika(yard.settings(url=proxy.url(yard.url)))


async def publish_until_unavailable(publisher: Publisher, queue: str) -> None:
    """A loss may be noticed only by the first to publish after it, who cannot know; nobody may be confirmed."""
    while True:
        assert await publisher.publish([message(queue)], timeout_s=0.5) == [UNKNOWN]


both_clients = pytest.mark.parametrize("opened", [_aio_pika, _pika], ids=["aio-pika", "pika"])


Break = Callable[[TcpProxy, bytes], None]
before_and_after = pytest.mark.parametrize(
    "break_link", [TcpProxy.drop_requests, TcpProxy.drop_replies], ids=["before", "after"]
)


# Publishing ---------------------------------------------------------------------------------------------


@both_clients
async def test_a_lost_confirm_is_unknown_and_the_message_is_there(
    rabbitmq: Yard, proxy: TcpProxy, opened: Opener
) -> None:
    """After the effect: the caller must not be told that it failed, and repeating makes a duplicate, not a loss."""
    broker = await rabbitmq.declared()
    publisher = await opened(rabbitmq, proxy)
    sent = message(rabbitmq.queue, b"maybe")
    proxy.drop_replies(after=sent.message_id.encode())

    first = await publisher.publish([sent], timeout_s=5)
    again = await publisher.publish([sent], timeout_s=5)

    assert (first, again) == ([UNKNOWN], [CONFIRMED])
    assert proxy.cuts == 1
    consumer = await broker.consume({rabbitmq.queue: 10})
    assert [delivery.body for delivery in await take(consumer, 2)] == [b"maybe"] * 2


@both_clients
async def test_a_publish_cut_before_it_arrived_is_unknown_and_can_be_repeated(
    rabbitmq: Yard, proxy: TcpProxy, opened: Opener
) -> None:
    """Before the effect: nothing is there, and the same client publishes again over a new connection."""
    broker = await rabbitmq.declared()
    publisher = await opened(rabbitmq, proxy)
    sent = message(rabbitmq.queue, b"once")
    proxy.drop_requests(sent.message_id.encode())

    first = await publisher.publish([sent], timeout_s=5)
    again = await publisher.publish([sent], timeout_s=5)

    assert (first, again) == ([UNKNOWN], [CONFIRMED])
    assert await comes_to(lambda: broker.depth([rabbitmq.queue]), [1]) == [1]


@both_clients
async def test_a_group_over_a_cut_link_is_confirmed_only_where_the_broker_has_it(
    rabbitmq: Yard, proxy: TcpProxy, opened: Opener
) -> None:
    """Thousands under way when the link goes: every confirmed one is at the broker, none is called refused."""
    broker = await rabbitmq.declared()
    publisher = await opened(rabbitmq, proxy)
    group = numbered(rabbitmq.queue, 3_000)
    proxy.drop_replies(after=group[1_500].message_id.encode())

    outcomes = await publisher.publish(group, timeout_s=30)
    confirmed = [item.body for item, outcome in zip(group, outcomes, strict=True) if outcome is CONFIRMED]
    consumer = await broker.consume({rabbitmq.queue: 4_000})

    assert set(outcomes) == {CONFIRMED, UNKNOWN}
    await take_bodies(consumer, confirmed)


@both_clients
async def test_a_publish_on_a_stalled_link_ends_within_its_timeout(
    rabbitmq: Yard, proxy: TcpProxy, opened: Opener
) -> None:
    """A connection that is open and silent is the worst kind: nothing fails, nothing answers."""
    await rabbitmq.declared()
    publisher = await opened(rabbitmq, proxy)
    assert await publisher.publish([message(rabbitmq.queue)], timeout_s=5) == [CONFIRMED]
    proxy.stall()

    began_s = time.monotonic()
    outcomes = await publisher.publish(numbered(rabbitmq.queue, 10), timeout_s=0.3)
    waited_s = time.monotonic() - began_s

    assert outcomes == [UNKNOWN] * 10
    assert waited_s < 3
    proxy.resume()
    assert await publisher.publish([message(rabbitmq.queue)], timeout_s=10) == [CONFIRMED]


@both_clients
async def test_a_publish_while_the_broker_is_away_says_so_within_its_timeout(
    rabbitmq: Yard, proxy: TcpProxy, opened: Opener
) -> None:
    """Nothing was sent, so it is unavailable, not unknown; and when the broker is back the client is too."""
    await rabbitmq.declared()
    publisher = await opened(rabbitmq, proxy)
    assert await publisher.publish([message(rabbitmq.queue)], timeout_s=5) == [CONFIRMED]
    proxy.refuse()

    began_s = time.monotonic()
    with pytest.raises(BrokerUnavailable, match="no connection to amqp://"):
        await publish_until_unavailable(publisher, rabbitmq.queue)
    waited_s = time.monotonic() - began_s

    assert waited_s < 5
    proxy.accept()
    assert await publisher.publish([message(rabbitmq.queue)], timeout_s=10) == [CONFIRMED]


@both_clients
async def test_cancelling_a_publish_leaves_the_client_usable(rabbitmq: Yard, proxy: TcpProxy, opened: Opener) -> None:
    """An HTTP caller hangs up in the middle of its request."""
    await rabbitmq.declared()
    publisher = await opened(rabbitmq, proxy)
    await publisher.publish([message(rabbitmq.queue)], timeout_s=5)
    proxy.stall()

    publishing = asyncio.create_task(publisher.publish(numbered(rabbitmq.queue, 10), timeout_s=60))
    await asyncio.wait([publishing], timeout=0.05)
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing

    proxy.resume()
    assert await publisher.publish([message(rabbitmq.queue)], timeout_s=10) == [CONFIRMED]


async def test_closing_over_a_stalled_link_is_bounded(rabbitmq: Yard, proxy: TcpProxy) -> None:
    """A worker must end by its deadline although the broker says nothing."""
    direct = await rabbitmq.declared()
    broker = await rabbitmq.open(rabbitmq.settings(url=proxy.url(rabbitmq.url)))
    consumer = await broker.consume({rabbitmq.queue: 10})
    publisher = rabbitmq.pika(rabbitmq.settings(url=proxy.url(rabbitmq.url)))
    await publisher.publish([message(rabbitmq.queue, b"held")], timeout_s=5)
    await take(consumer, 1)
    proxy.stall()

    async with asyncio.timeout(PATIENCE_S):
        await publisher.close()
        await broker.close()
    proxy.cut()  # the server learns of it now

    heir = await direct.consume({rabbitmq.queue: 10})
    [back] = await take(heir, 1)
    assert (back.body, back.redelivered) == (b"held", True)


# Consuming ----------------------------------------------------------------------------------------------


async def test_a_consumer_resumes_after_a_cut_and_its_unacked_deliveries_come_again(
    rabbitmq: Yard, proxy: TcpProxy
) -> None:
    """What was in hand when the link went arrives again, marked; acks of the dead connection's are skipped."""
    direct = await rabbitmq.declared()
    broker = await rabbitmq.open(rabbitmq.settings(url=proxy.url(rabbitmq.url)))
    consumer = await broker.consume({rabbitmq.queue: 10, rabbitmq.other: 10})
    await direct.publish([*numbered(rabbitmq.queue, 3), message(rabbitmq.other, b"x")], timeout_s=5)
    held = await take(consumer, 4)

    proxy.cut()
    again = await take_bodies(consumer, [b"0", b"1", b"2", b"x"])
    await consumer.ack(held)
    await consumer.requeue(held)
    await consumer.ack(again)

    assert all(delivery.redelivered for delivery in again)

    async def depths() -> list[int]:
        return await direct.depth([rabbitmq.queue, rabbitmq.other])

    await consumer.close()
    assert await comes_to(depths, [0, 0]) == [0, 0]


async def test_a_consumer_comes_back_after_the_broker_was_away(rabbitmq: Yard, proxy: TcpProxy) -> None:
    """A restarted broker finds its workers again by itself, however many tries that takes."""
    direct = await rabbitmq.declared()
    broker = await rabbitmq.open(rabbitmq.settings(url=proxy.url(rabbitmq.url)))
    consumer = await broker.consume({rabbitmq.queue: 10})

    with logged("broker_unreachable", "codeyard.shared.broker.rabbitmq_link") as tried:
        proxy.refuse()
        await asyncio.wait_for(tried.wait(), PATIENCE_S)
    proxy.accept()
    await direct.publish([message(rabbitmq.queue, b"back")], timeout_s=5)

    [delivery] = await take(consumer, 1)
    assert delivery.body == b"back"


async def test_a_silent_link_is_given_up_and_made_again(rabbitmq: Yard, proxy: TcpProxy) -> None:
    """Heartbeats: a firewall that forgets a connection tells nobody. Settings here: 2 s, noticed after about 6."""
    direct = await rabbitmq.declared()
    broker = await rabbitmq.open(rabbitmq.settings(url=proxy.url(rabbitmq.url)))
    consumer = await broker.consume({rabbitmq.queue: 10})
    await direct.publish([message(rabbitmq.queue, b"in hand")], timeout_s=5)
    [held] = await take(consumer, 1)

    proxy.stall()
    receiving = asyncio.create_task(consumer.receive(1))
    while held.tag.subscription.alive:  # type: ignore[attr-defined]  # the signal that the client gave up
        await asyncio.wait([receiving], timeout=0.1)
    proxy.cut()
    proxy.resume()
    [again] = await asyncio.wait_for(receiving, PATIENCE_S)

    assert (again.body, again.redelivered) == (b"in hand", True)


@before_and_after
async def test_an_ack_on_a_link_that_is_cut_costs_a_redelivery_at_most(
    rabbitmq: Yard, proxy: TcpProxy, break_link: Break
) -> None:
    """An ack has no answer. Lost, the delivery comes again; arrived, it does not: the claim table settles both."""
    direct = await rabbitmq.declared()
    broker = await rabbitmq.open(rabbitmq.settings(url=proxy.url(rabbitmq.url)))
    consumer = await broker.consume({rabbitmq.queue: 1})
    await direct.publish([message(rabbitmq.queue, b"acked"), message(rabbitmq.queue, b"next")], timeout_s=5)
    held = await take(consumer, 1)

    break_link(proxy, BASIC_ACK)
    await consumer.ack(held)
    bodies = [delivery.body for delivery in await take(consumer, 1)]

    assert proxy.cuts == 1
    assert bodies == ([b"acked"] if break_link is TcpProxy.drop_requests else [b"next"])


@before_and_after
async def test_declaring_over_a_link_that_is_cut_can_be_repeated(
    rabbitmq: Yard, proxy: TcpProxy, break_link: Break
) -> None:
    """Half of it may be there: the second try makes the rest."""
    broker = await rabbitmq.open(rabbitmq.settings(url=proxy.url(rabbitmq.url)))
    break_link(proxy, QUEUE_DECLARE)

    with pytest.raises(BrokerUnavailable):
        await broker.declare([rabbitmq.queue])
    await broker.declare([rabbitmq.queue])

    assert await broker.publish([message(rabbitmq.queue)], timeout_s=5) == [CONFIRMED]


@pytest.mark.parametrize("call", ["depth", "ping", "declare", "consume"])
async def test_no_call_waits_for_ever_on_a_stalled_link(rabbitmq: Yard, proxy: TcpProxy, call: str) -> None:
    """Calls without a timeout of their own have the publish timeout."""
    await rabbitmq.declared()
    impatient = rabbitmq.settings(url=proxy.url(rabbitmq.url), timeout_s=0.5)
    broker = await rabbitmq.open(impatient)
    proxy.stall()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "depth": lambda: broker.depth([rabbitmq.queue]),
        "ping": broker.ping,
        "declare": lambda: broker.declare([rabbitmq.queue]),
        "consume": lambda: broker.consume({rabbitmq.queue: 1}),
    }

    with pytest.raises(BrokerUnavailable):
        await asyncio.wait_for(calls[call](), PATIENCE_S)

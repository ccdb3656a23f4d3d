"""A URL with several nodes: each client goes on to the next one when its node is lost, silent, or refuses it.

The nodes here are links to one server, so that a node can be lost within milliseconds; with a real cluster:
tests/fault/test_rabbitmq_cluster.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from support.brokers import PATIENCE_S, Yard, comes_to, message, numbered, take, take_bodies
from support.proxy import TcpProxy
from support.servers import free_port

from codeyard.shared.broker import rabbitmq_nodes
from codeyard.shared.broker.port import Publisher, PublishOutcome
from codeyard.shared.errors import BrokerUnavailable

pytestmark = pytest.mark.services

CONFIRMED = PublishOutcome.CONFIRMED


@pytest_asyncio.fixture
async def nodes(rabbitmq: Yard) -> AsyncIterator[list[TcpProxy]]:
    """Two ways to the server."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(TcpProxy.to(rabbitmq.url)) for _ in range(2)]


def cluster_url(direct: str, *ports: int) -> str:
    user = urlsplit(direct).netloc.rpartition("@")[0]
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"amqp://{user}@{hosts}/"


Opener = Callable[[Yard, str], Awaitable[Publisher]]


async def _aio_pika(yard: Yard, url: str) -> Publisher:
    return await yard.open(yard.settings(url=url))


async def _pika(yard: Yard, url: str) -> Publisher:
    return yard.pika(yard.settings(url=url))


both_clients = pytest.mark.parametrize("opened", [_aio_pika, _pika], ids=["aio-pika", "pika"])


@both_clients
async def test_nodes_that_refuse_are_passed_over(rabbitmq: Yard, nodes: list[TcpProxy], opened: Opener) -> None:
    """Two of three are down when the client starts; whichever it begins with, it finds the third."""
    await rabbitmq.declared()
    url = cluster_url(rabbitmq.url, free_port(), nodes[0].port, free_port())

    for _ in range(5):
        publisher = await opened(rabbitmq, url)
        assert await publisher.publish([message(rabbitmq.queue)], timeout_s=PATIENCE_S) == [CONFIRMED]


@both_clients
async def test_a_silent_node_is_passed_over(
    rabbitmq: Yard, nodes: list[TcpProxy], opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is gone refuses nothing; the client must not spend all its time on it."""
    monkeypatch.setattr(rabbitmq_nodes, "SILENT_S", 0.5)
    await rabbitmq.declared()
    silent, sound = nodes
    silent.stall()

    for _ in range(4):
        publisher = await opened(rabbitmq, cluster_url(rabbitmq.url, silent.port, sound.port))
        assert await publisher.publish([message(rabbitmq.queue)], timeout_s=PATIENCE_S) == [CONFIRMED]


@both_clients
async def test_a_publisher_goes_on_at_another_node_when_its_own_is_lost(
    rabbitmq: Yard, nodes: list[TcpProxy], opened: Opener
) -> None:
    """And back again when that one is lost in its turn: nobody is forgotten."""
    await rabbitmq.declared()
    publisher = await opened(rabbitmq, cluster_url(rabbitmq.url, *(node.port for node in nodes)))
    assert await publisher.publish([message(rabbitmq.queue)], timeout_s=5) == [CONFIRMED]

    for _ in range(2):
        [own] = [node for node in nodes if node.links]
        [other] = [node for node in nodes if not node.links]
        own.refuse()
        # Whoever publishes first may be the one that notices; told UNKNOWN, it tries again.
        again = await comes_to(lambda: publisher.publish([message(rabbitmq.queue)], timeout_s=5), [CONFIRMED])
        assert again == [CONFIRMED]
        assert other.links == 1
        own.accept()


async def test_a_consumer_goes_on_at_another_node_and_what_it_held_comes_again(
    rabbitmq: Yard, nodes: list[TcpProxy]
) -> None:
    """As after any loss of a connection."""
    direct = await rabbitmq.declared()
    broker = await rabbitmq.open(rabbitmq.settings(url=cluster_url(rabbitmq.url, *(node.port for node in nodes))))
    before = [node.links for node in nodes]
    consumer = await broker.consume({rabbitmq.queue: 10, rabbitmq.other: 10})
    [own] = [node for node, links in zip(nodes, before, strict=True) if node.links > links]
    await direct.publish(numbered(rabbitmq.queue, 3), timeout_s=5)
    await take(consumer, 3)

    own.refuse()
    again = await take_bodies(consumer, [b"0", b"1", b"2"])
    await direct.publish([message(rabbitmq.other, b"more")], timeout_s=5)

    assert all(delivery.redelivered for delivery in again)
    assert await take_bodies(consumer, [b"more"])


@both_clients
async def test_a_password_that_every_node_refuses_is_said_at_once(
    rabbitmq: Yard, nodes: list[TcpProxy], opened: Opener
) -> None:
    """Trying on cannot help; one node's word alone is not enough, it may be the odd one."""
    url = cluster_url("amqp://nobody:wrong@127.0.0.1/", *(node.port for node in nodes))

    async def publish() -> None:
        publisher = await opened(rabbitmq, url)
        await publisher.publish([message(rabbitmq.queue)], timeout_s=60)

    with pytest.raises(BrokerUnavailable, match="refused u"):
        await asyncio.wait_for(publish(), PATIENCE_S)

    assert [node.links_opened for node in nodes] == [1, 1]


@both_clients
async def test_a_client_that_comes_to_a_full_queue_is_told_so_and_gets_in_when_there_is_room(
    rabbitmq: Yard, opened: Opener
) -> None:
    """Its first refusal is doubted (shared.broker.rabbitmq_refusals) and asked about once more, not for ever."""
    settings = rabbitmq.settings(max_length=3)
    direct = await rabbitmq.declared(settings)
    consumer = await direct.consume({rabbitmq.queue: 1})
    while await direct.publish([message(rabbitmq.queue)], timeout_s=5) == [CONFIRMED]:
        pass
    publisher = await opened(rabbitmq, rabbitmq.url)

    assert await publisher.publish([message(rabbitmq.queue)] * 2, timeout_s=5) == [PublishOutcome.FULL] * 2
    assert await publisher.publish([message(rabbitmq.other)], timeout_s=5) == [CONFIRMED]

    async def again() -> list[PublishOutcome]:
        await consumer.ack(await consumer.receive(1))
        return await publisher.publish([message(rabbitmq.queue)], timeout_s=5)

    assert await comes_to(again, [CONFIRMED]) == [CONFIRMED]

"""What a store's URL may name: one server, a cluster by several hosts, a primary by its Sentinels."""

import pytest
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedSSLConnection

from codeyard.shared.settings import StoreSettings, masked
from codeyard.shared.store.redis_connections import address_of, connect, connect_cluster, each_host, on_host


@pytest.mark.parametrize(
    "url,hosts",
    [
        ("redis://a/2", ["redis://a:6379/2"]),
        ("rediss://u:p@a:7000,b", ["rediss://u:p@a:7000", "rediss://u:p@b:6379"]),
        ("redis+sentinel://:p@s1,[::1]:5/yard", ["redis://:p@s1:26379/yard", "redis://:p@[::1]:5/yard"]),
    ],
)
def test_every_host_of_a_url_is_named_with_its_port(url: str, hosts: list[str]) -> None:
    """User, password and the rest hold for all of them."""
    assert each_host(url) == hosts


async def test_sentinels_are_asked_by_the_name_and_login_that_the_url_gives() -> None:
    """The servers' password is not the Sentinels', and a name keeps its capitals."""
    url = "rediss+sentinel://user:p%40ss@s1:1,s2/My-Yard/3?sentinel_password=other&ssl_ca_certs=/ca.pem"

    client = connect(StoreSettings(url=url))

    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "My-Yard"
    assert pool.connection_class is SentinelManagedSSLConnection
    assert {name: pool.connection_kwargs[name] for name in ("username", "password", "db", "ssl_ca_certs")} == {
        "username": "user",
        "password": "p@ss",
        "db": 3,
        "ssl_ca_certs": "/ca.pem",
    }
    [first, second] = [one.sentinels[0].connection_pool for one in pool.sentinel_manager._each]
    assert [one.connection_kwargs["port"] for one in (first, second)] == [1, 26_379]
    assert first.connection_kwargs["password"] == "other"
    assert first.connection_class is SSLConnection
    assert address_of(client) == "nowhere yet"
    await client.aclose()


async def test_a_cluster_begins_with_any_of_its_hosts() -> None:
    """The first may be the one that is away."""
    cluster = connect_cluster(StoreSettings(url="redis://user:secret@a:1,b:2"))

    nodes = cluster.nodes_manager.startup_nodes.values()
    assert {(node.host, node.port) for node in nodes} == {("a", 1), ("b", 2)}
    assert {node.connection_kwargs["password"] for node in nodes} == {"secret"}


def test_sentinels_without_a_name_and_ports_that_are_none_are_refused() -> None:
    """A mistake in a URL is a setting to be mended, not a server to be waited for."""
    for url in ("redis+sentinel://s1:26379", "redis+sentinel://s1:port/yard", "redis://a,b:port"):
        with pytest.raises(ValueError, match=r"NAME|Port"):
            connect(StoreSettings(url=url))


def test_a_password_before_several_hosts_is_masked_too() -> None:
    """The URL is printed by `codeyard doctor` and in errors."""
    assert masked("redis://u:secret@a:1,b:2/0") == "redis://u:***@a:1,b:2/0"
    assert on_host("redis+sentinel://u:p@a:1,b:2/yard", "c:3") == "redis://u:p@c:3/yard"

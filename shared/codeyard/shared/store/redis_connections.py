"""From the store's URL to connections of redis-py: to one server, to a cluster, or to the primary of a failover group.

    redis://user:password@host:6379/0                            one server, or a node of a cluster
    redis://host:6379,host:6379/0                                a cluster, by whichever of these answers first
    redis+sentinel://user:password@host:26379,host:26379/NAME/0  the primary that these Sentinels know as NAME

`rediss` in place of `redis`: over TLS, to the Sentinels too. `?sentinel_password=` (and `sentinel_username`) where
the Sentinels want one; user and password before the @ are the servers'.

Promise: with Sentinels every new connection asks them first, and a server that has become a replica ends its
connections, so that the next call finds the new primary. Every failure here is the library's own, or ValueError for
a URL of no use. Called by: store.redis_link, store.redis_probe.
"""

import asyncio
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff

from codeyard.shared.settings import StoreSettings

MAX_CONNECTIONS = 16  # per store; a group is one call, so this many groups are under way at once
SENTINEL = "+sentinel"
SENTINEL_PORT, REDIS_PORT = 26_379, 6_379


def uses_sentinels(url: str) -> bool:
    return urlsplit(url).scheme.endswith(SENTINEL)


def each_host(url: str) -> list[str]:
    """The URL once for every host in it. Of Sentinels: as URLs of servers, which is how they are reached."""
    hosts = urlsplit(url).netloc.rpartition("@")[2].split(",")
    port = SENTINEL_PORT if uses_sentinels(url) else REDIS_PORT
    return [on_host(url, _with_port(host, port)) for host in hosts]


def on_host(url: str, address: str) -> str:
    """The URL with this host and port in place of its own."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(scheme=parts.scheme.removesuffix(SENTINEL), netloc=f"{user}{at}{address}"))


def connect(settings: StoreSettings, *, retries: int = 1) -> Redis:
    """A client of the server the URL names; of several hosts, the first. Nothing is sent yet.

    Args:
        retries: of a call that met a stale pooled connection.
    Raises: ValueError for a URL of no use.
    """
    options = {**_options(settings), "retry": _retry(retries), "max_connections": MAX_CONNECTIONS}
    if uses_sentinels(settings.url):
        return Redis.from_pool(_pool_by_sentinels(settings, options))
    return Redis.from_pool(ConnectionPool.from_url(each_host(settings.url)[0], **options))


def connect_cluster(settings: StoreSettings) -> RedisCluster:
    given: list[dict[str, Any]] = [{**parse_url(url)} for url in each_host(settings.url)]
    nodes = [ClusterNode(str(one.pop("host", "localhost")), int(one.pop("port", REDIS_PORT))) for one in given]
    secure = given[0].pop("connection_class", None) is SSLConnection
    given[0].pop("db", None)  # a cluster has one
    return RedisCluster(startup_nodes=nodes, ssl=secure, **given[0], **_options(settings), retry=_retry(1))


def address_of(client: Redis) -> str:
    """host:port of the server it talks to; of Sentinels' primary, the one it was last told."""
    pool = client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        return "{}:{}".format(*pool.master_address) if pool.master_address else "nowhere yet"
    given = pool.connection_kwargs
    return f"{given.get('host', 'localhost')}:{given.get('port', REDIS_PORT)}"


def _pool_by_sentinels(settings: StoreSettings, options: dict[str, Any]) -> SentinelConnectionPool:
    parts = urlsplit(settings.url)
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("behind the Sentinels' addresses comes the name they know the primary by: /NAME")
    words = dict(parse_qsl(parts.query, keep_blank_values=True))
    login = {key: words.pop(f"sentinel_{key}", None) for key in ("username", "password")}
    bare = parts._replace(path=f"/{db}", query=urlencode(words))
    sentinels = each_host(urlunsplit(bare))
    given: dict[str, Any] = {**parse_url(sentinels[0])}
    secure = given.pop("connection_class", None) is SSLConnection
    tls = {"ssl": True, **{key: value for key, value in given.items() if key.startswith("ssl_")}} if secure else {}
    ask = {
        **{key: value for key, value in _options(settings).items() if key != "decode_responses"},
        **{key: value for key, value in login.items() if value},
        **tls,
        "retry": _retry(0),
    }
    addresses = [(str(urlsplit(one).hostname), int(urlsplit(one).port or SENTINEL_PORT)) for one in sentinels]
    for name in ("host", "port"):
        given.pop(name, None)
    each = [Sentinel([address], sentinel_kwargs=ask) for address in addresses]  # type: ignore[no-untyped-call]
    return _SentinelPool(  # type: ignore[no-untyped-call]  # redis-py leaves both without annotations
        service,
        _Sentinels(each, settings.timeout_s),
        connection_class=SentinelManagedSSLConnection if secure else SentinelManagedConnection,
        **{**given, **options},
    )


class _SentinelPool(SentinelConnectionPool):
    """The library's, closed together with its Sentinels."""

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            await self.sentinel_manager.aclose()


class _Sentinels:
    """What the pool asks for the primary: one Sentinel after the other, each within its share of a call's time.

    The library bounds its own round by a socket timeout alone, with which a send may swallow a cancellation.
    """

    def __init__(self, each: Sequence[Sentinel], timeout_s: float) -> None:
        self._each = list(each)
        self._share_s = timeout_s / (len(self._each) + 1)

    async def discover_master(self, service: str) -> tuple[str, int]:
        said: list[str] = []
        for sentinel in list(self._each):
            try:
                async with asyncio.timeout(self._share_s):
                    host, port = await sentinel.discover_master(service)
            except (TimeoutError, exceptions.RedisError) as error:
                said.append(str(error) or type(error).__name__)
                continue
            self._each.remove(sentinel)
            self._each.insert(0, sentinel)  # it is asked first next time
            return str(host), int(port)
        raise MasterNotFoundError(f"none of {len(self._each)} Sentinels names a primary {service!r}: {said[-1]}")

    async def aclose(self) -> None:
        for sentinel in self._each:
            await sentinel.aclose()


def _options(settings: StoreSettings) -> dict[str, Any]:
    return {
        "protocol": 2,  # nothing here needs RESP3, and its push messages cost a handshake
        "decode_responses": True,
        "socket_timeout": None,  # ours bounds the call; with its own, redis-py sends through asyncio.wait_for,
        # which before Python 3.12 swallows a cancellation that arrives as the send ends
        "socket_connect_timeout": settings.timeout_s,
    }


def _retry(times: int) -> Retry:
    return Retry(NoBackoff(), times, supported_errors=(exceptions.ConnectionError,))


def _with_port(host: str, port: int) -> str:
    """`host` may be [::1], without a port too."""
    return host if urlsplit(f"//{host}").port else f"{host}:{port}"

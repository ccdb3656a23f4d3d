"""The nodes of a RabbitMQ cluster: as its URL names them, and in which order one connection tries them.

`amqp://user:password@rabbit1:5672,rabbit2,rabbit3/vhost`: user, virtual host and TLS parameters hold for all. They
stand in the URL and not in a setting beside it, so that whoever gives another URL (`--broker`, a client's argument,
a drill) can never reach the nodes of the first one by accident.
Called by: rabbitmq_link, producer.pika_publisher, shared.settings (checks), the doctor. Opens nothing.
"""

import itertools
import random
import time
from urllib.parse import urlsplit, urlunsplit

from codeyard.shared.broker.backoff import backoff_s

SILENT_S = 3.0  # of several nodes, one that takes longer to let us in is passed over: a dead machine does not refuse


def node_urls(url: str) -> list[str]:
    """A URL for each node, in the order they are named. Raises ValueError where a node is no `host` or `host:port`."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    nodes = hosts.split(",")
    urls = [urlunsplit(parts._replace(netloc=f"{user}{at}{node}")) for node in nodes]
    if not all(_is_node(one, may_be_empty=len(urls) == 1) for one in urls):
        raise ValueError(
            "after the scheme must stand user:password@host:port, or host:port,host:port,... of a cluster; what is "
            "not a letter or digit in user or password percent-encoded"
        )
    return urls


def _is_node(url: str, *, may_be_empty: bool) -> bool:
    """Without a host it is localhost's, which makes no sense among several."""
    try:
        parts = urlsplit(url)
        return parts.port != 0 and (may_be_empty or bool(parts.hostname))
    except ValueError:
        return False


def node_of(url: str) -> str:
    """`host:port` of a node's URL, or the host alone; fit for logs."""
    return urlsplit(url).netloc.rpartition("@")[2]


class Turns:
    """Whose turn it is. The order is drawn anew for every connection, so that they spread over the nodes, and what
    was on a lost node spreads over those left. Every try goes to the next one, whatever became of the last."""

    def __init__(self, url: str) -> None:
        urls = node_urls(url)
        self._num_nodes = len(urls)
        self._turns = itertools.cycle(random.sample(urls, len(urls)))
        self._failures = 0  # in a row
        self._not_before_s = 0.0  # the next round
        self.patience_s = SILENT_S if len(urls) > 1 else None  # for one try; None: the caller's alone

    def next(self) -> str:
        """The URL to try now."""
        return next(self._turns)

    def failed(self) -> int:
        """The try failed. Returns how many did in a row."""
        self._failures += 1
        if self.all_failed:
            self._not_before_s = time.monotonic() + backoff_s(self._failures // self._num_nodes)
        return self._failures

    def succeeded(self) -> None:
        self._failures = 0

    @property
    def all_failed(self) -> bool:
        """Whether every node has failed as often as every other: a round is over."""
        return self._failures > 0 and self._failures % self._num_nodes == 0

    @property
    def wait_s(self) -> float:
        """Seconds before the next try: none within a round, growing between rounds. They go on while nobody waits:
        callers with less time than a pause would begin it anew each time, and never try."""
        return max(0.0, self._not_before_s - time.monotonic()) if self.all_failed else 0.0

"""The nodes that a broker's URL names, and the order in which a connection tries them."""

import itertools

import pytest

from codeyard.shared.broker.rabbitmq_nodes import Turns, node_of, node_urls
from codeyard.shared.errors import SettingsError
from codeyard.shared.settings import load, masked

CLUSTER = "amqps://me:s%2Cret@rabbit1:5671,rabbit2,[::1]:5673/yard?cafile=/ca.pem"


def test_every_node_has_the_user_the_virtual_host_and_the_parameters() -> None:
    """Nodes of one cluster share all of it; TLS checks each one's own name."""
    assert node_urls(CLUSTER) == [
        "amqps://me:s%2Cret@rabbit1:5671/yard?cafile=/ca.pem",
        "amqps://me:s%2Cret@rabbit2/yard?cafile=/ca.pem",
        "amqps://me:s%2Cret@[::1]:5673/yard?cafile=/ca.pem",
    ]
    assert [node_of(url) for url in node_urls(CLUSTER)] == ["rabbit1:5671", "rabbit2", "[::1]:5673"]
    assert node_urls("amqp://rabbit/") == ["amqp://rabbit/"]


def test_a_password_with_a_comma_is_no_list_of_nodes() -> None:
    """Only what stands after the last @ names hosts."""
    assert node_urls("amqp://me:a,b@rabbit/") == ["amqp://me:a,b@rabbit/"]


def test_a_cluster_s_url_is_masked_like_any_other() -> None:
    """It is logged with each failure."""
    assert masked(CLUSTER) == "amqps://me:***@rabbit1:5671,rabbit2,[::1]:5673/yard?cafile=/ca.pem"


@pytest.mark.parametrize("hosts", ["rabbit1:5672,", "rabbit1,,rabbit2", "rabbit1:x,rabbit2", "rabbit:0", "a:1,b:99999"])
def test_what_is_no_host_and_port_stops_the_process_at_start(hosts: str) -> None:
    """With the variable's name, and without the secret beside it."""
    with pytest.raises(SettingsError, match="CODEYARD_BROKER_URL") as refused:
        load(None, {"broker": {"url": f"amqp://me:hidden@{hosts}/"}})

    assert "hidden" not in str(refused.value)
    assert "host:port" in str(refused.value)


def test_connections_begin_with_different_nodes_and_go_round_all_of_them() -> None:
    """A fleet must not sit on one node; and what was on a lost one must not all go to the same next one."""
    orders = {tuple(itertools.islice(iter(Turns("amqp://a,b,c/").next, None), 3)) for _ in range(500)}

    assert orders == set(itertools.permutations(node_urls("amqp://a,b,c/")))


def test_within_a_round_nobody_waits_and_between_rounds_longer_each_time() -> None:
    """A lost node costs one try; a lost cluster must not be stormed."""
    turns, waits = Turns("amqp://a,b,c/"), []
    first_round = [turns.next() for _ in range(3)]
    for _ in range(12):
        turns.failed()
        waits.append(turns.wait_s)

    assert [turns.next() for _ in range(3)] == first_round
    between, within = waits[2::3], [wait for n, wait in enumerate(waits) if n % 3 != 2]
    assert set(within) == {0.0}
    assert all(0.04 * 2**n < wait <= 0.1 * 2**n for n, wait in enumerate(between))
    turns.succeeded()
    assert turns.wait_s == 0.0


def test_a_single_node_is_waited_for_from_the_first_failure() -> None:
    """There is no other to try, and its caller's deadline is the only one."""
    turns = Turns("amqp://a/")
    assert (turns.wait_s, turns.patience_s) == (0.0, None)

    turns.failed()

    assert turns.all_failed
    assert turns.wait_s > 0.04  # of at least 0.05, some of which may have passed
    assert turns.next() == turns.next() == "amqp://a/"


def test_a_pause_goes_on_while_nobody_waits() -> None:
    """Callers with less time than it takes each gave up in the middle of a pause of their own: none ever tried."""
    turns = Turns("amqp://a/")
    for _ in range(8):
        turns.failed()

    left = [turns.wait_s for _ in range(20)]

    assert left == sorted(left, reverse=True)

"""What `codeyard doctor` says of a real RabbitMQ: healthy, refusing, full, hung, or with another fleet's queues."""

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest
import pytest_asyncio
from support.brokers import Yard, message
from support.doctor import healthy, only, place, worst
from support.proxy import TcpProxy
from support.servers import RabbitServer, free_port
from support.services import missing

from codeyard.cli.checks.broker import check_broker, check_queues, queue_findings, trial_findings, version_findings
from codeyard.cli.checks.check import Finding, Place, Status
from codeyard.shared.broker.rabbitmq_probe import RabbitProbe, Seen, Trial
from codeyard.shared.broker.rabbitmq_topology import Queue
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology
from codeyard.worker.engines.models import parse_model

services = pytest.mark.services


def of(
    url: str, namespace: str = "codeyard", *, answer_s: float = 5.0, tmp: Path | None = None, **broker: int
) -> Place:
    store = f"sqlite:///{tmp / 'yard.db'}" if tmp else "sqlite:///no-such.db"
    return place(namespace=namespace, broker={"url": url, **broker}, store={"url": store}, answer_s=answer_s)


def changed(url: str, *, user: str = "", path: str = "") -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else parts.netloc, path=path or parts.path))


@services
async def test_a_rabbitmq_that_can_do_what_we_need_is_healthy_and_left_as_it_was(
    rabbitmq_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked with a queue of its own, which is gone again."""
    monkeypatch.setattr("codeyard.cli.checks.broker.new_nonce", lambda: "trial")
    findings = await check_broker(of(rabbitmq_url, namespace))
    assert healthy(findings)
    assert "RabbitMQ" in findings[0].text
    assert "messages are confirmed" in findings[1].text
    assert "guest:guest" not in str(findings)

    probe = await RabbitProbe.open(BrokerSettings(url=rabbitmq_url), timeout_s=5)
    left = await probe.look_at_queue(Queue(f"{namespace}.doctor.trial", {}))
    await probe.close()
    assert not left.there


@services
@pytest.mark.parametrize(
    "user,path,said,way_out",
    [
        ("guest:wrong-secret", "", "refused user 'guest'", "the broker's own machine only"),
        ("no-body:wrong-secret", "", "refused user 'no-body'", "percent-encode"),
        ("", "/nowhere", "no virtual host 'nowhere'", "add_vhost nowhere"),
    ],
)
async def test_whoever_is_not_let_in_hears_why(
    rabbitmq_url: str, user: str, path: str, said: str, way_out: str
) -> None:
    """And the password is not printed."""
    finding = worst(await check_broker(of(changed(rabbitmq_url, user=user, path=path))))
    assert said in finding.text
    assert way_out in finding.way_out
    assert "wrong-secret" not in str(finding)


@services
async def test_a_broker_that_says_nothing_ends_within_the_limit_that_is_named(rabbitmq_url: str) -> None:
    """A network that swallows packets: the link is open, no answer comes."""
    async with TcpProxy.to(rabbitmq_url) as proxy:
        proxy.stall()
        finding = worst(await check_broker(of(proxy.url(rabbitmq_url), answer_s=0.3)))
    assert "gives no answer within 0.3 s" in finding.text


async def test_a_broker_that_is_not_there_is_started() -> None:
    """The most common of all."""
    finding = worst(await check_broker(of(f"amqp://guest:guest@127.0.0.1:{free_port()}/")))
    assert "nobody listens there" in finding.text
    assert "rabbitmq-server" in finding.way_out


@services
async def test_a_lost_node_of_a_cluster_is_a_warning_and_the_others_are_asked(rabbitmq_url: str) -> None:
    """The fleet works on, and one more must not be lost."""
    gone = f"127.0.0.1:{free_port()}"
    user, _, host = urlsplit(rabbitmq_url).netloc.rpartition("@")
    cluster = urlunsplit(urlsplit(rabbitmq_url)._replace(netloc=f"{user}@{gone},{host}"))
    nobody = urlunsplit(urlsplit(rabbitmq_url)._replace(netloc=f"{user}@{gone},{gone}"))

    findings = await check_broker(of(cluster))
    without_any = await check_broker(of(nobody))

    assert only(findings, Status.WARN) == [f"one node is lost: {gone}: nobody listens there"]
    assert any("messages are confirmed" in text for text in only(findings, Status.OK))
    assert only(without_any, Status.FAIL) == [f"{gone}: nobody listens there"] * 2


# Queues --------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def yard(rabbitmq_url: str) -> AsyncIterator[Yard]:
    yard = Yard(rabbitmq_url)
    yield yard
    await yard.tidy()


def starters(topology: Topology) -> str:
    """The queue that a worker with the packaged model would make."""
    return topology.job_queue(parse_model("starter").revision, Lane.STANDARD)


@services
async def test_queues_that_are_not_there_are_not_made(yard: Yard) -> None:
    """Looking must not declare: a doctor with other settings would make the wrong ones."""
    there = of(yard.url, yard.topology.namespace)
    for _ in range(2):
        findings = await check_queues(there)
        assert healthy(findings)
        assert "the first worker makes them" in findings[0].text


@services
async def test_our_own_queues_are_recognised_and_jobs_that_nobody_takes_are_told(yard: Yard) -> None:
    """Exactly what a worker declares, with what waits there."""
    broker = await yard.open()
    queue = starters(yard.topology)
    await broker.declare([queue])
    there = of(yard.url, yard.topology.namespace, queue_max_length=10_000)
    assert healthy(await check_queues(there))

    await broker.publish([message(queue)], timeout_s=5)
    assert only(await check_queues(there), Status.WARN) == [f"{queue} holds 1 that nobody takes"]
    await delete(yard, queue)


@services
async def test_queues_of_another_length_are_explained_by_their_argument(yard: Yard) -> None:
    """A worker would end with PRECONDITION_FAILED; here it says which setting differs, and how."""
    await (await yard.open()).declare([])
    findings = await check_queues(of(yard.url, yard.topology.namespace, queue_max_length=77))
    failures = [finding for finding in findings if finding.status is Status.FAIL]
    assert len(failures) == 6  # dead, dropped, four delays
    assert (
        failures[0].text == f"{yard.topology.dead_queue} exists and is another one: x-max-length is 10000, ours is 77"
    )
    assert "CODEYARD_BROKER_QUEUE_MAX_LENGTH" in failures[0].way_out


@services
async def test_an_exchange_of_another_kind_is_named(yard: Yard) -> None:
    """Made by hand, or by another program."""
    async with await aio_pika.connect(yard.url) as connection:
        channel = await connection.channel()
        await channel.declare_exchange(yard.topology.jobs_exchange, aio_pika.ExchangeType.FANOUT, durable=True)
    [text] = only(await check_queues(of(yard.url, yard.topology.namespace)), Status.FAIL)
    assert yard.topology.jobs_exchange in text
    assert "fanout" in text


async def delete(yard: Yard, queue: str) -> None:
    async with await aio_pika.connect(yard.url) as connection:
        await (await connection.channel()).queue_delete(queue)


# A server of our own -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """One for this module, to be brought into a bad state."""
    if not RabbitServer.available():
        missing("rabbitmq-server to bring into a bad state", "rabbitmq-server", None)
    with RabbitServer(tmp_path_factory.mktemp("rabbit")) as server:
        yield server


def ctl(server: RabbitServer, *words: str) -> None:
    """rabbitmqctl, beside the server."""
    program = Path("/usr/lib/rabbitmq/bin/rabbitmqctl")  # Debian's in /usr/sbin is for its own server alone
    command = str(program) if program.exists() else "rabbitmqctl"
    subprocess.run([command, *words], env=server._environment(), check=True, capture_output=True)


@services
async def test_a_server_under_a_memory_or_disk_alarm_is_found_out(own_rabbitmq: RabbitServer) -> None:
    """It lets everybody in, and takes no message: publishers wait for ever."""
    ctl(own_rabbitmq, "set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        finding = worst(await check_broker(of(own_rabbitmq.url, answer_s=2.0)))
    finally:
        ctl(own_rabbitmq, "set_vm_memory_high_watermark", "0.9")
    assert "an alarm of memory or disk" in finding.text
    assert "rabbitmq-diagnostics alarms" in finding.way_out
    assert healthy(await check_broker(of(own_rabbitmq.url)))


@services
async def test_a_user_without_the_right_to_declare_gets_the_command_that_gives_it(own_rabbitmq: RabbitServer) -> None:
    """A user that was added and forgotten."""
    ctl(own_rabbitmq, "add_user", "yard", "pw")
    ctl(own_rabbitmq, "set_permissions", "-p", "/", "yard", "^$", ".*", ".*")
    url = changed(own_rabbitmq.url, user="yard:pw")
    finding = worst(await check_broker(of(url)))
    assert "may not declare queues" in finding.text

    command = finding.way_out.replace("'", "").split()
    assert command.pop(0) == "rabbitmqctl"
    ctl(own_rabbitmq, *command)
    assert healthy(await check_broker(of(url)))


# What cannot be run here ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "product,version,status",
    [
        ("RabbitMQ", "3.9.29", Status.FAIL),
        ("RabbitMQ", "3.8.35-1", Status.FAIL),
        ("RabbitMQ", "3.10.0", Status.OK),
        ("RabbitMQ", "4.1.2+rc.1", Status.OK),
        ("LavinMQ", "2.1.0", Status.WARN),
    ],
)
def test_versions_before_3_10_are_too_old(product: str, version: str, status: Status) -> None:
    """The facts page says what a quorum queue cannot do there."""
    [finding] = version_findings(product, version, "amqp://broker/")
    assert finding.status is status
    assert version in finding.text


def test_a_refused_quorum_queue_and_a_missing_confirm_have_their_own_words() -> None:
    """A feature flag that is off; a disk that does not answer."""
    settings = BrokerSettings(url="amqp://u:p@broker/v")

    def said(trial: Trial) -> Finding:
        return next(trial_findings(trial, settings, answer_s=2.0))

    assert "feature_flag" in said(Trial(refused="PRECONDITION_FAILED - queue type 'quorum' is not enabled")).way_out
    assert "not confirmed within 2 s" in said(Trial()).text
    assert "set_permissions -p v u" in said(Trial(refused="ACCESS_REFUSED - configure access")).way_out


def test_a_reason_in_other_words_is_shown_as_it_is() -> None:
    """A later server may phrase it anew."""
    [finding] = queue_findings([Seen("ns.dead", True, differs="PRECONDITION_FAILED - something new")], "ns")
    assert "something new" in finding.text

"""RabbitMQ 4.0 and Redis 8.0, from Debian 13, beside the 3.10 and 7.0 of Debian 12: `make test-versions`."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from support import debian, services
from support.servers import ROOT_VARIABLE, RabbitServer, RedisServer

from codeyard.shared.broker.rabbitmq import RabbitBroker
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology

pytestmark = [pytest.mark.long, pytest.mark.services, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
TOPOLOGY = Topology("versions")
JOB_QUEUES = [TOPOLOGY.job_queue("weights:1@a", lane) for lane in Lane]
MAX_LENGTH = 5_000
_RABBITMQCTL = Path("/usr/lib/rabbitmq/bin/rabbitmqctl")


@pytest.fixture(scope="module")
def newer() -> Path:
    """The folder with the newer servers."""
    if os.environ.get(ROOT_VARIABLE):
        pytest.skip("already running on another Debian's servers")
    return debian.folder()


@pytest.fixture
def newer_rabbitmq(newer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RabbitServer]:
    monkeypatch.setenv(ROOT_VARIABLE, str(newer))
    with RabbitServer(tmp_path / "newer") as server:
        monkeypatch.delenv(ROOT_VARIABLE)  # it keeps running; others of this test are this machine's own
        yield server


async def broker_at(server: RabbitServer) -> RabbitBroker:
    settings = BrokerSettings(url=server.url, queue_max_length=MAX_LENGTH, publish_timeout_s=30)
    return await RabbitBroker.open(settings, TOPOLOGY)


async def test_the_newer_servers_are_what_the_suites_run_on(
    newer_rabbitmq: RabbitServer, newer: Path, tmp_path: Path
) -> None:
    """Otherwise the tests below would test the old ones twice."""
    broker = await broker_at(newer_rabbitmq)
    version = await broker.ping()
    await broker.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ROOT_VARIABLE, str(newer))
        with RedisServer(tmp_path / "redis") as redis:
            store = await RedisStore.open(StoreSettings(url=redis.url), TOPOLOGY)
            redis_version = await store.ping()
            await store.close()

    assert version.startswith("rabbitmq 4.")
    assert redis_version.startswith("redis 8.")


async def test_a_topology_made_on_the_older_rabbitmq_is_declared_again_on_the_newer(
    private_rabbitmq: RabbitServer, newer_rabbitmq: RabbitServer
) -> None:
    """A fleet is upgraded queue by queue: whatever the old server says a queue's arguments are, the new one must
    take them, and our own declaration of today must equal them. Twice each, because everyone declares at start."""
    older = await broker_at(private_rabbitmq)
    assert (await older.ping()).startswith("rabbitmq 3.10")
    await older.declare(JOB_QUEUES)
    await older.declare(JOB_QUEUES)
    await older.close()
    made = captured(private_rabbitmq)
    assert {queue["arguments"]["x-queue-type"] for queue in made} == {"quorum"}
    assert {queue["name"] for queue in made} >= {*JOB_QUEUES, TOPOLOGY.dead_queue, TOPOLOGY.dropped_queue}

    async with await aio_pika.connect(newer_rabbitmq.url) as connection:
        channel = await connection.channel()
        for queue in made:
            await channel.declare_queue(queue["name"], durable=queue["durable"], arguments=queue["arguments"])
    broker = await broker_at(newer_rabbitmq)
    await broker.declare(JOB_QUEUES)
    await broker.declare(JOB_QUEUES)
    await broker.close()


def test_the_contract_suite_passes_on_the_newer_servers(newer: Path) -> None:
    """Every promise of both adapters, with links cut and servers killed."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/contract",
            "-m",
            "services and not long",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        cwd=REPOSITORY,
        env=debian.environment(newer),
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stdout[-4_000:]


async def test_the_drill_passes_on_the_newer_servers(newer: Path) -> None:
    """Kill -9 of the newer servers under load, and of everything around them."""
    command = (sys.executable, "-m", "codeyard.cli.main", "drill", "--json", "--jobs", "5000", "--faults", "11")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, "--seed", "4", env=debian.environment(newer), stdout=pipe, stderr=pipe
    )
    told, errors = await process.communicate()

    assert told, errors.decode()
    report = json.loads(told)
    assert report["findings"] == []
    assert report["good"]
    assert "redis 8." in report["servers"]


def captured(server: RabbitServer) -> list[dict[str, Any]]:
    """Name, durability and arguments of every queue, as the server itself tells them."""
    if not _RABBITMQCTL.exists():
        services.missing("rabbitmqctl", "rabbitmq-server", None)
    listing = subprocess.run(
        [
            str(_RABBITMQCTL),
            "--quiet",
            "--node",
            server.node,
            "list_queues",
            "--formatter",
            "json",
            "name",
            "durable",
            "arguments",
        ],
        env=server.control_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(listing.stdout)
    return [
        {**row, "arguments": {name: value for name, _, value in row["arguments"]}}
        if isinstance(row["arguments"], list)
        else row
        for row in rows
    ]

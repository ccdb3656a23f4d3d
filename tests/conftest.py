"""Fixtures every test may ask for: servers, a name of its own, servers it may kill."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import services, watchdog
from support.servers import RabbitServer, RedisServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="tests/simulation: run this schedule alone, and say what happened")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes: the long files first. See support.turns."""
    if config.getvalue("dist") != "loadfile":
        return None
    from support.turns import LongestFirst

    return LongestFirst(config, log)


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_tests() -> Iterator[None]:
    with watchdog.watching():
        yield


@pytest.fixture(scope="session")
def rabbitmq_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One RabbitMQ for all tests; keep to names under `namespace`."""
    with services.rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for all tests; keep to keys under `namespace`."""
    with services.redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def namespace() -> str:
    """A name no other test uses: for queues, exchanges and keys (the setting `namespace`)."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def private_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A running Redis that this test alone has and may kill, restart or freeze."""
    if not RedisServer.available():
        services.missing("redis-server to kill", "redis-server", None)
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def private_rabbitmq(tmp_path: Path) -> Iterator[RabbitServer]:
    """A running RabbitMQ that this test alone has and may kill, restart or freeze. Takes seconds."""
    if not RabbitServer.available():
        services.missing("rabbitmq-server to kill", "rabbitmq-server", None)
    with RabbitServer(tmp_path / "rabbitmq") as server:
        yield server

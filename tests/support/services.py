"""Where the tests find a RabbitMQ and a Redis. Never a server that was already running, unless it is named.

In this order: the URLs in CODEYARD_TEST_BROKER_URL and CODEYARD_TEST_STORE_URL; containers, where Docker
answers; the programs of the machine (Debian: rabbitmq-server, redis-server) on free ports in temporary
folders. With none of them the test is skipped, or fails where CI is set: there a skip would hide it.
"""

import contextlib
import os
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from support.probes import amqp_answers, redis_answers
from support.servers import RabbitServer, RedisServer, ServerFailed

BROKER_VARIABLE = "CODEYARD_TEST_BROKER_URL"
STORE_VARIABLE = "CODEYARD_TEST_STORE_URL"
RABBITMQ_IMAGE = "rabbitmq:4-management"
REDIS_IMAGE = "redis:8"
Service = Callable[[Path], contextlib.AbstractContextManager[str]]
"""Where it may keep its files -> the URL, for as long as the context lasts."""

_CONTAINER_READY_S = 90.0


@contextlib.contextmanager
def rabbitmq(directory: Path) -> Iterator[str]:
    """The amqp:// URL of a RabbitMQ for as long as the context lasts."""
    if url := os.environ.get(BROKER_VARIABLE):
        yield url
    elif docker_answers():
        with _container(RABBITMQ_IMAGE, 5672, []) as (host, port):
            url = f"amqp://guest:guest@{host}:{port}/"
            _await(lambda: amqp_answers(url), RABBITMQ_IMAGE)
            yield url
    elif RabbitServer.available():
        with RabbitServer(directory) as server:
            yield server.url
    else:
        missing("RabbitMQ", "rabbitmq-server", BROKER_VARIABLE)


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[str]:
    """The redis:// URL of a Redis for as long as the context lasts."""
    if url := os.environ.get(STORE_VARIABLE):
        yield url
    elif docker_answers():
        command = ["redis-server", "--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"]
        with _container(REDIS_IMAGE, 6379, command) as (host, port):
            _await(lambda: redis_answers(host, port), REDIS_IMAGE)
            yield f"redis://{host}:{port}/0"
    elif RedisServer.available():
        with RedisServer(directory) as server:
            yield server.url
    else:
        missing("Redis", "redis-server", STORE_VARIABLE)


def missing(what: str, package: str, variable: str | None) -> NoReturn:
    """Skip on a laptop, fail in CI."""
    named = f", or name a server in {variable}" if variable else ""
    reason = f"no {what}: install Debian's {package}{named}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@cache
def docker_answers() -> bool:
    """Whether a Docker daemon answers within a few seconds."""
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=5).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextlib.contextmanager
def _container(image: str, port: int, command: list[str]) -> Iterator[tuple[str, int]]:
    """A container, removed at the end; also after a kill -9, by testcontainers' own reaper."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Docker client's dependencies; ours stay errors
        from testcontainers.core.container import DockerContainer

        container = DockerContainer(image).with_exposed_ports(port)
        if command:
            container = container.with_command(command)
        container.start()
        try:
            yield container.get_container_host_ip(), int(container.get_exposed_port(port))
        finally:
            container.stop()


def _await(answers: Callable[[], bool], name: str) -> None:
    deadline, never = time.monotonic() + _CONTAINER_READY_S, threading.Event()
    while not answers():
        if time.monotonic() > deadline:
            raise ServerFailed(f"{name} did not answer within {_CONTAINER_READY_S:g} s")
        never.wait(0.2)

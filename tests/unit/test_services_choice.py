"""Which servers the tests get: named ones, containers, the machine's own programs, or none."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import services
from support.servers import RabbitServer, RedisServer


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Docker and without the programs."""
    for variable in (services.BROKER_VARIABLE, services.STORE_VARIABLE, "CI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(services, "docker_answers", lambda: False)
    for kind in (RabbitServer, RedisServer):
        monkeypatch.setattr(kind, "available", lambda: False)


@pytest.mark.usefixtures("nothing_here")
def test_a_server_that_is_named_is_used_and_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who names a server wants that one, whatever else the machine has."""
    monkeypatch.setenv(services.BROKER_VARIABLE, "amqp://there/")
    monkeypatch.setenv(services.STORE_VARIABLE, "redis://there/0")
    monkeypatch.setattr(services, "docker_answers", lambda: pytest.fail("asked for Docker"))

    with services.rabbitmq(tmp_path) as broker, services.redis(tmp_path) as store:
        assert (broker, store) == ("amqp://there/", "redis://there/0")


@pytest.mark.usefixtures("nothing_here")
def test_containers_come_before_the_programs_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the versions that production has."""
    started = []

    @contextlib.contextmanager
    def container(image: str, port: int, command: list[str]) -> Iterator[tuple[str, int]]:
        started.append(image)
        yield "127.0.0.1", 10_000 + port

    monkeypatch.setattr(services, "docker_answers", lambda: True)
    monkeypatch.setattr(services, "_container", container)
    monkeypatch.setattr(services, "amqp_answers", lambda url: True)
    monkeypatch.setattr(services, "redis_answers", lambda host, port: True)

    with services.rabbitmq(tmp_path) as broker, services.redis(tmp_path) as store:
        assert broker == "amqp://guest:guest@127.0.0.1:15672/"
        assert store == "redis://127.0.0.1:16379/0"
    assert started == ["rabbitmq:4-management", "redis:8"]


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize("service", [services.rabbitmq, services.redis])
def test_no_server_to_be_had_skips_on_a_laptop_and_fails_in_ci(
    service: services.Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skip in CI would hide that half of the tests no longer run."""
    with pytest.raises(pytest.skip.Exception, match="install Debian's"), service(tmp_path):
        pass

    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="install Debian's"), service(tmp_path):
        pass

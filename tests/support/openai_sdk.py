"""A fleet of real processes, as OpenAI's own SDK finds it: a gateway on a free port, a worker with the simulated
engine."""

import contextlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from codeyard.shared.settings import Settings
from support.fleet import fleet_settings

MODEL = "starter"


@dataclass(slots=True)
class Yard:
    """`worker` is replaced when it is started again. `held` is closed with the fleet."""

    url: str
    settings: Settings
    folder: Path
    worker: subprocess.Popen[bytes]
    held: contextlib.ExitStack

    def client(self, **more: object) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", **{"max_retries": 0, **more})  # type: ignore[arg-type]
        return self.held.enter_context(client)

    def async_client(self, **more: object) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", **{"max_retries": 0, **more})  # type: ignore[arg-type]

    @contextlib.contextmanager
    def another_gateway(self) -> Iterator[str]:
        """A replica; yields its URL."""
        gateway, line = _started("gateway", self.folder)
        try:
            yield line.split()[1]
        finally:
            _ended(gateway)

    def kill_worker(self) -> None:
        _ended(self.worker)

    def start_worker(self) -> None:
        self.worker, _ = _started("worker", self.folder)


@contextlib.contextmanager
def yard_running(
    folder: Path, broker_url: str, store_url: str, namespace: str, **groups: dict[str, object]
) -> Iterator[Yard]:
    gateway_group = {"port": 0, **groups.pop("gateway", {})}
    settings = fleet_settings(folder, broker_url, store_url, namespace, gateway=gateway_group, **groups)
    (folder / "yard.yaml").write_text(settings.model_dump_json())  # JSON is YAML
    with contextlib.ExitStack() as stack:
        worker, _ = _started("worker", folder)
        yard = Yard("", settings, folder, worker, stack)
        stack.callback(lambda: _ended(yard.worker))
        gateway, line = _started("gateway", folder)
        stack.callback(_ended, gateway)
        yard.url = line.split()[1]
        yield yard


def _started(what: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """And the line that says it is ready."""
    command = [sys.executable, "-m", "codeyard.cli.main", what, "--config", str(folder / "yard.yaml")]
    with (folder / f"{what}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line.startswith(what):
        _ended(process)
        raise AssertionError((folder / f"{what}.log").read_text()[-2_000:])
    return process, line


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@contextlib.contextmanager
def yards(
    request: pytest.FixtureRequest, factory: pytest.TempPathFactory, **groups: dict[str, object]
) -> Iterator[Yard]:
    """On the back end that the fixture's parameter names: one SQLite file, or RabbitMQ and Redis."""
    folder = factory.mktemp("yard")
    name = f"t{uuid.uuid4().hex[:12]}"
    if request.param == "embedded":
        url = f"sqlite:///{folder / 'yard.db'}"
        with yard_running(folder, url, url, name, **groups) as running:
            yield running
    else:
        broker_url, store_url = request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url")
        with yard_running(folder, broker_url, store_url, name, **groups) as running:
            yield running

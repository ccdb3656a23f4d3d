"""The two back ends a whole fleet runs on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.fleet import fleet_settings

from codeyard.producer import AsyncClient
from codeyard.shared.settings import Settings


@dataclass(frozen=True)
class Backend:
    """Where a fleet of this test lives. `settings` and `client` make what belongs to it."""

    folder: Path
    broker_url: str
    store_url: str
    namespace: str

    def settings(self, **groups: dict[str, Any]) -> Settings:
        return fleet_settings(self.folder, self.broker_url, self.store_url, self.namespace, **groups)

    def client(self) -> AsyncClient:
        return AsyncClient(settings=self.settings(), timeout_s=10)


@pytest.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def backend(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> Backend:
    """SQLite for both ports, then RabbitMQ and Redis."""
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        return Backend(tmp_path, url, url, namespace)
    return Backend(
        tmp_path, request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url"), namespace
    )


@pytest.fixture
def embedded(tmp_path: Path, namespace: str) -> Backend:
    """SQLite alone, where the back end makes no difference."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    return Backend(tmp_path, url, url, namespace)

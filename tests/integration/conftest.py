"""The two back ends a whole fleet runs on."""

from pathlib import Path

import pytest
from support.fleet import Backend


@pytest.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def backend(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> Backend:
    """SQLite for both ports, then RabbitMQ and Redis."""
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        return Backend(tmp_path, url, url, namespace)
    return Backend(tmp_path, request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url"), namespace)


@pytest.fixture
def embedded(tmp_path: Path, namespace: str) -> Backend:
    """SQLite alone, where the back end makes no difference."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    return Backend(tmp_path, url, url, namespace)

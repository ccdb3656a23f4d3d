"""The adapters that one contract holds for."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.brokers import Yard


@pytest_asyncio.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.services)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    """Every Broker adapter in turn, in a namespace of its own, which is deleted at the end."""
    rabbitmq = request.param == "rabbitmq"
    yard = Yard(request.getfixturevalue("rabbitmq_url") if rabbitmq else f"sqlite:///{tmp_path / 'yard.db'}")
    yield yard
    await yard.tidy()


@pytest_asyncio.fixture
async def rabbitmq(rabbitmq_url: str) -> AsyncIterator[Yard]:
    """RabbitMQ alone, for what only a server on the network can do."""
    yard = Yard(rabbitmq_url)
    yield yard
    await yard.tidy()

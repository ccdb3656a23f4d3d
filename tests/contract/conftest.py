"""The adapters that one contract holds for."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.brokers import MemoryYard, Yard
from support.stores import MemoryStoreYard, StoreYard

from codeyard.shared.store.port import Store
from codeyard.shared.topology import Topology


@pytest_asyncio.fixture(params=["sqlite", "memory", pytest.param("rabbitmq", marks=pytest.mark.services)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    """Every Broker adapter in turn, in a namespace of its own, which is deleted at the end."""
    rabbitmq = request.param == "rabbitmq"
    url = request.getfixturevalue("rabbitmq_url") if rabbitmq else f"sqlite:///{tmp_path / 'yard.db'}"
    yard = MemoryYard() if request.param == "memory" else Yard(url)
    yield yard
    await yard.tidy()


@pytest_asyncio.fixture
async def rabbitmq(rabbitmq_url: str) -> AsyncIterator[Yard]:
    """RabbitMQ alone, for what only a server on the network can do."""
    yard = Yard(rabbitmq_url)
    yield yard
    await yard.tidy()


@pytest_asyncio.fixture(params=["sqlite", "memory", pytest.param("redis", marks=pytest.mark.services)])
async def stores(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[StoreYard]:
    """Every Store adapter in turn, in a namespace of its own, with a clock that the test turns."""
    redis = request.param == "redis"
    url = request.getfixturevalue("redis_url") if redis else f"sqlite:///{tmp_path / 'yard.db'}"
    memory = request.param == "memory"
    stores = MemoryStoreYard(Topology(namespace)) if memory else StoreYard(url, Topology(namespace))
    yield stores
    await stores.tidy()


@pytest_asyncio.fixture
async def store(stores: StoreYard) -> Store:
    return await stores.open()

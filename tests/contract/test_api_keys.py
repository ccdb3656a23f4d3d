"""The KeyStore port, on every adapter."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from codeyard.shared.access.keys import ApiKey, Scope, make_key
from codeyard.shared.access.port import KeyStore
from codeyard.shared.connect import open_keys
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> StoreSettings:
    redis = request.param == "redis"
    return StoreSettings(url=request.getfixturevalue("redis_url") if redis else f"sqlite:///{tmp_path / 'yard.db'}")


@pytest_asyncio.fixture
async def keys(settings: StoreSettings, namespace: str) -> AsyncIterator[KeyStore]:
    store = await open_keys(settings, Topology(namespace))
    yield store
    await store.close()


def some_key(name: str = "laptop", *, now: float = 1.0) -> ApiKey:
    return make_key(name, tenant="acme", scopes=[Scope.READ, Scope.SUBMIT], now=now).key


async def test_a_key_that_was_put_is_read_by_every_gateway(
    keys: KeyStore, settings: StoreSettings, namespace: str
) -> None:
    """Gateways keep nothing of their own."""
    key = some_key()
    await keys.put([key])

    another = await open_keys(settings, Topology(namespace))
    try:
        assert await another.read([key.id]) == [key]
    finally:
        await another.close()


async def test_unknown_ids_have_no_key_and_do_not_disturb_their_neighbours(keys: KeyStore) -> None:
    """One outcome for each item, in order."""
    key = some_key()
    await keys.put([key])

    assert await keys.read(["aaaaaaaaaaaa", key.id, "bbbbbbbbbbbb"]) == [None, key, None]
    assert await keys.read([]) == []


async def test_keys_are_listed_oldest_first_with_the_revoked_ones(keys: KeyStore) -> None:
    """Who looks for a leaked key must find it, also after it was revoked."""
    first, second = some_key("first", now=1.0), some_key("second", now=2.0)
    revoked = first.model_copy(update={"revoked_at": 3.0})
    await keys.put([second, first])
    await keys.put([revoked])

    assert await keys.every() == [revoked, second]


async def test_fleets_on_one_server_do_not_see_each_others_keys(
    keys: KeyStore, settings: StoreSettings, namespace: str
) -> None:
    """A key of the staging fleet must not open production."""
    key = some_key()
    await keys.put([key])

    elsewhere = await open_keys(settings, Topology(f"{namespace}x"))
    try:
        assert await elsewhere.read([key.id]) == [None]
        assert await elsewhere.every() == []
    finally:
        await elsewhere.close()

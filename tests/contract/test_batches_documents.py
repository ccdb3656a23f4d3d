"""The DocumentStore port, on every adapter."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.documents import DocumentYard
from support.redis_server import running_redis

from codeyard.shared.documents.port import Document, DocumentStore, Name
from codeyard.shared.documents.redis import RedisDocumentStore
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology

ONE = Name("batch", "acme", "batch_1")


@pytest_asyncio.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[DocumentYard]:
    redis = request.param == "redis"
    url = request.getfixturevalue("redis_url") if redis else f"sqlite:///{tmp_path / 'yard.db'}"
    yard = DocumentYard(url, Topology(namespace))
    yield yard
    await yard.tidy()


@pytest_asyncio.fixture
async def store(yard: DocumentYard) -> DocumentStore:
    return await yard.open()


def body_of(document: Document | None) -> str | None:
    return document.body if document else None


async def test_a_document_is_read_by_every_process_until_its_end(store: DocumentStore, yard: DocumentYard) -> None:
    """Whatever letters it has; times are the store's."""
    assert await store.create(ONE, '{"ä": "\u20ac"}', ttl_s=100)

    found = await (await yard.open()).read(ONE)
    assert found is not None
    assert (found.body, found.wish, found.name) == ('{"ä": "\u20ac"}', "", ONE)
    assert abs(found.now - yard.clock()) < 5
    await yard.elapse(110)

    assert await store.read(ONE) is None
    assert await store.newest("batch", "acme", limit=10) == []


async def test_an_id_is_given_once_and_a_repeat_is_the_same(store: DocumentStore) -> None:
    """An answer that was lost is asked for again; another's document is not overwritten."""
    assert await store.create(ONE, "first", ttl_s=100, open=True)
    assert await store.take(ONE, "a", lease_s=10) is not None
    assert await store.write(ONE, "a", "later", lease_s=10) is not None

    assert await store.create(ONE, "first", ttl_s=100, open=True)
    assert not await store.create(ONE, "another", ttl_s=100)

    assert body_of(await store.read(ONE)) == "later"


async def test_other_tenants_and_kinds_are_other_documents(store: DocumentStore) -> None:
    """An id alone opens nothing."""
    await store.create(ONE, "mine", ttl_s=100)

    for other in (Name("batch", "globex", ONE.id), Name("file", "acme", ONE.id)):
        assert await store.read(other) is None
        assert not await store.delete(other)
        assert await store.wish(other, "cancel") is None
        assert await store.newest(other.kind, other.tenant, limit=5) == []
    assert body_of(await store.read(ONE)) == "mine"


async def test_the_newest_come_first_in_pages(store: DocumentStore) -> None:
    """A page goes on before the last id of the one before, even if that one was deleted meanwhile."""
    names = [Name("file", "acme", f"file-{n:03d}") for n in range(250)]
    for name in names:
        await store.create(name, name.id, ttl_s=100)
    newest = [name.id for name in reversed(names)]

    first = [one.name.id for one in await store.newest("file", "acme", limit=120)]
    await store.delete(Name("file", "acme", first[-1]))
    rest = [one.name.id for one in await store.newest("file", "acme", before=first[-1], limit=1_000)]

    assert first + rest == newest


async def test_only_one_owns_an_open_document_until_its_lease_is_over(store: DocumentStore, yard: DocumentYard) -> None:
    """Two gateways must not expand one batch; one that died must not keep it."""
    await store.create(ONE, "0", ttl_s=1_000, open=True)
    assert list(await store.lapsed("batch", limit=10)) == [ONE]

    assert body_of(await store.take(ONE, "a", lease_s=10)) == "0"
    assert await store.take(ONE, "b", lease_s=10) is None
    assert body_of(await store.take(ONE, "a", lease_s=10)) == "0"
    assert list(await store.lapsed("batch", limit=10)) == []
    assert await store.write(ONE, "b", "stolen", lease_s=10) is None
    assert body_of(await store.write(ONE, "a", "1", lease_s=10)) == "1"
    await yard.elapse(20)
    assert list(await store.lapsed("batch", limit=10)) == [ONE]
    assert body_of(await store.take(ONE, "b", lease_s=10)) == "1"

    assert await store.write(ONE, "a", "late", lease_s=10) is None
    assert body_of(await store.read(ONE)) == "1"


async def test_an_owner_that_stops_hands_on_at_once(store: DocumentStore) -> None:
    """A lease of no length: a rollout of gateways does not hold up batches."""
    await store.create(ONE, "0", ttl_s=1_000, open=True)
    await store.take(ONE, "a", lease_s=10)

    await store.write(ONE, "a", "1", lease_s=0)

    assert list(await store.lapsed("batch", limit=10)) == [ONE]
    assert body_of(await store.take(ONE, "b", lease_s=10)) == "1"


async def test_a_closed_document_is_nobodys_to_work_on(store: DocumentStore, yard: DocumentYard) -> None:
    """And the write that closed it may be repeated."""
    await store.create(ONE, "0", ttl_s=1_000, open=True)
    await store.take(ONE, "a", lease_s=10)

    assert body_of(await store.write(ONE, "a", "done", lease_s=None)) == "done"
    assert body_of(await store.write(ONE, "a", "done", lease_s=None)) == "done"
    assert await store.write(ONE, "a", "more", lease_s=None) is None
    assert await store.write(ONE, "a", "more", lease_s=10) is None
    await yard.elapse(60)

    assert list(await store.lapsed("batch", limit=10)) == []
    assert await store.take(ONE, "b", lease_s=10) is None
    assert body_of(await store.read(ONE)) == "done"


async def test_a_wish_reaches_the_owner_with_its_next_write(store: DocumentStore) -> None:
    """A cancel comes to any gateway; the batch may be another's."""
    await store.create(ONE, "0", ttl_s=1_000, open=True)
    await store.take(ONE, "a", lease_s=10)

    wished = await store.wish(ONE, "cancel")
    written = await store.write(ONE, "a", "1", lease_s=10)

    assert wished is not None
    assert written is not None
    assert (wished.body, wished.wish) == ("0", "cancel")
    assert (written.body, written.wish) == ("1", "cancel")


async def test_a_deleted_document_is_gone_for_its_owner_too(store: DocumentStore) -> None:
    """Nothing of it comes back with a late write."""
    await store.create(ONE, "0", ttl_s=1_000, open=True)
    await store.take(ONE, "a", lease_s=10)

    assert await store.delete(ONE)

    assert not await store.delete(ONE)
    assert await store.write(ONE, "a", "1", lease_s=10) is None
    assert list(await store.lapsed("batch", limit=10)) == []


@pytest.mark.services
async def test_on_redis_what_ended_leaves_nothing_behind(redis_url: str, namespace: str) -> None:
    """Every key has an end, and lists of ids lose those that ended."""
    yard = DocumentYard(redis_url, Topology(namespace))
    store = await yard.open()
    await store.create(ONE, "0", ttl_s=50, open=True)
    assert all(0 < left_s <= 51 for left_s in await yard.lifetimes())
    await store.create(Name("batch", "acme", "batch_2"), "0", ttl_s=500)
    await yard.elapse(60)
    assert await store.take(ONE, "a", lease_s=10) is None
    await store.create(Name("batch", "acme", "batch_3"), "0", ttl_s=500)

    async with yard._redis() as redis:
        [ids] = [key for key in await yard.keys() if key.endswith("-ids")]
        kept = await redis.zrange(ids, 0, -1)
    await yard.tidy()

    assert kept == ["batch_2", "batch_3"]


@pytest.mark.services
async def test_on_a_cluster_every_tenants_open_documents_are_found(tmp_path: Path) -> None:
    """They lie on different shards."""
    async with running_redis(tmp_path / "redis", "--cluster-enabled", "yes") as server:
        await server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        await server.cluster_formed()
        store = await RedisDocumentStore.open(StoreSettings(url=server.url), Topology("cluster"))
        names = {Name("batch", f"tenant|{n}", "batch_1") for n in range(20)}
        for name in names:
            assert await store.create(name, name.tenant, ttl_s=100, open=True)

        assert set(await store.lapsed("batch", limit=100)) == names
        await store.close()


@pytest.mark.services
async def test_documents_on_a_redis_that_is_gone_are_an_error_to_repeat(tmp_path: Path) -> None:
    """Nothing above knows a library's exceptions."""
    async with running_redis(tmp_path / "redis") as server:
        store = await RedisDocumentStore.open(StoreSettings(url=server.url, timeout_s=0.5), Topology("gone"))
    with pytest.raises(StoreUnavailable):
        await store.read(ONE)
    await store.close()

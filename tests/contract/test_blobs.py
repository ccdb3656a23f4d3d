"""The BlobStore port, on every adapter."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.blobs import QUOTA_BYTES, BlobYard, chunk
from support.redis_server import running_redis

from codeyard.shared.blobs import whole
from codeyard.shared.blobs.port import MAX_CHUNK_BYTES, BlobStore, Hold, PutVerdict, digest_of
from codeyard.shared.blobs.redis import RedisBlobStore
from codeyard.shared.claims import deposit, hold_on, redeem, set_aside
from codeyard.shared.errors import BlobMissing, MalformedMessage, StorageQuotaExceeded, StoreUnavailable
from codeyard.shared.job import Claim, Job, new_job_id
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import Timing
from codeyard.shared.topology import Topology

JOB_ID = new_job_id()
BYTES = bytes(range(256)) * 4  # no text: also what is not UTF-8 comes back as it was


@pytest_asyncio.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[BlobYard]:
    redis = request.param == "redis"
    url = request.getfixturevalue("redis_url") if redis else f"sqlite:///{tmp_path / 'yard.db'}"
    yard = BlobYard(url, Topology(namespace))
    yield yard
    await yard.tidy()


@pytest_asyncio.fixture
async def store(blobs: BlobYard) -> BlobStore:
    return await blobs.open()


async def test_bytes_come_back_as_they_were_put(store: BlobStore, blobs: BlobYard) -> None:
    """Whatever they are, and for every process."""
    assert await store.put([chunk(BYTES), chunk(b"x")]) == [PutVerdict.STORED] * 2

    another = await blobs.open()

    assert await another.read("acme", [digest_of(b"x"), digest_of(b"y"), digest_of(BYTES)]) == [b"x", None, BYTES]
    assert await store.read("acme", []) == []


async def test_equal_content_lies_there_once(store: BlobStore) -> None:
    """A repository in front of a thousand prompts must not take up a thousand times its size."""
    verdicts = await store.put([chunk(BYTES), chunk(BYTES, holder="file-2"), chunk(b"other")])

    assert verdicts == [PutVerdict.STORED, PutVerdict.PRESENT, PutVerdict.STORED]
    assert await store.used_bytes("acme") == len(BYTES) + 5


async def test_another_tenants_bytes_are_not_there(store: BlobStore, blobs: BlobYard) -> None:
    """A digest is no secret: who knows one must not be able to read, hold or end what it names."""
    await store.put([chunk(BYTES)])

    assert await store.read("globex", [digest_of(BYTES)]) == [None]
    assert await store.hold([Hold("globex", digest_of(BYTES), "file-1", 600)]) == [False]
    await store.release("globex", "file-1", [digest_of(BYTES)])
    assert await store.put([chunk(BYTES, tenant="globex")]) == [PutVerdict.STORED]
    assert await store.read("acme", [digest_of(BYTES)]) == [BYTES]
    elsewhere = await blobs.open(Topology(f"{blobs.topology.namespace}x"))
    assert await elsewhere.read("acme", [digest_of(BYTES)]) == [None]


async def test_a_chunk_ends_with_the_last_that_holds_it(store: BlobStore, blobs: BlobYard) -> None:
    """Never before the last deadline that refers to it."""
    digest = digest_of(BYTES)
    await store.put([chunk(BYTES, ttl_s=100), chunk(BYTES, holder="claims", ttl_s=1_000)])

    await blobs.elapse(500)
    assert await store.read("acme", [digest]) == [BYTES]
    await blobs.elapse(600)

    assert await store.read("acme", [digest]) == [None]
    assert await store.used_bytes("acme") == 0
    assert await store.hold([Hold("acme", digest, "claims", 100)]) == [False]
    assert await store.put([chunk(BYTES)]) == [PutVerdict.STORED]


async def test_holding_again_moves_the_end_only_to_later(store: BlobStore, blobs: BlobYard) -> None:
    """A short job over the same prompt must not take it from a long one."""
    digest = digest_of(BYTES)
    await store.put([chunk(BYTES, holder="claims", ttl_s=1_000)])
    assert await store.put([chunk(BYTES, holder="claims", ttl_s=10)]) == [PutVerdict.PRESENT]
    assert await store.hold([Hold("acme", digest, "claims", 20)]) == [True]

    await blobs.elapse(900)
    assert await store.hold([Hold("acme", digest, "claims", 300)]) == [True]
    await blobs.elapse(200)

    assert await store.read("acme", [digest]) == [BYTES]


async def test_what_the_last_holder_releases_is_gone_and_makes_room(store: BlobStore) -> None:
    """A deleted file gives its quota back at once, unless something else needs the same bytes."""
    digest = digest_of(BYTES)
    await store.put([chunk(BYTES), chunk(BYTES, holder="file-2")])

    await store.release("acme", "file-1", [digest, digest_of(b"unknown")])
    assert await store.read("acme", [digest]) == [BYTES]
    await store.release("acme", "file-1", [digest])
    assert await store.read("acme", [digest]) == [BYTES]
    await store.release("acme", "file-2", [digest])

    assert await store.read("acme", [digest]) == [None]
    assert await store.used_bytes("acme") == 0


async def test_released_bytes_live_as_long_as_the_others_that_hold_them(store: BlobStore, blobs: BlobYard) -> None:
    """Not as long as the one who let go wanted them."""
    digest = digest_of(BYTES)
    await store.put([chunk(BYTES, ttl_s=1_000), chunk(BYTES, holder="file-2", ttl_s=100)])
    await store.release("acme", "file-1", [digest])

    await blobs.elapse(200)

    assert await store.read("acme", [digest]) == [None]


async def test_a_tenant_over_its_quota_is_refused_and_no_other(store: BlobStore, blobs: BlobYard) -> None:
    """One tenant's uploads must not fill the store for all; what is there already costs nothing."""
    first, second = bytes(MAX_CHUNK_BYTES), b"\1" * MAX_CHUNK_BYTES
    third = b"\2" * MAX_CHUNK_BYTES
    assert QUOTA_BYTES < 3 * MAX_CHUNK_BYTES

    verdicts = await store.put([chunk(first, ttl_s=50), chunk(second), chunk(third), chunk(second, holder="file-2")])

    assert verdicts == [PutVerdict.STORED, PutVerdict.STORED, PutVerdict.OVER_QUOTA, PutVerdict.PRESENT]
    assert await store.read("acme", [digest_of(third)]) == [None]
    assert await store.put([chunk(third, tenant="globex")]) == [PutVerdict.STORED]
    await blobs.elapse(60)
    assert await store.put([chunk(third)]) == [PutVerdict.STORED]


async def test_a_whole_text_is_cut_kept_and_read_back(store: BlobStore) -> None:
    """Over several chunks, and a second time without sending them."""
    text = b"".join(n.to_bytes(4, "big") for n in range(640_000))  # 2.56 MB, no two chunks alike
    pieces = whole.cut(text)
    assert [len(piece) for piece in pieces] == [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, len(text) - 2 * MAX_CHUNK_BYTES]

    digests = await whole.keep(store, "acme", pieces, holder="claims", ttl_s=60)

    assert await whole.read_whole(store, "acme", digests) == text
    assert await whole.keep(store, "acme", pieces, holder="claims", ttl_s=60) == digests
    with pytest.raises(BlobMissing):
        await whole.read_whole(store, "acme", [*digests, digest_of(b"never")])
    with pytest.raises(StorageQuotaExceeded):
        await whole.keep(store, "acme", [b"\3" * MAX_CHUNK_BYTES], holder="claims", ttl_s=60)


async def test_a_claimed_prompt_lives_as_long_as_its_job_and_its_next_life(store: BlobStore, blobs: BlobYard) -> None:
    """A dead job that is redriven has a new deadline, and needs its prompt until then."""
    timing = Timing(longest_run_s=10, retention_s=10, unpublished_s=10)
    job = Job.build(
        id=JOB_ID, tenant="acme", key="k", model="m", revision="m-1", prompt="x" * 100_000, timeout_s=10_000.0
    )
    aside = set_aside(job, max_prompt_bytes=1_000_000)
    assert aside is not None
    claim = aside.job.prompt
    assert isinstance(claim, Claim)

    await deposit(store, aside, timing)
    await blobs.elapse(10_020)
    assert await redeem(store, "acme", claim) == job.prompt
    await hold_on(store, [aside.job, job], timing)
    await blobs.elapse(10_020)
    assert await redeem(store, "acme", claim) == job.prompt
    await blobs.elapse(1_000)

    with pytest.raises(BlobMissing):
        await redeem(store, "acme", claim)
    await hold_on(store, [aside.job], timing)


async def test_a_claim_whose_bytes_are_no_prompt_is_malformed(store: BlobStore) -> None:
    """Whoever wrote it: the job fails, the worker goes on."""
    for stored in (b"no JSON", b'""', b"[]", b'{"messages": 1}'):
        digests = await whole.keep(store, "acme", [stored], holder="claims", ttl_s=60)
        claim = Claim(digest=digests[0], kind="text", size_bytes=len(stored), tokens=1, chunks=tuple(digests))
        with pytest.raises(MalformedMessage):
            await redeem(store, "acme", claim)
        with pytest.raises(MalformedMessage, match="not the prompt"):
            await redeem(store, "acme", claim.model_copy(update={"digest": "0" * 64}))


@pytest.mark.services
async def test_on_redis_every_key_has_an_end(redis_url: str, namespace: str) -> None:
    """A tenant that stays away leaves nothing behind."""
    yard = BlobYard(redis_url, Topology(namespace))
    store = await yard.open()

    await store.put([chunk(BYTES, ttl_s=100), chunk(b"x", ttl_s=50)])
    await store.hold([Hold("acme", digest_of(b"x"), "other", 70)])
    lifetimes = {tuple(key.split(":")[3:]): left_s for key, left_s in (await yard.lifetimes()).items()}
    await yard.tidy()

    assert len(lifetimes) == 6
    assert all(60 < left_s <= 102 for left_s in lifetimes.values()), lifetimes
    assert lifetimes["blob", digest_of(b"x")] <= 70


@pytest.mark.services
async def test_bytes_that_redis_lost_are_counted_once_when_they_come_again(redis_url: str, namespace: str) -> None:
    """A key that somebody deleted by hand must not cost the tenant its room for ever."""
    yard = BlobYard(redis_url, Topology(namespace))
    store = await yard.open()
    await store.put([chunk(BYTES)])
    async with yard._redis() as redis:
        [data] = [key for key in await yard.keys() if ":blob:" in key]
        await redis.delete(data)

    assert await store.put([chunk(BYTES)]) == [PutVerdict.STORED]
    assert await store.used_bytes("acme") == len(BYTES)
    assert await store.read("acme", [digest_of(BYTES)]) == [BYTES]
    await yard.tidy()


@pytest.mark.services
async def test_on_a_cluster_chunks_of_many_tenants_come_back_in_order(tmp_path: Path) -> None:
    """Each tenant's keys lie in one slot; a node with all slots refuses a script over two, as any cluster does."""
    async with running_redis(tmp_path / "redis", "--cluster-enabled", "yes") as server:
        await server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        await server.cluster_formed()
        store = await RedisBlobStore.open(StoreSettings(url=server.url), Topology("cluster"))
        group = [chunk(f"{n % 10}".encode(), tenant=f"tenant-{n % 10}") for n in range(20)]

        verdicts = await store.put(group)

        assert verdicts == [PutVerdict.STORED] * 10 + [PutVerdict.PRESENT] * 10
        assert await store.read("tenant-3", [digest_of(b"3"), digest_of(b"4")]) == [b"3", None]
        assert await store.used_bytes("tenant-3") == 1
        await store.release("tenant-3", "file-1", [digest_of(b"3")])
        assert await store.read("tenant-3", [digest_of(b"3")]) == [None]
        await store.close()


@pytest.mark.services
async def test_a_redis_that_is_gone_is_an_error_to_repeat(tmp_path: Path) -> None:
    """Nothing above knows a library's exceptions."""
    async with running_redis(tmp_path / "redis") as server:
        store = await RedisBlobStore.open(StoreSettings(url=server.url, timeout_s=0.5), Topology("gone"))
    with pytest.raises(StoreUnavailable):
        await store.put([chunk(b"x")])
    with pytest.raises(StoreUnavailable):
        await store.read("acme", [digest_of(b"x")])
    await store.close()

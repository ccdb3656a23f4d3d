"""What a Redis in trouble looks like to the store's callers: StoreUnavailable, said clearly, in time."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis import exceptions
from support.proxy import TcpProxy
from support.redis_server import OwnRedis, running_redis
from support.servers import free_port
from support.store_calls import commit_of, make_job, reservation_of, run_jobs, tokens

from codeyard.shared.access.keys import make_key
from codeyard.shared.access.redis import RedisKeyStore
from codeyard.shared.alias import Alias
from codeyard.shared.blobs.port import Chunk, Hold, digest_of
from codeyard.shared.blobs.redis import RedisBlobStore
from codeyard.shared.documents.port import Name
from codeyard.shared.documents.redis import RedisDocumentStore
from codeyard.shared.errors import SettingsError, StoreUnavailable
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import Append, AppendVerdict, CommitVerdict, Queued, Renewal, ReserveVerdict
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.store.redis_link import _bounded
from codeyard.shared.topology import Topology

pytestmark = pytest.mark.services


@asynccontextmanager
async def opened(url: str, *, timeout_s: float = 5.0, replicas: int = 0) -> AsyncIterator[RedisStore]:
    store = await RedisStore.open(StoreSettings(url=url, timeout_s=timeout_s, replicas=replicas), Topology("fails"))
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[OwnRedis]:
    async with running_redis(tmp_path / "redis") as server:
        yield server


async def test_ping_names_the_server_and_its_version(server: OwnRedis) -> None:
    """`codeyard doctor` prints it."""
    async with opened(server.url) as store, server.client() as client:
        assert await store.ping() == f"redis {(await client.info('server'))['redis_version']}"


async def test_a_server_that_forgot_its_scripts_is_taught_them_again(server: OwnRedis) -> None:
    """A restart or a failover empties the script cache in the middle of a worker's life."""
    async with opened(server.url) as store, server.client() as client:
        (claimed,) = await run_jobs(store, job := make_job())
        await client.script_flush()

        (committed,) = await store.commit([commit_of(job, claimed)])
        await client.script_flush()

        assert committed.verdict is CommitVerdict.COMMITTED
        assert (await store.commit([commit_of(job, claimed)]))[0].verdict is CommitVerdict.COMMITTED


async def test_a_full_server_refuses_the_whole_group_and_still_reads(server: OwnRedis) -> None:
    """Half a group written would be a promise to half of the callers; nobody could tell which half."""
    async with opened(server.url) as store, server.client() as client:
        await run_jobs(store, there := make_job())
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1mb")

        with pytest.raises(StoreUnavailable, match="out of memory"):
            await store.reserve([reservation_of(make_job()) for _ in range(3)])

        (record,) = await store.read([there.id])
        assert record is not None
        assert len(await store.recent(10)) == 1
        await client.config_set("maxmemory", "0")
        assert (await store.reserve([reservation_of(make_job())]))[0].verdict is ReserveVerdict.NEW


async def test_a_replica_is_named_as_such(server: OwnRedis) -> None:
    """After a failover the old primary is a replica: retrying there never helps, another address does."""
    async with opened(server.url) as store:
        await server.command("REPLICAOF", "127.0.0.1", free_port())

        with pytest.raises(StoreUnavailable, match="read-only replica"):
            await store.reserve([reservation_of(make_job())])


async def test_a_server_that_is_loading_is_unavailable_and_then_back(tmp_path: Path) -> None:
    """A restart with much data answers LOADING for minutes; workers wait it out."""
    server = OwnRedis(tmp_path / "redis")
    try:
        await server.start()
        async with opened(server.url) as store:
            await store.reserve([reservation_of(make_job()) for _ in range(10)])
            await server.command("SAVE")
            await server.kill()
            slowly = ("--key-load-delay", "100000", "--loading-process-events-interval-bytes", "1024")
            await server.start(*slowly, answering=False)

            with pytest.raises(StoreUnavailable, match="loading"):
                await store.recent(10)

            await server.command("CONFIG", "SET", "key-load-delay", "0")
            await server.answering()
            assert len(await store.recent(20)) == 10
    finally:
        await server.stop()


async def test_too_few_replicas_for_a_write_is_unavailable(server: OwnRedis) -> None:
    """The server's own rule (min-replicas-to-write) ends the call, not the process."""
    async with opened(server.url) as store, server.client() as client:
        await client.config_set("min-replicas-to-write", "1")

        with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
            await store.reserve([reservation_of(make_job())])


async def joined(primary: OwnRedis) -> None:
    """Its replica has all there is; the first copy takes Redis 8 some seconds."""
    async with asyncio.timeout(30):
        while await primary.command("WAIT", 1, 1_000) != 1:
            pass


async def test_a_commit_waits_for_the_replicas_it_was_told_to(tmp_path: Path) -> None:
    """The delivery is acked next: a failover must not lose the only copy of the result."""
    async with running_redis(tmp_path / "primary", "--repl-diskless-sync-delay", "0") as primary:
        async with opened(primary.url, timeout_s=1.0) as store:
            (claimed,) = await run_jobs(store, job := make_job())
        async with opened(primary.url, timeout_s=1.0, replicas=1) as store:
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                await store.commit([commit_of(job, claimed)])

        async with running_redis(tmp_path / "replica", "--replicaof", f"127.0.0.1 {primary.port}"):
            await joined(primary)
            async with opened(primary.url, replicas=1) as store:
                (committed,) = await store.commit([commit_of(job, claimed)])
            assert committed.verdict is CommitVerdict.COMMITTED


async def test_a_commit_its_replicas_missed_is_not_acked_when_it_is_repeated_either(tmp_path: Path) -> None:
    """The repeat writes nothing, so it must wait for what the first one wrote, on whatever connection that was."""
    async with (
        running_redis(tmp_path / "primary", "--repl-diskless-sync-delay", "0") as primary,
        running_redis(tmp_path / "replica", "--replicaof", f"127.0.0.1 {primary.port}") as replica,
        opened(primary.url, timeout_s=0.6, replicas=1) as hasty,
        opened(primary.url, replicas=1) as patient,
    ):
        await joined(primary)
        (claimed,) = await run_jobs(patient, job := make_job())
        await replica.kill()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                await hasty.commit([commit_of(job, claimed)])
        await replica.start()
        await joined(primary)
        (committed,) = await patient.commit([commit_of(job, claimed)])
    assert committed.verdict is CommitVerdict.COMMITTED


async def test_whatever_somebody_relies_on_waits_for_the_replicas(server: OwnRedis) -> None:
    """An accepted job whose record, mark or prompt a failover took could end as one that was never published; a key
    that was revoked would open doors again. Tokens and renewals are made up for, and wait for nobody."""
    async with opened(server.url) as store:
        (claimed,) = await run_jobs(store, job := make_job())
    settings, topology = StoreSettings(url=server.url, timeout_s=3.0, replicas=1), Topology("fails")
    store = await RedisStore.open(settings, topology)
    blobs, keys = await RedisBlobStore.open(settings, topology), await RedisKeyStore.open(settings, topology)
    documents = await RedisDocumentStore.open(settings, topology)
    key = make_key("revoked", tenant="tests", scopes=(), now=1.0).key
    try:
        hold = Hold("tests", digest_of(b"def f():"), "job-1", 60.0)
        refused = await asyncio.gather(
            store.reserve([reservation_of(make_job())]),
            store.mark_queued([Queued(job.id, "p1")]),
            store.cancel([make_job().id]),
            store.swap_alias(None, Alias("m", "m-1")),
            blobs.put([Chunk(hold, b"def f():")]),
            documents.create(Name("batch", "tests", "1"), "{}", ttl_s=60.0),
            keys.put([key]),
            return_exceptions=True,
        )

        assert ["0 of 1 replicas" in str(one) for one in refused] == [True] * len(refused), refused
        assert await store.append([Append(job.id, claimed.fence, [tokens(1)])]) == [AppendVerdict.APPENDED]
        assert (await store.renew([Renewal(job.id, claimed.fence)]))[0].held
    finally:
        for one in (store, blobs, keys, documents):
            await one.close()


async def test_a_demoted_primary_is_left_for_the_one_its_address_leads_to(tmp_path: Path) -> None:
    """A name or a virtual address that follows the primary moves no connection that is open: one refusal must."""
    first, second = (running_redis(tmp_path / name) for name in ("first", "second"))
    async with (
        first as old,
        second as new,
        TcpProxy("127.0.0.1", old.port) as address,
        opened(f"redis://127.0.0.1:{address.port}/0") as store,
    ):
        await store.reserve([reservation_of(make_job()) for _ in range(3)])
        await old.command("REPLICAOF", "127.0.0.1", new.port)
        address.target_port = new.port

        with pytest.raises(StoreUnavailable, match="read-only replica"):
            await store.reserve([reservation_of(make_job())])

        assert (await store.reserve([reservation_of(make_job())]))[0].verdict is ReserveVerdict.NEW


async def test_a_password_that_is_missing_or_wrong_is_said_so(tmp_path: Path) -> None:
    """The most common mistake when a URL is configured; the password itself is never repeated."""
    async with running_redis(tmp_path / "redis") as server:
        async with server.client() as client:
            await client.config_set("requirepass", "right-one")

        with pytest.raises(StoreUnavailable, match="password"):
            await RedisStore.open(StoreSettings(url=server.url), Topology())
        with pytest.raises(StoreUnavailable, match="user or password") as refused:
            await RedisStore.open(StoreSettings(url=f"redis://:wrong-one@127.0.0.1:{server.port}/0"), Topology())
        assert "wrong-one" not in str(refused.value)
        async with opened(f"redis://:right-one@127.0.0.1:{server.port}/0") as store:
            assert (await store.ping()).startswith("redis ")


async def test_a_cluster_without_its_slots_is_down(tmp_path: Path) -> None:
    """CLUSTERDOWN heals by itself; it must read like that."""
    async with running_redis(tmp_path / "redis", "--cluster-enabled", "yes") as server:
        with pytest.raises(StoreUnavailable):
            await RedisStore.open(StoreSettings(url=server.url, timeout_s=2.0), Topology())


async def test_no_server_is_unavailable_and_a_bad_url_is_a_setting() -> None:
    """One is to be waited out, the other to be mended."""
    with pytest.raises(StoreUnavailable):
        await RedisStore.open(StoreSettings(url=f"redis://127.0.0.1:{free_port()}/0"), Topology())
    with pytest.raises(SettingsError, match="CODEYARD_STORE_URL") as refused:
        await RedisStore.open(StoreSettings(url="redis://:secret@127.0.0.1:notaport/0"), Topology())
    assert "secret" not in str(refused.value)


async def test_a_server_that_stands_still_is_given_up_in_time(server: OwnRedis) -> None:
    """A stopped process keeps its connections open: only our own clock ends the wait."""
    async with opened(server.url, timeout_s=0.5) as store:
        (claimed,) = await run_jobs(store, job := make_job())
        server.pause()
        begun = time.monotonic()

        with pytest.raises(StoreUnavailable, match="no answer"):
            await store.append([Append(job.id, claimed.fence, [tokens(1)])])

        assert time.monotonic() - begun < 2.0
        server.resume()
        (committed,) = await store.commit([commit_of(job, claimed)])
        assert committed.verdict in {CommitVerdict.COMMITTED, CommitVerdict.FENCED}
        await store.ping()


async def test_more_callers_than_connections_wait_their_turn(server: OwnRedis) -> None:
    """A burst at a gateway must neither open a connection per request nor fail."""
    async with opened(server.url) as store, server.client() as client:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(store.reserve([reservation_of(make_job())])) for _ in range(100)]

        assert {call.result()[0].verdict for call in calls} == {ReserveVerdict.NEW}
        assert len(await client.client_list()) <= 17


async def test_a_cancelled_call_leaves_no_half_read_connection(server: OwnRedis) -> None:
    """Its late reply must never be taken for the answer to the next call."""
    async with opened(server.url) as store:
        await run_jobs(store, job := make_job())
        for _ in range(20):
            call = asyncio.ensure_future(store.read([job.id]))
            await asyncio.wait([call], timeout=0.0002)
            call.cancel()
            await asyncio.wait([call])
            assert await store.due(1) == []


async def test_a_result_committed_under_appendfsync_always_survives_kill_9(tmp_path: Path) -> None:
    """The delivery is acked right after the commit: from then on Redis alone has the result."""
    server = OwnRedis(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")
    try:
        await server.start()
        async with opened(server.url) as store:
            jobs = [make_job() for _ in range(20)]
            claims = await run_jobs(store, *jobs)
            await store.commit([commit_of(job, claimed) for job, claimed in zip(jobs, claims, strict=True)])

            await server.kill()
            with pytest.raises(StoreUnavailable):
                await store.read([jobs[0].id])
            await server.start()

            records = await store.read([job.id for job in jobs])
            assert {record.result.text for record in records if record and record.result} == {"return a + b"}
            assert len(await store.events(jobs[0].id, after=0)) == 1
            assert len(records) == 20
    finally:
        await server.stop()


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for _, kind in inspect.getmembers(exceptions, inspect.isclass)
        if issubclass(kind, exceptions.RedisError | exceptions.RedisClusterException)
    ],
    ids=lambda kind: kind.__name__,
)
async def test_no_exception_of_the_library_gets_past_the_link(kind: type[Exception]) -> None:
    """A caller that has to know redis-py is bound to it."""
    error = kind.__new__(kind)
    with pytest.raises(StoreUnavailable):
        async with _bounded(1.0):
            raise error

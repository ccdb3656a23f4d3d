"""A Redis Cluster: every script's keys in one slot, groups split and put together again."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.redis_server import OwnRedis, running_redis
from support.store_calls import claim_of, commit_of, make_job, reservation_of

from codeyard.shared.alias import Alias
from codeyard.shared.record import State
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import ClaimVerdict, CommitVerdict, ReserveVerdict
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology, store_shard

pytestmark = pytest.mark.services


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[OwnRedis]:
    """One node with all slots: it refuses a script over two slots as any cluster does."""
    async with running_redis(tmp_path / "redis", "--cluster-enabled", "yes") as server:
        await server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        await server.cluster_formed()
        yield server


@pytest.fixture
async def store(server: OwnRedis) -> AsyncIterator[RedisStore]:
    store = await RedisStore.open(StoreSettings(url=server.url), Topology("cluster"))
    yield store
    await store.close()


async def test_a_group_over_many_slots_comes_back_in_its_order(store: RedisStore) -> None:
    """The caller has one group and gets one list, wherever the records lie."""
    jobs = [make_job() for _ in range(60)]
    assert len({store_shard(job.id) for job in jobs}) > 10

    reserved = await store.reserve([reservation_of(job) for job in jobs])
    claims = await store.claim([claim_of(job) for job in jobs])
    async with store.watch(jobs[0].id) as watcher:
        commits = [commit_of(job, claimed, job.key) for job, claimed in zip(jobs, claims, strict=True)]
        committed = await store.commit(commits)
        await watcher.wait(5.0)

    assert [outcome.record.id for outcome in reserved] == [job.id for job in jobs]
    assert {outcome.verdict for outcome in reserved} == {ReserveVerdict.NEW}
    assert {outcome.verdict for outcome in claims} == {ClaimVerdict.RUN}
    assert {outcome.verdict for outcome in committed} == {CommitVerdict.COMMITTED}
    records = await store.read([job.id for job in jobs])
    assert [record.result.text for record in records if record and record.result] == [job.key for job in jobs]
    assert len(await store.events(jobs[0].id, after=0)) == 1


async def test_the_indexes_of_all_shards_are_looked_through(store: RedisStore) -> None:
    """The reconciler and `codeyard jobs` see the whole fleet, not one node."""
    jobs = [make_job(timeout_s=0.001) for _ in range(30)]
    await store.reserve([reservation_of(job) for job in jobs])

    assert set(await store.due(100)) == {job.id for job in jobs}
    assert {record.id for record in await store.recent(100)} == {job.id for job in jobs}
    assert {record.state for record in await store.recent(100)} == {State.RESERVED}
    assert await store.swap_alias(None, Alias("m", "m-1")) == Alias("m", "m-1")
    assert await store.aliases() == {"m": Alias("m", "m-1")}
    assert (await store.ping()).startswith("redis ")


async def test_a_forgotten_script_is_taught_again_on_every_node(store: RedisStore, server: OwnRedis) -> None:
    """Each node has a script cache of its own, and a new node an empty one."""
    await store.reserve([reservation_of(make_job())])
    await server.command("SCRIPT", "FLUSH")

    outcomes = await store.reserve([reservation_of(make_job()) for _ in range(8)])

    assert {outcome.verdict for outcome in outcomes} == {ReserveVerdict.NEW}

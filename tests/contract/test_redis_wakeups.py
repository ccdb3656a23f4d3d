"""Waiting for a job without asking all the time: one subscription connection for all who wait."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.redis_server import OwnRedis, running_redis
from support.store_calls import commit_of, make_job, run_jobs, tokens

from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import Append, Wakeup
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology

pytestmark = pytest.mark.services

TOPOLOGY = Topology("wake")
LONG_S = 20.0  # a wait that ends by this has not been woken


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[OwnRedis]:
    async with running_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def store(server: OwnRedis) -> AsyncIterator[RedisStore]:
    store = await RedisStore.open(StoreSettings(url=server.url), TOPOLOGY)
    yield store
    await store.close()


async def woken(watcher: Wakeup) -> bool:
    begun = time.monotonic()
    await watcher.wait(LONG_S)
    return time.monotonic() - begun < LONG_S - 1


async def test_events_and_the_final_state_wake_who_watches(store: RedisStore) -> None:
    """A stream's reader sees tokens as they come, and the end without a poll."""
    (claimed,) = await run_jobs(store, job := make_job())

    async with store.watch(job.id) as watcher:
        await store.append([Append(job.id, claimed.fence, [tokens(1)])])
        assert await woken(watcher)
        await store.commit([commit_of(job, claimed)])
        assert await woken(watcher)


async def test_a_change_right_after_entering_is_never_missed(store: RedisStore) -> None:
    """The context is entered only when the server has confirmed the subscription."""
    jobs = [make_job() for _ in range(50)]
    claims = await run_jobs(store, *jobs)

    for job, claimed in zip(jobs, claims, strict=True):
        async with store.watch(job.id) as watcher:
            await store.commit([commit_of(job, claimed)])
            assert await woken(watcher)


async def test_a_wait_for_a_quiet_job_ends_by_its_timeout(store: RedisStore) -> None:
    """Callers read again then: a wake-up is only a hint."""
    (claimed,) = await run_jobs(store, other := make_job())

    async with store.watch(make_job().id) as watcher:
        await store.commit([commit_of(other, claimed)])
        begun = time.monotonic()
        await watcher.wait(0.2)

    assert time.monotonic() - begun >= 0.19


async def test_all_watchers_of_a_process_share_one_connection(store: RedisStore, server: OwnRedis) -> None:
    """A gateway has thousands of waiting callers; Redis has a limit of connections."""
    jobs = [make_job() for _ in range(40)]
    claims = await run_jobs(store, *jobs)

    async with AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(store.watch(job.id)) for job in [*jobs, *jobs]]
        clients = await server.command("CLIENT LIST")
        await store.commit([commit_of(job, claimed) for job, claimed in zip(jobs, claims, strict=True)])
        assert all(await asyncio.gather(*(woken(watcher) for watcher in watchers)))

    subscribers = [client for client in clients if int(client["sub"]) > 0]
    assert len(subscribers) == 1
    assert int(subscribers[0]["sub"]) == 1 + len(jobs)  # two watchers of a job share its channel


async def test_a_channel_nobody_watches_any_more_is_left(store: RedisStore, server: OwnRedis) -> None:
    """Else a gateway's subscriptions grow with every job it ever waited for."""
    async with store.watch(make_job().id), store.watch(make_job().id):
        assert len(await server.command("PUBSUB", "CHANNELS")) == 3

    async with store.watch(last := make_job().id):  # confirmed behind the others' end, on the same connection
        channels = await server.command("PUBSUB", "CHANNELS")

    assert set(channels) == {"wake:wake", TOPOLOGY.job_key(last, "wake")}


async def test_watching_survives_a_cut_and_the_cut_itself_wakes(store: RedisStore, server: OwnRedis) -> None:
    """What was published while the link was down is lost: who waits must read."""
    (claimed,) = await run_jobs(store, job := make_job())
    async with store.watch(job.id) as watcher, store.watch(make_job().id) as other:
        assert await server.command("CLIENT", "KILL", "TYPE", "pubsub") == 1

        assert await woken(watcher)
        assert await woken(other)

        await store.commit([commit_of(job, claimed)])
        assert await woken(watcher)


async def test_watching_survives_a_restart_of_the_server(store: RedisStore, server: OwnRedis) -> None:
    """The subscription comes back by itself, with backoff, however long it took."""
    async with store.watch(make_job().id) as watcher:
        await server.kill()
        await server.start()

        assert await woken(watcher)
        (claimed,) = await run_jobs(store, job := make_job())
        async with store.watch(job.id) as after:
            await store.commit([commit_of(job, claimed)])
            assert await woken(after)


async def test_watching_while_the_server_is_away_is_entered_all_the_same(store: RedisStore, server: OwnRedis) -> None:
    """The read that follows tells of the outage; a second error would only hide it."""
    await server.kill()

    async with asyncio.timeout(LONG_S), store.watch(make_job().id) as watcher:
        await watcher.wait(0.01)


async def test_a_cancelled_watcher_leaves_nothing_behind(store: RedisStore, server: OwnRedis) -> None:
    """Callers hang up at any moment, also between the subscription and its confirmation."""
    for _ in range(30):
        watching = asyncio.ensure_future(_watch_for_ever(store))
        await asyncio.wait([watching], timeout=0.0005)
        watching.cancel()
        await asyncio.wait([watching])

    async with store.watch(last := make_job().id):
        channels = await server.command("PUBSUB", "CHANNELS")
    assert set(channels) == {"wake:wake", TOPOLOGY.job_key(last, "wake")}


async def test_close_ends_the_task_and_the_connection(server: OwnRedis) -> None:
    """A lease thread opens a store of its own and closes it; nothing may stay behind in its loop."""
    tasks_before = asyncio.all_tasks()
    store = await RedisStore.open(StoreSettings(url=server.url), TOPOLOGY)
    async with store.watch(make_job().id):
        assert asyncio.all_tasks() - tasks_before

    await store.close()

    assert asyncio.all_tasks() == tasks_before
    assert await server.command("PUBSUB", "CHANNELS") == []


async def test_an_idle_subscription_costs_nothing(store: RedisStore, server: OwnRedis) -> None:
    """A gateway waits most of the time; a loop that turns meanwhile burns a core."""
    async with store.watch(make_job().id) as watcher:
        before = time.process_time()
        await watcher.wait(1.0)
        assert time.process_time() - before < 0.2


async def _watch_for_ever(store: RedisStore) -> None:
    async with store.watch(make_job().id) as watcher:
        await watcher.wait(LONG_S)

"""kill -9 of Redis among commits, with our configuration: what was acked is there, every time."""

import asyncio
import random
from pathlib import Path

import pytest
from support.redis_server import OwnRedis
from support.store_calls import claim_of, commit_of, make_job, reservation_of, success

from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.record import Record
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import CommitVerdict
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology

pytestmark = pytest.mark.services

WORKERS = 8  # committing at once, so that a kill meets some in flight
GROUP = 4
KILLED_AFTER = (1, 120)  # acked results, drawn for each kill
OURS = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")


@pytest.mark.parametrize(
    "num_kills",
    [
        pytest.param(5, marks=pytest.mark.timeout(180)),
        pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(1_500)]),
    ],
)
async def test_no_acked_result_is_lost_when_redis_is_killed_among_commits(tmp_path: Path, num_kills: int) -> None:
    """Right after the ack the broker forgets the job: from then on Redis alone has its result."""
    choose = random.Random(num_kills)
    server = OwnRedis(tmp_path / "redis", *OURS)
    acked: dict[JobId, str] = {}
    try:
        for kill in range(num_kills):
            await server.start()
            before = len(acked)

            await commit_until_killed(server, acked, after=before + choose.randint(*KILLED_AFTER))

            assert len(acked) > before
            await server.start()
            assert await missing(server, acked) == [], f"after kill {kill + 1}"
            await server.kill()
    finally:
        await server.stop()


async def commit_until_killed(server: OwnRedis, acked: dict[JobId, str], *, after: int) -> None:
    """Commit with several connections at once; -9 as soon as `after` results are acked."""
    enough = asyncio.Event()
    store = await RedisStore.open(StoreSettings(url=server.url), Topology("killed"))

    async def work(worker: int) -> None:
        try:
            while True:
                await commit_group(store, worker, acked)
                if len(acked) >= after:
                    enough.set()
        except StoreUnavailable:
            return  # killed: what this group came to, nobody was told

    try:
        async with asyncio.TaskGroup() as tasks:
            for worker in range(WORKERS):
                tasks.create_task(work(worker))
            await enough.wait()
            await server.kill()
    finally:
        await store.close()


async def commit_group(store: RedisStore, worker: int, acked: dict[JobId, str]) -> None:
    jobs = [make_job() for _ in range(GROUP)]
    await store.reserve([reservation_of(job) for job in jobs])
    claims = await store.claim([claim_of(job, owner=f"worker-{worker}") for job in jobs])
    texts = [f"answer to {job.key}" for job in jobs]
    commits = [commit_of(job, claimed, text) for job, claimed, text in zip(jobs, claims, texts, strict=True)]
    for job, text, answer in zip(jobs, texts, await store.commit(commits), strict=True):
        assert answer.verdict is CommitVerdict.COMMITTED
        assert answer.may_ack
        acked[job.id] = text


async def missing(server: OwnRedis, acked: dict[JobId, str]) -> list[JobId]:
    """Acked jobs without their result, or with another one."""
    store = await RedisStore.open(StoreSettings(url=server.url), Topology("killed"))
    try:
        ids = list(acked)
        records: list[Record | None] = []
        for start in range(0, len(ids), 500):
            records += await store.read(ids[start : start + 500])
    finally:
        await store.close()
    return [
        one for one, record in zip(ids, records, strict=True) if record is None or record.result != success(acked[one])
    ]

"""A whole fleet on Redis that fails over under it: in cluster mode, and with Sentinels. Nothing is restarted.

`pytest tests/fault/test_redis_cluster_fleet.py -m long -s` prints the ledgers and how long clients were refused.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from support import services
from support.asking import Asking, accepted, ended
from support.audited_load import audited_load
from support.fleet import Backend, WorkerProcess, gateway_task, running, worker_task
from support.redis_cluster import RedisCluster, redis_cluster
from support.redis_group import RedisGroup, redis_group
from support.redis_server import OwnRedis, client_of
from support.servers import RedisServer

from codeyard.cli.processes import Child
from codeyard.producer import AsyncClient
from codeyard.shared.record import State
from codeyard.shared.settings import Settings

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]

REPOSITORY = Path(__file__).parents[2]
LONG = [pytest.mark.long, pytest.mark.process, pytest.mark.timeout(900)]
NUM_WORKERS = 2
RATE = 8.0  # jobs a second: far below what this fleet does on two cores, so that a busy machine keeps up too
PROMPTS = 40
CONTRACT = "redis and not test_redis_"  # those have servers of their own
STORE = {"replicas": 1, "timeout_s": 2.0, "lease_s": 2.0, "renew_s": 0.5, "grace_s": 1.0}
WORKER = {"stall_s": 60.0}  # a busy machine is no stalled engine


@pytest.fixture(autouse=True)
def _need_redis() -> None:
    if not RedisServer.available():
        services.missing("redis-server to fail over", "redis-server", None)


@contextlib.asynccontextmanager
async def processes(settings: Settings, folder: Path) -> AsyncIterator[Asking]:
    """Workers and a gateway as processes, and somebody who asks it; none of them ends before the block does."""
    workers = []
    for n in range(NUM_WORKERS):
        (folder / f"worker-{n}").mkdir()
        workers.append(WorkerProcess(settings, folder / f"worker-{n}"))
    config = folder / "gateway.yaml"
    config.write_text(settings.model_dump_json())
    gateway = Child("gateway", ("gateway", "--config", str(config), "--port", "0"), {}, "gateway", keeps_settings=False)
    try:
        await asyncio.gather(gateway.start(), *(worker.start() for worker in workers))
        asking = Asking(gateway.ready)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(asking.run(), name="asking")
            yield asking
            running.cancel()
        ended = [one.process.returncode for one in workers if one.process]
        assert [*ended, gateway.process and gateway.process.returncode] == [None] * (NUM_WORKERS + 1)
    finally:
        for worker in workers:
            if worker.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    worker.signal(signal.SIGKILL)
                await worker.ended()
        if gateway.process is not None:
            await gateway.kill()


async def test_worker_and_gateway_go_on_after_a_failover_and_every_job_ends_once(
    tmp_path: Path, rabbitmq_url: str, namespace: str
) -> None:
    """Jobs accepted before the primary was lost, jobs that run then, and jobs submitted after it."""
    async with redis_group(tmp_path / "redis", replicas=[()]) as group:
        settings = Backend(tmp_path, rabbitmq_url, group.url, namespace).settings(store=STORE, worker=WORKER)
        async with (
            worker_task(settings),
            gateway_task(settings) as url,
            AsyncClient(settings=settings, timeout_s=20) as client,
            httpx.AsyncClient(base_url=url, timeout=30.0) as http,
        ):
            before = await accepted(client, "before", PROMPTS)
            old = await group.primary()
            await group.lose(old)
            await group.promoted(old)
            await group.mend(old)
            after = await accepted(client, "after", PROMPTS)
            asked = await http.post(
                "/v1/jobs", json={"prompt": "def f():", "model": "starter"}, headers={"Prefer": "wait=20"}
            )
            results = [await client.result(job_id, timeout=30) for job_id in [*before, *after]]

    assert asked.json()["state"] == State.SUCCEEDED
    assert {result.state for result in results} == {State.SUCCEEDED}
    assert len(results) == 2 * PROMPTS


async def test_jobs_whose_records_a_failover_took_are_made_again_from_their_messages(
    tmp_path: Path, rabbitmq_url: str, redis_url: str, namespace: str
) -> None:
    """What is lost with a primary that nobody waited for is more than results: records of jobs that wait at the
    broker or run. Their messages are still there, and nothing of them is lost but time."""
    settings = Backend(tmp_path, rabbitmq_url, redis_url, namespace).settings(worker=WORKER, engine={"time_scale": 1.0})
    async with worker_task(settings), AsyncClient(settings=settings, timeout_s=20) as client:
        ids = await accepted(client, "lost", PROMPTS)
        await running(client, ids[0])
        assert State.QUEUED in await client.store.states(ids)
        async with client_of(redis_url) as redis:
            gone = [key async for key in redis.scan_iter(f"{namespace}:{{s*", count=1_000)]
            num_gone = await redis.delete(*gone)

        assert num_gone > PROMPTS
        assert None in await client.store.states(ids)
        assert set(await ended(client, ids)) == {State.SUCCEEDED}


@pytest.mark.parametrize("num_failovers", [pytest.param(4, marks=LONG)])
async def test_a_fleet_goes_on_while_its_primary_is_lost_or_hangs_again_and_again(
    tmp_path: Path, rabbitmq_url: str, namespace: str, num_failovers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost: its links are reset. Cut off: they stay open and carry nothing, and nobody says that it is primary no
    more. The drill's audit finds every accepted job with one right result."""
    async with redis_group(tmp_path / "redis", replicas=[()]) as group:
        settings = Backend(tmp_path, rabbitmq_url, group.url, namespace).settings(store=STORE, worker=WORKER)
        async with (
            processes(settings, tmp_path) as asking,
            audited_load(settings, tmp_path / "load", rate=RATE, seed=6) as load,
        ):
            for failover in range(num_failovers):
                await asking.more(5)
                await fail_over(group, hangs=bool(failover % 2))
            await asking.more(5)
            ledger = await load.finished()

    with capsys.disabled():
        print(
            f"\n{num_failovers} failovers: {ledger}; asked over HTTP: {len(asking.answers)} answered, "
            f"{len(asking.refusals)} refused, the longest took {asking.longest_s:.1f} s"
        )
    assert ledger.findings == []
    assert ledger.good
    assert ledger.accepted > 0


async def fail_over(group: RedisGroup, *, hangs: bool) -> None:
    old = await group.primary()
    if hangs:
        group.cut_off(old)
    else:
        await group.lose(old)
    await group.promoted(old)
    await group.mend(old)
    await group.whole()


@pytest.mark.parametrize("rounds", [pytest.param(1, marks=LONG)])
async def test_a_fleet_on_a_cluster_goes_on_while_primaries_are_killed_or_hang(
    tmp_path: Path, rabbitmq_url: str, namespace: str, rounds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each primary once in a round, killed or stopped in turn; its replica is promoted, and it comes back as one."""
    async with redis_cluster(tmp_path / "redis", replicas=True) as cluster:
        settings = Backend(tmp_path, rabbitmq_url, cluster.url, namespace).settings(store=STORE, worker=WORKER)
        async with (
            processes(settings, tmp_path) as asking,
            audited_load(settings, tmp_path / "load", rate=RATE, seed=8) as load,
        ):
            for turn in range(rounds):
                for number, primary in enumerate(await cluster.primaries()):
                    await asking.more(5)
                    await promote_instead_of(cluster, primary, hangs=bool((turn + number) % 2))
            await asking.more(5)
            ledger = await load.finished()

    with capsys.disabled():
        print(
            f"\ncluster, {3 * rounds} failovers: {ledger}; asked over HTTP: {len(asking.answers)} answered, "
            f"{len(asking.refusals)} refused, the longest took {asking.longest_s:.1f} s"
        )
    assert ledger.findings == []
    assert ledger.good
    assert ledger.accepted > 0


async def promote_instead_of(cluster: RedisCluster, primary: OwnRedis, *, hangs: bool) -> None:
    if hangs:
        primary.pause()
    else:
        await primary.kill()
    await cluster.promoted(primary)
    if hangs:
        primary.resume()
    else:
        await primary.start(answering=False)
    await cluster.whole()


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_the_contract_suite_passes_on_a_cluster_of_three_primaries(tmp_path: Path) -> None:
    """Every promise of the store, with its keys on three nodes."""
    async with redis_cluster(tmp_path / "redis", replicas=False) as cluster:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CONTRACT, "tests/contract")
        run = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=REPOSITORY,
            env={**os.environ, services.STORE_VARIABLE: cluster.url},
            capture_output=True,
            text=True,
        )

    assert run.returncode == 0, run.stdout[-3_000:]
    assert " skipped" not in run.stdout

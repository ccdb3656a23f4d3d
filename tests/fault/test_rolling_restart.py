"""Everything is restarted in its turn while users work, and none of them sees an error: docs/upgrades.md."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.fleet import fleet_settings
from support.rolling import USERS, Crowd, yard
from support.servers import RabbitServer, RedisServer

from codeyard.producer import AsyncClient
from codeyard.shared.record import EventKind, State
from codeyard.shared.settings import Settings

pytestmark = [pytest.mark.process, pytest.mark.services]


def settings_of(folder: Path, broker_url: str, store_url: str, namespace: str) -> Settings:
    """Answers take about half a second; `leave_s` is many looks of the balancer, on a machine that is busy too."""
    return fleet_settings(
        folder,
        broker_url,
        store_url,
        namespace,
        engine={"time_scale": 2.0, "max_running": 16},
        worker={"stall_s": 30, "drain_s": 20},
        store={"lease_s": 3.0, "renew_s": 1.0, "grace_s": 1.0},
        gateway={"leave_s": 2.0},
    )


@pytest.mark.timeout(180)
async def test_gateways_and_workers_are_restarted_under_load_without_an_error_at_any_client(
    rabbitmq_url: str, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    """An upgrade in small: one gateway and one worker of two, each told to stop as its platform would."""
    settings = settings_of(tmp_path, rabbitmq_url, redis_url, namespace)
    crowd: Crowd
    async with yard(settings, tmp_path, num_gateways=2, num_workers=2) as fleet:
        crowd = Crowd(fleet)
        async with crowd.busy(USERS, each=1):
            await crowd.goes_on("before")
            ends = []
            for name, part in (("a gateway", fleet.gateways[0]), ("a worker", fleet.workers[0])):
                crowd.phase = f"{name} restarts"
                ends.append(await part.restart())
                await crowd.goes_on(f"after {name}")
        found = await audited(settings, crowd)

    assert crowd.errors == []
    assert ends == [0, 0]
    assert found == {"ended once": len(set(crowd.ids))}


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_everything_is_restarted_under_load_without_an_error_at_any_client(
    private_rabbitmq: RabbitServer, private_redis: RedisServer, tmp_path: Path, namespace: str
) -> None:
    """Gateways, workers, RabbitMQ and Redis, one after the other, twice. Every job ends once."""
    settings = settings_of(tmp_path, private_rabbitmq.url, private_redis.url, namespace)
    async with yard(settings, tmp_path, num_gateways=2, num_workers=3) as fleet:
        crowd = Crowd(fleet)
        parts: dict[str, Callable[[], Awaitable[int]]] = {
            **{f"gateway {n}": part.restart for n, part in enumerate(fleet.gateways)},
            **{f"worker {n}": part.restart for n, part in enumerate(fleet.workers)},
            "RabbitMQ": lambda: replaced(private_rabbitmq),
            "Redis": lambda: replaced(private_redis),
        }
        async with crowd.busy(USERS, each=2):  # `pytest -s` shows what it was like
            await crowd.goes_on("before")
            ends = []
            for _ in range(2):
                for name, restart in parts.items():
                    crowd.phase = f"{name} restarts"
                    ends.append(await restart())
                    await crowd.goes_on(f"after {name}")
        found = await audited(settings, crowd)
        print("\nlongest answer (s) by phase:", {name: round(s, 1) for name, s in crowd.longest_s.items()})
        print("answers:", dict(crowd.done), "connections while no gateway was ready:", fleet.fronts[0].blind)
        print("errors:", *crowd.errors, sep="\n")

    assert crowd.errors == []
    assert set(ends) == {0}
    assert found == {"ended once": len(set(crowd.ids))}


async def replaced(server: RabbitServer | RedisServer) -> int:
    """An orderly end, and up again with the same data."""
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)
    return 0


async def audited(settings: Settings, crowd: Crowd) -> dict[str, int]:
    """How the jobs of this run ended, as the store has them: one end each, and streams without gap."""
    found: Counter[str] = Counter()
    async with AsyncClient(settings=settings) as client:
        for job_id in set(crowd.ids):
            [record] = await client.store.read([job_id])
            events = await client.store.events(job_id, after=0)
            dense = [event.seq for event in events] == list(range(1, len(events) + 1))
            ends = [event.kind for event in events].count(EventKind.END)
            good = record is not None and record.state is State.SUCCEEDED and dense and ends == 1 and not record.history
            found["ended once" if good else f"wrong: {job_id}"] += 1
    return dict(found)

"""No room anywhere: a full queue, a full store, a broker under an alarm. The submitter is told; nothing is lost."""

import asyncio
import functools
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from support.brokers import message
from support.doors import DOORS, MAX_TOKENS, Doors, Told, gateway_front, open_doors
from support.fleet import fleet_settings, worker_task
from support.owners import owned
from support.servers import RabbitServer, RedisServer

from codeyard.shared.broker.rabbitmq_consumer import RabbitConsumer
from codeyard.shared.connect import open_broker
from codeyard.shared.job import JobId, Lane
from codeyard.shared.record import State
from codeyard.shared.settings import Settings
from codeyard.shared.topology import Topology
from codeyard.worker.engines.simulated import simulated_completion
from codeyard.worker.settler import Settler
from codeyard.worker.simulation.virtual_time import pass_time

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]

HASTY_S = 1.0
GRACE_S = 6.0  # on top, on a machine where everything runs at once
PATIENCE_S = 60.0
STATUS = {"queue-full": 429, "store-unavailable": 503, "broker-unavailable": 503}
CODE = {429: grpc.StatusCode.RESOURCE_EXHAUSTED, 503: grpc.StatusCode.UNAVAILABLE}
ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "absolute", "1MB"), ("set_vm_memory_high_watermark", "0.9")),
    "disk": (("set_disk_free_limit", "1000000GB"), ("set_disk_free_limit", "64MB")),
}


@asynccontextmanager
async def front(settings: Settings) -> AsyncIterator[tuple[Doors, Doors]]:
    """Doors for those in a hurry and for those with time."""
    async with (
        gateway_front(settings) as (url, rpc),
        open_doors(settings, url, rpc, timeout_s=HASTY_S) as hasty,
        open_doors(settings, url, rpc, timeout_s=PATIENCE_S) as patient,
    ):
        yield hasty, patient


def small_waits(folder: Path, broker_url: str, store_url: str, namespace: str, **groups: Any) -> Settings:
    worker = {"stall_s": 120, **groups.pop("worker", {})}
    broker = {"url": broker_url, "publish_timeout_s": HASTY_S, **groups.pop("broker", {})}
    gateway = {"submit_timeout_s": HASTY_S}
    ours = {"broker": broker, "gateway": gateway, "worker": worker, "breaker": {"open_s": 1.0}}
    return fleet_settings(folder, broker_url, store_url, namespace, **ours, **groups)


async def refused(doors: Doors, door: str) -> tuple[Told, list[str]]:
    """What the door says when it takes no more, and the keys it took before: a server that runs full takes some."""
    taken: list[str] = []
    for number in range(20):
        key = f"{door}-{number}"
        async with asyncio.timeout(HASTY_S + GRACE_S):
            told = await doors.ask(door, prompt_of(key), key)
        if isinstance(told, Told):
            return told, [*taken, key]
        taken.append(key)
    raise AssertionError(f"{door} took everything")


def prompt_of(key: str) -> str:
    return f"def f_{key.replace(' ', '_').replace('-', '_')}():"


def is_proper(told: Told, kind: str) -> bool:
    """The right words, status and time to come again."""
    status = STATUS[kind]
    if told.status is None:
        return told.kind == kind
    waits = told.retry_after_s is not None and told.retry_after_s >= 1
    return told.kind == kind and told.status in (status, CODE[status]) and waits


async def all_refused(doors: Doors) -> dict[str, tuple[Told, list[str]]]:
    return dict(zip(DOORS, await asyncio.gather(*(refused(doors, door) for door in DOORS)), strict=True))


async def taken_after_all(doors: Doors, refusals: dict[str, tuple[Told, list[str]]]) -> None:
    """Again with the same keys, as the refusals say; and each ends as it should."""

    async def again(door: str, key: str) -> tuple[JobId, str]:
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(told := await doors.ask(door, prompt_of(key), key), Told):
                await pass_time(0.1)
        return told, prompt_of(key)

    asked = [again(door, key) for door, (_, keys) in refusals.items() for key in keys]
    await succeeded(doors, dict(await asyncio.gather(*asked)))


async def succeeded(doors: Doors, jobs: dict[JobId, str]) -> None:
    """Each of these with the right text; `jobs`: id -> prompt."""
    for job_id, prompt in jobs.items():
        result = await doors.client.result(job_id, timeout=PATIENCE_S)
        assert result.state is State.SUCCEEDED
        assert result.text == simulated_completion(prompt, result.usage.completion_tokens)[0]


async def test_a_full_queue_is_told_at_every_door_and_takes_the_jobs_when_there_is_room(
    rabbitmq_url: str, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    """429 and RESOURCE_EXHAUSTED with the time to come again, as every client library knows to wait for."""
    settings = small_waits(tmp_path, rabbitmq_url, redis_url, namespace, broker={"queue_max_length": 3})
    async with worker_task(settings):
        pass
    async with front(settings) as (hasty, _):
        jobs: dict[JobId, str] = {}
        for number in range(40):
            told = await hasty.ask("async client", prompt_of(f"fill-{number}"), f"fill-{number}")
            if not isinstance(told, Told):
                jobs[told] = prompt_of(f"fill-{number}")
        refusals = await all_refused(hasty)

        async with worker_task(settings):
            await taken_after_all(hasty, refusals)
            await succeeded(hasty, jobs)

    for door, (told, _) in refusals.items():
        assert is_proper(told, "queue-full"), (door, told)
        assert told.retry_after_s is not None


async def test_a_full_store_refuses_new_jobs_and_keeps_what_was_generated(
    rabbitmq_url: str,
    private_redis: RedisServer,
    tmp_path: Path,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Redis at maxmemory: the worker holds finished results and their deliveries until they are committed."""
    acked = counted(monkeypatch, RabbitConsumer, "ack")
    finished = counted(monkeypatch, Settler, "_finish")
    slow, held = {"time_scale": 8.0}, {"lease_s": 20.0}  # else what nobody renews meanwhile runs once more
    settings = small_waits(tmp_path, rabbitmq_url, private_redis.url, namespace, engine=slow, store=held)
    async with worker_task(settings), front(settings) as (hasty, patient):
        prompts = [f"def held_{number}():" for number in range(8)]
        options = {"max_tokens": 4 * MAX_TOKENS}  # 2.5 s
        accepted = await asyncio.gather(*(hasty.client.submit(prompt, sampling=options) for prompt in prompts))
        jobs = {job.id: prompt for job, prompt in zip(accepted, prompts, strict=True)}
        await owned(hasty.client, list(jobs))
        await configure(private_redis, maxmemory="1mb")
        acked_before = sum(acked)

        refusals = await all_refused(hasty)
        waiting = [asyncio.create_task(patient.insist(door, prompt_of(door), f"waits-{door}")) for door in DOORS]
        async with asyncio.timeout(PATIENCE_S):
            while sum(finished) == 0:
                await pass_time(0.05)
        states = {(await hasty.client.status(job_id)).state for job_id in jobs}
        acked_meanwhile = sum(acked) - acked_before

        await configure(private_redis, maxmemory="0")
        await succeeded(hasty, jobs)
        insisted = await asyncio.gather(*waiting)
        await succeeded(hasty, dict(zip(insisted, map(prompt_of, DOORS), strict=True)))
        await taken_after_all(hasty, refusals)

    assert states == {State.RUNNING}, "nothing can have been committed"
    assert acked_meanwhile == 0
    for door, (told, _) in refusals.items():
        assert is_proper(told, "store-unavailable"), (door, told)
        assert "out of memory" in told.text, (door, told)


@pytest.mark.long
@pytest.mark.parametrize("alarm", ALARMS)
async def test_an_alarm_of_the_broker_is_named_at_every_door_and_the_workers_go_on(
    alarm: str, private_rabbitmq: RabbitServer, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    """connection.blocked: RabbitMQ neither takes nor refuses what is published. What it has is delivered, generated,
    stored and acked all the same, though dead letters and retries wait; afterwards everything goes on by itself."""
    on, off = ALARMS[alarm]
    settings = small_waits(tmp_path, private_rabbitmq.url, redis_url, namespace, worker={"max_attempts": 2})
    async with worker_task(settings):
        pass
    async with front(settings) as (hasty, patient):
        for door in DOORS[:3]:
            await hasty.ask(door, prompt_of(door), door)  # a publisher is blocked when it publishes
        failing = [await hasty.client.submit(f"!fail {number}") for number in range(4)]
        prompts = [f"def through_{number}():" for number in range(24)]
        accepted = [await hasty.client.submit(prompt, sampling={"max_tokens": MAX_TOKENS}) for prompt in prompts]
        await malformed(settings, (await accepted[0].status()).revision, 3)
        await asyncio.to_thread(control, private_rabbitmq, *on)
        async with worker_task(settings):
            refusals = await all_refused(hasty)
            waiting = [asyncio.create_task(patient.insist(door, prompt_of(door), f"waits-{door}")) for door in DOORS]
            await succeeded(hasty, {job.id: prompt for job, prompt in zip(accepted, prompts, strict=True)})
            states = [(await job.status()).state for job in failing]
            let_in_early = [door for door, task in zip(DOORS, waiting, strict=True) if task.done()]

            await asyncio.to_thread(control, private_rabbitmq, *off)
            insisted = await asyncio.gather(*waiting)
            await succeeded(hasty, dict(zip(insisted, map(prompt_of, DOORS), strict=True)))
            ends = [(await job.result(timeout=PATIENCE_S)).state for job in failing]
            await taken_after_all(hasty, refusals)
            num_dead = await dead_letters(settings, len(failing) + 3)

    assert states.count(State.FAILED) <= 1, "the server takes one message of each publisher, and then no more"
    assert let_in_early == []
    assert ends == [State.FAILED] * len(failing)
    assert num_dead == len(failing) + 3
    for door, (told, _) in refusals.items():
        assert is_proper(told, "broker-unavailable"), (door, told)
        assert "alarm of memory or disk" in told.text, (door, told)


# Looking on ----------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """How many items each call of this method was given from now on."""
    original, sizes = getattr(owner, name), list[int]()

    @functools.wraps(original)
    async def hooked(self: Any, group: Sequence[Any]) -> Any:
        sizes.append(len(group))
        return await original(self, group)

    monkeypatch.setattr(owner, name, hooked)
    return sizes


async def configure(server: RedisServer, **options: str) -> None:
    client: Redis = Redis.from_url(server.url, protocol=2)
    try:
        for name, value in options.items():
            await client.config_set(name, value)
    finally:
        await client.aclose()


def control(server: RabbitServer, *words: str) -> None:
    """rabbitmqctl, beside the server."""
    program = Path("/usr/lib/rabbitmq/bin/rabbitmqctl")  # Debian's in /usr/sbin is for its own server alone
    command = str(program) if program.exists() else "rabbitmqctl"
    told = [command, "-n", server.node, *words]
    subprocess.run(told, env=server.control_environment(), check=True, capture_output=True)


async def malformed(settings: Settings, revision: str, count: int) -> None:
    """Messages nobody can read, into a queue that a worker consumes."""
    topology = Topology(settings.namespace)
    broker = await open_broker(settings.broker, topology)
    queue = topology.job_queue(revision, Lane.BULK)
    await broker.publish([message(queue, b"not a job") for _ in range(count)], timeout_s=10)
    await broker.close()


async def dead_letters(settings: Settings, count: int) -> int:
    """How many messages have one, once there are so many. A copy too many is harmless, and counts as none."""
    topology, found = Topology(settings.namespace), set[str]()
    broker = await open_broker(settings.broker, topology)
    try:
        consumer = await broker.consume({topology.dead_queue: 100})
        async with asyncio.timeout(PATIENCE_S):
            while len(found) < count:
                found |= {delivery.message_id for delivery in await consumer.receive(100)}
    finally:
        await broker.close()
    return len(found)

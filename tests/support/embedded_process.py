"""One process on the embedded file, told what to do on its command line, answering on its standard output.

python embedded_process.py FILE hold COUNT     take COUNT messages, say so, hold them until killed
python embedded_process.py FILE fork COUNT     the same, with a forked child that outlives it
python embedded_process.py FILE submit NAME    submit jobs for ever; one line for each that is confirmed
python embedded_process.py FILE work           take, claim, commit and ack for ever; one line for each group
python embedded_process.py FILE reopen         use the file, fork, and use it in the child
"""

import asyncio
import itertools
import os
import sys
from typing import NoReturn

import pytest

from codeyard.shared.broker.port import Message, PublishOutcome
from codeyard.shared.broker.sqlite import SqliteBroker
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import Job, Lane
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store.port import ClaimVerdict, Queued
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology
from support.store_calls import claim_of, commit_of, make_job, reservation_of

TOPOLOGY = Topology("process")
QUEUE = TOPOLOGY.job_queue("m-1", Lane.STANDARD)
GROUP = 16
LEASE_S = 0.5  # a worker here needs milliseconds; its successor waits this long


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, even beside a child's


async def open_broker(file: str) -> SqliteBroker:
    broker = await SqliteBroker.open(BrokerSettings(url=f"sqlite:///{file}"), TOPOLOGY)
    await broker.declare([QUEUE])
    return broker


async def open_store(file: str) -> SqliteStore:
    return await SqliteStore.open(StoreSettings(url=f"sqlite:///{file}", lease_s=LEASE_S), TOPOLOGY)


async def hold(file: str, count: int, *, fork: bool = False) -> None:
    broker = await open_broker(file)
    consumer = await broker.consume({QUEUE: count})
    held = 0
    while held < count:
        held += len(await consumer.receive(count))
    if fork and os.fork() == 0:
        say(f"child {os.getpid()}")
        wait_to_be_killed()
    say(f"held {held}")
    wait_to_be_killed()


async def submit(file: str, name: str) -> None:
    store, broker = await open_store(file), await open_broker(file)
    for number in itertools.count():
        jobs = [make_job(f"{name}-{number}-{n}") for n in range(GROUP)]
        await store.reserve([reservation_of(job) for job in jobs])
        messages = [Message(QUEUE, job.id, job.encode(), {"publication": "p1"}) for job in jobs]
        assert set(await broker.publish(messages, timeout_s=30)) == {PublishOutcome.CONFIRMED}
        await store.mark_queued([Queued(job.id, "p1") for job in jobs])
        say(" ".join(job.id for job in jobs))


async def work(file: str) -> None:
    store, broker = await open_store(file), await open_broker(file)
    consumer = await broker.consume({QUEUE: 2 * GROUP})
    while True:
        deliveries = await consumer.receive(GROUP)
        jobs = [Job.decode(delivery.body) for delivery in deliveries]
        claims = await store.claim([claim_of(job, owner=str(os.getpid())) for job in jobs])
        arrived = list(zip(deliveries, jobs, claims, strict=True))
        await store.commit([commit_of(job, claimed) for _, job, claimed in arrived if claimed.fence])
        held = [delivery for delivery, _, claimed in arrived if claimed.verdict is ClaimVerdict.HOLD]
        await consumer.ack([delivery for delivery in deliveries if delivery not in held])
        await consumer.requeue(held)  # their owner was killed; they come back until its lease is over
        say(" ".join(job.id for job in jobs))


def reopen(file: str) -> None:
    async def use_and_keep() -> SqliteStore:
        store = await open_store(file)
        await store.reserve([reservation_of(make_job("parent"))])
        return store

    async def use_in_child(inherited: SqliteStore) -> None:
        with pytest.raises(StoreUnavailable, match="fork"):
            await inherited.read(["x"])
        await inherited.close()
        store = await open_store(file)
        await store.reserve([reservation_of(make_job("child"))])
        await store.close()

    kept = asyncio.run(use_and_keep())
    child = os.fork()
    if child == 0:
        asyncio.run(use_in_child(kept))
        say("child done")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    asyncio.run(kept.close())
    say("parent done")


def wait_to_be_killed() -> NoReturn:
    """Standing still, as a process that will not end by itself; its input is held open by the test."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    path, what, *rest = sys.argv[1:]
    match what:
        case "hold" | "fork":
            asyncio.run(hold(path, int(rest[0]), fork=what == "fork"))
        case "submit":
            asyncio.run(submit(path, rest[0]))
        case "work":
            asyncio.run(work(path))
        case "reopen":
            reopen(path)

"""How many jobs a second the embedded file accepts, and how many it takes through a worker's calls.

    python loadtest/bench_embedded.py [--processes 1] [--jobs 6400] [--group 64] [--folder DIR]

Each process submits its jobs in groups (reserve, publish, mark queued; four groups under way at once, as
in a gateway), then receives, claims, commits and acks jobs until none is left. All processes share one
file in a new folder under DIR. Prints one JSON line.
"""

import argparse
import asyncio
import json
import multiprocessing
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

from codeyard.shared.broker.port import Broker
from codeyard.shared.broker.sqlite import SqliteBroker
from codeyard.shared.envelope import new_nonce, open_delivery, seal
from codeyard.shared.job import Job, Lane, new_job_id
from codeyard.shared.record import Result, State, Usage
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store.port import Claim, Commit, Queued, Reservation, Store
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology

TOPOLOGY = Topology("bench")
REVISION = "bench-1"
QUEUE = TOPOLOGY.job_queue(REVISION, Lane.BULK)
PROMPT = "def parse(line: str) -> dict[str, str]:\n" * 10  # 400 bytes
UNDER_WAY = 4  # groups a process submits at once
EMPTY_S = 0.5  # no job for this long: all are done

_together: Barrier  # set in each process of the pool


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        url = f"sqlite:///{Path(folder) / 'yard.db'}"
        asyncio.run(_declare(url))
        spawn = multiprocessing.get_context("spawn")
        together = spawn.Barrier(arguments.processes)
        with ProcessPoolExecutor(arguments.processes, spawn, _set_barrier, (together,)) as pool:
            share = arguments.jobs // arguments.processes
            runs = [pool.submit(_process, url, share, arguments.group) for _ in range(arguments.processes)]
            times = [run.result() for run in runs]
    num_jobs = share * arguments.processes
    report = {
        "sqlite": sqlite3.sqlite_version,
        "processes": arguments.processes,
        "group": arguments.group,
        "jobs": num_jobs,
        "submitted_per_s": round(num_jobs / max(submit_s for submit_s, _ in times)),
        "settled_per_s": round(num_jobs / max(settle_s for _, settle_s in times)),
    }
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=6_400)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--folder", help="on the disk to measure; the system's temporary folder by default")
    return parser.parse_args()


def _set_barrier(together: Barrier) -> None:
    global _together
    _together = together


def _process(url: str, num_jobs: int, group: int) -> tuple[float, float]:
    return asyncio.run(_run(url, num_jobs, group))


async def _declare(url: str) -> None:
    broker = await SqliteBroker.open(BrokerSettings(url=url), TOPOLOGY)
    await broker.declare([QUEUE])
    await broker.close()


async def _run(url: str, num_jobs: int, group: int) -> tuple[float, float]:
    """Seconds for submitting, seconds for settling."""
    store = await SqliteStore.open(StoreSettings(url=url), TOPOLOGY)
    broker = await SqliteBroker.open(BrokerSettings(url=url), TOPOLOGY)
    jobs = [_job() for _ in range(num_jobs)]
    groups = [jobs[start : start + group] for start in range(0, num_jobs, group)]

    async def submitter(mine: Sequence[list[Job]]) -> None:
        for one in mine:
            await _submit(store, broker, one)

    async def submit_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for first in range(UNDER_WAY):
                tasks.create_task(submitter(groups[first::UNDER_WAY]))

    submit_s = await _timed(submit_all)
    settle_s = await _timed(lambda: _settle_all(store, broker, group)) - EMPTY_S
    await broker.close()
    await store.close()
    return submit_s, settle_s


async def _timed(part: Callable[[], Awaitable[None]]) -> float:
    await asyncio.to_thread(_together.wait)
    begun_s = time.monotonic()
    await part()
    return time.monotonic() - begun_s


async def _submit(store: Store, broker: Broker, jobs: Sequence[Job]) -> None:
    reserved = await store.reserve([Reservation(job, job.digest(), new_nonce(), new_nonce()) for job in jobs])
    records = [one.record for one in reserved]
    messages = [
        seal(one.job, TOPOLOGY, publication=one.publication, incarnation=one.incarnation, deadline_at=one.deadline_at)
        for one in records
    ]
    await broker.publish(messages, timeout_s=10)
    await store.mark_queued([Queued(one.id, one.publication) for one in records])


async def _settle_all(store: Store, broker: Broker, group: int) -> None:
    consumer = await broker.consume({QUEUE: 2 * group})
    owner = new_nonce()
    result = Result(state=State.SUCCEEDED, text="return {}", usage=Usage(prompt_tokens=100, completion_tokens=5))
    while True:
        try:
            async with asyncio.timeout(EMPTY_S):
                deliveries = await consumer.receive(group)
        except TimeoutError:
            break
        envelopes = [open_delivery(delivery) for delivery in deliveries]
        claims = await store.claim([Claim(e.job, e.digest, e.publication, owner, e.incarnation) for e in envelopes])
        await store.commit(
            [Commit(e.job.id, claim.fence, e.publication, result) for e, claim in zip(envelopes, claims, strict=True)]
        )
        await consumer.ack(deliveries)
    await consumer.close()


def _job() -> Job:
    job_id = new_job_id()
    return Job.build(id=job_id, key=job_id, model="bench", revision=REVISION, lane=Lane.BULK, prompt=PROMPT)


if __name__ == "__main__":
    main()

"""What a group is worth: the store called once per job, and once for many jobs, in the same run.

    CODEYARD_STORE_URL=redis://127.0.0.1:6379/0 python loadtest/bench_store.py --jobs 6400 --group 64

Prints jobs per second for reserve, claim and commit; both ways make the same calls on jobs of their
own (1 KiB prompts, 1 KiB results) in a namespace of this run. `--in-flight` calls are under way at a
time: 1 is a worker's settler, more is a gateway.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from codeyard.shared.connect import open_store
from codeyard.shared.envelope import new_nonce
from codeyard.shared.job import Job, job_id_for_key
from codeyard.shared.record import Result, State, Usage
from codeyard.shared.settings import StoreSettings, masked
from codeyard.shared.store.port import Claim, Commit, Reservation, Store
from codeyard.shared.topology import Topology

PROMPT = "def add(first, second):\n    " * 38
TEXT = "return first + second  # one line\n" * 30

RequestT = TypeVar("RequestT")
OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True, slots=True)
class Rates:
    """Jobs per second."""

    reserve: float
    claim: float
    commit: float


async def measure(store: Store, num_jobs: int, group: int, in_flight: int) -> Rates:
    """Take `num_jobs` new jobs through reserve, claim and commit, `group` per call."""
    jobs = [_job() for _ in range(num_jobs)]
    reservations = [Reservation(job, job.digest(), job.key, "bench") for job in jobs]
    reserve = await _timed(store.reserve, reservations, group, in_flight)
    claims = [Claim(job, job.digest(), job.key, "bench", "bench") for job in jobs]
    claim = await _timed(store.claim, claims, group, in_flight)
    result = Result(state=State.SUCCEEDED, text=TEXT, usage=Usage(prompt_tokens=256, completion_tokens=256))
    commits = [
        Commit(job.id, claimed.fence, job.key, result) for job, claimed in zip(jobs, claim.outcomes, strict=True)
    ]
    commit = await _timed(store.commit, commits, group, in_flight)
    if not all(committed.verdict == "committed" for committed in commit.outcomes):
        raise SystemExit("not every commit was taken: a lease ended meanwhile, use fewer jobs")
    return Rates(*(num_jobs / part.took_s for part in (reserve, claim, commit)))


@dataclass(frozen=True, slots=True)
class _Timed:
    outcomes: list[Any]
    took_s: float


async def _timed(
    call: Callable[[Sequence[RequestT]], Awaitable[list[OutcomeT]]],
    requests: Sequence[RequestT],
    group: int,
    in_flight: int,
) -> _Timed:
    outcomes: list[Any] = [None] * len(requests)
    starts = iter(range(0, len(requests), group))

    async def work() -> None:
        for start in starts:
            outcomes[start : start + group] = await call(requests[start : start + group])

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(work())
    return _Timed(outcomes, time.perf_counter() - begun)


def _job() -> Job:
    key = new_nonce()
    return Job.build(id=job_id_for_key("bench", key), tenant="bench", key=key, model="m", revision="m-1", prompt=PROMPT)


async def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--jobs", type=int, default=6_400)
    arguments.add_argument("--group", type=int, default=64)
    arguments.add_argument("--in-flight", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=3, help="the best of them is printed")
    chosen = arguments.parse_args()
    url = os.environ.get("CODEYARD_STORE_URL") or StoreSettings().url
    settings = StoreSettings(url=url, lease_s=600, retention_s=60)
    store = await open_store(settings, Topology(f"bench-{new_nonce()[:8]}"))
    try:
        print(f"{await store.ping()} at {masked(url)}; {chosen.jobs} jobs, {chosen.in_flight} calls in flight")
        print(f"{'jobs per call':>14} {'reserve/s':>10} {'claim/s':>10} {'commit/s':>10}")
        for group in (1, chosen.group):
            rounds = [await measure(store, chosen.jobs, group, chosen.in_flight) for _ in range(chosen.rounds)]
            best = [max(getattr(rates, name) for rates in rounds) for name in ("reserve", "claim", "commit")]
            print(f"{group:>14} " + " ".join(f"{rate:>10,.0f}" for rate in best))
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main())

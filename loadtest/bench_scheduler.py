"""How long a decision takes with 2,000 jobs in hand.

    python loadtest/bench_scheduler.py [--jobs 2000] [--slots 512] [--tenants 200]

Keeps a scheduler at that many jobs in hand while an engine's steps go by (their times made up, nothing
runs), and prints how long it took to decide: the first time, and the median and p99 of the others.
"""

import random
import statistics
import time

import click

from codeyard.shared.job import JobId, Lane
from codeyard.shared.settings import AdmissionSettings
from codeyard.worker.scheduling.adaptive import AdaptiveScheduler
from codeyard.worker.scheduling.port import Candidate, EngineLoad

DECISIONS = 5_000


@click.command(help=__doc__)
@click.option("--jobs", default=2_000, show_default=True, type=click.IntRange(min=1))
@click.option("--slots", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--tenants", default=200, show_default=True, type=click.IntRange(min=1))
def main(jobs: int, slots: int, tenants: int) -> None:
    rng = random.Random(1)
    scheduler = AdaptiveScheduler(AdmissionSettings(), slots=slots, continuous=True)
    waiting: dict[JobId, Candidate] = {}
    running: dict[JobId, int] = {}  # tokens to go
    made, now_s = 0, 0.0
    times: list[float] = []
    while len(times) < DECISIONS:
        while len(waiting) < jobs:
            made += 1
            lane, tenant = rng.choice(list(Lane)), f"tenant-{rng.randrange(tenants)}"
            job = Candidate(str(made), lane, tenant, rng.randrange(16, 1_000), 512, now_s, 1e9)
            waiting[job.job_id] = job
            scheduler.offer(job, now_s)
        started = time.perf_counter()
        decision = scheduler.decide(now_s, {Lane.BULK: 1_000}, EngineLoad(kv_cache_used=0.5))
        times.append(time.perf_counter() - started)
        for job_id in decision.preempt:
            del running[job_id]
            scheduler.ended(job_id, now_s)
        prompts = sum(waiting.pop(job_id).prompt_tokens for job_id in decision.admit)
        running.update((job_id, rng.randrange(20, 300)) for job_id in decision.admit)
        now_s += 0.005 + 3e-5 * len(running) + 2.2e-5 * prompts
        for job_id in list(running):
            scheduler.progressed(job_id, 1, now_s)
            running[job_id] -= 1
            if not running[job_id]:
                del running[job_id]
                scheduler.ended(job_id, now_s)
    first_s = times.pop(0)
    times.sort()
    print(f"{jobs} jobs in hand, {len(running)} running, {tenants} tenants")
    print(f"first decision  {1e3 * first_s:7.3f} ms")
    print(f"median          {1e3 * statistics.median(times):7.3f} ms")
    print(f"p99             {1e3 * times[int(0.99 * len(times))]:7.3f} ms")


if __name__ == "__main__":
    main()

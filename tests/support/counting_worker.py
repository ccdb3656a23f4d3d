"""A worker whose simulated engine writes down every token it makes, in a file that outlives kill -9 of the worker.

    python counting_worker.py SETTINGS TALLY LEAST

SETTINGS as of `codeyard worker --config`; every delta of a job becomes a line `JOB TOKENS` at the end of TALLY, which
several workers may share; LEAST is the fewest tokens of an answer, where the simulated engine would stop sooner.
It says `worker ready` when it serves. `tokens_made` reads a tally.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from codeyard.shared.settings import load
from codeyard.worker.engines import simulated
from codeyard.worker.engines.port import Delta, EngineJob
from codeyard.worker.engines.simulated import SimulatedEngine
from codeyard.worker.service import run_worker


def tokens_made(tally: Path, job_id: str) -> int:
    """Of one job, by all workers; 0 if none has begun."""
    if not tally.exists():
        return 0
    lines = (line.split() for line in tally.read_text().splitlines())
    return sum(int(tokens) for job, tokens in lines if job == job_id)


def main() -> None:
    settings, least = load(Path(sys.argv[1])), int(sys.argv[3])
    tally = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    generate = SimulatedEngine.generate

    async def counted(self: SimulatedEngine, job: EngineJob) -> AsyncGenerator[Delta, None]:
        async with aclosing(generate(self, job)) as deltas:
            async for delta in deltas:
                os.write(tally, f"{job.id} {len(delta.token_ids)}\n".encode())
                yield delta

    simulated.MIN_TOKENS = least
    SimulatedEngine.generate = counted  # type: ignore[method-assign]
    asyncio.run(run_worker(settings, asyncio.Event(), on_ready=lambda _: print("worker ready", flush=True)))


if __name__ == "__main__":
    main()

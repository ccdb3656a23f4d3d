"""Is the simulated engine the measured one? The same closed loop through it, window by window."""

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from codeyard.shared.job import Lane
from codeyard.worker.simulation.engine import NEVER, SimEngine, SimJob
from codeyard.worker.simulation.latency import LatencyTable, Lengths, MeasuredWindow


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """One window, simulated beside measured."""

    measured: MeasuredWindow
    jobs_s: float
    tokens_s: float
    first_token_p50_s: float
    per_token_p50_s: float

    @property
    def errors(self) -> dict[str, float]:
        """Simulated over measured, less one."""
        return {
            "jobs_s": self.jobs_s / self.measured.jobs_s - 1,
            "tokens_s": self.tokens_s / self.measured.tok_s - 1,
            "first_token": self.first_token_p50_s / self.measured.ttft_p50 - 1,
            "per_token": self.per_token_p50_s / (self.measured.tpot_ms / 1e3) - 1,
        }


def calibrate(table: LatencyTable, *, seed: int = 1) -> list[ClosedLoop]:
    """Every measured window of the table, with as many jobs as were measured."""
    return [_closed_loop(table, measured, random.Random(f"{seed}/{measured.window}")) for measured in table.measured]


def _closed_loop(table: LatencyTable, measured: MeasuredWindow, rng: random.Random) -> ClosedLoop:
    engine = SimEngine(table, by_priority=False)
    jobs = _jobs(table, measured.n, rng)
    firsts: list[float] = []
    steps: list[float] = []
    finished, tokens, now_s = 0, 0, 0.0
    engine.submit([job for job, _ in zip(jobs, range(measured.window), strict=False)], 0.0)
    while engine.due_s < NEVER:
        now_s = engine.due_s
        first, done = engine.advance(now_s)
        for job in first:
            job.first_s = now_s + table.frontend_s
            firsts.append(job.first_s - job.arrived_s)
        for job in done:
            finished += 1
            tokens += job.completion
            steps.append((now_s + table.frontend_s - job.first_s) / (job.completion - 1))
        following = [job for _, job in zip(done, jobs, strict=False)]
        for job in following:
            job.arrived_s = now_s
        engine.submit(following, now_s)
        engine.resume(now_s)
    return ClosedLoop(measured, finished / now_s, tokens / now_s, statistics.median(firsts), statistics.median(steps))


def _jobs(table: LatencyTable, most: int, rng: random.Random) -> Iterator[SimJob]:
    for number in range(most):
        prompt, completion = _draw(table.prompts, rng), _draw(table.completions, rng)
        yield SimJob(number, 0.0, Lane.BULK, "closed-loop", prompt, completion, table.completions.most)


def _draw(lengths: Lengths, rng: random.Random) -> int:
    return min(lengths.most, max(lengths.least, int(rng.lognormvariate(lengths.mu, lengths.sigma))))

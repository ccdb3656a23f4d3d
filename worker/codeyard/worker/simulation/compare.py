"""One run, and many: traces x loads x policies x seeds."""

from collections.abc import Callable, Iterator

from codeyard.worker.simulation.engine import SimJob
from codeyard.worker.simulation.fleet import Fleet
from codeyard.worker.simulation.latency import LatencyTable
from codeyard.worker.simulation.metrics import RunStats
from codeyard.worker.simulation.plan import FleetPlan, Loss
from codeyard.worker.simulation.policies import policy
from codeyard.worker.simulation.traces import Trace, arrivals, run_length_s


def simulate_one(
    trace_name: str,
    trace: Trace,
    table: LatencyTable,
    *,
    policy_name: str,
    workers: int,
    load: float,
    jobs: int,
    seed: int,
    losses: tuple[Loss, ...] = (),
    num_shards: int = 1,
    shards_per_tenant: int = 1,
    tick: Callable[[float], None] | None = None,
) -> RunStats:
    """One fleet through one trace under one policy."""
    length_s = run_length_s(trace, table, workers=workers, load=load, jobs=jobs)
    coming = arrivals(trace, table, jobs=jobs, length_s=length_s, seed=seed)
    stats = RunStats(trace_name, policy_name, load, seed, workers, length_s)
    shards = (num_shards, shards_per_tenant)
    return _run(trace, table, stats, coming, losses=losses, shards=shards, tick=tick)


def simulate_replay(
    trace_name: str,
    trace: Trace,
    table: LatencyTable,
    coming: Iterator[SimJob],
    *,
    policy_name: str,
    workers: int,
    length_s: float,
    losses: tuple[Loss, ...] = (),
    tick: Callable[[float], None] | None = None,
) -> RunStats:
    """A recorded trace; its load is what it is."""
    stats = RunStats(trace_name, policy_name, float("nan"), 0, workers, length_s)
    return _run(trace, table, stats, coming, losses=losses, shards=(1, 1), tick=tick)


def _run(
    trace: Trace,
    table: LatencyTable,
    stats: RunStats,
    coming: Iterator[SimJob],
    *,
    losses: tuple[Loss, ...],
    shards: tuple[int, int],
    tick: Callable[[float], None] | None,
) -> RunStats:
    plan = FleetPlan(
        workers=stats.workers,
        length_s=stats.length_s,
        promises=trace.promises,
        losses=losses,
        num_shards=shards[0],
        shards_per_tenant=shards[1],
    )
    return Fleet(plan, policy(stats.policy, trace, table), table, stats).run(coming, tick=tick)

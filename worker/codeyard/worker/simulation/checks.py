"""Three questions the score does not answer: what a flood costs, what a greedy tenant costs, and whether
the promised wait is true. Each runs the fleet a few times on one seed and returns plain numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codeyard.shared.job import Lane
from codeyard.shared.settings import Promise
from codeyard.worker.simulation.compare import simulate_one
from codeyard.worker.simulation.latency import LatencyTable
from codeyard.worker.simulation.metrics import Histogram, RunStats
from codeyard.worker.simulation.policies import OURS
from codeyard.worker.simulation.traces import Stream, Trace

WINDOWS = tuple(range(64, 513, 32))
WARM = ((0.1, 0.0), (0.5, 1.0), (1.0, 0.0))  # of the interactive trickle
GREEDY = "greedy"


@dataclass(frozen=True, slots=True)
class Check:
    """One number beside its target."""

    name: str
    value: float
    target: str
    kept: bool


def flood(trace: Trace, table: LatencyTable, *, workers: int, jobs: int, seed: int, load: float = 1.3) -> list[Check]:
    """The interactive trickle keeps its promises; what does that cost the bulk, with it and after it?"""

    def run(trace: Trace, name: str) -> RunStats:
        return simulate_one("flood", trace, table, policy_name=name, workers=workers, load=load, jobs=jobs, seed=seed)

    # The trickle starts when the flood is running: a fleet that starts empty breaks promises under any policy.
    streams = (
        stream.model_copy(update={"shape": WARM}) if stream.lane is Lane.INTERACTIVE else stream
        for stream in trace.streams
    )
    trace = trace.model_copy(update={"streams": tuple(streams)})
    promise = trace.promises[Lane.INTERACTIVE]
    ours = run(trace, OURS)
    first_s, per_token_s = _p99s(ours)
    checks = [
        Check(
            "interactive p99 to first token, s",
            first_s,
            f"<= {promise.first_token_s:g}",
            first_s <= promise.first_token_s,
        ),
        Check(
            "interactive p99 per token, s",
            per_token_s,
            f"<= {promise.per_token_s:g}",
            per_token_s <= promise.per_token_s,
        ),
    ]
    for window in reversed(WINDOWS):
        fixed = run(trace, f"fixed-{window}")
        fixed_first_s, fixed_per_token_s = _p99s(fixed)
        if fixed_first_s <= promise.first_token_s and fixed_per_token_s <= promise.per_token_s:
            ratio = _rate(ours, 0.2, 0.5) / _rate(fixed, 0.2, 0.5)
            checks.append(
                Check(
                    f"tokens/s beside interactive, of the widest window that keeps both ({window})",
                    ratio,
                    ">= 0.85",
                    ratio >= 0.85,
                )
            )
            break
    alone = trace.model_copy(update={"streams": tuple(s for s in trace.streams if s.lane is Lane.BULK)})
    gone = next(s.at_s for s in ours.samples if s.at_s > 0.5 * ours.length_s and not s.urgent) / ours.length_s
    ratio = _rate(ours, gone, 1.0) / _rate(run(alone, OURS), gone, 1.0)
    checks.append(Check("tokens/s once interactive is gone, of bulk alone", ratio, ">= 0.95", ratio >= 0.95))
    return checks


def greedy(
    table: LatencyTable, *, workers: int, jobs: int, seed: int, shards: int = 16, per_tenant: int = 4
) -> list[Check]:
    """Nineteen tenants ask for three tenths of what the fleet can do; the twentieth for one and a half.

    Bulk without end waits behind them in both runs, so the GPUs are full with and without the greedy one.
    """
    modest, bulk, flood = 0.3, 1.2, 1.5  # of capacity
    total = modest + bulk + flood
    streams = {
        "modest": Stream(lane=Lane.STANDARD, share=modest / total, tenants=19),
        "bulk": Stream(lane=Lane.BULK, share=bulk / total, tenants=3),
        "flood": Stream(lane=Lane.STANDARD, share=flood / total, tenants=1, name=GREEDY),
    }
    promises = {Lane.STANDARD: Promise(first_token_s=2.0, per_token_s=0.04)}

    def run(names: list[str], load: float) -> RunStats:
        part = load / total
        chosen = tuple(s.model_copy(update={"share": s.share / part}) for n, s in streams.items() if n in names)
        trace = Trace(what="a greedy tenant", promises=promises, streams=chosen)
        return simulate_one(
            GREEDY, trace, table, policy_name=OURS, workers=workers, load=load, jobs=round(jobs * part),
            seed=seed, num_shards=shards, shards_per_tenant=per_tenant,
        )  # fmt: skip

    calm = run(["modest", "bulk"], modest + bulk)
    stormy = run(["modest", "bulk", "flood"], total)
    others = [name for name in calm.tenants if name.startswith("standard-")]
    share = min(stormy.tenants[name].tokens / calm.tenants[name].tokens for name in others)
    checks = [Check("worst of nineteen: tokens, of those without the greedy one", share, ">= 0.95", share >= 0.95)]
    for what, pick in _LATENCIES.items():
        ratio = _worst_p99(stormy, others, pick) / _worst_p99(calm, others, pick)
        checks.append(Check(f"others' p99 {what}, over that without it", ratio, "<= 1.3", ratio <= 1.3))
    return checks


def over_seeds(runs: Sequence[Sequence[Check]]) -> list[Check]:
    """The same checks under several seeds as one: the mean is judged, the name tells the spread."""
    checks = []
    for same in zip(*runs, strict=True):
        values = [check.value for check in same]
        mean, (sign, limit) = sum(values) / len(values), same[0].target.split()
        kept = mean >= float(limit) if sign == ">=" else mean <= float(limit)
        name = f"{same[0].name}, mean of {len(values)} seeds ({min(values):.2f} to {max(values):.2f})"
        checks.append(Check(name, mean, same[0].target, kept) if len(values) > 1 else same[0])
    return checks


def calibration(runs: list[RunStats]) -> list[Check]:
    """The wait promised at submission against the one that came, over given runs."""
    checks = []
    both = (Lane.INTERACTIVE, Lane.STANDARD)
    for name, lanes in (("interactive", both[:1]), ("standard", both[1:]), ("both lanes'", both)):
        right = sum(run.calibration[lane][0] for run in runs for lane in lanes)
        judged = sum(run.calibration[lane][1] for run in runs for lane in lanes)
        share = right / judged if judged else 1.0
        checks.append(Check(f"{name} starts within 25 % or 250 ms of the estimate", share, ">= 0.9", share >= 0.9))
    return checks


_LATENCIES: dict[str, Callable[..., Histogram]] = {
    "to first token": lambda stats: stats.first_token,
    "latency": lambda stats: stats.latency,
}


def _p99s(run: RunStats) -> tuple[float, float]:
    lane = run.lanes[Lane.INTERACTIVE]
    return lane.first_token.quantile(0.99) or 0.0, lane.per_token.quantile(0.99) or 0.0


def _worst_p99(run: RunStats, tenants: list[str], pick: Callable[..., Histogram]) -> float:
    return max(pick(run.tenants[name]).quantile(0.99) or 0.0 for name in tenants)


def _rate(run: RunStats, start: float, end: float) -> float:
    """Tokens per second between two shares of the run."""
    first = next(sample for sample in run.samples if sample.at_s >= start * run.length_s)
    last = [sample for sample in run.samples if sample.at_s <= end * run.length_s][-1]
    return (last.tokens - first.tokens) / (last.at_s - first.at_s)

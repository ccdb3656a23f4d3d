"""Runs as people and programs read them: rows, cells, a verdict; as JSON, as terminal tables, as Markdown.

A *cell* is a trace at a load: the mean of its runs over the seeds, policy by policy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from codeyard.shared.job import Lane
from codeyard.worker.simulation.checks import Check
from codeyard.worker.simulation.metrics import Histogram, LaneStats, RunStats
from codeyard.worker.simulation.policies import OURS, is_fixed


@dataclass(frozen=True, slots=True)
class Cell:
    trace: str
    load: float
    scores: dict[str, float]  # by policy, mean over seeds
    kept: dict[str, int]  # by policy, seeds whose promises were kept
    seeds: int

    @property
    def best_fixed(self) -> str | None:
        fixed = {name: score for name, score in self.scores.items() if is_fixed(name)}
        return max(fixed, key=lambda name: fixed[name]) if fixed else None

    @property
    def of_best_fixed(self) -> float | None:
        """Our score over that of the best fixed window of this cell; None if no fixed window scored."""
        best = self.best_fixed
        if best is None or OURS not in self.scores or not self.scores[best]:
            return None
        return self.scores[OURS] / self.scores[best]


def cells(runs: Iterable[RunStats]) -> list[Cell]:
    """In the order the runs came."""
    grouped: dict[tuple[str, float], dict[str, list[RunStats]]] = {}
    for run in runs:
        grouped.setdefault((run.trace, run.load), {}).setdefault(run.policy, []).append(run)
    return [
        Cell(
            trace,
            load,
            {name: fmean(run.score for run in group) for name, group in by_policy.items()},
            {name: sum(run.keeps_promises for run in group) for name, group in by_policy.items()},
            max(len(group) for group in by_policy.values()),
        )
        for (trace, load), by_policy in grouped.items()
    ]


def totals(found: Sequence[Cell]) -> dict[str, float]:
    """Each policy's score over all cells together: the mean of its cells."""
    names = {name: None for cell in found for name in cell.scores}
    return {name: fmean(cell.scores.get(name, 0.0) for cell in found) for name in names}


def verdicts(found: Sequence[Cell]) -> list[Check]:
    """The targets of docs/scheduling.md that the scores answer; none without ours and a fixed window."""
    checks = []
    shares = [share for cell in found if (share := cell.of_best_fixed) is not None]
    if shares:
        checks.append(
            Check("worst cell: score of the best fixed window for it", min(shares), ">= 0.97", min(shares) >= 0.97)
        )
    all_cells = totals(found)
    fixed = [score for name, score in all_cells.items() if is_fixed(name)]
    best = max(fixed, default=0.0)
    if best and OURS in all_cells:
        gain = all_cells[OURS] / best
        checks.append(Check("all cells: score of the best single fixed window", gain, ">= 1.2", gain >= 1.2))
    return checks


def run_as_json(run: RunStats) -> dict[str, Any]:
    """Everything of one run; seconds, tokens, shares in 0..1."""
    return {
        "trace": run.trace,
        "policy": run.policy,
        "load": run.load,
        "seed": run.seed,
        "workers": run.workers,
        "length_s": round(run.length_s, 3),
        "score": round(run.score, 1),
        "keeps_promises": run.keeps_promises,
        "jobs_s": round(run.jobs_s, 2),
        "tokens_per_gpu_s": round(run.tokens_s, 1),
        "gpu_busy": round(run.busy_share, 4),
        "preempted": run.preempted,
        "decisions": run.decisions,
        "simulated_in_s": round(run.wall_s, 2),
        "lanes": {lane.value: _stats(stats) for lane, stats in run.lanes.items() if stats.arrived},
        "tenants": {name: _stats(stats) for name, stats in sorted(run.tenants.items())},
        "estimate_right": {
            lane.value: round(right / judged, 4) for lane, (right, judged) in run.calibration.items() if judged
        },
        "samples": [
            {
                "at_s": round(sample.at_s, 3),
                "depth": {lane.value: depth for lane, depth in sample.depth.items()},
                "in_engines": sample.in_engines,
                "window": round(sample.window, 1),
                "tokens": sample.tokens,
            }
            for sample in run.samples
        ],
    }


def run_table(runs: Sequence[RunStats]) -> Table:
    """One row a run."""
    table = _table(
        "Runs",
        "trace",
        "load",
        "policy",
        "seed",
        "score",
        "tokens/GPU-s",
        "jobs/s",
        "GPU busy",
        "preempted",
        "estimate right",
    )
    for run in runs:
        right = sum(right for right, _ in run.calibration.values())
        judged = sum(judged for _, judged in run.calibration.values())
        table.add_row(
            *_run_names(run),
            f"{run.score:.0f}",
            f"{run.tokens_s:.0f}",
            f"{run.jobs_s:.1f}",
            f"{run.busy_share:.0%}",
            str(run.preempted),
            f"{right / judged:.0%}" if judged else "-",
        )
    return table


def lane_table(runs: Sequence[RunStats], *, tenants: bool = False) -> Table:
    """One row a lane (or a tenant) of a run; times as p50 / p99."""
    table = _table(
        "Tenants" if tenants else "Lanes", "trace", "load", "policy", "seed", "tenant" if tenants else "lane",
        "jobs/s", "tokens/s", "kept", "wait", "first token", "per token", "latency",
    )  # fmt: skip
    for run in runs:
        groups = sorted(run.tenants.items()) if tenants else [(lane.value, run.lanes[lane]) for lane in Lane]
        for name, stats in groups:
            if stats.arrived:
                table.add_row(
                    *_run_names(run),
                    name,
                    f"{stats.finished / run.length_s:.1f}",
                    f"{stats.tokens / run.length_s:.0f}",
                    f"{stats.kept_share:.1%}",
                    *(_p50_p99(each) for each in (stats.wait, stats.first_token, stats.per_token, stats.latency)),
                )
    return table


def cell_table(found: Sequence[Cell]) -> Table:
    names = list(totals(found))
    title = "Score: tokens of jobs that kept their promise, per GPU-second"
    table = _table(title, "trace", "load", *names, "ours / best fixed")
    for row in _cell_rows(found, names):
        table.add_row(*row)
    return table


def check_table(checks: Sequence[Check]) -> Table:
    table = _table("Targets", "target", "value", "wanted", "")
    for check in checks:
        table.add_row(check.name, f"{check.value:.3f}", check.target, "kept" if check.kept else "[bold red]missed")
    return table


def as_markdown(found: Sequence[Cell], checks: Sequence[Check], note: str) -> str:
    """The table of docs/scheduling.md."""
    names = list(totals(found))
    header = ["trace", "load", *names, "ours / best fixed"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in _cell_rows(found, names)]
    lines += ["", note, "", "| target | value | wanted | |", "|---|---|---|---|"]
    lines += [f"| {c.name} | {c.value:.3f} | {c.target} | {'kept' if c.kept else '**missed**'} |" for c in checks]
    return "\n".join(lines) + "\n"


def _cell_rows(found: Sequence[Cell], names: Sequence[str]) -> list[list[str]]:
    """A dash for a policy whose promises were broken under every seed; `(7)` when only 7 kept them."""
    rows = []
    for cell in found:
        share = cell.of_best_fixed
        row = [cell.trace, f"{cell.load:g}"]
        for name in names:
            kept = cell.kept.get(name, 0)
            some = "" if kept == cell.seeds else f" ({kept})"
            row.append(f"{cell.scores[name]:.0f}{some}" if kept else "-")
        rows.append([*row, f"{share:.2f}" if share is not None else "-"])
    everything = totals(found)
    rows.append(["all", "", *(f"{everything[name]:.0f}" for name in names), ""])
    return rows


def _stats(stats: LaneStats) -> dict[str, Any]:
    return {
        "arrived": stats.arrived,
        "finished": stats.finished,
        "tokens": stats.tokens,
        "kept_share": round(stats.kept_share, 4),
        **{
            f"{name}_{quantile}_s": round(value, 4)
            for name in ("wait", "first_token", "per_token", "latency")
            for quantile, share in (("p50", 0.5), ("p99", 0.99))
            if (value := getattr(stats, name).quantile(share)) is not None
        },
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        text = name in {"trace", "policy", "lane", "tenant", "target", "wanted"}
        table.add_column(name, justify="left" if text else "right", no_wrap=name != "target")
    return table


def _run_names(run: RunStats) -> tuple[str, str, str, str]:
    return run.trace, f"{run.load:g}", run.policy, str(run.seed)


def _p50_p99(times: Histogram) -> str:
    return f"{_time(times.quantile(0.5))} / {_time(times.quantile(0.99))}"


def _time(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    return f"{value_s:.1f} s" if value_s >= 1 else f"{value_s * 1e3:.0f} ms"

"""Plots of runs: PNG files, and one HTML page that holds them all. Needs matplotlib (`codeyard[simulate]`)."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeyard.shared.errors import SettingsError
from codeyard.shared.job import Lane
from codeyard.worker.simulation.checks import Check
from codeyard.worker.simulation.metrics import RunStats
from codeyard.worker.simulation.policies import OURS, is_fixed
from codeyard.worker.simulation.report import Cell, cells, totals, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 6  # policies in a time plot
_OURS_COLOUR = "#1b7f5c"
_OTHERS = (
    "#2d6a8e", "#c8553d", "#b08a2e", "#6f5a9c", "#7a7a7a", "#7fc4c2", "#a35a7a", "#8c8c3c", "#202020", "#e39a7b",
    "#8fb3d9", "#5a3b28",
)  # fmt: skip


def write_plots(runs: Sequence[RunStats], checks: Sequence[Check], folder: Path) -> list[Path]:
    """Scores by cell, promises kept, and each cell over time; then report.html. Returns the files written."""
    _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    found = cells(runs)
    figures: list[tuple[str, str, Figure]] = [
        ("scores", "Score by trace and load", _scores(found)),
        ("promises", "Jobs that kept their promise", _promises(runs)),
    ]
    for cell in found:
        shown = _shown(cell, runs)
        figures.append(
            (f"time-{cell.trace}-{cell.load:g}", f"{cell.trace} at load {cell.load:g}, over time", _over_time(shown))
        )
    written = []
    for name, _, figure in figures:
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    page = folder / "report.html"
    page.write_text(
        _page(found, [*verdicts(found), *checks], [(t, p) for (_, t, _), p in zip(figures, written, strict=True)])
    )
    return [*written, page]


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SettingsError("plots need matplotlib: pip install 'codeyard[simulate]'") from None
    matplotlib.use("Agg")
    return matplotlib


def _figure(width: float, height: float, rows: int = 1) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)
    plain = [row[0] for row in axes]
    for axis in plain:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, plain


def _scores(found: Sequence[Cell]) -> "Figure":
    names = list(totals(found))
    figure, (axis,) = _figure(max(8.0, 1.1 * len(found)), 4.8)
    width = 0.86 / len(names)
    for place, name in enumerate(names):
        axis.bar(
            [i + (place - (len(names) - 1) / 2) * width for i in range(len(found))],
            [cell.scores.get(name, 0.0) for cell in found],
            width,
            label=name,
            color=_colour(name, names),
        )
    axis.set_xticks(range(len(found)), [f"{cell.trace}\n{cell.load:g}" for cell in found])
    axis.set_ylabel("kept tokens per GPU-second")
    figure.legend(loc="outside upper center", ncols=min(len(names), 7), frameon=False)
    return figure


def _promises(runs: Sequence[RunStats]) -> "Figure":
    names = list(dict.fromkeys(run.policy for run in runs))
    figure, axes = _figure(9.0, 5.6, rows=2)
    for axis, lane, target in zip(axes, (Lane.INTERACTIVE, Lane.STANDARD), (0.99, 0.95), strict=True):
        for place, name in enumerate(names):
            shares = [
                100 * run.lanes[lane].kept_share for run in runs if run.policy == name and run.lanes[lane].arrived
            ]
            middle = (len(shares) - 1) / 2
            jitter = [place + 0.5 * (i - middle) / max(1, len(shares)) for i in range(len(shares))]
            axis.scatter(jitter, shares, s=16, color=_colour(name, names), alpha=0.8, linewidths=0)
        axis.axhline(100 * target, color="#404040", linewidth=0.8, linestyle="--")
        axis.set_xticks(
            range(len(names)), names if lane is Lane.STANDARD else [""] * len(names), rotation=30, ha="right"
        )
        axis.set_ylim(-3, 103)
        axis.set_xlim(-0.5, len(names) - 0.5)
        axis.set_ylabel("kept, %")
        axis.set_title(f"{lane}: one point a run, target {target:.0%}", fontsize=10, loc="left")
    return figure


def _over_time(runs: Sequence[RunStats]) -> "Figure":
    names = [run.policy for run in runs]
    figure, (rate, inside, depth) = _figure(9.0, 7.2, rows=3)
    for run in runs:
        colour = _colour(run.policy, names)
        at = [sample.at_s for sample in run.samples]
        tokens = [0, *(sample.tokens for sample in run.samples)]
        times = [0.0, *at]
        rates = [(tokens[i + 1] - tokens[i]) / (times[i + 1] - times[i]) / run.workers for i in range(len(at))]
        rate.plot(at, rates, color=colour, linewidth=1.3, label=run.policy)
        inside.plot(at, [sample.in_engines / run.workers for sample in run.samples], color=colour, linewidth=1.3)
        depth.plot(at, [sum(sample.depth.values()) for sample in run.samples], color=colour, linewidth=1.3)
    rate.set_ylabel("tokens per GPU-s")
    inside.set_ylabel("jobs in an engine")
    depth.set_ylabel("ready at the broker")
    depth.set_xlabel("seconds")
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _shown(cell: Cell, runs: Sequence[RunStats]) -> list[RunStats]:
    """Ours, the best policies of the cell, one run each."""
    first: dict[str, RunStats] = {}
    for run in runs:
        if (run.trace, run.load) == (cell.trace, cell.load):
            first.setdefault(run.policy, run)
    ranked = sorted(first, key=lambda name: (name != OURS, not is_fixed(name), -cell.scores[name]))
    return [first[name] for name in ranked[:MOST_LINES]]


def _colour(name: str, names: Sequence[str]) -> str:
    others = [other for other in names if other != OURS]
    return _OURS_COLOUR if name == OURS else _OTHERS[others.index(name) % len(_OTHERS)]


def _page(found: Sequence[Cell], checks: Sequence[Check], plots: Sequence[tuple[str, Path]]) -> str:
    names = list(totals(found))
    everything = totals(found)
    rows = "".join(
        "<tr><td>{}</td><td>{:g}</td>{}</tr>".format(
            html.escape(cell.trace), cell.load, "".join(f"<td>{cell.scores.get(n, 0.0):.0f}</td>" for n in names)
        )
        for cell in found
    )
    rows += "<tr class=all><td>all</td><td></td>" + "".join(f"<td>{everything[n]:.0f}</td>" for n in names) + "</tr>"
    targets = "".join(
        f"<tr><td>{html.escape(c.name)}</td><td>{c.value:.3f}</td><td>{html.escape(c.target)}</td>"
        f"<td>{'kept' if c.kept else '<b>missed</b>'}</td></tr>"
        for c in checks
    )
    images = "".join(
        f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' src='data:image/png;base64,"
        f"{base64.b64encode(path.read_bytes()).decode()}'>"
        for title, path in plots
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trace", "load", *names))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>codeyard simulate</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:.25rem .6rem;text-align:right;"
        "border-bottom:1px solid #e4e4e4}td:first-child,th:first-child{text-align:left}"
        ".all td{font-weight:600}img{max-width:100%}</style>"
        "<h1>codeyard simulate</h1><p>Simulated from a latency table; no model ran. Score: tokens of jobs that "
        "kept their lane's promise per GPU-second, 0 for a run in which fewer than 99 % of interactive or 95 % "
        f"of standard jobs kept it.</p><table><tr>{head}</tr>{rows}</table>"
        + (f"<h2>Targets</h2><table>{targets}</table>" if targets else "")
        + images
        + "</html>\n"
    )

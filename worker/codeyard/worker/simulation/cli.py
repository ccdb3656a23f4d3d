"""`codeyard simulate`: what a fleet would do, before it is bought.

`simulate` is the click command; `run` is what it calls, for scripts. Registered lazily by codeyard.cli.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from codeyard.shared.errors import SettingsError
from codeyard.worker.simulation.calibrate import calibrate
from codeyard.worker.simulation.checks import Check, calibration, flood, greedy, over_seeds
from codeyard.worker.simulation.compare import simulate_replay
from codeyard.worker.simulation.latency import LatencyTable, load_table
from codeyard.worker.simulation.many import Task, kept_runs, run_many
from codeyard.worker.simulation.metrics import RunStats
from codeyard.worker.simulation.plan import Loss
from codeyard.worker.simulation.policies import OURS, known_policies
from codeyard.worker.simulation.report import (
    as_markdown,
    cell_table,
    cells,
    check_table,
    lane_table,
    run_as_json,
    run_table,
    verdicts,
)
from codeyard.worker.simulation.traces import Scenarios, Trace, load_scenarios, replay

SCALE_WORKERS, SCALE_JOBS = 1_000, 1_000_000
SAY_EVERY_S = 30.0  # without a terminal
PLAIN_WIDTH = 160  # columns, where the output is no terminal
MOST_ROWS = 60  # runs printed one by one
MOST_DETAILED = 12  # and lane by lane
CHECK_WORKERS, CHECK_JOBS = 4, 40_000
WAIT_TRACES = ("steady", "burst", "day")

HELP = """Simulate a fleet of GPU workers with the very scheduling policy the worker runs.

No model runs: engines follow a latency table (the shipped one was measured with vLLM on an H200).
Time is simulated too, so an hour of traffic takes seconds, and the same seed gives the same run.

\b
  codeyard simulate                                  our policy on the steady trace
  codeyard simulate --trace burst --trace flood --policy adaptive --policy fixed-256
  codeyard simulate --compare                        every policy, trace and load; the tables of docs/scheduling.md
  codeyard simulate --compare --workers 5 --jobs 5000  the same in minutes
  codeyard simulate --compare --processes 8 --keep runs/  as fast as the machine allows, to be gone on with later
  codeyard simulate --trace mine.csv --workers 12    replay: arrived_s,lane,tenant,prompt_tokens,completion_tokens
  codeyard simulate --loss 5:10 --load 0.9           ten workers die five seconds in
  codeyard simulate --calibrate                      the simulated engine beside the measured one
  codeyard simulate --scale                          1,000 workers, a million jobs

\b
Score: tokens of jobs that kept their lane's promise per GPU-second; 0 for a run in which fewer than
99 % of interactive or 95 % of standard jobs kept it. Load 1.0 offers as many jobs a second as the
fleet finishes with every slot full.
"""


@click.command("simulate", help=HELP)
@click.option("--trace", "traces", multiple=True, help="A trace by name, `all`, or a CSV to replay. Repeatable.")
@click.option("--policy", "policies", multiple=True, help="A policy by name, `fixed-N`, or `all`. Repeatable.")
@click.option(
    "--load",
    "loads",
    multiple=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Share of capacity. Repeatable; 0.95 by default.",
)
@click.option("--workers", type=click.IntRange(min=1), help="GPUs; 50 by default.")
@click.option("--jobs", type=click.IntRange(min=1), help="Jobs a run, about; 50,000 by default.")
@click.option(
    "--seed", "seeds", multiple=True, type=int, help="Repeatable; 101 by default, all report seeds with --compare."
)
@click.option(
    "--table",
    "table_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A latency table of your own, as JSON.",
)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="AT_S:WORKERS",
    help="Workers that die at a time; they come back after the engine's start time.",
)
@click.option(
    "--compare", is_flag=True, help="All policies on all traces and loads, with the targets of docs/scheduling.md."
)
@click.option("--scale", is_flag=True, help="1,000 workers and a million jobs.")
@click.option(
    "--calibrate", "only_calibrate", is_flag=True, help="Check the simulated engine against its table, and end."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@click.option("--tenants", "by_tenant", is_flag=True, help="Print a row for each tenant too.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write the comparison as Markdown.")
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write PNG plots and report.html into this folder.",
)
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at once.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep each run in this folder as it ends. A run is made again only if what decides it has changed, "
    "so a comparison can go on later.",
)
@click.option("--list", "only_list", is_flag=True, help="List traces and policies, and end.")
def simulate(
    traces: tuple[str, ...], policies: tuple[str, ...], loads: tuple[float, ...], workers: int | None,
    jobs: int | None, seeds: tuple[int, ...], table_path: Path | None, losses: tuple[str, ...], compare: bool,
    scale: bool, only_calibrate: bool, as_json: bool, by_tenant: bool, markdown: Path | None,
    plots: Path | None, processes: int, keep: Path | None, only_list: bool,
) -> None:  # fmt: skip
    console = _console(as_json)
    try:
        table = load_table(table_path)
        if only_list:
            _list(console)
        elif only_calibrate:
            _calibrate(table, console, as_json=as_json)
        else:
            run(
                table=table, traces=traces, policies=policies, loads=loads, workers=workers, jobs=jobs, seeds=seeds,
                losses=losses, compare=compare, scale=scale, as_json=as_json, by_tenant=by_tenant,
                markdown=markdown, plots=plots, processes=processes, keep=keep,
                console=console,
            )  # fmt: skip
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


def run(
    *,
    table: LatencyTable,
    traces: Sequence[str] = (),
    policies: Sequence[str] = (),
    loads: Sequence[float] = (),
    workers: int | None = None,
    jobs: int | None = None,
    seeds: Sequence[int] = (),
    losses: Sequence[str] = (),
    compare: bool = False,
    scale: bool = False,
    as_json: bool = False,
    by_tenant: bool = False,
    markdown: Path | None = None,
    plots: Path | None = None,
    processes: int = 1,
    keep: Path | None = None,
    console: Console | None = None,
) -> list[RunStats]:
    """Run what was asked for, report it, return it. Raises SettingsError for names nobody knows."""
    console = console or _console(as_json)
    scenarios = load_scenarios()
    workers = workers or (SCALE_WORKERS if scale else 50)
    jobs = jobs or (SCALE_JOBS if scale else 50_000)
    names = _traces(traces, scenarios, compare)
    chosen = _policies(policies, compare)
    cell_loads = tuple(loads) or (scenarios.loads if compare else (0.95,))
    cell_seeds = tuple(seeds) or (scenarios.report_seeds if compare else (scenarios.report_seeds[0],))
    deaths = tuple(_loss(text) for text in losses)
    keys = [(n, load, seed, p) for seed in cell_seeds for n in names for load in cell_loads for p in chosen]

    runs: list[RunStats] = []
    with _progress(console) as bars:
        progress = _Bar(bars, len(keys))
        for name, _, _, policy_name in [key for key in keys if key[0].endswith(".csv")]:
            tick = progress.starts(f"{name} {policy_name}")
            runs.append(_replay(Path(name), policy_name, scenarios, table, workers=workers, losses=deaths, tick=tick))
            progress.ended()
        tasks = [
            Task(name, scenarios.traces[name], table, policy_name, workers, load, jobs, seed, deaths)
            for name, load, seed, policy_name in keys
            if not name.endswith(".csv")
        ]
        found_runs = kept_runs(tasks, keep) if keep is not None else {}
        progress.kept(len(found_runs))
        left = {place: task for place, task in enumerate(tasks) if place not in found_runs}
        for place, stats in run_many(left, processes=processes, keep=keep, begins=progress.starts):
            found_runs[place] = stats
            progress.ended()
        runs += [found_runs[place] for place in range(len(tasks))]
        checks = _checks(runs, scenarios, table, cell_seeds, progress) if compare else []
    found = cells(runs)
    checks = [*verdicts(found), *checks]
    _report(console, table, runs, checks, as_json=as_json, by_tenant=by_tenant)
    if markdown is not None:
        note = (
            f"{workers} workers, about {jobs:,} jobs a run, {len(cell_seeds)} seeds. "
            "In parentheses: under so many seeds only were the promises kept."
        )
        markdown.write_text(as_markdown(found, checks, note))
        console.print(f"wrote {markdown}")
    if plots is not None:
        from codeyard.worker.simulation.plots import write_plots

        for path in write_plots(runs, checks, plots):
            console.print(f"wrote {path}")
    return runs


def _replay(
    path: Path,
    policy_name: str,
    scenarios: Scenarios,
    table: LatencyTable,
    *,
    workers: int,
    losses: tuple[Loss, ...],
    tick: Callable[[float], None],
) -> RunStats:
    length_s = max((job.arrived_s for job in replay(path)), default=0.0) + 1.0
    steady = scenarios.traces["steady"]
    trace = Trace(what=path.name, promises=steady.promises, streams=steady.streams)
    return simulate_replay(
        path.stem, trace, table, replay(path), policy_name=policy_name, workers=workers, length_s=length_s,
        losses=losses, tick=tick,
    )  # fmt: skip


def _checks(
    runs: list[RunStats], scenarios: Scenarios, table: LatencyTable, seeds: Sequence[int], progress: "_Bar"
) -> list[Check]:
    """Flood and greedy tenant need long runs rather than many workers. The flood is judged under the first seed:
    it takes a run for each window. What the worst of nineteen tenants meets differs from seed to seed: their mean."""
    progress.starts("flood")
    checks = flood(scenarios.traces["flood"], table, workers=CHECK_WORKERS, jobs=CHECK_JOBS, seed=seeds[0])
    stormy = []
    for seed in seeds:
        progress.starts(f"greedy tenant, seed {seed}")
        stormy.append(greedy(table, workers=CHECK_WORKERS, jobs=CHECK_JOBS, seed=seed))
    return checks + over_seeds(stormy) + calibration([r for r in runs if r.policy == OURS and r.trace in WAIT_TRACES])


def _report(
    console: Console, table: LatencyTable, runs: list[RunStats], checks: list[Check], *, as_json: bool, by_tenant: bool
) -> None:
    found = cells(runs)
    if as_json:
        body: dict[str, Any] = {
            "what": "simulated; no model ran",
            "table": table.what,
            "runs": [run_as_json(run) for run in runs],
            "cells": [asdict(cell) for cell in found],
            "targets": [asdict(check) for check in checks],
        }
        json.dump(body, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    console.print(f"[dim]Simulated, no model ran. Engines as: {table.what}")
    if len(runs) <= MOST_ROWS:
        console.print(run_table(runs))
    if len(runs) <= MOST_DETAILED:
        console.print(lane_table(runs))
        if by_tenant:
            console.print(lane_table(runs, tenants=True))
    if len({run.policy for run in runs}) > 1:
        console.print(cell_table(found))
    if checks:
        console.print(check_table(checks))


def _calibrate(table: LatencyTable, console: Console, *, as_json: bool) -> None:
    loops = calibrate(table)
    if as_json:
        json.dump([{"window": loop.measured.window, **loop.errors} for loop in loops], sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    shown = Table(title="Closed loop: simulated (error against measured)", title_justify="left")
    for name in ("window", "jobs/s", "tokens/s", "p50 to first token, ms", "p50 per token, ms"):
        shown.add_column(name, justify="right")
    for loop in loops:
        errors = loop.errors
        shown.add_row(
            str(loop.measured.window),
            f"{loop.jobs_s:.2f} ({errors['jobs_s']:+.0%})",
            f"{loop.tokens_s:.0f} ({errors['tokens_s']:+.0%})",
            f"{loop.first_token_p50_s * 1e3:.1f} ({errors['first_token']:+.0%})",
            f"{loop.per_token_p50_s * 1e3:.2f} ({errors['per_token']:+.0%})",
        )
    console.print(shown)


def _list(console: Console) -> None:
    for title, rows in (
        ("Traces", {name: trace.what for name, trace in load_scenarios().traces.items()}),
        ("Policies", {name: known.what for name, known in known_policies().items()}),
    ):
        shown = Table(title=title, title_justify="left", show_header=False)
        for name, what in rows.items():
            shown.add_row(name, what)
        console.print(shown)


def _traces(asked: Sequence[str], scenarios: Scenarios, compare: bool) -> list[str]:
    if "all" in asked or (compare and not asked):
        return list(scenarios.traces)
    for name in asked:
        if name.endswith(".csv"):
            if not Path(name).is_file():
                raise SettingsError(f"no file {name}")
        elif name not in scenarios.traces:
            raise SettingsError(f"no trace {name!r}; there are {', '.join(scenarios.traces)}, or a CSV file")
    return list(asked) or ["steady"]


def _policies(asked: Sequence[str], compare: bool) -> list[str]:
    known = list(known_policies())
    if "all" in asked or (compare and not asked):
        return known
    for name in asked:
        if name not in known and not name.removeprefix("fixed-").isdecimal():
            raise SettingsError(f"no policy {name!r}; there are {', '.join(known)}, and fixed-N")
    return list(asked) or [OURS]


def _loss(text: str) -> Loss:
    try:
        at_s, workers = text.split(":")
        return Loss(at_s=float(at_s), workers=int(workers))
    except ValueError:
        raise SettingsError(f"a loss is AT_S:WORKERS, e.g. 5:10, not {text!r}") from None


class _Bar:
    """Progress over runs, and within one. Without a terminal, a line on standard error now and then."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self._progress = progress
        self._runs = progress.add_task("", total=runs)
        self._total = runs
        self._ended = 0
        self._made = 0  # of them, in this process
        self._began_s = self._said_s = time.monotonic()

    def starts(self, name: str) -> Callable[[float], None]:
        self._progress.update(self._runs, description=name + self._left())

        def tick(share: float) -> None:
            self._progress.update(self._runs, completed=self._ended + min(1.0, share))

        return tick

    def kept(self, runs: int) -> None:
        """So many were made before and say nothing about how long the others take."""
        self._ended += runs
        self._progress.update(self._runs, completed=self._ended)

    def ended(self) -> None:
        self._ended += 1
        self._made += 1
        self._progress.update(self._runs, completed=self._ended)
        now_s = time.monotonic()
        if self._progress.disable and now_s - self._said_s >= SAY_EVERY_S:
            self._said_s = now_s
            click.echo(f"{self._ended} of {self._total} runs{self._left()}", err=True)

    def _left(self) -> str:
        """How long the runs to come will take, at the pace of those made."""
        if not self._made:
            return ""
        left_s = (time.monotonic() - self._began_s) / self._made * (self._total - self._ended)
        return f", {left_s / 60:.0f} min left" if left_s >= 60 else ""


def _console(as_json: bool) -> Console:
    console = Console(stderr=as_json)
    return console if console.is_terminal else Console(stderr=as_json, width=PLAIN_WIDTH)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip

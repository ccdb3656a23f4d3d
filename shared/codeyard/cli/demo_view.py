"""What the demo shows: live progress by lane, then the report."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from codeyard.shared.job import Lane
from codeyard.shared.record import FINAL_STATES, Record, State

if TYPE_CHECKING:
    from codeyard.cli.demo import Planned, Run

SHOWN = 3  # completions
COLOURS = {State.SUCCEEDED: "green", State.FAILED: "red", State.CANCELLED: "yellow", State.EXPIRED: "magenta"}


class View:
    """A live view on a terminal, plain lines elsewhere. A context manager."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._status = Text("", style="bold")
        self._bars = Progress(TextColumn("{task.description:12}"), BarColumn(40), MofNCompleteColumn())
        self._lanes = {lane: self._bars.add_task(str(lane), total=None) for lane in Lane}
        self._counts = Text("")
        self._live = Live(Group(self._status, self._bars, self._counts), console=self.console, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def banner(self, text: str) -> None:
        self.console.print(f"[bold]codeyard demo[/bold]  worker {text}")

    def say(self, text: str) -> None:
        self._status.plain = text
        if not self.console.is_terminal:
            self.console.print(f"- {text}")

    def update(self, planned: Sequence["Planned"], states: Mapping[str, State]) -> None:
        by_lane = Counter(str(job.body["lane"]) for job in planned)
        done: Counter[str] = Counter()
        for job, state in zip(planned, states.values(), strict=False):
            done[str(job.body["lane"])] += state.final
        for lane, task in self._lanes.items():
            self._bars.update(task, total=by_lane[lane], completed=done[lane])
        counts = Counter(states.values())
        self._counts.plain = "  ".join(f"{state} {counts[state]}" for state in State if counts[state])


def print_report(run: "Run") -> None:
    console = Console(highlight=False)
    succeeded = [record for record in run.records if record.state is State.SUCCEEDED]
    console.print()
    for record in succeeded[:SHOWN]:
        assert record.result is not None
        code = f"{record.job.prompt}{record.result.text.rstrip()}"
        console.print(Syntax(code, "python", theme="ansi_dark", word_wrap=True))
        console.print(f"[dim]{record.id}, {record.lane}, {record.result.engine}[/dim]\n")
    console.print(_ledger(run))
    console.print(_latencies(run.records))
    sizes = Counter(record.result.batch_size for record in succeeded if record.result and record.result.batch_size)
    console.print(f"running together when a job started: {min(sizes)} to {max(sizes)} jobs" if sizes else "")
    attempts = sum(record.attempt > 1 for record in run.records)
    console.print(
        f"worker killed with -9 while it held {run.killed_running} jobs, another served after {run.back_s:.1f} s; "
        f"{attempts} jobs were claimed again"
    )
    console.print(f"duplicates attached: {run.attached}; replayed byte for byte: {run.identical}")
    console.print(f"took {run.took_s:.1f} s")
    for line in run.wrong:
        console.print(f"[red]wrong:[/red] {line}")
    verdict = "[red]FAILED[/red]" if run.wrong else "[green]every job ended as it should[/green]"
    console.print(verdict)


def _ledger(run: "Run") -> str:
    counts = Counter(record.state for record in run.records)
    terms = " + ".join(
        f"[{COLOURS[state]}]{counts[state]} {state}[/{COLOURS[state]}]" for state in State if state in FINAL_STATES
    )
    open_jobs = sum(not record.state.final for record in run.records)
    balance = "" if open_jobs == 0 else f" + [red]{open_jobs} not final[/red]"
    return f"ledger, read back from the store: accepted {len(run.planned)} = {terms}{balance}"


def _latencies(records: Sequence[Record]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("lane")
    for heading in ("jobs", "latency p50", "max"):
        table.add_column(heading, justify="right")
    for lane in Lane:
        seconds = [r.finished_at - r.created_at for r in records if r.lane is lane and r.state.final]
        if seconds:
            median = statistics.median(seconds)
            table.add_row(str(lane), str(len(seconds)), f"{median:.2f} s", f"{max(seconds):.2f} s")
    return table

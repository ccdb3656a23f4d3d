"""A drill for people and for scripts: progress while it runs, the ledger at its end, JSON, a timeline."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from codeyard.cli.drill.audit import DUPLICATED, FINAL, LOST, SHOWN, STREAM, WRONG
from codeyard.cli.drill.faults import Met
from codeyard.cli.drill.plan import FaultKind
from codeyard.cli.drill.run import Report, Say

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")  # Paul Tol's bright
DPI = 120


@contextmanager
def progress(quiet: bool) -> Iterator[Say]:
    """A bar on standard error; nothing if `quiet`."""
    if quiet:
        yield lambda doing, final, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("jobs final"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def say(doing: str, final: int, total: int) -> None:
            bar.update(task, description=doing, completed=min(final, total), total=total)

        yield say


def as_json(report: Report) -> dict[str, Any]:
    ledger = report.ledger
    return {
        "good": report.good,
        "seed": report.seed,
        "jobs": report.num_jobs,
        "servers": report.servers,
        "took_s": round(report.took_s, 1),
        "ledger": {
            "accepted": ledger.accepted,
            **{str(state): ledger.states[state] for state in FINAL},
            "refused": ledger.refused,
            "lost": ledger.count(LOST),
            "duplicated": ledger.count(DUPLICATED),
            "wrong": ledger.count(WRONG),
            "streams_not_their_result": ledger.count(STREAM),
            "balanced": ledger.balanced,
        },
        "tokens": ledger.tokens,
        "regenerated_tokens_at_most": ledger.regenerated_tokens,
        "taken_over": ledger.resumed,
        "undisturbed_s": [round(seconds, 3) for seconds in report.undisturbed_s],
        "faults": [
            {
                "kind": one.kind,
                "victim": one.victim,
                "began_s": round(one.began_s, 2),
                "lasted_s": round(one.lasted_s, 2),
                "recovery_s": None if one.recovery_s is None else round(one.recovery_s, 2),
                "note": one.note,
            }
            for one in report.met
        ],
        "findings": [{"kind": one.kind, "job": one.job, "text": one.text} for one in ledger.findings[:SHOWN]],
    }


def print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console, ledger = Console(), report.ledger
    faults = f"{len(report.met)} faults" if len(report.met) != 1 else "1 fault"
    console.print(
        f"seed {report.seed}: {faults} in {report.took_s:.0f} s, audited in {report.audit_s:.0f} s; {report.servers}"
    )
    if report.met:
        console.print(_recoveries(report.met))
    if report.undisturbed_s:
        console.print(f"an urgent job took {median(report.undisturbed_s):.2f} s with nothing broken")

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(str(ledger.accepted), "accepted")
    for state in FINAL:
        table.add_row(f"= {ledger.states[state]}" if state is FINAL[0] else f"+ {ledger.states[state]}", str(state))
    if ledger.refused:
        table.add_row(f"({ledger.refused})", "refused: would have missed their deadline")
    for kind, text in (
        (LOST, "lost"),
        (DUPLICATED, "duplicated"),
        (WRONG, "wrong"),
        (STREAM, "streams not their result"),
    ):
        count = ledger.count(kind)
        table.add_row(f"[{'red' if count else 'green'}]{count}[/]", text)
    table.add_row(str(ledger.resumed), "taken over by another worker or tried again, and succeeded")
    share = ledger.regenerated_tokens / ledger.tokens if ledger.tokens else 0.0
    table.add_row(
        str(ledger.regenerated_tokens), f"tokens generated more than once, at most ({share:.1%} of {ledger.tokens})"
    )
    console.print(table)
    for finding in ledger.findings[:SHOWN]:
        console.print(f"  {finding.kind}: {finding.job} {finding.text}", markup=False, highlight=False)
    if len(ledger.findings) > SHOWN:
        console.print(f"  and {len(ledger.findings) - SHOWN} more")
    for one in report.unrecovered:
        console.print(f"  not recovered: {one.kind} of {one.victim} at {one.began_s:.0f} s", markup=False)
    console.print("[green]nothing lost, nothing twice[/]" if report.good else "[red]NOT GOOD[/]")


def _recoveries(met: Sequence[Met]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("fault", "times", "lasted (median)", "recovered after (median)", "longest"):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    by_kind: dict[FaultKind, list[Met]] = defaultdict(list)
    for one in met:
        by_kind[one.kind].append(one)
    for kind, ones in by_kind.items():
        recovered = [one.recovery_s for one in ones if one.recovery_s is not None]
        cells = (f"{median(recovered):.1f} s", f"{max(recovered):.1f} s") if recovered else ("never", "")
        table.add_row(kind, str(len(ones)), f"{median(one.lasted_s for one in ones):.1f} s", *cells)
    return table


def plot(report: Report, path: Path) -> None:
    """The timeline as a picture. Needs matplotlib (`codeyard[simulate]`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(11, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    times = [moment.at_s for moment in report.timeline]
    above.plot(times, [moment.accepted for moment in report.timeline], color=PALETTE[0], label="accepted")
    above.plot(times, [moment.final for moment in report.timeline], color=PALETTE[2], label="final")
    above.set_ylabel("jobs")
    verdict = "nothing lost, nothing twice" if report.good else "NOT GOOD"
    above.set_title(
        f"{report.ledger.accepted} jobs, {len(report.met)} faults, seed {report.seed}: {verdict}", loc="left"
    )
    for one in report.met:
        above.axvspan(
            one.began_s,
            one.began_s + max(one.lasted_s, 0.1),
            facecolor=PALETTE[6],
            alpha=0.35,
            edgecolor="white",
            linewidth=1,
        )
    above.legend(loc="upper left", frameon=False)

    kinds = [kind for kind in FaultKind if any(one.kind is kind for one in report.met)]
    markers = "ov^sDPX*<>p"
    for number, kind in enumerate(kinds):
        ones = [one for one in report.met if one.kind is kind and one.recovery_s is not None]
        below.scatter(
            [one.began_s for one in ones],
            [one.recovery_s for one in ones],
            s=30,
            color=PALETTE[number % (len(PALETTE) - 2)],
            marker=markers[number % len(markers)],
            label=kind.replace("_", " "),
        )
    below.set_ylabel("recovered after (s)")
    below.set_xlabel("seconds since the producers' start; grey: something is broken")
    below.set_ylim(bottom=0)
    if kinds:
        below.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)

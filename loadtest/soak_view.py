"""A soak for people and for scripts: the table of what grew, JSON, a picture. Called by: soak."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.soak_verdict import MEMORY, RSS_GROWS, Growth
from rich.table import Table

from codeyard.cli.drill.view import DPI, PALETTE

if TYPE_CHECKING:
    from loadtest.soak import Report

_MIB = 2**20
_WORDS = {"rss_bytes": "RSS, MiB", "unique_bytes": "its own alone, MiB"}


def table(rows: Sequence[Growth]) -> Table:
    found = Table(box=None, pad_edge=False)
    for heading in ("process", "of", "early", "last", "grew", "line, per hour", "at rest", ""):
        found.add_column(heading, justify="left" if heading in ("process", "of", "") else "right")
    for row in rows:
        verdict = {True: "kept", False: "[bold red]grows[/]", None: ""}[row.kept]
        rest = "" if row.rest is None else f"{row.rest[0]} -> {row.rest[1]}"
        grew = f"{row.share:+.2%}" if row.what in MEMORY else f"{row.last - row.early:+g}"
        scale = _MIB if row.what in MEMORY else 1
        found.add_row(
            row.process,
            _WORDS.get(row.what, row.what),
            f"{row.early / scale:.1f}",
            f"{row.last / scale:.1f}",
            grew,
            f"{row.line_share_per_hour:+.2%}",
            rest,
            verdict,
        )
    return found


def as_json(report: "Report") -> dict[str, Any]:
    ledger = report.ledger
    return {
        "what": "loadtest.soak",
        "good": report.good,
        "minutes": report.plan.minutes,
        "warm_up_s": round(report.plan.warm_up_s, 1),
        "rate": report.plan.rate,
        "machine": report.machine,
        "other_cores": report.other_cores,
        "missed_looks": report.missed_looks,
        "jobs": {
            "sent": ledger.sent.total(),
            "ended_as_they_had_to": ledger.ended.total(),
            "wrong": ledger.num_wrong,
            "in_flight": ledger.in_flight,
            "by_kind": {str(kind): count for kind, count in ledger.ended.items()},
            "findings": list(ledger.wrong),
            "latest_start_s": round(ledger.late_s, 3),
        },
        "growths": [
            {
                **asdict(row),
                "share": row.share,
                "line_share_per_hour": row.line_share_per_hour,
            }
            for row in report.growths
        ],
        "cores": {
            name: (samples[-1].cpu_s - samples[0].cpu_s) / max(1.0, samples[-1].at_s - samples[0].at_s)
            for name, samples in report.samples.items()
        },
        "samples": {name: [asdict(one) for one in samples] for name, samples in report.samples.items()},
        "around": [asdict(one) for one in report.around],
    }


def plot(report: "Report", path: Path) -> None:
    """Needs matplotlib (`codeyard[simulate]`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(12, 9), sharex=True, layout="constrained")
    ours = [row for row in report.growths if row.what == "rss_bytes" and row.kept is not None]
    for number, row in enumerate(ours):
        samples, color = report.samples[row.process], PALETTE[number]
        times = [one.at_s / 60 for one in samples]

        def line(place: Any, values: Sequence[float], label: str, times: Any = times, color: str = color) -> None:
            place.plot(times, values, color=color, linewidth=1.2, label=label)

        grown = [100 * (one.rss_bytes / row.early - 1) for one in samples]
        line(axes[0][0], grown, f"{row.process}: {row.early / _MIB:.0f} MiB, {row.share:+.2%}")
        line(axes[0][1], [one.unique_bytes / _MIB for one in samples], row.process)
        line(axes[1][0], [one.descriptors for one in samples], row.process)
        line(axes[1][1], [one.tasks or 0 for one in samples], row.process)
    axes[0][0].axhline(100 * RSS_GROWS, color="black", linewidth=0.8, linestyle=":")
    axes[0][0].set_ylim(-5, 5)
    times = [one.at_s / 60 for one in report.around]
    for name, label, color in (
        ("in_flight", "jobs in flight", PALETTE[0]),
        ("ready", "ready in the queues", PALETTE[1]),
        ("broker_connections", "connections: RabbitMQ", PALETTE[3]),
        ("store_connections", "connections: Redis", PALETTE[2]),
    ):
        axes[2][0].plot(times, [getattr(one, name) for one in report.around], color=color, linewidth=1.2, label=label)
    axes[2][1].plot(times, [one.store_bytes / _MIB for one in report.around], color=PALETTE[2], label="Redis: its data")
    for name, color in (("redis", PALETTE[4]), ("rabbitmq", PALETTE[5])):
        samples = report.samples[name]
        values = [one.rss_bytes / _MIB for one in samples]
        axes[2][1].plot([one.at_s / 60 for one in samples], values, color=color, label=f"{name}: RSS")
    labels = ("RSS, % over the early window", "its own alone, MiB", "descriptors", "tasks on the loop", "count", "MiB")
    for place, label in zip(axes.flat, labels, strict=True):
        place.set_ylabel(label)
        place.axvspan(0, report.plan.warm_up_s / 60, facecolor=PALETTE[6], alpha=0.3, linewidth=0)
        place.legend(loc="best", frameon=False, fontsize="small")
        place.spines[["top", "right"]].set_visible(False)
    for place in axes.flat[1:]:
        place.set_ylim(bottom=0)
    for place in axes[2]:
        place.set_xlabel("minutes; grey: warm-up")
    ledger, verdict = report.ledger, "nothing grows" if report.good else "NOT GOOD"
    figure.suptitle(
        f"{ledger.sent.total()} jobs at {report.plan.rate:g}/s, {ledger.num_wrong} wrong: {verdict}", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=DPI)
    plt.close(figure)

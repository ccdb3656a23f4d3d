"""From what the runs saw to the figures, the targets, and the three ways to show them.

Runs of one side are pooled: percentiles over all its interactive jobs, tokens over all its seconds. Pure.
Called by: bench_flood.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.flood_side import SideRun
from rich.table import Table

ON, OFF = "adaptive", "fcfs"
BETTER = 5.0  # times: interactive p99 to the first token
BULK_KEPT = 0.85
GAP_S = 0.25  # p95
MISSING = "-"


@dataclass(frozen=True, slots=True)
class Summary:
    """One side. Times in seconds; None where nothing was seen."""

    side: str
    rounds: int
    engine: str
    jobs: int
    not_succeeded: int
    first_p50_s: float | None  # interactive, from the call of `submit` to the first token at the reader
    first_p99_s: float | None
    first_p99_s_by_round: list[float | None]
    worker_first_p50_s: float | None  # from the record to the first token at the worker
    worker_first_p99_s: float | None
    per_token_p50_s: float | None  # at the reader, mean after a job's first chunk
    per_token_p99_s: float | None
    gaps: int  # between chunks of one job at the reader
    gap_p50_s: float | None
    gap_p95_s: float | None
    gap_max_s: float | None
    bulk_beside_tokens_s: float  # of bulk jobs that ended while interactive came, over that time
    bulk_beside_tokens_s_by_round: list[float]
    bulk_tokens_s: float  # all bulk, to its last end
    bulk_tokens: int
    outlasted: bool  # bulk was still there when the last interactive job came, in every round
    late_s: float  # the latest submission behind its time: this process was held up
    load: list[float]  # the machine's 1-minute average before each round
    other_cores: list[float | None]  # that other programs used during each round


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    value: float | None
    wanted: str
    kept: bool


def summarize(side: str, runs: Sequence[SideRun], interactive_s: float) -> Summary:
    """`interactive_s`: when the last interactive job comes, seconds into a run."""
    streams = [stream for run in runs for stream in run.streams if stream.chunks]
    firsts = [stream.first_token_s for stream in streams]
    worker_firsts = [first for run in runs for first in run.worker_first_token_s]
    per_token = [stream.per_token_s for stream in streams if stream.per_token_s is not None]
    gaps = [gap for stream in streams for gap in stream.gaps_s]
    beside = [sum(tokens for end_s, tokens in run.bulk_ends if end_s <= interactive_s) for run in runs]
    bulk_tokens = sum(tokens for run in runs for _, tokens in run.bulk_ends)
    return Summary(
        side=side,
        rounds=len(runs),
        engine=runs[0].engine,
        jobs=sum(run.num_jobs for run in runs),
        not_succeeded=sum(len(run.not_succeeded) for run in runs),
        first_p50_s=percentile(firsts, 0.5),
        first_p99_s=percentile(firsts, 0.99),
        first_p99_s_by_round=[
            percentile([one.first_token_s for one in run.streams if one.chunks], 0.99) for run in runs
        ],
        worker_first_p50_s=percentile(worker_firsts, 0.5),
        worker_first_p99_s=percentile(worker_firsts, 0.99),
        per_token_p50_s=percentile(per_token, 0.5),
        per_token_p99_s=percentile(per_token, 0.99),
        gaps=len(gaps),
        gap_p50_s=percentile(gaps, 0.5),
        gap_p95_s=percentile(gaps, 0.95),
        gap_max_s=max(gaps, default=None),
        bulk_beside_tokens_s=statistics.mean(beside) / interactive_s,
        bulk_beside_tokens_s_by_round=[tokens / interactive_s for tokens in beside],
        bulk_tokens_s=bulk_tokens / sum(run.last_end_s for run in runs),
        bulk_tokens=bulk_tokens,
        outlasted=all(run.last_end_s > interactive_s for run in runs),
        late_s=max(stream.late_s for stream in streams) if streams else 0.0,
        load=[round(run.load_before, 2) for run in runs],
        other_cores=[run.other_cores for run in runs],
    )


def targets(summaries: Mapping[str, Summary]) -> list[Target]:
    """Policy on against policy off. A side that was not run, or saw nothing, misses."""
    on, off = summaries.get(ON), summaries.get(OFF)
    if on is None or off is None:
        return []
    better = off.first_p99_s / on.first_p99_s if on.first_p99_s and off.first_p99_s else None
    beside = on.bulk_beside_tokens_s / off.bulk_beside_tokens_s if off.bulk_beside_tokens_s else None
    overall = on.bulk_tokens_s / off.bulk_tokens_s
    gap_s = on.gap_p95_s
    return [
        Target("interactive p99 to first token: off / on", better, f">= {BETTER:g}", at_least(better, BETTER)),
        Target("bulk beside interactive: on / off", beside, f">= {BULK_KEPT:g}", at_least(beside, BULK_KEPT)),
        Target("bulk overall: on / off", overall, f">= {BULK_KEPT:g}", at_least(overall, BULK_KEPT)),
        Target("p95 between chunks at the reader, on, s", gap_s, f"<= {GAP_S:g}", gap_s is not None and gap_s <= GAP_S),
    ]


def at_least(value: float | None, wanted: float) -> bool:
    return value is not None and value >= wanted


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank: the least value that this share does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


# Showing -------------------------------------------------------------------------------------------


def rows(summaries: Mapping[str, Summary]) -> list[list[str]]:
    """The table: a heading, then a measure a row, a side a column."""
    sides = list(summaries.values())
    measures = [
        ("interactive: first token at the reader, p50", [_ms(one.first_p50_s) for one in sides]),
        ("interactive: first token at the reader, p99", [_ms(one.first_p99_s) for one in sides]),
        ("... of each round", [" / ".join(map(_ms, one.first_p99_s_by_round)) for one in sides]),
        ("interactive: first token at the worker, p50", [_ms(one.worker_first_p50_s) for one in sides]),
        ("interactive: first token at the worker, p99", [_ms(one.worker_first_p99_s) for one in sides]),
        ("interactive: per token, p50", [_ms(one.per_token_p50_s) for one in sides]),
        ("interactive: per token, p99", [_ms(one.per_token_p99_s) for one in sides]),
        ("between chunks at the reader, p50", [_ms(one.gap_p50_s) for one in sides]),
        ("between chunks at the reader, p95", [_ms(one.gap_p95_s) for one in sides]),
        ("between chunks at the reader, longest", [_ms(one.gap_max_s) for one in sides]),
        ("bulk while interactive comes, tokens/s", [f"{one.bulk_beside_tokens_s:,.0f}" for one in sides]),
        (
            "... of each round",
            [" / ".join(f"{rate:,.0f}" for rate in one.bulk_beside_tokens_s_by_round) for one in sides],
        ),
        ("bulk overall, tokens/s", [f"{one.bulk_tokens_s:,.0f}" for one in sides]),
        ("jobs, of them not succeeded", [f"{one.jobs}, {one.not_succeeded}" for one in sides]),
        ("load average before each round", [" / ".join(f"{load:g}" for load in one.load) for one in sides]),
        ("cores used by other programs meanwhile", [" / ".join(map(_number, one.other_cores)) for one in sides]),
    ]
    return [["", *summaries], *([name, *values] for name, values in measures)]


def terminal_table(summaries: Mapping[str, Summary], aims: Sequence[Target]) -> list[Table]:
    heading, *body = rows(summaries)
    table = Table(*heading)
    for row in body:
        table.add_row(*row)
    verdicts = Table("target", "value", "wanted", "")
    for aim in aims:
        verdicts.add_row(aim.name, _number(aim.value), aim.wanted, "kept" if aim.kept else "[bold red]missed[/]")
    return [table, verdicts] if aims else [table]


def markdown(summaries: Mapping[str, Summary], aims: Sequence[Target], notes: Sequence[str]) -> str:
    heading, *body = rows(summaries)
    lines = [_line(heading), _line(["---"] * len(heading)), *map(_line, body), ""]
    if aims:
        lines += [_line(["target", "value", "wanted", ""]), _line(["---"] * 4)]
        lines += [
            _line([aim.name, _number(aim.value), aim.wanted, "kept" if aim.kept else "**missed**"]) for aim in aims
        ]
        lines.append("")
    return "\n".join([*lines, *notes, ""])


def as_json(summaries: Mapping[str, Summary], aims: Sequence[Target], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **about,
        "sides": {side: asdict(summary) for side, summary in summaries.items()},
        "targets": [asdict(aim) for aim in aims],
    }


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"

"""The bulk flood on the real engine: admission policy on against off, side by side in one run.

    python -m loadtest.bench_flood [--quick] [--markdown flood.md] [--json flood.json]

Real RabbitMQ and Redis, `codeyard worker --engine vllm` in a process of its own with the packaged starter
model, jobs submitted through AsyncClient, interactive ones read as streams. From the repository's root, with
vLLM installed (`make env-test`; on a machine without a GPU its CPU build); about five minutes on two cores,
half of it the worker's starts. Every side gets the same trace, from the same seed, in open loop:

    off       fcfs      everything to the engine, first come first served: what a service without a policy does
    on        adaptive  codeyard's policy
    for info  priority  everything to the engine, lanes as vLLM's own priorities

played in the order off on priority on off, each with a fresh worker. Only the policy differs: slots, prefetch
(five times the slots, so that off has a queue inside the engine) and the model are the same.

Reported: interactive time to first token as the reader sees it and as the worker has it, time per token, gaps
between chunks at the reader, bulk tokens per second; then the targets of docs/scheduling.md. What other programs
took of the machine is in the output: engine, servers and this reader need two cores for themselves.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from loadtest.flood_machine import describe
from loadtest.flood_report import OFF, ON, Summary, Target, as_json, markdown, summarize, targets, terminal_table
from loadtest.flood_side import Place, SideRun, Standing, run_side
from loadtest.flood_trace import Planned, flood, interactive_until_s
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from codeyard.shared.errors import FleetError

TESTS = Path(__file__).parents[1] / "tests"
PRIORITY = "priority"
ORDER = (OFF, ON, PRIORITY, ON, OFF)
BUSY_CORES = 0.2  # used by other programs: worth a warning
LOOK_AHEAD = 4  # times the slots: the most there is
SIDES: dict[str, dict[str, str]] = {
    ON: {"CODEYARD_ADMISSION_POLICY": "adaptive"},
    OFF: {"CODEYARD_ADMISSION_POLICY": "straight", "CODEYARD_ENGINE_SCHEDULING_POLICY": "fcfs"},
    PRIORITY: {"CODEYARD_ADMISSION_POLICY": "straight", "CODEYARD_ENGINE_SCHEDULING_POLICY": "priority"},
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was given. Seconds and tokens; see --help."""

    engine: str
    slots: int
    bulk: int
    interactive: int
    seconds: float
    seed: int
    first_token: float
    per_token: float
    order: tuple[str, ...]
    limit: float

    def environment(self, side: str) -> dict[str, str]:
        """Of the worker of this side."""
        promises = {"interactive": {"first_token_s": self.first_token, "per_token_s": self.per_token}}
        return {
            "CODEYARD_WORKER_ENGINE": self.engine,
            "CODEYARD_WORKER_LOOK_AHEAD": str(LOOK_AHEAD),
            "CODEYARD_ENGINE_MAX_RUNNING": str(self.slots),
            "CODEYARD_ADMISSION_PROMISES": json.dumps(promises),
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
            **SIDES[side],
        }


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.option("--quick", is_flag=True, help="A smaller flood, off and on once each: about two minutes, rough figures.")
@click.option("--engine", type=click.Choice(["vllm", "simulated"]), default="vllm", show_default=True)
@click.option("--slots", default=64, show_default=True, type=click.IntRange(1, 1_024), help="Jobs in the engine.")
@click.option("--bulk", type=click.IntRange(1, 100_000), help="Bulk jobs of a round. [default: 1000; quick: 400]")
@click.option("--interactive", type=click.IntRange(1, 10_000), help="Interactive jobs. [default: 50; quick: 20]")
@click.option("--seconds", type=click.FloatRange(1, 600), help="Length of the trace. [default: 18; quick: 8]")
@click.option("--seed", default=1, show_default=True)
@click.option("--first-token", default=0.3, show_default=True, help="Promise to interactive jobs, s.")
@click.option("--per-token", default=0.04, show_default=True, help="Promise to interactive jobs, s.")
@click.option("--limit", default=180.0, show_default=True, help="Give up a round after so many seconds.")
@click.option("--broker", "broker_url", metavar="URL", help="A RabbitMQ to use. [default: one of its own]")
@click.option("--store", "store_url", metavar="URL", help="A Redis to use. [default: one of its own]")
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), help="Where its own servers keep their files, on disk."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
@click.option("--markdown", "markdown_path", type=click.Path(dir_okay=False, path_type=Path), help="The tables there.")
def main(
    quick: bool,
    bulk: int | None,
    interactive: int | None,
    seconds: float | None,
    broker_url: str | None,
    store_url: str | None,
    data: Path | None,
    json_path: Path | None,
    markdown_path: Path | None,
    **rest: Any,
) -> None:
    options = Options(
        bulk=bulk or (400 if quick else 1_000),
        interactive=interactive or (20 if quick else 50),
        seconds=seconds or (8.0 if quick else 18.0),
        order=(OFF, ON) if quick else ORDER,
        **rest,
    )
    console = Console(stderr=True)
    trace = flood(bulk=options.bulk, interactive=options.interactive, seconds=options.seconds, seed=options.seed)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="codeyard-flood-", dir=data) as folder,
            servers(Path(folder), broker_url, store_url) as urls,
        ):
            runs = asyncio.run(_run_all(options, trace, urls, Path(folder), console))
    except FleetError as error:
        raise click.ClickException(str(error)) from None
    summaries = {
        side: summarize(side, [run for run in runs if run.side == side], interactive_until_s(trace))
        for side in dict.fromkeys((ON, OFF, *options.order))
    }
    aims, notes = targets(summaries), _notes(options, trace, summaries)
    out = Console()
    for table in terminal_table(summaries, aims):
        out.print(table)
    for note in notes:
        out.print(note, highlight=False)
    _write(json_path, markdown_path, options, summaries, aims, notes)
    if wrong := [line for run in runs for line in run.not_succeeded]:
        raise click.ClickException(f"{len(wrong)} jobs did not succeed: {', '.join(wrong[:5])}")


async def _run_all(
    options: Options, trace: Sequence[Planned], urls: tuple[str, str], folder: Path, console: Console
) -> list[SideRun]:
    name = f"flood-{uuid.uuid4().hex[:8]}"
    runs = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for number, side in enumerate(options.order, 1):
            title = f"{number}/{len(options.order)} {side}"
            console.print(f"{title}: starts its worker", highlight=False)
            task = progress.add_task(f"{title}: worker starts, warms up", total=len(trace))

            def say(at: Standing, title: str = title, task: Any = task) -> None:
                waits = at.interactive_submitted - at.interactive_begun
                told = f"{title}: {at.at_s:3.0f} s, {waits} interactive jobs without a token"
                progress.update(task, completed=at.interactive_begun + at.bulk_done, description=told)

            run = await run_side(
                side,
                Place(*urls, namespace=f"{name}-{number}", folder=folder / str(number)),
                options.environment(side),
                trace,
                warm_up_jobs=2 * options.slots,
                limit_s=options.limit,
                say=say,
            )
            progress.remove_task(task)
            one = summarize(side, [run], interactive_until_s(trace))
            console.print(
                f"{title}: first token p99 {one.first_p99_s or 0.0:.2f} s, bulk {one.bulk_tokens_s:,.0f} tokens/s, "
                f"{one.jobs} jobs; the worker took {run.start_s:.0f} s to start",
                highlight=False,
            )
            runs.append(run)
    return runs


@contextlib.contextmanager
def servers(folder: Path, broker_url: str | None, store_url: str | None) -> Iterator[tuple[str, str]]:
    """URLs of broker and store; those not given are started on free ports and end with the context."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))  # the tests' servers: free ports, own folders, no process left behind
    from support.servers import RabbitServer, RedisServer, ServerFailed

    with contextlib.ExitStack() as stack:
        try:
            for server, option in ((RabbitServer, broker_url), (RedisServer, store_url)):
                if option is None and not server.available():
                    raise FleetError(f"there is no {server.name} here: `make services`, or --broker and --store")
            broker = broker_url or stack.enter_context(RabbitServer(folder / "rabbitmq")).url
            store = store_url or stack.enter_context(RedisServer(folder / "redis")).url
        except ServerFailed as error:
            raise FleetError(str(error)) from None
        yield broker, store


def _notes(options: Options, trace: Sequence[Planned], summaries: Mapping[str, Summary]) -> list[str]:
    """What a reader must know of the figures."""
    until_s = interactive_until_s(trace)
    notes = [
        f"{describe()}. {summaries[ON].engine}, {options.slots} slots, "
        f"prefetch {(1 + LOOK_AHEAD) * options.slots} a lane.",
        f"Each round: {len(trace)} jobs in {options.seconds:g} s (seed {options.seed}), the last interactive one at "
        f"{until_s:.1f} s. Promised to interactive: {options.first_token:g} s to the first token, "
        f"{options.per_token:g} s per token. Order: {' '.join(options.order)}.",
    ]
    if early := [side for side, summary in summaries.items() if not summary.outlasted]:
        notes.append(
            f"The flood was over before the last interactive job came ({', '.join(early)}): too small for this "
            "machine, give more --bulk."
        )
    if max(summary.late_s for summary in summaries.values()) > 0.1:
        notes.append("This process was held up: a job was submitted more than 0.1 s after its time.")
    others = [cores for summary in summaries.values() for cores in summary.other_cores if cores is not None]
    if max(others, default=0.0) > BUSY_CORES:
        notes.append(f"Other programs used up to {max(others):.1f} cores: these figures are theirs, too.")
    return notes


def _write(
    json_path: Path | None,
    markdown_path: Path | None,
    options: Options,
    summaries: Mapping[str, Summary],
    aims: Sequence[Target],
    notes: Sequence[str],
) -> None:
    if json_path is not None:
        about = {"what": "loadtest.bench_flood", "at": time.strftime("%FT%TZ", time.gmtime()), "machine": describe()}
        body = as_json(summaries, aims, {**about, "options": asdict(options), "notes": list(notes)})
        json_path.write_text(json.dumps(body, indent=1) + "\n")
    if markdown_path is not None:
        markdown_path.write_text(markdown(summaries, aims, notes))


if __name__ == "__main__":
    main()

"""`codeyard drill`: break a fleet on purpose, and prove that no accepted job was lost, doubled or wrong."""

import asyncio
import importlib.util
import json
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from codeyard.cli.jobs import as_json as as_json_option
from codeyard.cli.options import EXIT_FAILED, connection, fail, one_line_errors, settings_of
from codeyard.shared.envelope import new_nonce

KINDS = (  # of plan.FaultKind, which is not imported before it is needed
    *("kill_worker", "kill_gateway", "kill_producer", "pause_worker", "fill_queue"),
    *("restart_broker", "restart_store", "cut_broker", "cut_store", "delay_broker", "delay_store"),
)


@click.command()
@connection
@click.option("--jobs", "num_jobs", type=click.IntRange(min=10), default=5_000, show_default=True)
@click.option("--faults", "num_faults", type=click.IntRange(min=0), default=22, show_default=True)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of jobs and faults; the same seed plans the same. [default: drawn]"
)
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KINDS), metavar="KIND", help="Only this fault; again for more."
)
@click.option("--engine", type=click.Choice(["simulated", "vllm"]), default="simulated", show_default=True)
@click.option("--model", default="starter", show_default=True, help="ALIAS or ALIAS=DIRECTORY_OR_HUGGING_FACE_ID.")
@click.option("--embedded", is_flag=True, help="On the embedded file, also where RabbitMQ and Redis are installed.")
@click.option("--against", is_flag=True, help="Your own fleet at --broker and --store: start only producers.")
@click.option("--workers", type=click.IntRange(1, 16), help="[default: 3; with vllm 1]")
@click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the timeline to this PNG."
)
@as_json_option
@one_line_errors
def drill(
    num_jobs: int,
    num_faults: int,
    seed: int | None,
    kinds: tuple[str, ...],
    engine: str,
    model: str,
    embedded: bool,
    against: bool,
    workers: int | None,
    plot_path: Path | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Break a fleet on purpose and audit what became of every job.

    Starts a fleet of its own: RabbitMQ and Redis if their programs are installed (else the embedded file),
    workers, gateways, and producers that submit jobs whose answers are known. Then, on a schedule drawn from
    the seed, kills workers, gateways and producers with -9, stops workers past their lease, fills a queue,
    kills and restarts RabbitMQ and Redis, cuts and delays links. At the end it reads every accepted job back:
    accepted = succeeded + failed + expired + cancelled, nothing lost, duplicated or wrong, each stream its
    result. Status 0 only if so, and if the fleet came back after every fault.

    Kinds of faults: kill_worker, kill_gateway, kill_producer, pause_worker, fill_queue, restart_broker,
    restart_store, cut_broker, cut_store, delay_broker, delay_store.

    \b
    codeyard drill                                     5,000 jobs, 22 faults, about two minutes
    codeyard drill --jobs 100000 --faults 200 --seed 1 the long one
    codeyard drill --kind kill_worker --faults 5       one thing at a time
    codeyard drill --plot drill.png --json             for a report
    codeyard drill --engine vllm --jobs 200            with real vLLM on this machine

    \b
    Against your own staging fleet: nothing of it is touched. Only the drill's own producers are killed and
    their links cut; workers, servers and gateways are yours to break meanwhile. Its jobs stay in its store.
      codeyard drill --against --broker amqp://... --store redis://... --namespace staging --model coder
    The known answers are those of simulated workers; with real ones say --engine vllm.
    """
    from codeyard.cli.drill.fleet import Size, Wish
    from codeyard.cli.drill.plan import FaultKind
    from codeyard.cli.drill.run import run_drill
    from codeyard.cli.drill.servers import RabbitServer, RedisServer
    from codeyard.cli.drill.view import as_json as report_as_json
    from codeyard.cli.drill.view import plot, print_report, progress

    _check_installed(engine, against, plot_path)
    if against and not (where["broker_url"] and where["store_url"] and where["namespace"]):
        fail("--against needs --broker, --store and --namespace of the fleet, so that none is met by accident")
    if not against and (where["broker_url"] or where["store_url"] or where["namespace"]):
        fail("--broker, --store and --namespace are for --against; without it the drill starts its own fleet")
    real = not against and not embedded and RabbitServer.available() and RedisServer.available()
    with tempfile.TemporaryDirectory(prefix="codeyard-drill-") as folder:
        if not against:
            url = f"sqlite:///{Path(folder) / 'yard.db'}"
            where |= {"broker_url": url, "store_url": url, "namespace": f"drill-{new_nonce()[:8]}"}
        wish = Wish(
            settings=settings_of(**where),
            folder=Path(folder),
            namespace=f"drill-{new_nonce()[:8]}" if against else str(where["namespace"]),
            seed=random.randrange(1_000_000) if seed is None else seed,
            num_jobs=num_jobs,
            real=real,
            against=against,
            engine=engine,
            model=model,
            size=Size(workers=workers or (1 if engine == "vllm" else 3)),
        )
        chosen = [FaultKind(kind) for kind in kinds] or None
        with progress(quiet=as_json) as say, _in_silence():
            report = asyncio.run(run_drill(wish, num_faults, chosen, say))
    if plot_path is not None:
        plot(report, plot_path)
    if as_json:
        click.echo(json.dumps(report_as_json(report)))
    else:
        print_report(report)
    if not report.good:
        sys.exit(EXIT_FAILED)


@contextmanager
def _in_silence() -> Iterator[None]:
    """What the clients log of the servers' absence is what the drill is about."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="aio_pika")  # of links it gave up
            yield
    finally:
        logging.disable(logging.NOTSET)


def _check_installed(engine: str, against: bool, plot_path: Path | None) -> None:
    wanted = [] if against else [("fastapi", "gateway"), ("uvicorn", "gateway"), ("httpx", "gateway")]
    if engine == "vllm" and not against:
        wanted.append(("vllm", "vllm"))
    if plot_path is not None:
        wanted.append(("matplotlib", "simulate"))
    for module, extra in wanted:
        if importlib.util.find_spec(module) is None:
            fail(f"the drill needs {module}: pip install 'codeyard[{extra}]'")

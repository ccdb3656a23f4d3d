"""Does anything grow? An hour at a steady rate, every process measured from outside.

    python -m loadtest.soak [--minutes 60] [--rate 20] [--warm-up 10] [--json soak.json] [--plot soak.png]

From the repository's root, with the services installed (`make services`); Linux. Starts a fleet of its own:
RabbitMQ, Redis, a gateway, two workers with the simulated engine. Sends jobs of every kind through the gateway
(polled, waited for, followed, cut and resumed, abandoned, repeated, OpenAI chats, cancelled, failed, expired), each
with an answer that is known. Every ten seconds it reads of each process the memory (RSS, and what is its own alone),
descriptors, threads and tasks; of the servers data, queue depth and connections.

After the warm-up, and at the end, the load rests until nothing is under way. The status is 0 only if every job ended
as it had to, RSS of gateway and workers grew by less than 2 % (medians of the first and last fifth after the
warm-up, and along a fitted line), and descriptors, threads and tasks did not grow: neither under load, beyond the
noise of the jobs in flight, nor at rest.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import click
import httpx
import redis.asyncio
from loadtest.flood_machine import CpuMeter, describe
from loadtest.soak_load import FAILING, HANGING, MODEL, Ledger, Load
from loadtest.soak_verdict import FEWEST, Growth, Sample, growths, quietest
from loadtest.soak_view import as_json, plot, table
from loadtest.soak_watch import Around, Watch, Watched
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from codeyard.cli.drill.servers import RabbitServer, RedisServer, free_port
from codeyard.cli.processes import Child
from codeyard.shared.connect import open_broker
from codeyard.shared.errors import FleetError
from codeyard.shared.job import Lane
from codeyard.shared.settings import Settings, load
from codeyard.shared.topology import Topology

NUM_WORKERS = 2
RETENTION_S = LONGEST_RUN_S = 60.0  # a record ends three minutes after its job began: the store comes to rest, too
REST_LOOKS, REST_LOOK_S = 12, 1.0  # of which the quietest counts: connections close within seconds
TOLD_S = 60.0  # between lines where there is no terminal
ANSWER_S = 30.0  # for a process' metrics
GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command was given. `rate` in jobs a second; the minutes contain the warm-up."""

    minutes: float
    warm_up_s: float
    rate: float
    every_s: float  # between looks
    profile: bool


@dataclass(slots=True)
class Fleet:
    """A gateway and workers, and the servers they use."""

    settings: Settings
    url: str
    processes: list[Watched]
    rabbitmq: RabbitServer
    redis: RedisServer

    @property
    def ours(self) -> list[str]:
        return [one.name for one in self.processes if one.metrics is not None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a soak found. `around` and `samples` in the order of time."""

    plan: Plan
    machine: str
    other_cores: float | None  # that other programs used meanwhile
    ledger: Ledger
    growths: list[Growth]
    samples: dict[str, list[Sample]]
    around: list[Around]
    missed_looks: int = 0

    @property
    def good(self) -> bool:
        return self.ledger.balanced and all(growth.kept is not False for growth in self.growths)


Say = Callable[[str, float], None]
"""What it does now, and how much of the time is over, in [0, 1]."""


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.option("--minutes", default=60.0, show_default=True, type=click.FloatRange(0.5, 10_080), help="With warm-up.")
@click.option("--rate", default=20.0, show_default=True, type=click.FloatRange(0.1, 1_000), help="Jobs a second.")
@click.option("--warm-up", "warm_up", type=click.FloatRange(0), help="Minutes. [default: 10, at most a third]")
@click.option(
    "--every", default=10.0, show_default=True, type=click.FloatRange(0.5, 600), help="Seconds between looks."
)
@click.option("--profile", is_flag=True, help="Workers trace their allocations: to find a leak, not to measure.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Where servers keep their files.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="And a picture there.")
def main(
    minutes: float,
    rate: float,
    warm_up: float | None,
    every: float,
    profile: bool,
    data: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    warm_up_s = 60 * (min(10.0, minutes / 3) if warm_up is None else warm_up)
    if 60 * minutes - warm_up_s < FEWEST * every:
        raise click.UsageError(f"too short: less than {FEWEST} samples would be left after the warm-up")
    trouble: BaseException | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="codeyard-soak-", dir=data) as folder:
            report = asyncio.run(_told(Path(folder), Plan(minutes, warm_up_s, rate, every, profile)))
    except* FleetError as several:  # out of the groups of tasks that they ended
        trouble = several
    if trouble is not None:
        while isinstance(trouble, BaseExceptionGroup):
            trouble = trouble.exceptions[0]
        raise click.ClickException(str(trouble))
    out = Console()
    out.print(table(report.growths))
    ledger = report.ledger
    out.print(
        f"{ledger.sent.total()} jobs at {rate:g}/s in {minutes:g} min: {ledger.ended.total()} ended as they had to, "
        f"{ledger.num_wrong} did not, {ledger.in_flight} unknown. {report.machine}.",
        highlight=False,
    )
    for line in ledger.wrong:
        out.print(f"  {line}", markup=False, highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(report), indent=1) + "\n")
    if plot_path is not None:
        plot(report, plot_path)
    out.print("[green]nothing grows[/]" if report.good else "[red]NOT GOOD[/]")
    sys.exit(0 if report.good else 1)


async def _told(folder: Path, plan: Plan) -> Report:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, told_s = progress.add_task("the fleet starts", total=1.0), 0.0

        def say(doing: str, share: float) -> None:
            nonlocal told_s
            progress.update(bar, description=doing, completed=share)
            if not console.is_terminal and time.monotonic() >= told_s:
                told_s = time.monotonic() + TOLD_S
                console.print(f"{time.strftime('%H:%M:%S')} {share:4.0%} {doing}", highlight=False)

        say("the fleet starts", 0.0)
        async with AsyncExitStack() as stack:
            fleet = await _start(stack, folder, profile=plan.profile)
            return await _soak(stack, fleet, plan, say)


async def _soak(stack: AsyncExitStack, fleet: Fleet, plan: Plan, say: Say) -> Report:
    meter, load_of = CpuMeter(), Load(fleet.url, fleet.settings.namespace)
    watch = await _watch(stack, fleet, await load_of.first_revision())
    began_s, length_s = time.monotonic(), 60 * plan.minutes

    async def sent_until(end_s: float) -> None:
        """Load and a look every so often; then what the processes hold at rest."""
        ends = asyncio.Event()

        async def look() -> None:
            while (at_s := time.monotonic() - began_s) < end_s:
                await watch.look(at_s, load_of.ledger.in_flight)
                told = {name: watch.samples[name][-1] for name in fleet.ours if name in watch.samples}
                newest = ", ".join(f"{name} {one.rss_bytes / 2**20:.1f}" for name, one in told.items())
                ledger = load_of.ledger
                say(f"{ledger.sent.total()} jobs, {ledger.num_wrong} wrong; RSS, MiB: {newest}", at_s / length_s)
                await asyncio.sleep(min(plan.every_s, max(0.0, end_s - (time.monotonic() - began_s))))
            ends.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(look(), name="look")
            tasks.create_task(load_of.send(rate=plan.rate, until=ends.is_set), name="load")

    async def at_rest() -> dict[str, Sample]:
        say("at rest", min(1.0, (time.monotonic() - began_s) / length_s))
        looks = []
        for _ in range(REST_LOOKS):
            await asyncio.sleep(REST_LOOK_S)
            with suppress(httpx.HTTPError):  # the others count
                looks.append(await watch.now(time.monotonic() - began_s))
        if not looks:
            raise FleetError("no process told of its tasks while the load was at rest")
        return {name: quietest([look[name] for look in looks]) for name in looks[0]}

    await sent_until(plan.warm_up_s)
    before = await at_rest()
    warm_s = time.monotonic() - began_s
    await sent_until(length_s)
    after = await at_rest()
    return Report(
        plan=replace(plan, warm_up_s=warm_s),
        machine=describe(),
        other_cores=meter.others(),
        ledger=load_of.ledger,
        growths=growths(watch.samples, (before, after), warm_up_s=warm_s, judged=fleet.ours),
        samples=watch.samples,
        around=watch.around,
        missed_looks=watch.missed,
    )


async def _watch(stack: AsyncExitStack, fleet: Fleet, revision: str) -> Watch:
    topology = Topology(fleet.settings.namespace)
    broker = await open_broker(fleet.settings.broker, topology)
    stack.push_async_callback(broker.close)
    store = redis.asyncio.from_url(fleet.redis.url)
    stack.push_async_callback(store.aclose)
    return Watch(
        processes=fleet.processes,
        http=await stack.enter_async_context(_bare_client()),
        store=store,
        broker=broker,
        store_port=fleet.redis.port,
        broker_port=fleet.rabbitmq.port,
        queues=[topology.job_queue(revision, lane) for lane in Lane],
        dead_queue=topology.dead_queue,
    )


def _bare_client() -> httpx.AsyncClient:
    """It keeps no connection: what is counted shall not be its own."""
    return httpx.AsyncClient(trust_env=False, headers={"Connection": "close"}, timeout=ANSWER_S)


async def _start(stack: AsyncExitStack, folder: Path, *, profile: bool) -> Fleet:
    """Everything ends with the stack, and with this process. Raises FleetError with the last lines of what did not."""
    rabbitmq, own_redis = RabbitServer(folder / "rabbitmq"), RedisServer(folder / "redis")
    for server in (rabbitmq, own_redis):
        if not server.available():
            raise FleetError(f"there is no {server.name} here: `make services`")
        stack.push_async_callback(asyncio.to_thread, server.stop)
    await asyncio.gather(*(asyncio.to_thread(server.start) for server in (rabbitmq, own_redis)))
    settings = _settings(folder, rabbitmq.url, own_redis.url, profile=profile)
    processes = [Watched("redis", own_redis.pid), Watched("rabbitmq", rabbitmq.pid)]
    for number in range(NUM_WORKERS):
        port = free_port()
        own = {"metrics_port": port, "memory_profile_file": folder / f"memory-profile-{number}.json"}
        one = settings.model_copy(update={"worker": settings.worker.model_copy(update=own)})
        worker = await _child(stack, folder, f"worker {number}", "worker", one)
        processes.append(Watched(worker.name, _pid(worker), f"http://127.0.0.1:{port}/metrics"))
    gateway = await _child(stack, folder, GATEWAY, GATEWAY, settings)
    processes.insert(0, Watched(GATEWAY, _pid(gateway), f"{gateway.ready}/metrics"))
    return Fleet(settings, gateway.ready, processes, rabbitmq, own_redis)


async def _child(stack: AsyncExitStack, folder: Path, name: str, command: str, settings: Settings) -> Child:
    config = folder / f"{name}.yaml"
    config.write_text(settings.model_dump_json())  # JSON is YAML
    child = Child(name, (command, "--config", str(config)), {}, command, keeps_settings=False)
    await child.start()
    stack.push_async_callback(child.stop)
    return child


def _pid(child: Child) -> int:
    assert child.process is not None
    return child.process.pid


def _settings(folder: Path, broker_url: str, store_url: str, *, profile: bool) -> Settings:
    shipped = resources.files("codeyard.worker") / "data" / "vllm-h200-qwen2.5-7b.json"
    latencies = folder / "table.json"
    faults = {FAILING: "fail", HANGING: "hang"}
    latencies.write_text(json.dumps({**json.loads(shipped.read_text()), "faults": faults}))
    return load(
        None,
        {
            "namespace": f"soak-{time.time_ns() // 10**9}",
            "auth": {"mode": "off"},  # on loopback, for this run
            "log_level": "WARNING",
            "broker": {"url": broker_url},
            "store": {"url": store_url, "retention_s": RETENTION_S, "longest_run_s": LONGEST_RUN_S},
            "gateway": {"port": 0},
            "worker": {"engine": "simulated", "model": f"{MODEL}=org/{MODEL}", "memory_profile": profile},
            "engine": {"latency_table": latencies},
        },
    )


if __name__ == "__main__":
    main()

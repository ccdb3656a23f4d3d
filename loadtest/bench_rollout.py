"""A rollout under load: what jobs wait before, during and after a new revision goes live.

    python -m loadtest.bench_rollout [--engine simulated] [--rate 50] [--workers 2]
    python -m loadtest.bench_rollout --engine vllm --rate 5 --workers 1

From the repository's root. Real RabbitMQ and Redis of its own, workers as processes, jobs submitted at a steady
rate in open loop. After ten seconds the alias is rolled out to another revision (simulated: one that takes five
seconds to load; vllm and torch: a copy of the packaged starter model with other weights), and ten seconds after the
rollout is done it ends. Latency is from submission to the end, both by the store's clock.

Wanted: no job failed, lost, or answered by another revision than the one it was pinned to; p99 from the rollout's
begin to its end at most 2 times the p99 before.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
from loadtest.bench_flood import servers
from loadtest.flood_machine import describe
from rich.console import Console
from rich.table import Table

from codeyard.producer import AsyncClient
from codeyard.producer.async_client import AsyncJob
from codeyard.shared.alias import Phase
from codeyard.shared.errors import FleetError
from codeyard.shared.record import JobStatus, State
from codeyard.shared.rollout import begin, change
from codeyard.shared.settings import Settings, load

AROUND_S = 10.0  # of load before and after
PATIENCE_S = 300.0
LOOK_S = 0.2


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.option("--engine", type=click.Choice(["simulated", "torch", "vllm"]), default="simulated", show_default=True)
@click.option("--rate", default=50.0, show_default=True, type=click.FloatRange(0.1, 1_000), help="Jobs per second.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 16))
@click.option("--tokens", default=40, show_default=True, type=click.IntRange(1, 1_000), help="Of each answer, at most.")
def main(engine: str, rate: float, workers: int, tokens: int) -> None:
    with tempfile.TemporaryDirectory(prefix="codeyard-rollout-") as folder:
        first, second = _models(engine, Path(folder))
        with servers(Path(folder), None, None) as (broker_url, store_url):
            settings = _settings(engine, first, broker_url, store_url)
            statuses, began_at, ended_at = asyncio.run(
                _run(settings, second, workers=workers, rate=rate, tokens=tokens, folder=Path(folder))
            )
    wrong = [one for one in statuses if one.state is not State.SUCCEEDED or one.result is None]
    mixed = [one for one in statuses if one.result is not None and one.result.revision != one.revision]
    spans = {
        "before": [one for one in statuses if one.created_at < began_at],
        "during": [one for one in statuses if began_at <= one.created_at < ended_at],
        "after": [one for one in statuses if one.created_at >= ended_at],
    }
    table = Table("", "jobs", "p50, s", "p99, s", "longest, s")
    for name, jobs in spans.items():
        took_s = sorted(job.finished_at - job.created_at for job in jobs if job.finished_at is not None)
        table.add_row(name, str(len(jobs)), *(f"{_quantile(took_s, share):.3f}" for share in (0.5, 0.99, 1.0)))
    ratio = _p99(spans["during"]) / _p99(spans["before"])
    out = Console()
    out.print(table)
    out.print(
        f"{describe()}. {engine}, {workers} workers, {rate:g} jobs/s; the rollout took {ended_at - began_at:.1f} s. "
        f"Not succeeded: {len(wrong)}; of another revision than pinned: {len(mixed)}; revisions: "
        f"{', '.join(dict.fromkeys(one.revision for one in statuses))}; p99 during / before: {ratio:.2f} "
        f"({'kept' if ratio <= 2 else 'missed'}: at most 2).",
        highlight=False,
    )
    sys.exit(1 if wrong or mixed else 0)


def _models(engine: str, folder: Path) -> tuple[str, str]:
    if engine == "simulated":
        return "org/coder-1", "org/coder-2"
    from safetensors.torch import load_file, save_file

    from codeyard.worker.engines.models import starter_directory

    second = folder / "coder-2"
    shutil.copytree(starter_directory(), second)
    weights = load_file(second / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, second / "model.safetensors", {"format": "pt"})
    return str(starter_directory()), str(second)


def _settings(engine: str, model: str, broker_url: str, store_url: str) -> Settings:
    simulated = {"simulated_bytes": 1_000, "simulated_load_s": 5.0}
    return load(
        None,
        {
            "namespace": "rollout",
            "broker": {"url": broker_url},
            "store": {"url": store_url},
            "worker": {"engine": engine, "model": f"coder={model}"},
            "engine": {"max_running": 32, "enforce_eager": True, **(simulated if engine == "simulated" else {})},
        },
    )


async def _run(
    settings: Settings, second: str, *, workers: int, rate: float, tokens: int, folder: Path
) -> tuple[list[JobStatus], float, float]:
    """Every job's end; when the rollout began and was over, by the wall clock that the store shares."""
    console = Console(stderr=True)
    async with AsyncExitStack() as stack:
        console.print(f"{workers} workers start", highlight=False)
        for number in range(workers):
            place = folder / f"worker-{number}"
            place.mkdir()
            stack.push_async_callback(_ended, await _worker(settings, place))
        client = await stack.enter_async_context(AsyncClient(settings=settings, timeout_s=10))
        jobs: list[AsyncJob] = []
        asked: dict[str, Any] = {"model": "coder", "sampling": {"max_tokens": tokens}}
        loading = asyncio.create_task(_load(client, rate, jobs, asked))
        await asyncio.sleep(AROUND_S)
        began_at = time.time()
        console.print("the rollout begins", highlight=False)
        await change(client.store, "coder", partial(begin, location=second, rollout_id="bench", percent=100, now=0.0))
        async with asyncio.timeout(PATIENCE_S):
            while await _phase(client) is not Phase.DONE:  # noqa: ASYNC110 - nothing tells but the store
                await asyncio.sleep(LOOK_S)
        ended_at = time.time()
        console.print(f"it is done after {ended_at - began_at:.1f} s", highlight=False)
        await asyncio.sleep(AROUND_S)
        loading.cancel()
        await asyncio.wait([loading])
        return [await client.wait(job.id, PATIENCE_S) for job in jobs], began_at, ended_at


async def _load(client: AsyncClient, rate: float, jobs: list[AsyncJob], asked: dict[str, Any]) -> None:
    """In open loop: a job is submitted when its time has come."""
    zero_s = time.monotonic()

    async def submit(number: int) -> None:
        jobs.append(await client.submit(f"def job_{number}():", **asked))

    async with asyncio.TaskGroup() as tasks:
        for number in range(sys.maxsize):
            await asyncio.sleep(zero_s + number / rate - time.monotonic())
            tasks.create_task(submit(number))


async def _phase(client: AsyncClient) -> Phase | None:
    rollout = (await client.store.aliases())["coder"].rollout
    if rollout is not None and rollout.phase in (Phase.FAILED, Phase.ROLLED_BACK):
        raise FleetError(f"the rollout ended: {rollout.phase}: {rollout.reason}")
    return rollout.phase if rollout is not None else None


async def _worker(settings: Settings, folder: Path) -> asyncio.subprocess.Process:
    config = folder / "worker.yaml"
    config.write_text(settings.model_dump_json())  # JSON is YAML
    with (folder / "worker.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "codeyard.cli.main", "worker", "--config", str(config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        if not (await process.stdout.readline()).startswith(b"worker "):
            raise FleetError(f"the worker did not start:\n{(folder / 'worker.log').read_text()[-2_000:]}")
    return process


async def _ended(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    try:
        async with asyncio.timeout(30):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()


def _p99(jobs: Sequence[JobStatus]) -> float:
    return _quantile(sorted(job.finished_at - job.created_at for job in jobs if job.finished_at is not None), 0.99)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))] if ordered else float("nan")


if __name__ == "__main__":
    main()

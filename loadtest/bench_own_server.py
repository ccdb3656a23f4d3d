"""What queue and store cost: streams through codeyard against vLLM's own OpenAI server, same machine, model and client.

    python -m loadtest.bench_own_server [--rounds 2] [--markdown own_server.md]

From the repository's root, with vLLM and the services installed (`make env-test services`). Two sides, in turns,
each with fresh processes; about four minutes on two cores:

    vllm      `vllm serve`: one process answers HTTP, its engine core beside it; nothing is durable
    codeyard  RabbitMQ and Redis (appendfsync always) on disk, `codeyard gateway`, `codeyard worker --engine vllm`

Both get the same `POST /v1/completions` with `stream: true` from this process: first one at a time (low load: the
time to the first token), then 64 at once (tokens per second, gaps between chunks at the reader). The packaged
starter model in float32, greedy, 64 slots.

Wanted: at most 15 ms more to the first token, median at low load; 64 at once at least 85 % of the tokens per second
of vLLM's own server, with gaps of at most 250 ms at p95.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import httpx
from loadtest.bench_flood import servers
from loadtest.flood_machine import CpuMeter, describe
from rich.console import Console
from rich.table import Table

from codeyard.shared.errors import FleetError
from codeyard.worker.engines.models import starter_directory

SLOTS, ALONE, TOGETHER, TOKENS = 64, 40, 64, 128
DTYPE = "float32"  # `vllm serve` 0.32.0 with bfloat16 ends with an illegal instruction on some CPUs with AMX
PATIENCE_S = 180.0
SIDES = ("vllm", "codeyard")


@dataclass(slots=True)
class Run:
    """Seconds; of all rounds of one side."""

    first_s: list[float] = field(default_factory=list)  # one at a time
    first_together_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # 64 at once
    rates: list[float] = field(default_factory=list)  # tokens per second, one for each burst
    others: list[float] = field(default_factory=list)  # cores used by other programs


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1, 10))
@click.option("--markdown", "markdown_path", type=click.Path(dir_okay=False, path_type=Path), help="The table there.")
def main(rounds: int, markdown_path: Path | None) -> None:
    console = Console(stderr=True)
    runs = {side: Run() for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            console.print(f"round {number + 1}/{rounds}: {side}", highlight=False)
            with tempfile.TemporaryDirectory(prefix="codeyard-own-") as folder:
                asyncio.run(_measured(side, Path(folder), runs[side]))
    rows = _rows(runs)
    table = Table("", *SIDES, "codeyard: cost", "wanted")
    for row in rows:
        table.add_row(*row)
    out = Console()
    out.print(table)
    others = max(cores for run in runs.values() for cores in run.others)
    out.print(f"{describe()}. Other programs used up to {others:.2f} cores.", highlight=False)
    if markdown_path is not None:
        lines = [f"| | {' | '.join(SIDES)} | cost | wanted |", "|---|---|---|---|---|"]
        markdown_path.write_text("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n")


def _rows(runs: dict[str, Run]) -> list[tuple[str, ...]]:
    own, ours = runs["vllm"], runs["codeyard"]
    first = [statistics.median(run.first_s) for run in (own, ours)]
    rate = [statistics.median(run.rates) for run in (own, ours)]
    gap50, gap95 = ([_p(run.gaps_s, share) for run in (own, ours)] for share in (0.5, 0.95))
    together = [_p(run.first_together_s, 0.5) for run in (own, ours)]
    return [
        ("first token, one at a time, median", *_ms(first), f"+{(first[1] - first[0]) * 1e3:.1f} ms", "<= 15 ms"),
        ("... p99", *_ms([_p(run.first_s, 0.99) for run in (own, ours)]), "", ""),
        ("64 at once: tokens/s, median", *(f"{one:,.0f}" for one in rate), f"{1 - rate[1] / rate[0]:.0%}", "<= 15 %"),
        ("64 at once: between chunks, p50", *_ms(gap50), "", ""),
        ("64 at once: between chunks, p95", *_ms(gap95), "", "<= 250 ms"),
        ("64 at once: first token, median", *_ms(together), "", ""),
    ]


async def _measured(side: str, folder: Path, run: Run) -> None:
    async with _running(side, folder) as url, httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        for number in range(2):  # what is done for the first time takes longer
            await asyncio.gather(*[_stream(client, f"# warm up {number} {n}\ndef f():") for n in range(TOGETHER)])
        meter = CpuMeter()
        for number in range(ALONE):
            chunks, _ = await _stream(client, f"def alone_{number}(a, b):", tokens=16)
            run.first_s.append(chunks[0])
        for burst in range(3):
            began_s = time.monotonic()
            prompts = [f"def together_{burst}_{n}(items):" for n in range(TOGETHER)]
            seen = await asyncio.gather(*[_stream(client, prompt) for prompt in prompts])
            run.rates.append(sum(tokens for _, tokens in seen) / (time.monotonic() - began_s))
            run.first_together_s += [chunks[0] for chunks, _ in seen]
            run.gaps_s += [later - earlier for chunks, _ in seen for earlier, later in pairwise(chunks)]
        run.others.append(meter.others() or 0.0)


async def _stream(client: httpx.AsyncClient, prompt: str, tokens: int = TOKENS) -> tuple[list[float], int]:
    """When its chunks with text came, from the request; how many tokens it has."""
    body = {
        "model": "starter",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began_s, chunks, used = time.monotonic(), [], 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise FleetError(f"{answer.status_code}: {(await answer.aread()).decode()[:500]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line[6:])
            if "error" in chunk:
                raise FleetError(f"the stream broke off: {chunk['error']}")
            if any(choice["text"] for choice in chunk["choices"]):
                chunks.append(time.monotonic() - began_s)
            used = (chunk.get("usage") or {}).get("completion_tokens", used)
    return chunks or [time.monotonic() - began_s], used


# The sides -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _running(side: str, folder: Path) -> AsyncIterator[str]:
    """The URL of the side's HTTP server, once it answers for the model."""
    port = _free_port()
    with contextlib.ExitStack() as stack:
        processes = []
        if side == "vllm":
            words = ["vllm.entrypoints.openai.api_server", "--model", str(starter_directory()), "--enforce-eager"]
            more = ["--served-model-name", "starter", "--max-num-seqs", str(SLOTS), "--dtype", DTYPE]
            where = ["--host", "127.0.0.1", "--port", str(port)]
            processes.append(await _process(folder, "vllm", *words, *more, *where))
        else:
            broker_url, store_url = stack.enter_context(servers(folder, None, None))
            where = ["--broker", broker_url, "--store", store_url]
            gateway = ["codeyard.cli.main", "gateway", *where, "--port", str(port)]
            processes.append(await _process(folder, "gateway", *gateway))
            processes.append(await _process(folder, "worker", "codeyard.cli.main", "worker", *where))
        try:
            await _answers(f"http://127.0.0.1:{port}", processes, folder)
            yield f"http://127.0.0.1:{port}"
        finally:
            for process in processes:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
            for process in processes:
                try:
                    async with asyncio.timeout(30):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _process(folder: Path, name: str, *words: str) -> asyncio.subprocess.Process:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("CODEYARD_")}
    own = {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "CODEYARD_WORKER_ENGINE": "vllm",
        "CODEYARD_WORKER_MODEL": "starter",
        "CODEYARD_ENGINE_MAX_RUNNING": str(SLOTS),
        "CODEYARD_ENGINE_ENFORCE_EAGER": "true",
        "CODEYARD_ENGINE_DTYPE": DTYPE,
    }
    with (folder / f"{name}.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *words), env={**inherited, **own}, cwd=folder, stdout=log, stderr=log
        )


async def _answers(url: str, processes: Sequence[asyncio.subprocess.Process], folder: Path) -> None:
    until_s, said = time.monotonic() + PATIENCE_S, ""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        while True:
            try:
                await _stream(client, "def ready():", tokens=4)
                return
            except (httpx.TransportError, FleetError) as error:
                said = str(error)
            if time.monotonic() > until_s or any(process.returncode is not None for process in processes):
                raise FleetError(f"it did not start: {said}\n{_ends_of_logs(folder)}")
            await asyncio.sleep(0.5)


def _ends_of_logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-1_500:] for path in folder.glob("*.log"))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _p(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))] if ordered else float("nan")


def _ms(values: Sequence[float]) -> list[str]:
    return [f"{value * 1e3:,.1f} ms" for value in values]


if __name__ == "__main__":
    main()

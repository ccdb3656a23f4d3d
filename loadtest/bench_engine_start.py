"""How long an engine takes to its first answer, by engine, model size and way of reading the weights.

    python -m loadtest.bench_engine_start [--engine vllm --engine torch] [--runs 2] [--megabytes 100]
                                          [--markdown start.md]

From the repository's root. Two models: the packaged starter (7 MB), and a Llama with random weights of the
size asked for, made for the run. Each row is a process of its own, which starts the engine twice:

    first   as a new worker does: with the engine's imports
    next    as a worker does that loads another model

Both from the call to the end of a first answer of 8 tokens; the best of the runs, since whatever else runs
only adds to them. The weights' pages are dropped from the kernel's cache before each start, as after a
reboot. What does not run here is told in the engine's own words. About fifteen minutes on two cores with
everything installed.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import click
from rich.console import Console
from rich.table import Table

from codeyard.shared.errors import FleetError
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import parse_model, starter_directory
from codeyard.worker.engines.select import EngineName, start_engine
from codeyard.worker.warmup import warm_up

FORMATS = {"vllm": ("auto", "dummy", "runai_streamer", "fastsafetensors"), "torch": ("auto", "dummy")}
QUANTIZATIONS: dict[str, tuple[str | None, ...]] = {"vllm": (None,), "torch": (None, "8bit", "4bit")}
HIDDEN, INTERMEDIATE, HEADS = 768, 2_048, 12  # of the made model; its layers follow from the size
BYTES = 2  # of a weight in bf16
PATIENCE_S = 600.0
COLUMNS = ("engine", "model", "weights read as", "first start, s", "next start, s", "")


@dataclass(frozen=True, slots=True)
class Way:
    engine: str
    model: str  # directory
    load_format: str
    quantization: str | None


@dataclass(frozen=True, slots=True)
class Started:
    """Seconds; or why there are none."""

    first_s: float = 0.0
    next_s: float = 0.0
    refused: str = ""


@click.command(help=__doc__)
@click.option("--engine", "engines", multiple=True, type=click.Choice(list(FORMATS)), default=list(FORMATS))
@click.option("--runs", default=2, show_default=True, help="Processes for each row.")
@click.option("--megabytes", default=100, show_default=True, help="Weights of the made model, in bf16.")
@click.option("--markdown", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@click.option("--one", hidden=True, help="A way, as JSON: what the processes of the rows are given.")
def main(engines: tuple[str, ...], runs: int, megabytes: int, markdown: Path | None, one: str | None) -> None:
    if one is not None:
        print(json.dumps(asdict(asyncio.run(start_twice(Way(**json.loads(one)))))), flush=True)
        return
    console = Console()
    rows = []
    with tempfile.TemporaryDirectory(prefix="codeyard-start-") as folder:
        made = make_model(Path(folder) / f"random-{megabytes}-mb", megabytes)
        for way in ways(engines, (starter_directory(), made)):
            rows.append(cells(way, best(asyncio.run(in_own_process(way)) for _ in range(runs))))
            console.print(*rows[-1], sep="  ")
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if markdown is not None:
        lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def ways(engines: tuple[str, ...], models: tuple[Path, ...]) -> Iterator[Way]:
    for engine in engines:
        for model in models:
            for load_format in FORMATS[engine]:
                for quantization in QUANTIZATIONS[engine] if load_format == "auto" else (None,):
                    yield Way(engine, str(model), load_format, quantization)


def make_model(folder: Path, megabytes: int) -> Path:
    """Random weights about so large, with the starter's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": max(1, round(megabytes * 1_000_000 / BYTES / layer)),
    }
    config = AutoConfig.from_pretrained(str(starter_directory()), local_files_only=True, **sizes)
    AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(folder)
    for file in starter_directory().glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


async def in_own_process(way: Way) -> Started:
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest.bench_engine_start", "--one", json.dumps(asdict(way))),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(PATIENCE_S):
        said, _ = await program.communicate()
    told = [json.loads(line) for line in said.splitlines() if line.startswith(b"{")]
    return Started(**told[-1]) if told else Started(refused=f"ended with status {program.returncode}")


async def start_twice(way: Way) -> Started:
    try:
        return Started(await start(way), await start(way))
    except FleetError as error:
        return Started(refused=" ".join(str(error).split()))


async def start(way: Way) -> float:
    """Seconds to the first answer. Closes the engine."""
    drop_pages(Path(way.model))
    source = parse_model(f"model={way.model}")
    settings = EngineSettings(load_format=way.load_format, quantization=way.quantization, enforce_eager=True)
    began_s = time.monotonic()
    engine = await start_engine(cast("EngineName", way.engine), source, settings)
    await warm_up(engine)
    took_s = time.monotonic() - began_s
    await engine.close()
    return took_s


def drop_pages(folder: Path) -> None:
    """Of its files, from the kernel's cache: the next reader waits for the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def best(runs: Iterator[Started]) -> Started:
    """The first refusal ends it: the next would be the same."""
    done = []
    for one in runs:
        if one.refused:
            return one
        done.append(one)
    return Started(min(one.first_s for one in done), min(one.next_s for one in done))


def cells(way: Way, started: Started) -> tuple[str, ...]:
    read_as = f"{way.load_format}, {way.quantization}" if way.quantization else way.load_format
    seconds = ("", "") if started.refused else (f"{started.first_s:.1f}", f"{started.next_s:.1f}")
    return way.engine, Path(way.model).name, read_as, *seconds, started.refused.rpartition(f"{way.model}: ")[2][:120]


if __name__ == "__main__":
    main()

"""What arrives, and when: traces as streams of jobs, made lazily from a seed or replayed from a file.

A trace is one or more streams, each with a lane, its tenants, its lengths and the shape of its rate over
the run. Load is a share of what the fleet can do: 1.0 offers as many jobs a second as the workers finish
with every slot full, for the lengths of this very trace. The committed traces, the promises they are
judged by and the seeds are in data/scenarios.json.
"""

import csv
import heapq
import json
import random
from collections.abc import Iterator
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from codeyard.shared.errors import SettingsError
from codeyard.shared.job import Lane
from codeyard.shared.settings import Promise
from codeyard.worker.simulation.engine import SimJob
from codeyard.worker.simulation.latency import LatencyTable, Lengths

SCENARIOS = "scenarios.json"
_MEAN_SAMPLES = 20_000


class Pareto(BaseModel):
    """Heavy-tailed lengths in tokens: P(more than x) = (least / x) ** alpha, clipped at `most`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: PositiveFloat
    least: PositiveInt
    most: PositiveInt


class Stream(BaseModel):
    """One lane's share of a trace. `shape`: [[until, relative rate], ...] over the run, `until` in 0..1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lane: Lane
    share: Annotated[float, Field(gt=0, le=1)]  # of the trace's jobs
    tenants: PositiveInt = 1
    name: str = ""  # of the tenants; else the lane's
    shape: tuple[tuple[float, NonNegativeFloat], ...] = ((1.0, 1.0),)
    prompts: Pareto | None = None  # None: as in the latency table's measurement
    completions: Pareto | None = None


class Trace(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    promises: dict[Lane, Promise]
    streams: Annotated[tuple[Stream, ...], Field(min_length=1)]


class Scenarios(BaseModel):
    """data/scenarios.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    loads: tuple[PositiveFloat, ...]
    tuning_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    traces: dict[str, Trace]


def load_scenarios() -> Scenarios:
    body = (resources.files("codeyard.worker") / "data" / SCENARIOS).read_text()
    return Scenarios.model_validate(json.loads(body))


def run_length_s(trace: Trace, table: LatencyTable, *, workers: int, load: float, jobs: int) -> float:
    """Seconds over which `jobs` arrive at this load."""
    gpu_s_per_job = sum(stream.share * _gpu_s(stream, table) for stream in trace.streams)
    return jobs * gpu_s_per_job / (load * workers)


def arrivals(trace: Trace, table: LatencyTable, *, jobs: int, length_s: float, seed: int) -> Iterator[SimJob]:
    """About `jobs` jobs in order of arrival. Same arguments, same jobs."""
    numbers = count()
    streams = [
        _poisson(stream, table, jobs * stream.share, length_s, random.Random(f"{seed}/{place}"), numbers)
        for place, stream in enumerate(trace.streams)
    ]
    return heapq.merge(*streams, key=lambda job: job.arrived_s)


def replay(path: Path) -> Iterator[SimJob]:
    """Jobs of a CSV with columns arrived_s, lane, tenant, prompt_tokens, completion_tokens and optionally
    max_tokens, in order of arrival. Raises SettingsError naming the first bad line."""
    try:
        with path.open(newline="") as file:
            latest = 0.0
            for number, row in enumerate(csv.DictReader(file)):
                try:
                    arrived_s = float(row["arrived_s"])
                    completion = int(row["completion_tokens"])
                    job = SimJob(
                        number,
                        arrived_s,
                        Lane(row["lane"]),
                        row["tenant"],
                        max(1, int(row["prompt_tokens"])),
                        max(1, completion),
                        int(row.get("max_tokens") or completion),
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise SettingsError(f"{path}, job {number + 1}: {error!r}") from None
                if arrived_s < latest:
                    raise SettingsError(f"{path}, job {number + 1}: arrives before the job above it")
                latest = arrived_s
                yield job
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error}") from None


def _poisson(
    stream: Stream, table: LatencyTable, jobs: float, length_s: float, rng: random.Random, numbers: "count[int]"
) -> Iterator[SimJob]:
    """A Poisson process whose rate follows the stream's shape."""
    pieces = _pieces(stream)
    prompts, completions = stream.prompts or table.prompts, stream.completions or table.completions
    name = stream.name or stream.lane.value
    tenants = [f"{name}-{place}" for place in range(stream.tenants)] if stream.tenants > 1 else [name]
    done = 0.0  # of the stream's jobs, as a share
    place, before = 0, 0.0
    while True:
        done += rng.expovariate(jobs)
        while place < len(pieces) and done > before + pieces[place][2]:
            before += pieces[place][2]
            place += 1
        if place == len(pieces):
            return
        start, end, share = pieces[place]
        arrived_s = length_s * (start + (end - start) * (done - before) / share)
        yield SimJob(
            next(numbers),
            arrived_s,
            stream.lane,
            tenants[int(rng.random() * len(tenants))],
            _draw(prompts, rng),
            _draw(completions, rng),
            completions.most,
        )


def _pieces(stream: Stream) -> list[tuple[float, float, float]]:
    """(start, end, share of the jobs) of each piece of the shape that has any."""
    pieces, start = [], 0.0
    total = 0.0
    for until, rate in stream.shape:
        pieces.append((start, until, (until - start) * rate))
        total += (until - start) * rate
        start = until
    return [(start, end, mass / total) for start, end, mass in pieces if mass > 0]


def _draw(lengths: Lengths | Pareto, rng: random.Random) -> int:
    if isinstance(lengths, Pareto):
        value = lengths.least * rng.paretovariate(lengths.alpha)
    else:
        value = rng.lognormvariate(lengths.mu, lengths.sigma)
    return min(lengths.most, max(lengths.least, int(value)))


def _gpu_s(stream: Stream, table: LatencyTable) -> float:
    """GPU seconds one job of this stream takes with every slot full."""
    prompt, completion = _mean(stream.prompts or table.prompts), _mean(stream.completions or table.completions)
    return completion * table.decode_s[table.slots] / table.slots + prompt * table.prefill_s


def _mean(lengths: Lengths | Pareto) -> float:
    if isinstance(lengths, Lengths):
        return lengths.mean
    rng = random.Random(0)
    return sum(_draw(lengths, rng) for _ in range(_MEAN_SAMPLES)) / _MEAN_SAMPLES

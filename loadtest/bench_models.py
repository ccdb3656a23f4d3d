"""Six models, room for two: what sleep, placement and preloading are worth against a plain LRU.

    python loadtest/bench_models.py                    ten seeds, a table; about a minute
    python loadtest/bench_models.py --seeds 2 --markdown models.md
    python loadtest/bench_models.py --real             one seed on real engines; about twelve minutes

The trace: bursts of jobs, each for one model, drawn by Zipf 1.1 or (0.6 of them) following the one before by
habit; one to three at a time. The worker's memory holds two models awake and two asleep; loading takes 30 s
from disk and 2 s from sleep. Time is virtual: the real ModelCache, place() and Transitions run on a loop
whose clock jumps.

    lru           a model is loaded when a job of it waits, in the order of the waits; the least recently used
                  one stops taking jobs, finishes what it has, and goes to disk. No sleep, no preloading
    lru + sleep   the same; it goes to sleep while host memory lasts
    placed        codeyard's placement instead of the LRU's order, and sleep
    codeyard      and the forecast: what comes next is kept, and made ready if it is nearly certain

With --real the models are six copies of the packaged starter model in the torch engine, on this machine's clock:
everything of the trace is six times as fast, since such a model loads in about five seconds instead of 30, and
there is no tier between awake and disk, as on any machine without a GPU. The policy is told the trace's seconds. A
job generates 100 tokens. The rows are lru and codeyard, played one after the other.

The same jobs, slots and memory for all. Wanted: p99 of the queue wait at most 60 % of the LRU's, loads
(from disk and from sleep) at most 70 %.
"""

import argparse
import asyncio
import random
import shutil
import statistics
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codeyard.shared.job import Lane, Sampling, new_job_id
from codeyard.shared.settings import AdmissionSettings, EngineSettings
from codeyard.shared.telemetry import Metrics
from codeyard.worker.cache.forecast import Transitions
from codeyard.worker.cache.model_cache import Lease, ModelCache, ModelSpec, Tier
from codeyard.worker.engines.models import ModelSource, parse_model, starter_directory
from codeyard.worker.engines.port import Engine, EngineJob
from codeyard.worker.engines.simulated import SimulatedEngine
from codeyard.worker.scheduling.placement import ModelState, place
from codeyard.worker.simulation.virtual_time import run_in_virtual_time

MODELS, HELD, ASLEEP = 6, 2, 2
SIZE = 1_000
LOAD_S, WAKE_S = 30.0, 2.0
SLOTS, JOB_S = 16, 4.0
LENGTH_S = 4 * 3_600.0
ZIPF = 1.1
HABIT = 0.6  # of bursts that come after a certain other model's
LOOK_S = 0.5
POLICIES = ("lru", "lru + sleep", "placed", "codeyard")
REAL_POLICIES = ("lru", "codeyard")
REAL_FASTER, REAL_LENGTH_S, REAL_TOKENS = 6.0, 1_800.0, 100
REAL_MARGIN = 1.2  # of what one engine measures: it grows a little as it works


@dataclass(frozen=True, slots=True)
class Machine:
    """What the models run on. Times of the trace are divided by `faster`."""

    spec: Callable[[str], ModelSpec]
    load: Callable[[ModelSpec], Awaitable[Engine]]
    work: Callable[[Engine], Awaitable[None]]  # one job
    sleeps: bool = True
    faster: float = 1.0
    length_s: float = LENGTH_S
    size: int = SIZE  # bytes of one model, loaded


@dataclass(frozen=True, slots=True)
class Outcome:
    waits_s: list[float]
    loads: int
    from_disk: int
    preloads_used: int


@dataclass(slots=True, eq=False)
class Served:
    """One model: its jobs, and its engine while it is leased."""

    name: str
    spec: ModelSpec
    waiting: deque[float] = field(default_factory=deque)  # arrival times
    running: int = 0
    lease: Lease | None = None
    opening: bool = False
    closing: bool = False
    since_s: float = 0.0
    used_s: float = 0.0  # when a job of it last began
    busy_s: float = 0.0  # when it last had work

    @property
    def serving(self) -> bool:
        return self.lease is not None or self.opening


def trace(seed: int, until_s: float = LENGTH_S, faster: float = 1.0) -> list[tuple[float, str]]:
    """(arrival, model), sorted. `until_s` of it, then divided by `faster`."""
    rng = random.Random(seed)
    names = [f"m{number}" for number in range(MODELS)]
    weights = [1.0 / (rank + 1) ** ZIPF for rank in range(MODELS)]
    follows = dict(zip(names, rng.sample(names, MODELS), strict=True))
    jobs = []
    at_s, last = 0.0, names[0]
    while at_s < until_s:
        name = follows[last] if rng.random() < HABIT else rng.choices(names, weights)[0]
        length_s, rate = rng.uniform(20, 120), rng.uniform(0.5, 3.0)
        jobs += [(at_s + offset, name) for offset in _poisson(rng, rate, length_s)]
        at_s += length_s * rng.uniform(0.4, 1.0)  # bursts overlap now and then
        last = name
    return sorted((at_s / faster, name) for at_s, name in jobs)


def _poisson(rng: random.Random, rate: float, length_s: float) -> Iterator[float]:
    at_s = rng.expovariate(rate)
    while at_s < length_s:
        yield at_s
        at_s += rng.expovariate(rate)


class Worker:
    """The station's loop, without a broker."""

    def __init__(self, policy: str, jobs: Sequence[tuple[float, str]], machine: Machine) -> None:
        self._policy = policy
        self._jobs = jobs
        self._machine = machine
        self._loop = asyncio.get_running_loop()
        self._zero_s = self._loop.time()
        self._metrics = Metrics()
        self._cache = ModelCache(
            machine.load,
            metrics=self._metrics,
            expected_bytes=lambda spec: machine.size,
            budget_bytes=HELD * machine.size,
            host_budget_bytes=ASLEEP * machine.size if machine.sleeps and policy != "lru" else 0,
        )
        names = sorted({name for _, name in jobs})
        self._models = {name: Served(name, machine.spec(name)) for name in names}
        self._habits = Transitions()
        self._preload: tuple[str, asyncio.Task[bool]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._waits_s: list[float] = []

    async def run(self) -> Outcome:
        arriving = asyncio.create_task(self._arrive())
        while not arriving.done() or any(model.waiting or model.running for model in self._models.values()):
            if self._policy.startswith("lru"):
                self._evict_least_recent()
            else:
                self._place()
            self._changed.clear()
            try:
                async with asyncio.timeout(LOOK_S / self._machine.faster):
                    await self._changed.wait()
            except TimeoutError:
                pass
        await arriving
        for model in self._models.values():
            if model.lease is not None:
                await model.lease.release()
        await self._cache.close()
        loads = {tier: self._value("load_seconds_count", tier=tier) for tier in (Tier.DISK, Tier.ASLEEP)}
        used = self._value("preloads_total", outcome="used")
        return Outcome(self._waits_s, round(sum(loads.values())), round(loads[Tier.DISK]), round(used))

    async def _arrive(self) -> None:
        for at_s, name in self._jobs:
            await asyncio.sleep(self._zero_s + at_s - self._loop.time())
            model = self._models[name]
            model.waiting.append(self._zero_s + at_s)
            self._admit(model)
            if model.lease is None:
                self._changed.set()

    def _admit(self, model: Served) -> None:
        while model.lease is not None and not model.closing and model.waiting and model.running < SLOTS:
            now_s = self._loop.time()
            self._waits_s.append(now_s - model.waiting.popleft())
            model.running += 1
            model.used_s = now_s
            self._start(self._run(model, model.lease.engine))

    async def _run(self, model: Served, engine: Engine) -> None:
        await self._machine.work(engine)
        model.running -= 1
        self._admit(model)
        if model.closing and not model.running:
            self._start(self._close(model))

    def _start(self, chore: "asyncio._CoroutineLike[None]") -> None:
        task = self._loop.create_task(chore)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _open(self, model: Served) -> None:
        model.opening, model.since_s = True, self._loop.time()
        self._start(self._opened(model))

    async def _opened(self, model: Served) -> None:
        model.lease = await self._cache.acquire(model.spec, who=model.name, timeout_s=3_600)
        model.opening, model.since_s = False, self._loop.time()
        self._admit(model)
        self._changed.set()

    def _stop(self, model: Served) -> None:
        model.closing = True
        if not model.running:
            self._start(self._close(model))

    async def _close(self, model: Served) -> None:
        if model.lease is not None:
            lease, model.lease = model.lease, None
            await lease.release()
        model.closing = False
        self._changed.set()

    # The two ways to decide ------------------------------------------------------------------------

    def _evict_least_recent(self) -> None:
        waiting = [model for model in self._models.values() if model.waiting and not model.serving]
        for model in sorted(waiting, key=lambda one: one.waiting[0]):
            taken = [one for one in self._models.values() if one.serving]
            leaving = sum(one.closing for one in taken)
            if len(taken) < HELD:
                self._open(model)
            elif not leaving and (here := [one for one in taken if one.lease is not None]):
                self._stop(min(here, key=lambda one: one.used_s))

    def _place(self) -> None:
        now_s = self._loop.time()
        for model in self._models.values():
            if model.waiting or model.running:
                model.busy_s = now_s
                self._habits.has_work(model.name, now_s * self._machine.faster)
        decision = place(
            {name: self._state(model, now_s) for name, model in self._models.items()},
            AdmissionSettings().shares,
            budget_bytes=HELD * self._machine.size,
            forecast=self._habits.forecast(self._models) if self._policy == "codeyard" else None,
        )
        if self._policy == "codeyard" and (decision.open or decision.preload is not None):
            waiting = [name for name, model in self._models.items() if model.waiting]
            self._cache.expect(self._habits.soon(self._models, waiting))
        for name in decision.close:
            if self._models[name].lease is not None and not self._models[name].closing:
                self._stop(self._models[name])
        for name in decision.open:
            self._open(self._models[name])
        if self._preload is not None and (
            self._preload[1].done() or decision.open or decision.preload != self._preload[0]
        ):
            self._preload[1].cancel()
            self._preload = None
        if decision.preload is not None and self._preload is None:
            for name in decision.over:
                if self._models[name].lease is not None and not self._models[name].closing:
                    self._stop(self._models[name])
            spec = self._models[decision.preload].spec
            self._preload = decision.preload, self._loop.create_task(self._cache.preload(spec, over=decision.over))

    def _state(self, model: Served, now_s: float) -> ModelState:
        tier = self._cache.tier(model.name)
        waited_s = now_s - model.waiting[0] if model.waiting else 0.0
        faster = self._machine.faster  # the policy counts in the trace's seconds
        return ModelState(
            depth={Lane.STANDARD: len(model.waiting)},
            oldest_s={Lane.STANDARD: waited_s * faster},
            num_bytes=self._machine.size,
            ready_s={Tier.AWAKE: 0.0, Tier.ASLEEP: WAKE_S, Tier.DISK: LOAD_S}[tier],
            load_s=WAKE_S if self._machine.sleeps else LOAD_S,
            serving=model.serving,
            served_s=0.0 if model.lease is None else (now_s - model.since_s) * faster,
            running={Lane.STANDARD: model.running},
            idle_s=(now_s - model.busy_s) * faster,
        )

    def _value(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(f"codeyard_model_{name}", labels) or 0.0


def simulated() -> Machine:
    settings = EngineSettings(simulated_bytes=SIZE, simulated_load_s=LOAD_S, simulated_wake_s=WAKE_S)

    async def load(spec: ModelSpec) -> Engine:
        return await SimulatedEngine.start(spec.source, spec.settings)

    async def work(_: Engine) -> None:
        await asyncio.sleep(JOB_S)

    return Machine(lambda name: ModelSpec(name, ModelSource(name, f"org/{name}", name), settings), load, work)


async def real(folder: Path) -> Machine:
    """Copies of the starter model, each a model of its own, in the torch engine. Room for two as one measures."""
    from codeyard.worker.engines.torch_engine import TorchEngine

    settings = EngineSettings(max_running=SLOTS)

    def spec(name: str) -> ModelSpec:
        if not (folder / name).exists():
            shutil.copytree(starter_directory(), folder / name)
        return ModelSpec(name, parse_model(f"{name}={folder / name}"), settings)

    async def load(spec: ModelSpec) -> Engine:
        return await TorchEngine.start(spec.source, spec.settings)

    async def work(engine: Engine) -> None:
        sampling = Sampling(max_tokens=REAL_TOKENS, temperature=0.0)
        job = EngineJob(new_job_id(), "def handler(request):", sampling, Lane.STANDARD, stream=False)
        async for _ in engine.generate(job):
            pass

    engine = await load(spec("measured"))
    await work(engine)
    size = round(REAL_MARGIN * (await engine.memory()).device_bytes)
    await engine.close()
    return Machine(spec, load, work, sleeps=False, faster=REAL_FASTER, length_s=REAL_LENGTH_S, size=size)


async def played_on_real(policy: str, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="codeyard-models-") as folder:
        return await played(policy, seed, await real(Path(folder)))


async def played(policy: str, seed: int, machine: Machine) -> Outcome:
    return await Worker(policy, trace(seed, machine.length_s, machine.faster), machine).run()


def _p(waits_s: Sequence[float], share: float) -> float:
    return sorted(waits_s)[min(len(waits_s) - 1, int(share * len(waits_s)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="on the torch engine and this machine's clock")
    parser.add_argument("--seeds", type=int, help="default: 10; with --real 1")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()
    seeds = range(1, (options.seeds or (1 if options.real else 10)) + 1)
    lines = [
        "| policy | queue wait p50 | p99 | of lru | loads | of lru | from disk | preloads used |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base: tuple[float, float] | None = None
    for policy in REAL_POLICIES if options.real else POLICIES:
        if options.real:
            outcomes = [asyncio.run(played_on_real(policy, seed)) for seed in seeds]
        else:
            outcomes = [run_in_virtual_time(played(policy, seed, simulated())) for seed in seeds]
        p50 = statistics.mean(_p(one.waits_s, 0.50) for one in outcomes)
        p99 = statistics.mean(_p(one.waits_s, 0.99) for one in outcomes)
        loads = statistics.mean(one.loads for one in outcomes)
        base = base or (p99, loads)
        disk = statistics.mean(one.from_disk for one in outcomes)
        used = statistics.mean(one.preloads_used for one in outcomes)
        lines.append(
            f"| {policy} | {p50:.1f} s | {p99:.1f} s | {p99 / base[0]:.2f} | {loads:.0f} | {loads / base[1]:.2f} "
            f"| {disk:.0f} | {used:.0f} |"
        )
        print(lines[-1] if len(lines) > 3 else "\n".join(lines), flush=True)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

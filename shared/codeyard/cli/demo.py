"""`codeyard demo`: the main job on real input, from submission over HTTP to an audited ledger.

Gateway and worker run as processes of their own. Among 100 jobs one has a prompt that is too long, one
raises in the engine, one is cancelled after its first token; ten are submitted twice; halfway the worker
is killed with -9 and started again. The exit status is 0 only if every job ended as it should.
"""

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from codeyard.cli.demo_prompts import standard_library_prompts
from codeyard.cli.demo_view import View, print_report
from codeyard.cli.options import EXIT_FAILED, connection, fail, one_line_errors, settings_of
from codeyard.cli.processes import Child
from codeyard.shared.connect import open_store
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import FleetError
from codeyard.shared.job import Lane
from codeyard.shared.record import Record, State
from codeyard.shared.settings import Settings, masked
from codeyard.shared.topology import Topology

NUM_JOBS = 100
NUM_TWICE = 10
KILL_AT = 0.4  # of the jobs final: the worker dies in the middle of a batch
MAX_TOKENS = 48
SLOTS = 16  # several batches, so that there is something to schedule
LIMIT_S = 240.0  # for all jobs to end; then the demo has failed


@dataclass(frozen=True, slots=True)
class Planned:
    """One job of the demo and the state it should end in."""

    key: str
    body: dict[str, Any]
    expected: State
    error: str | None = None


@dataclass(slots=True)
class Run:
    """What the demo saw, for the report."""

    banner: str
    planned: list[Planned]
    ids: dict[str, str] = field(default_factory=dict)  # key -> request id
    attached: int = 0
    identical: int = 0
    killed_running: int = 0
    back_s: float = 0.0
    took_s: float = 0.0
    records: list[Record] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@click.command()
@connection
@click.option("--engine", type=click.Choice(["torch", "vllm"]), default="torch", show_default=True)
@click.option("--model", default="starter", show_default=True, help="ALIAS or ALIAS=DIRECTORY_OR_HUGGING_FACE_ID.")
@one_line_errors
def demo(engine: str, model: str, **where: Any) -> None:
    """Run the main job on this machine and audit the outcome.

    \b
    codeyard demo                                                    embedded, nothing else needed
    codeyard demo --broker amqp://localhost --store redis://localhost  on real servers
    codeyard demo --engine vllm                                      with real vLLM
    """
    import importlib.util

    needed = {"torch": ("torch", "transformers"), "vllm": ("vllm",)}[engine]
    for name in ("fastapi", "uvicorn", "httpx", *needed):
        if importlib.util.find_spec(name) is None:
            fail(f"the demo needs {name}: pip install 'codeyard[gateway,{engine}]'")
    with tempfile.TemporaryDirectory(prefix="codeyard-demo-") as folder:
        embedded = f"sqlite:///{Path(folder) / 'yard.db'}"
        where["broker_url"] = where["broker_url"] or embedded
        where["store_url"] = where["store_url"] or embedded
        where["namespace"] = where["namespace"] or f"demo-{new_nonce()[:8]}"
        run = asyncio.run(_demo(settings_of(**where), engine, model))
    print_report(run)
    if run.wrong:
        sys.exit(EXIT_FAILED)


async def _demo(settings: Settings, engine: str, model: str) -> Run:
    import httpx

    environment = {
        "CODEYARD_BROKER_URL": settings.broker.url,
        "CODEYARD_STORE_URL": settings.store.url,
        "CODEYARD_NAMESPACE": settings.namespace,
        "CODEYARD_AUTH_MODE": "off",  # on loopback, for this run; whatever the settings around it say
        "CODEYARD_STORE_RENEW_S": "0.25",  # a cancel reaches the worker with a renewal
        "CODEYARD_LOG_LEVEL": "WARNING",
        "CODEYARD_ENGINE_MAX_RUNNING": str(SLOTS),
        "CODEYARD_ENGINE_ENFORCE_EAGER": "true",
    }
    worker = Child("worker", ("worker", "--engine", engine, "--model", model), environment, "worker")
    gateway = Child("gateway", ("gateway", "--port", "0"), environment, "gateway")
    started_s = time.monotonic()
    try:
        with View() as view:
            view.say("starting gateway and worker (loading the model)")
            serves, url = await asyncio.gather(worker.start(), gateway.start())
            where = f"broker {masked(settings.broker.url)}, store {masked(settings.store.url)}"
            run = Run(banner=f"{serves}\n{where}", planned=_plan(model.partition("=")[0]))
            view.banner(run.banner)
            async with httpx.AsyncClient(base_url=url, timeout=30) as http:
                await _drive(run, http, worker, view)
                await _replay(run, http)
        await _audit(run, settings)
    finally:
        for child in (gateway, worker):
            if child.process is not None:
                await child.stop()
    run.took_s = time.monotonic() - started_s
    return run


def _plan(model: str) -> list[Planned]:
    lanes = itertools.cycle((Lane.INTERACTIVE, Lane.STANDARD, Lane.BULK, Lane.BULK))
    prompts = standard_library_prompts(NUM_JOBS)
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 0.3}
    planned = [
        Planned(
            f"demo-{n}",
            {"model": model, "prompt": prompt, "lane": next(lanes), "sampling": sampling, "stream": n % 4 == 0},
            State.SUCCEEDED,
        )
        for n, prompt in enumerate(prompts[: NUM_JOBS - 3])
    ]
    standard = {"model": model, "lane": Lane.STANDARD}
    too_long = {**standard, "prompt": "\n\n".join(prompts), "sampling": sampling}
    foreign = {**standard, "prompt": [1, 2, 2**31 - 1], "sampling": sampling}
    endless = {
        **standard,
        "prompt": prompts[0],
        "lane": Lane.INTERACTIVE,
        "sampling": {"max_tokens": 180, "temperature": 0.0, "repetition_penalty": 1.01},
        "stream": True,
    }
    return [
        *planned,
        Planned("demo-too-long", too_long, State.FAILED, "prompt_too_long"),
        Planned("demo-raises", foreign, State.FAILED, "invalid_prompt"),
        Planned("demo-cancelled", endless, State.CANCELLED, "cancelled"),
    ]


async def _drive(run: Run, http: Any, worker: Child, view: View) -> None:
    """Submit, cancel one at its first token, kill and restart the worker, until all are final."""
    view.say("submitting")
    cancelled = next(job for job in run.planned if job.expected is State.CANCELLED)
    await _submit(run, http, cancelled)
    rest = [job for job in run.planned if job is not cancelled]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_cancel_at_first_token(http, run.ids[cancelled.key]))
        for job in rest:
            tasks.create_task(_submit(run, http, job))
    for job in rest[:NUM_TWICE]:
        await _submit(run, http, job, again=True)
    view.say("running")
    killed = False
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                states = await _states(http, run)
                view.update(run.planned, states)
                final = sum(state.final for state in states.values())
                if not killed and final >= KILL_AT * NUM_JOBS:
                    killed = True
                    run.killed_running = sum(state is State.RUNNING for state in states.values())
                    view.say(f"killed the worker with -9 while it held {run.killed_running} jobs; starting another")
                    await worker.kill()
                    started_s = time.monotonic()
                    await worker.start()
                    run.back_s = time.monotonic() - started_s
                    view.say("running")
                if final == len(run.planned):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        run.wrong.append(f"not all jobs were final after {LIMIT_S:g} s\n{worker.last_lines()}")


async def _submit(run: Run, http: Any, job: Planned, *, again: bool = False) -> None:
    answer = await http.post("/v1/jobs", json=job.body, headers={"Idempotency-Key": job.key})
    if answer.status_code not in (200, 202):
        raise FleetError(f"{job.key} was not accepted: {answer.status_code} {answer.text[:300]}")
    body = answer.json()
    if again:
        run.attached += body["attached"] and body["id"] == run.ids[job.key]
    run.ids[job.key] = body["id"]


async def _cancel_at_first_token(http: Any, job_id: str) -> None:
    async with http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        async for line in answer.aiter_lines():
            if line == "event: tokens":
                break
    await http.delete(f"/v1/jobs/{job_id}")


async def _states(http: Any, run: Run) -> dict[str, State]:
    answer = await http.get("/v1/jobs", params={"limit": 1_000})
    found = {one["id"]: State(one["state"]) for one in answer.json()["jobs"]}
    return {job_id: found.get(job_id, State.RESERVED) for job_id in run.ids.values()}


async def _replay(run: Run, http: Any) -> None:
    """The same key and body once more, now that all is final: the same bytes must come back."""
    for job in run.planned[:NUM_TWICE]:
        first = await http.get(f"/v1/jobs/{run.ids[job.key]}")
        replayed = await http.post("/v1/jobs", json=job.body, headers={"Idempotency-Key": job.key})
        same = replayed.status_code == 200 and _result_bytes(first) == _result_bytes(replayed)
        run.identical += same


def _result_bytes(answer: Any) -> bytes:
    return json.dumps(answer.json().get("result")).encode()


async def _audit(run: Run, settings: Settings) -> None:
    """Read every record back from the store and hold it against the plan."""
    store = await open_store(settings.store, Topology(settings.namespace))
    try:
        records: Sequence[Record | None] = await store.read([run.ids[job.key] for job in run.planned])
    finally:
        await store.close()
    for job, record in zip(run.planned, records, strict=True):
        if record is None:
            run.wrong.append(f"{job.key}: lost")
            continue
        run.records.append(record)
        error = record.result.error.code if record.result and record.result.error else None
        if record.state is not job.expected or error != job.error:
            run.wrong.append(f"{job.key}: {record.state} {error or ''}, expected {job.expected} {job.error or ''}")
    if run.attached != NUM_TWICE:
        run.wrong.append(f"{run.attached} of {NUM_TWICE} duplicates attached")
    if run.identical != NUM_TWICE:
        run.wrong.append(f"{run.identical} of {NUM_TWICE} replays were the same byte for byte")

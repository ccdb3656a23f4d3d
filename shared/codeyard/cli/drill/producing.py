"""One producer of a drill, as a process of its own: `python -m codeyard.cli.drill.producing SPEC.json SETTINGS.yaml`.

Submits its share of the planned jobs until each is accepted or refused for good, straight to broker and store
or through gateways, and writes what it was told into its ledger. Killed at any moment and started again with
the same specification it goes on where its ledger ends; what it had submitted without hearing of it, the
idempotency key attaches to.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from codeyard.cli.drill.ledger import ACCEPTED, REFUSED, WRONG, Told, Writer
from codeyard.cli.drill.plan import TENANT, PlannedJob, planned_job
from codeyard.producer import AsyncClient
from codeyard.shared.errors import (
    BrokerUnavailable,
    DeadlineTooSoon,
    FleetError,
    QueueFull,
    StoreUnavailable,
    UnknownModel,
)
from codeyard.shared.settings import Settings, load

GROUP = 64  # submitted in one go
CALLS = 12  # HTTP requests under way at once
PAUSE_S = 0.1  # before what was not accepted is tried again
CALL_S = 10.0
AGAIN_EVERY = 50  # one job in so many is submitted twice
AGAIN_LATER = (BrokerUnavailable, StoreUnavailable, QueueFull, UnknownModel)
READY = "producer"


class Spec(BaseModel):
    """What a producer is to do. Its jobs are `first`, `first + step`, ... below `num_jobs`."""

    model_config = ConfigDict(frozen=True)

    seed: int
    first: int
    step: int
    num_jobs: int
    ledger: Path
    namespace: str
    model: str
    can_fail: bool
    gate: Path  # how far to go for now; see Gate
    gateways: tuple[str, ...] = ()  # none: straight to broker and store

    def jobs(self) -> list[PlannedJob]:
        numbers = range(self.first, self.num_jobs, self.step)
        return [planned_job(self.seed, number, can_fail=self.can_fail) for number in numbers]


@dataclass(slots=True)
class Gate:
    """How much of the drill may be submitted yet, as a share of all jobs in a file: the load is spread over the
    faults, or the last of them would meet a fleet with nothing to do."""

    path: Path
    num_jobs: int

    def open_to(self, share: float) -> None:
        """Whole or not at all: a reader never finds half a number."""
        written = self.path.with_suffix(".new")
        written.write_text(repr(share))
        written.replace(self.path)

    def lets_through(self, job: PlannedJob) -> bool:
        return job.number < float(self.path.read_text()) * self.num_jobs


async def produce(spec: Spec, settings: Settings) -> None:
    """Return when every job of `spec` is accepted or refused for good."""
    known = Told.of(spec.ledger)
    left = deque(job for job in spec.jobs() if job.number not in known.accepted and job.number not in known.refused)
    ledger = Writer(spec.ledger)
    try:
        await (_over_http(spec, left, ledger) if spec.gateways else _directly(spec, settings, left, ledger))
    finally:
        ledger.close()


# Straight to broker and store ----------------------------------------------------------------------


async def _directly(spec: Spec, settings: Settings, left: deque[PlannedJob], ledger: Writer) -> None:
    while left:
        try:
            async with AsyncClient(settings=settings, timeout_s=CALL_S, tenant=TENANT) as client:
                while left:
                    await _submit_group(spec, client, left, ledger)
        except (BrokerUnavailable, StoreUnavailable):
            await asyncio.sleep(PAUSE_S)


async def _submit_group(spec: Spec, client: AsyncClient, left: deque[PlannedJob], ledger: Writer) -> None:
    gate, group = Gate(spec.gate, spec.num_jobs), list[PlannedJob]()
    while left and len(group) < GROUP and gate.lets_through(left[0]):
        group.append(left.popleft())
    if not group:
        await asyncio.sleep(PAUSE_S)
        return
    twice = [job for job in group if job.number % AGAIN_EVERY == 0]
    asked = [*group, *twice]
    outcomes = await client.submit_many([job.submission(spec.namespace, spec.model) for job in asked])
    facts, cancelled, later = [], [], {}
    for job, outcome in zip(asked, outcomes, strict=True):
        if isinstance(outcome, AGAIN_LATER):
            later[job.number] = job
        elif isinstance(outcome, DeadlineTooSoon):
            facts.append((REFUSED, job.number, str(outcome)))
        elif isinstance(outcome, FleetError):
            facts.append((WRONG, job.number, repr(outcome)))
        else:
            facts.append((ACCEPTED, job.number, outcome.id))
            if job.cancel:
                cancelled.append(outcome.id)
    ledger.write(facts)
    told = {number for _, number, _ in facts}
    left.extendleft(job for job in later.values() if job.number not in told)
    if cancelled:
        await client.store.cancel(cancelled)
    if later:
        await asyncio.sleep(PAUSE_S)


# Through gateways ----------------------------------------------------------------------------------


async def _over_http(spec: Spec, left: deque[PlannedJob], ledger: Writer) -> None:
    import httpx

    gate = Gate(spec.gate, spec.num_jobs)

    async def call() -> None:
        turn = spec.first
        while left:
            if not gate.lets_through(left[0]):
                await asyncio.sleep(PAUSE_S)
                continue
            job = left.popleft()
            while (fact := await _post(spec, http, spec.gateways[turn % len(spec.gateways)], job)) is None:
                turn += 1
                await asyncio.sleep(PAUSE_S)
            ledger.write([fact])
            if job.cancel and fact[0] == ACCEPTED:
                await _delete(http, spec.gateways[turn % len(spec.gateways)], fact[2])

    async with httpx.AsyncClient(timeout=CALL_S) as http, asyncio.TaskGroup() as tasks:
        for n in range(CALLS):
            tasks.create_task(call(), name=f"caller {n}")


async def _post(spec: Spec, http: object, gateway: str, job: PlannedJob) -> tuple[str, int, str] | None:
    """What is known for good, or None: try again, at another gateway."""
    import httpx

    assert isinstance(http, httpx.AsyncClient)
    key = job.submission(spec.namespace, spec.model).idempotency_key or ""
    try:
        answer = await http.post(f"{gateway}/v1/jobs", json=job.body(spec.model), headers={"Idempotency-Key": key})
    except httpx.TransportError:
        return None
    if answer.status_code in (200, 202):
        return ACCEPTED, job.number, str(answer.json()["id"])
    kind = str(answer.json().get("type", "")) if answer.content else ""
    if answer.status_code == 429 and "deadline" in kind:
        return REFUSED, job.number, kind
    if answer.status_code in (404, 429, 502, 503, 504):
        return None
    return WRONG, job.number, f"HTTP {answer.status_code} {answer.text[:200]}"


async def _delete(http: object, gateway: str, job_id: str) -> None:
    """Asked once: a cancel that did not arrive lets the job succeed, which the plan allows."""
    import contextlib

    import httpx

    assert isinstance(http, httpx.AsyncClient)
    with contextlib.suppress(httpx.TransportError):
        await http.delete(f"{gateway}/v1/jobs/{job_id}")


def main(arguments: Sequence[str]) -> None:
    spec = Spec.model_validate_json(Path(arguments[0]).read_text())
    print(f"{READY} {spec.first}", flush=True)
    asyncio.run(produce(spec, load(Path(arguments[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])

"""A whole drill: start the fleet, let producers submit, break things on schedule, wait for the end, audit.

Called by: command. The parts: plan (what), fleet (processes), faults (breaking), watch (looking on), audit.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from codeyard.cli.dead_letters import in_hand
from codeyard.cli.drill import plan
from codeyard.cli.drill.audit import WRONG, Finding, Ledger, judge, regenerated
from codeyard.cli.drill.faults import Breaker, Met
from codeyard.cli.drill.fleet import Fleet, Wish
from codeyard.cli.drill.ledger import Reader
from codeyard.cli.drill.patience import until_answered
from codeyard.cli.drill.plan import LONG_S, Fault, FaultKind, PlannedJob, planned_job, schedule
from codeyard.cli.drill.watch import Moment, Watch, digest_of
from codeyard.producer import AsyncClient
from codeyard.shared.connect import open_broker
from codeyard.shared.errors import FleetError
from codeyard.shared.job import JobId, Lane
from codeyard.shared.record import Event, State
from codeyard.shared.topology import Topology

LOOK_EVERY_S = 0.25
STALLED_S = 90.0  # without a job becoming final, with no fault going on: the rest is lost
GROUP = 256  # records audited in one round trip
AT_ONCE = 24  # streams read at once
AHEAD = 0.03  # of the jobs: how far producers may be ahead of the next fault
NUM_UNDISTURBED = 3  # probes before the first fault
CALL_S = 10.0

Say = Callable[[str, int, int], None]
"""Told what is going on, how many jobs are final, and how many there are."""


@dataclass(slots=True)
class Report:
    """What a drill found. Times in seconds since the producers' start."""

    seed: int
    num_jobs: int
    servers: str
    ledger: Ledger = field(default_factory=Ledger)
    undisturbed_s: list[float] = field(default_factory=list)
    met: list[Met] = field(default_factory=list)
    timeline: list[Moment] = field(default_factory=list)
    took_s: float = 0.0
    audit_s: float = 0.0

    @property
    def unrecovered(self) -> list[Met]:
        return [one for one in self.met if one.recovery_s is None]

    @property
    def good(self) -> bool:
        """Nothing lost, duplicated or wrong, every job accounted for, and the fleet back after every fault."""
        all_asked = self.ledger.accepted + self.ledger.refused >= self.num_jobs
        return self.ledger.good and all_asked and not self.unrecovered


async def run_drill(wish: Wish, num_faults: int, kinds: Sequence[FaultKind] | None, say: Say) -> Report:
    """Raises FleetError if the fleet does not start, SettingsError for kinds of faults it cannot be done."""
    say("starting the fleet", 0, wish.num_jobs)
    fleet = await Fleet.start(wish)
    try:
        possible = fleet.kinds
        if kinds is not None and (absent := sorted(set(kinds) - set(possible))):
            raise FleetError(f"this fleet knows no {', '.join(absent)}; it knows {', '.join(possible)}")
        faults = schedule(wish.seed, num_faults, possible if kinds is None else kinds)
        async with AsyncClient(settings=fleet.settings, timeout_s=CALL_S, tenant=plan.TENANT) as client:
            drill = _Drill(fleet, client, say)
            return await drill.run(faults)
    finally:
        await fleet.close()


class _Drill:
    def __init__(self, fleet: Fleet, client: AsyncClient, say: Say) -> None:
        self._fleet = fleet
        self._client = client
        self._say = say
        self._wish = fleet.wish
        self._started_s = time.monotonic()
        self._watch = Watch(client.store, [Reader(path) for path in fleet.ledgers], self._started_s)
        self._probes: list[JobId] = []
        self._doing = "submitting"

    async def run(self, faults: Sequence[Fault]) -> Report:
        servers = (
            f"{await until_answered(self._client.store.ping)}, {self._fleet.settings.broker.url.partition(':')[0]}"
        )
        report = Report(self._wish.seed, self._wish.num_jobs, servers)
        breaker = Breaker(self._fleet, self._client, self._started_s, self._on_probe)
        gates = [*(min(1.0, fault.at + AHEAD) for fault in faults), 1.0]  # while waiting for each fault, and after
        self._fleet.gate.open_to(gates[0])
        await self._fleet.start_producers()
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._keep_watching(), name="watch")
            for _ in range(NUM_UNDISTURBED):
                report.undisturbed_s += [seconds] if (seconds := await breaker.undisturbed()) is not None else []
            for number, fault in enumerate(faults, start=1):
                await self._reached(fault.at)
                more = self._to_fill if fault.kind is FaultKind.FILL_QUEUE else 0.0
                self._fleet.gate.open_to(min(1.0, gates[number] + more))
                self._doing = f"fault {number} of {len(faults)}: {fault.kind}"
                report.met.append(await breaker.commit(fault))
                self._watch.moved_s = time.monotonic()
            self._doing = "waiting for the last jobs"
            await self._ended()
            watching.cancel()
        report.timeline = self._watch.timeline
        report.took_s = time.monotonic() - self._started_s
        self._say("auditing", self._num_final, self._wish.num_jobs)
        report.ledger = await self._audited()
        report.audit_s = time.monotonic() - self._started_s - report.took_s
        return report

    # While it runs ---------------------------------------------------------------------------------

    @property
    def _num_final(self) -> int:
        return self._watch.timeline[-1].final if self._watch.timeline else 0

    @property
    def _to_fill(self) -> float:
        """The share of all jobs among which some lane has enough to fill its queue."""
        return 2.5 * self._wish.queue_max_length / self._wish.num_jobs

    def _on_probe(self, job_id: JobId) -> None:
        self._probes.append(job_id)
        self._watch.add(job_id)

    async def _keep_watching(self) -> None:
        while True:
            await self._watch.look()
            self._say(self._doing, self._num_final, self._wish.num_jobs)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _reached(self, share: float) -> None:
        """Return when this share of the jobs is final, or nothing moves any more: then a fault cannot harm."""
        while self._num_final < share * self._wish.num_jobs and not self._stalled:  # noqa: ASYNC110  # other processes'
            await asyncio.sleep(LOOK_EVERY_S / 4)

    async def _ended(self) -> None:
        while (self._fleet.producing or self._watch.num_open) and not self._stalled:
            await asyncio.sleep(LOOK_EVERY_S)
            self._watch.read_ledgers()

    @property
    def _stalled(self) -> bool:
        return time.monotonic() - self._watch.moved_s > STALLED_S

    # Afterwards ------------------------------------------------------------------------------------

    async def _audited(self) -> Ledger:
        self._watch.read_ledgers()
        told = self._watch.told
        ledger = Ledger(refused=len(told.refused), findings=[Finding(WRONG, "", text) for text in told.wrong])
        letters = await until_answered(self._letters)
        plans = {
            job_id: planned_job(self._wish.seed, number, can_fail=self._wish.can_fail)
            for number, job_id in told.accepted.items()
        }
        if len(plans) != len(told.accepted):
            ledger.findings.append(Finding(WRONG, "", "two jobs have one id"))
        for number, job_id in enumerate(self._probes):
            plans[job_id] = _probe(self._wish.seed, number)
        ids = list(plans)
        for start in range(0, len(ids), GROUP):
            await self._audit_group(ledger, ids[start : start + GROUP], plans, letters)
        return ledger

    async def _audit_group(
        self, ledger: Ledger, ids: Sequence[JobId], plans: dict[JobId, PlannedJob], letters: set[JobId]
    ) -> None:
        records = await until_answered(lambda: self._client.store.read(ids))
        free = asyncio.Semaphore(AT_ONCE)

        async def stream(job_id: JobId) -> list[Event]:
            async with free:
                return await until_answered(lambda: self._client.store.events(job_id, after=0))

        streams = await asyncio.gather(*(stream(job_id) for job_id in ids))
        for job_id, record, events in zip(ids, records, streams, strict=True):
            seen = self._watch.digests.get(job_id)
            same = record is None or record.result is None or seen in (None, digest_of(record.result.encode()))
            findings = judge(
                plans[job_id],
                job_id,
                record,
                events,
                seen=None if same else "another one",
                simulated=self._wish.engine == "simulated",
                has_letter=job_id in letters or self._wish.against,
            )
            ledger.enter(record, findings)
            if record is not None:
                ledger.regenerated_tokens += regenerated(record, events)

    async def _letters(self) -> set[JobId]:
        """Ids of the dead letters. Somebody else's fleet is left alone: looking takes them in hand."""
        if self._wish.against:
            return set()
        topology = Topology(self._fleet.settings.namespace)
        broker = await open_broker(self._fleet.settings.broker, topology)
        try:
            async with in_hand(broker, topology) as hand:
                return {letter.id for letter in hand.letters}
        finally:
            await broker.close()


def _probe(seed: int, number: int) -> PlannedJob:
    """What faults.Breaker submits."""
    prompt, succeeded = f"def probe_{seed}_{number}():", frozenset({State.SUCCEEDED})
    return PlannedJob(-1, prompt, Lane.INTERACTIVE, False, LONG_S, False, succeeded)

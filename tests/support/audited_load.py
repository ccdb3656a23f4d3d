"""A steady load of jobs with known answers on somebody's fleet, and the drill's audit of every one of them.

The producers are the drill's own processes (cli.drill.producing): they submit each job until it is accepted, write
down what they were told, and their ledgers are held against the records, streams and results at the end.
Called by: tests that break a server while jobs flow.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from codeyard.cli.drill.audit import LOST, WRONG, Finding, Ledger, judge
from codeyard.cli.drill.fleet import Fleet, Size, Wish
from codeyard.cli.drill.ledger import Reader
from codeyard.cli.drill.patience import until_answered
from codeyard.cli.drill.plan import TENANT, PlannedJob, planned_job
from codeyard.cli.drill.watch import Watch, digest_of
from codeyard.producer import AsyncClient
from codeyard.shared.job import JobId
from codeyard.shared.settings import Settings

PATIENCE_S = 180.0  # for the last jobs; reached only by a failing test
LONGEST_S = 900.0  # of a whole test
GROUP = 256
LOOK_EVERY_S = 0.25
MOST_JOBS = 50_000  # more than any test lets through


class AuditedLoad:
    """Made by `audited_load`. Jobs are let through at `rate` per second until `finished`."""

    def __init__(self, fleet: Fleet, client: AsyncClient, rate: float) -> None:
        self.client = client
        self._fleet = fleet
        self._rate = rate
        self._began_s = time.monotonic()
        self._watch = Watch(client.store, [Reader(path) for path in fleet.ledgers], self._began_s)
        self._asked = 0  # jobs let through
        self._others: dict[JobId, PlannedJob] = {}

    def add(self, job_id: JobId, planned: PlannedJob) -> None:
        """A job that somebody else had accepted, to be audited too."""
        self._others[job_id] = planned
        self._watch.add(job_id)

    @property
    def num_final(self) -> int:
        return self._watch.timeline[-1].final if self._watch.timeline else 0

    async def finished(self) -> Ledger:
        """Let no more through; return when every job let through is accepted or refused, and final; audited."""
        self._rate = 0.0
        async with asyncio.timeout(PATIENCE_S):
            while self._num_told < self._asked or self._watch.num_open:  # noqa: ASYNC110  # other processes'
                await asyncio.sleep(LOOK_EVERY_S)
        return await self._audited()

    # -------------------------------------------------------------------------------------------------

    @property
    def _num_told(self) -> int:
        return len(self._watch.told.accepted) + len(self._watch.told.refused)

    async def run(self) -> None:
        """Let jobs through and look on, until it is cancelled."""
        last_s = time.monotonic()
        async with asyncio.timeout(LONGEST_S):
            while True:
                now_s = time.monotonic()
                self._asked += int(self._rate * (now_s - last_s))
                last_s = now_s
                self._fleet.gate.open_to(self._asked / MOST_JOBS)
                await self._watch.look()
                await asyncio.sleep(LOOK_EVERY_S)

    async def _audited(self) -> Ledger:
        told, seed = self._watch.told, self._fleet.wish.seed
        ledger = Ledger(refused=len(told.refused), findings=[Finding(WRONG, "", text) for text in told.wrong])
        plans = {job_id: planned_job(seed, number, can_fail=False) for number, job_id in told.accepted.items()}
        if len(plans) != len(told.accepted):
            ledger.findings.append(Finding(WRONG, "", "two jobs have one id"))
        if self._num_told != self._asked:
            ledger.findings.append(
                Finding(LOST, "", f"{self._asked} let through, {self._num_told} accepted or refused")
            )
        plans |= self._others
        ids = list(plans)
        for start in range(0, len(ids), GROUP):
            await self._audit_group(ledger, ids[start : start + GROUP], plans)
        return ledger

    async def _audit_group(self, ledger: Ledger, ids: Sequence[JobId], plans: dict[JobId, PlannedJob]) -> None:
        store = self.client.store
        for job_id, record in zip(ids, await until_answered(lambda: store.read(ids)), strict=True):
            events = await store.events(job_id, after=0)
            seen = self._watch.digests.get(job_id)
            same = record is None or record.result is None or seen in (None, digest_of(record.result.encode()))
            findings = judge(
                plans[job_id],
                job_id,
                record,
                events,
                seen=None if same else "another one",
                simulated=True,
                has_letter=True,  # no prompt here is to fail, and one that does is `wrong`
            )
            ledger.enter(record, findings)


@asynccontextmanager
async def audited_load(settings: Settings, folder: Path, *, rate: float, seed: int) -> AsyncIterator[AuditedLoad]:
    """Producers at work on the fleet that `settings` name, `rate` jobs per second, until `finished` is called."""
    await asyncio.to_thread(folder.mkdir)
    size = Size(producers=2)
    wish = Wish(settings, folder, f"load-{seed}", seed, MOST_JOBS, real=False, against=True, size=size)
    fleet = await Fleet.start(wish)
    try:
        fleet.gate.open_to(0.0)
        async with AsyncClient(settings=settings, timeout_s=10.0, tenant=TENANT) as client:
            load = AuditedLoad(fleet, client, rate)
            await fleet.start_producers()
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(load.run(), name="load")
                yield load
                running.cancel()
    finally:
        await fleet.close()

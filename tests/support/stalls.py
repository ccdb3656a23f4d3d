"""How long submissions and the taking of jobs stand still while something is broken, as clients see it.

A prober submits a small urgent job many times a second and notes when each was accepted; when a worker claimed it
the record says. The longest gap between two of those is the stall. Called by: tests/fault/test_rabbitmq_cluster.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from types import SimpleNamespace
from unittest.mock import patch

from codeyard.cli.drill.plan import LONG_S, MAX_TOKENS, TENANT, PlannedJob
from codeyard.producer import AsyncClient
from codeyard.shared.broker import rabbitmq_nodes
from codeyard.shared.broker.rabbitmq_nodes import node_urls
from codeyard.shared.errors import FleetError
from codeyard.shared.job import JobId, Lane
from codeyard.shared.record import State
from codeyard.shared.settings import Settings
from support.audited_load import LONGEST_S, AuditedLoad

EVERY_S = 0.05  # between submissions of one prober: stalls are known to about this
AGAIN_S = 0.02
PATIENCE_S = 120.0


@dataclass(slots=True)
class Prober:
    """One client, and what it saw. Times are wall clock, to be held against the store's on the same machine."""

    node: str  # host:port that it is connected to at first
    client: AsyncClient
    accepted: dict[JobId, float] = field(default_factory=dict)
    refusals: list[FleetError] = field(default_factory=list)

    async def run(self, name: str, load: AuditedLoad) -> None:
        number = 0
        async with asyncio.timeout(LONGEST_S):
            while True:
                accepted = await self._submitted(f"{name}_{number}", load)
                number += accepted
                await asyncio.sleep(EVERY_S if accepted else AGAIN_S)

    async def refused(self, name: str, load: AuditedLoad) -> FleetError:
        """Submit until that is refused: the first ones may still find everything as it was."""
        async with asyncio.timeout(PATIENCE_S):
            for number in count():
                if not await self._submitted(f"{name}_{number}", load):
                    break
        return self.refusals[-1]

    async def _submitted(self, name: str, load: AuditedLoad) -> bool:
        prompt, sampling = f"def {name}():", {"max_tokens": MAX_TOKENS, "temperature": 0.0}
        try:
            job = await self.client.submit(
                prompt, lane=Lane.INTERACTIVE, idempotency_key=name, sampling=sampling, timeout_s=LONG_S, tenant=TENANT
            )
        except FleetError as error:
            self.refusals.append(error)
            return False
        self.accepted[job.id] = time.time()
        load.add(job.id, _planned(prompt))
        return True


@dataclass(slots=True)
class Probing:
    """Made by `probing`: a prober for each node."""

    probers: list[Prober]
    load: AuditedLoad

    async def more(self, num_jobs: int) -> None:
        """Return when each prober had `num_jobs` more accepted, and workers have claimed all of them."""
        wanted = [len(prober.accepted) + num_jobs for prober in self.probers]
        async with asyncio.timeout(PATIENCE_S):
            while any(len(one.accepted) < want for one, want in zip(self.probers, wanted, strict=True)):  # noqa: ASYNC110
                await asyncio.sleep(EVERY_S)
            await self._claims([job_id for prober in self.probers for job_id in prober.accepted])

    async def submit_stalls_s(self) -> dict[str, float]:
        """The longest gap of each prober, by the node it was connected to at first."""
        return {prober.node: longest_gap(prober.accepted.values()) for prober in self.probers}

    async def claim_stall_s(self) -> float:
        """The longest time in which no worker claimed any of the probes."""
        return longest_gap(await self._claims([job_id for prober in self.probers for job_id in prober.accepted]))

    async def _claims(self, ids: Sequence[JobId]) -> list[float]:
        """When each was claimed, last; waits until each was."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                records = await self.load.client.store.read(ids)
                times = [one.started_at for one in records if one is not None and one.started_at is not None]
                if len(times) == len(ids):
                    return times
                await asyncio.sleep(EVERY_S)


@asynccontextmanager
async def probing(settings: Settings, load: AuditedLoad, name: str, *, timeout_s: float) -> AsyncIterator[Probing]:
    """A prober at each node of the broker, at work. `timeout_s`: of one submission, then it is tried again."""
    urls = node_urls(settings.broker.url)
    async with AsyncExitStack() as stack:
        probers = []
        for n, url in enumerate(urls):
            order = [*urls[n:], *urls[:n]]
            with _beginning_with(order):
                client = AsyncClient(settings=settings, timeout_s=timeout_s, tenant=TENANT)
                probers.append(Prober(rabbitmq_nodes.node_of(url), await stack.enter_async_context(client)))
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(prober.run(f"{name}_{n}", load), name=f"prober {n}")
                for n, prober in enumerate(probers)
            ]
            yield Probing(probers, load)
            for task in running:
                task.cancel()


def longest_gap(times: Iterable[float]) -> float:
    """Seconds between two that follow each other; 0.0 for fewer than two."""
    ordered = sorted(times)
    return max((later - earlier for earlier, later in pairwise(ordered)), default=0.0)


@contextmanager
def _beginning_with(order: Sequence[str]) -> Iterator[None]:
    """Connections made in here try the nodes in this order, not in one drawn by chance."""
    with patch.object(rabbitmq_nodes, "random", SimpleNamespace(sample=lambda urls, k: list(order))):
        yield


def _planned(prompt: str) -> PlannedJob:
    return PlannedJob(-1, prompt, Lane.INTERACTIVE, False, LONG_S, False, frozenset({State.SUCCEEDED}))

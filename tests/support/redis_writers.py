"""Writers that commit results through the real Store, all the time, and what became of those that were acked.

What a worker acks at the broker is gone from there: from then on the store alone has it. So a commit that was acked
and is not on the server that is primary afterwards is a lost result. Called by: tests/fault, loadtest.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.record import Record, State
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import ClaimVerdict, CommitVerdict
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology
from support.store_calls import claim_of, commit_of, make_job, reservation_of, success

T = TypeVar("T")

WORKERS = 8  # committing at once, so that a failure meets some in flight
GROUP = 4
CALL_S = 2.0  # a link that is silent is given up after this
AGAIN_S = 0.02
PATIENCE_S = 180.0  # reached only by a failing test
TOPOLOGY = Topology("writers")


@dataclass(frozen=True, slots=True)
class Acked:
    text: str
    at_s: float  # monotonic, when its writer knew


@dataclass(frozen=True, slots=True)
class Loss:
    """Of what was acked until somebody looked; times relative to the failure, so before it they are negative."""

    acked: int
    lost: int  # without their result on the new primary
    without_record: int  # of these: without anything there
    first_s: float  # when the earliest lost one was acked
    last_s: float
    kept_after: int  # acked later than that and before the failure, and there


@dataclass
class Writers:
    url: str
    replicas: int = 0
    acked: dict[JobId, Acked] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)  # what the store said in place of an answer
    longest_silence_s: float = 0.0  # between two acks, since it was last set to nothing
    _last_s: float = field(default_factory=time.monotonic)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def settings(self) -> StoreSettings:
        return StoreSettings(url=self.url, replicas=self.replicas, timeout_s=CALL_S)

    async def more(self, count: int) -> None:
        """Return when so many more results are acked."""
        wanted = len(self.acked) + count
        await self._until(lambda: len(self.acked) >= wanted)

    async def refused(self, count: int) -> None:
        """Return when the store has refused so many more calls."""
        wanted = len(self.refusals) + count
        await self._until(lambda: len(self.refusals) >= wanted)

    async def refused_throughout(self, seconds: float) -> bool:
        """Whether nothing is acked for so long; False as soon as something is."""
        before, ends_s = len(self.acked), time.monotonic() + seconds
        while len(self.acked) == before and (left_s := ends_s - time.monotonic()) > 0:
            await self._next(left_s)
        return len(self.acked) == before

    async def _until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                await self._next(PATIENCE_S)

    async def _next(self, within_s: float) -> None:
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._news.wait()

    async def write(self, store: RedisStore, worker: int) -> None:
        """For ever."""
        while True:
            jobs = [make_job() for _ in range(GROUP)]
            await self._insist(partial(store.reserve, [reservation_of(job) for job in jobs]))
            asked = [claim_of(job, owner=f"writer-{worker}") for job in jobs]
            claims = await self._insist(partial(store.claim, asked))
            commits = [
                commit_of(job, claimed, f"answer to {job.key}")
                for job, claimed in zip(jobs, claims, strict=True)
                if claimed.verdict in (ClaimVerdict.RUN, ClaimVerdict.ADOPT)
            ]
            answers = await self._insist(partial(store.commit, commits))
            for commit, answer in zip(commits, answers, strict=True):
                if answer.verdict is CommitVerdict.COMMITTED:  # else a failover took its claim: nobody acks that one
                    self._ack(commit.job_id, commit.result.text or "")

    def _ack(self, job_id: JobId, text: str) -> None:
        now_s = time.monotonic()
        self.longest_silence_s = max(self.longest_silence_s, now_s - self._last_s)
        self._last_s = now_s
        self.acked[job_id] = Acked(text, now_s)
        self._news.set()

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """As a worker does: again, until the store answers."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    return await call()
                except StoreUnavailable as error:
                    self.refusals.append(str(error))
                    self._news.set()
                    await asyncio.sleep(AGAIN_S)


@contextlib.asynccontextmanager
async def writing(url: str, *, replicas: int = 0) -> AsyncIterator[Writers]:
    """At work until the block ends, over every failure, by one Store that is never opened again."""
    writers = Writers(url, replicas)
    store = await RedisStore.open(writers.settings(), TOPOLOGY)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(writers.write(store, n), name=f"writer {n}") for n in range(WORKERS)]
            yield writers
            for one in running:
                one.cancel()
    finally:
        await store.close()


async def loss(url: str, acked: Mapping[JobId, Acked], failed_s: float) -> Loss:
    """What is missing at `url`, the server that is primary now. `failed_s`: when the other one failed, monotonic."""
    ids, records = list(acked), list[Record | None]()
    store = await RedisStore.open(StoreSettings(url=url), TOPOLOGY)
    try:
        for start in range(0, len(ids), 500):
            records += await store.read(ids[start : start + 500])
    finally:
        await store.close()
    gone = [(one, record) for one, record in zip(ids, records, strict=True) if not _is_there(record, acked[one].text)]
    missing = {one for one, _ in gone}
    times = [acked[one].at_s - failed_s for one, _ in gone]
    return Loss(
        acked=len(ids),
        lost=len(gone),
        without_record=sum(record is None for _, record in gone),
        first_s=min(times, default=0.0),
        last_s=max(times, default=0.0),
        kept_after=sum(min(times, default=0.0) < acked[one].at_s - failed_s < 0 for one in ids if one not in missing),
    )


def _is_there(record: Record | None, text: str) -> bool:
    return record is not None and record.state is State.SUCCEEDED and record.result == success(text)

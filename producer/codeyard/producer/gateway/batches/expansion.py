"""The work on one batch, by the gateway that owns it: submit its items, see them end, write down how far it is.

    every round   submit the next items, as long as fewer than `in_flight` are under way; look which have ended
    every second  renew the lease and write the record; learn of a wish to cancel
    at the end    read all results once, for exact counts and sizes; close the document

Promise: an item's job has the key (batch, custom_id), so whoever goes on submits nothing twice; the record says up
to which line every item has ended (`line`), and beyond which nobody has submitted anything (`high`, written before
it is). So it may end anywhere, also by kill -9. What comes in the way of a submission for now (a full queue, the
tenant's limits, a server that is away) is waited for; what can never succeed becomes the item's error.
Called by: batches.runner.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from codeyard.producer.gateway.batches.answers import AGAIN_S, BROKEN, MAX_BROKEN, Later, refusal_or_later
from codeyard.producer.gateway.batches.items import Bad, Item, Reader, outcome_of
from codeyard.producer.gateway.batches.record import (
    CANCEL,
    MAX_REFUSED,
    WINDOW_S,
    BatchRecord,
    Counts,
    Outcome,
    Phase,
    Refusal,
)
from codeyard.producer.gateway.batches.results import dialect_of, input_lines, results
from codeyard.producer.gateway.files.lines import Line
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.documents.port import Document
from codeyard.shared.errors import BlobMissing, FleetError, StoreUnavailable
from codeyard.shared.job import JobId, Lane
from codeyard.shared.record import State
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_S = 5.0
RENEW_S = 1.0
GROUP_ITEMS = 64  # submitted at once
GROUP_BYTES = 4_194_304  # of their lines, unless one alone is longer
LOOK_GROUP = 512  # states in one round trip
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.05, 1.0  # between looks; the longest after some that found nothing
LOOK_EACH_S = 1e-4  # and at least this for each job: a look at 4,096 of them takes the store some 30 ms
RESCAN_PAUSE = 1_000  # lines read over by a new owner between two turns of the event loop
LAST_LOOK_S = 60.0  # past the deadline: by then the jobs under way have expired too


class _Lost(Exception):
    """Another gateway owns the batch now, or it is gone."""


class Expansion:
    def __init__(
        self,
        document: Document,
        owner: str,
        shelves: Shelves,
        store: Store,
        jobs: TenantJobs,
        *,
        in_flight: int,
        most_line_bytes: int,
        metrics: Metrics,
        stop: asyncio.Event,
    ) -> None:
        self._name = document.name
        self._owner = owner
        self._shelves = shelves
        self._store = store
        self._jobs = jobs
        self._in_flight = in_flight
        self._most_line_bytes = most_line_bytes
        self._metrics = metrics
        self._stop = stop
        self._batch = BatchRecord.decode(document.body)
        self._cancelling = document.wish.startswith(CANCEL)
        self._clock_offset_s = document.now - time.monotonic()  # the store's clock against ours
        self._saved_s = time.monotonic()
        self._reader = Reader(self._batch, dialect_of(self._batch))
        self._lines: AsyncGenerator[Line, None] | None = None  # None: to be opened behind `_read_to`
        self._read_to = 0  # the last line that the reader has seen
        self._all_read = False
        self._pending: deque[Item] = deque()  # read and not submitted
        self._flying: dict[int, Sequence[JobId]] = {}  # by line
        self._cancelled: set[int] = set()  # lines whose jobs were told
        self._ended: dict[int, Outcome] = {}  # by line, beyond the record's
        self._order: deque[int] = deque()  # lines with items, read and beyond the record's
        self._not_before_s = 0.0
        self._broken: Counter[int] = Counter()  # submissions that broke off, by line
        self._wants_room = False  # what the last round met was a lack of room
        self._group_items = GROUP_ITEMS  # submitted at once: fewer where some of them were put off
        self._look_s = SHORTEST_LOOK_S
        self._looked_s = 0.0

    async def run(self) -> None:
        """Until the batch has ended, another gateway owns it, or this one stops. Raises nothing but a bug."""
        try:
            await self._persistently(self._begin)
            while not self._over():
                if self._stop.is_set():
                    with contextlib.suppress(StoreUnavailable):
                        await self._save(lease_s=0.0)
                    return
                try:
                    moved = await self._round()
                except StoreUnavailable as error:
                    log.warning("batch_waits", extra={"batch": self._batch.id, "error": str(error)})
                    await self._rewind()
                    moved = False
                if not moved:
                    await self._pause(self._look_s)
            await self._end()
        except _Lost:
            log.info("batch_lost", extra={"batch": self._batch.id})
        except BlobMissing as error:
            problem = Refusal(code="input_missing", message=str(error))
            with contextlib.suppress(_Lost):
                await self._close(self._batch.with_(phase=Phase.FAILED, ended_at=time.time(), problem=problem))
        finally:
            await self._rewind()

    # A round -----------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        batch = self._batch
        if batch.phase is Phase.WAITING:
            deadline_at = self._now() + WINDOW_S - max(0.0, time.time() - batch.created_at)
            batch = batch.with_(phase=Phase.RUNNING, started_at=time.time(), deadline_at=deadline_at)
        self._batch = batch
        await self._save()

    def _over(self) -> bool:
        """Nothing is left to submit, and nothing under way."""
        if self._now() > self._batch.deadline_at + LAST_LOOK_S:
            return True
        submitted = self._all_read and not self._pending
        return not self._flying and (submitted or self._closing)

    @property
    def _closing(self) -> bool:
        """Nothing more is submitted. What others submitted up to `high` is still looked for."""
        late = self._now() >= self._batch.deadline_at
        return (self._cancelling or late) and (self._read_to >= self._batch.high or self._all_read)

    async def _round(self) -> bool:
        """Whether anything changed. Raises StoreUnavailable, BlobMissing, _Lost."""
        if time.monotonic() - self._saved_s >= RENEW_S:
            await self._save()
        if self._cancelling or self._now() >= self._batch.deadline_at:
            moved = await self._catch_up()
        else:
            moved = await self._submit()
        return await self._look() or moved

    async def _submit(self) -> bool:
        if time.monotonic() < self._not_before_s or len(self._flying) >= self._in_flight:
            return False
        moved = await self._read()
        most = min(len(self._pending), self._in_flight - len(self._flying), self._group_items)
        group = [self._pending.popleft() for _ in range(most)]
        if not group:
            return moved
        if group[-1].line > self._batch.high:
            self._batch = self._batch.with_(high=group[-1].line + self._in_flight)
            await self._save()
        outcomes = await self._renewing(asyncio.gather(*(self._submit_one(item) for item in group)))
        later = [outcome for outcome in outcomes if isinstance(outcome, Later)]
        if later:
            self._not_before_s = time.monotonic() + max(outcome.seconds for outcome in later)
        self._wants_room = bool(later) and all(outcome.room for outcome in later)
        self._group_items = max(1, len(group) - len(later)) if later else min(GROUP_ITEMS, 2 * self._group_items)
        for item, outcome in reversed(list(zip(group, outcomes, strict=True))):
            if isinstance(outcome, Later) and outcome.broken:
                self._broken[item.line] += 1
                if self._broken[item.line] >= MAX_BROKEN:
                    self._refused(item, BROKEN)
                    continue
            if isinstance(outcome, Later):
                self._pending.appendleft(item)
            elif isinstance(outcome, Refusal):
                self._refused(item, outcome)
            else:
                self._flying[item.line] = outcome
        return True

    async def _renewing(self, work: "asyncio.Future[T]") -> T:
        """A submission may take longer than the lease, while the broker is away."""
        try:
            while not (await asyncio.wait({work}, timeout=RENEW_S))[0]:
                await self._save()
            return work.result()
        finally:
            work.cancel()

    async def _submit_one(self, item: Item) -> list[JobId] | Refusal | Later:
        ids = item.job_ids(self._batch.id, self._name.tenant)
        timeout_s = max(1.0, self._batch.deadline_at - self._now())
        for wanted, key in zip(item.wanted, item.keys(self._batch.id), strict=True):
            try:
                await self._jobs.submit(
                    wanted.prompt,
                    model=item.model,
                    lane=Lane.BULK,
                    idempotency_key=key,
                    sampling=wanted.sampling,
                    stream=False,
                    timeout_s=timeout_s,
                    metadata={**item.metadata, "batch_id": self._batch.id, "custom_id": item.custom_id},
                    traceparent=None,
                )
            except FleetError as error:
                return refusal_or_later(error)
            except Exception:
                # The edge of an item: whatever it does, the others go on.
                log.exception("batch_item_failed", extra={"batch": self._batch.id, "line": item.line})
                return Later(AGAIN_S, broken=True)
        return ids

    def _refused(self, item: Item, refusal: Refusal) -> None:
        batch = self._batch
        if refusal.code == "model_not_found" and len(batch.unknown_models) < MAX_REFUSED:
            if item.model not in batch.unknown_models:
                self._batch = batch.with_(unknown_models=(*batch.unknown_models, item.model))
        elif len(batch.refused) < MAX_REFUSED:
            self._batch = batch.with_(refused={**batch.refused, item.line: refusal})
        self._ended[item.line] = Outcome.ERRORED

    async def _read(self) -> bool:
        """Fill what waits to be submitted."""
        moved, size_bytes = False, 0
        while not self._all_read and len(self._pending) < GROUP_ITEMS and size_bytes < GROUP_BYTES:
            line = await self._next_line()
            if line is None:
                break
            one = self._reader.read(line)
            moved = True
            if line.number <= self._batch.line:
                continue
            self._order.append(line.number)
            if isinstance(one, Bad) or self._batch.refusal_of(line.number, one.model) is not None:
                self._ended[line.number] = Outcome.ERRORED
            else:
                size_bytes += len(line.raw or b"")
                self._pending.append(one)
        return moved

    async def _next_line(self) -> Line | None:
        """The one behind the last; None at the end. A line is read again if the store did not answer."""
        if self._lines is None:
            self._lines = input_lines(
                self._shelves.blobs, self._name.tenant, self._batch, most_line_bytes=self._most_line_bytes
            )
        async for line in self._lines:
            if line.number % RESCAN_PAUSE == 0:
                await asyncio.sleep(0)
                if time.monotonic() - self._saved_s >= RENEW_S:
                    await self._save()
            if line.number > self._read_to:
                self._read_to = line.number
                return line
        self._all_read = True
        return None

    async def _catch_up(self) -> bool:
        """The batch closes: what waits is dropped, and what is under way is cancelled, also what an owner before
        this one submitted and did not write down."""
        waiting = list(self._pending)
        self._pending.clear()
        while not self._all_read and self._read_to < self._batch.high:
            await self._read()
            waiting += self._pending
            self._pending.clear()
            if len(waiting) >= GROUP_ITEMS:
                break
        for item in waiting:
            ids = item.job_ids(self._batch.id, self._name.tenant)
            if any(state is not None for state in await self._store.states(ids)):
                self._flying[item.line] = ids
            else:
                self._ended[item.line] = Outcome.CANCELLED if self._cancelling else Outcome.EXPIRED
        if self._cancelling:
            told = [line for line in self._flying if line not in self._cancelled][:LOOK_GROUP]
            await self._store.cancel([job_id for line in told for job_id in self._flying[line]])
            self._cancelled.update(told)
            return bool(waiting or told)
        return bool(waiting)

    async def _look(self) -> bool:
        """Which items have ended. Looks are rarer while nothing ends."""
        if not self._flying or time.monotonic() - self._looked_s < self._look_s:
            return self._settle()
        lines = list(self._flying)
        num_ended = 0
        for start in range(0, len(lines), LOOK_GROUP):
            group = lines[start : start + LOOK_GROUP]
            ids = [job_id for line in group for job_id in self._flying[line]]
            states = dict(zip(ids, await self._store.states(ids), strict=True))
            for line in group:
                found = [states[job_id] for job_id in self._flying[line]]
                if all(state is None or state.final for state in found):
                    known = [state or State.FAILED for state in found]  # no record: its time is over
                    self._ended[line] = outcome_of(known)
                    del self._flying[line]
                    num_ended += 1
        self._looked_s = time.monotonic()
        if num_ended and self._wants_room:
            self._not_before_s = self._looked_s
        shortest_s = max(SHORTEST_LOOK_S, LOOK_EACH_S * len(lines))
        self._look_s = shortest_s if num_ended else min(LONGEST_LOOK_S, max(shortest_s, self._look_s * 2))
        return self._settle() or num_ended > 0

    def _settle(self) -> bool:
        """Move the record's line over the items that have ended."""
        line, done = self._batch.line, self._batch.done
        while self._order and self._order[0] in self._ended:
            line = self._order.popleft()
            outcome = self._ended.pop(line)
            done = done.plus(outcome)
            self._metrics.batch_items.labels(outcome=outcome.value).inc()
        if line == self._batch.line:
            return False
        self._batch = self._batch.with_(line=line, done=done)
        return True

    # The record --------------------------------------------------------------------------------------

    async def _save(self, *, lease_s: float = LEASE_S) -> None:
        """Raises _Lost, StoreUnavailable."""
        counts = self._batch.done
        for outcome in Outcome:
            counts = counts.plus(outcome, sum(1 for ended in self._ended.values() if ended is outcome))
        self._batch = self._batch.with_(counts=counts)
        documents = self._shelves.documents
        written = await documents.write(self._name, self._owner, self._batch.encode(), lease_s=lease_s)
        if written is None:
            raise _Lost
        self._saved_s = time.monotonic()
        self._clock_offset_s = written.now - time.monotonic()
        self._cancelling = self._cancelling or written.wish.startswith(CANCEL)

    async def _end(self) -> None:
        """Every item has ended. Counts and sizes are taken from the results themselves."""
        late = self._now() >= self._batch.deadline_at
        phase = Phase.CANCELLED if self._cancelling else Phase.EXPIRED if late else Phase.COMPLETED
        self._batch = self._batch.with_(phase=Phase.FINALIZING, finalizing_at=time.time())
        await self._persistently(self._save)
        ended = self._batch.with_(phase=phase)
        await self._persistently(lambda: self._count(ended))
        await self._close(self._batch.with_(phase=phase, ended_at=time.time()))

    async def _count(self, ended: BatchRecord) -> None:
        counts, sizes = Counts(), {True: 0, False: 0}
        made = results(
            self._store, self._shelves.blobs, self._name.tenant, ended, most_line_bytes=self._most_line_bytes
        )
        async for result in made:
            counts = counts.plus(result.outcome)
            sizes[result.outcome is Outcome.SUCCEEDED] += len(result.text) + 1
            if time.monotonic() - self._saved_s >= RENEW_S:
                await self._save()
        self._batch = self._batch.with_(counts=counts, done=counts, output_bytes=sizes[True], error_bytes=sizes[False])

    async def _close(self, ended: BatchRecord) -> None:
        async def close() -> None:
            if await self._shelves.documents.write(self._name, self._owner, ended.encode(), lease_s=None) is None:
                raise _Lost

        await self._persistently(close)
        extra: dict[str, Any] = {"batch": ended.id, "phase": ended.phase.value, **ended.counts.model_dump()}
        log.info("batch_ended", extra=extra)

    async def _persistently(self, call: Callable[[], Awaitable[None]]) -> None:
        """Until the store answers, or the gateway stops."""
        while not self._stop.is_set():
            try:
                await call()
                return
            except StoreUnavailable as error:
                log.warning("batch_waits", extra={"batch": self._batch.id, "error": str(error)})
                await self._pause(AGAIN_S)
        raise _Lost

    async def _rewind(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            await lines.aclose()

    def _now(self) -> float:
        """By the store's clock."""
        return time.monotonic() + self._clock_offset_s

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return
        await asyncio.sleep(0 if seconds < SHORTEST_LOOK_S else SHORTEST_LOOK_S)  # it stops: no busy loop meanwhile

"""Write streamed tokens to the store: all running jobs in one round trip, a few times a second.

A job's first token is written at once, later ones every `flush_s`, or a little earlier in company. A slow
store makes the groups larger, never the worker slower: what waits is coalesced. Called by: worker.runner.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.store.port import Append, AppendVerdict, Store
from codeyard.worker.held import HeldJob

log = logging.getLogger(__name__)

RETRY_S = 0.2  # pause after the store did not answer
EARLY_SHARE = 0.25  # of `flush_s`: what is due this soon goes along, so that many streams share few round trips


class EventWriter:
    """`touch` a job after it generated; `forget` it when its end is handed to the settler."""

    def __init__(self, store: Store, *, flush_s: float, on_fenced: Callable[[JobId], None]) -> None:
        self._store = store
        self._flush_s = flush_s
        self._on_fenced = on_fenced
        self._dirty: dict[JobId, HeldJob] = {}
        self._written_s: dict[JobId, float] = {}
        self._until_s = math.inf  # the writer sleeps until then
        self._wake = asyncio.Event()

    def touch(self, held: HeldJob) -> None:
        self._dirty[held.id] = held
        if self._due_s(held.id) < self._until_s:
            self._wake.set()

    def forget(self, job_id: JobId) -> None:
        self._dirty.pop(job_id, None)
        self._written_s.pop(job_id, None)

    async def run(self) -> None:
        """Until cancelled. What is not written then goes with the job's commit."""
        while True:
            await self._until_due()
            now_s = time.monotonic()
            soon_s = now_s + EARLY_SHARE * self._flush_s
            due = [held for held in self._dirty.values() if self._due_s(held.id) <= soon_s]
            if due:
                await self._write(due, now_s)

    async def _until_due(self) -> None:
        self._wake.clear()
        self._until_s = min((self._due_s(job_id) for job_id in self._dirty), default=math.inf)
        wait_s = None if self._until_s == math.inf else max(0.0, self._until_s - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._wake.wait()

    def _due_s(self, job_id: JobId) -> float:
        written_s = self._written_s.get(job_id)
        return 0.0 if written_s is None else written_s + self._flush_s

    async def _write(self, due: list[HeldJob], now_s: float) -> None:
        for held in due:
            del self._dirty[held.id]
            self._written_s[held.id] = now_s
        group = [Append(held.id, held.fence, held.log.flush()) for held in due]
        try:
            verdicts = await self._store.append(group)
        except StoreUnavailable as error:
            log.warning("events_not_written", extra={"num_jobs": len(group), "error": str(error)})
            for held in due:
                if held.id in self._written_s:  # not forgotten meanwhile
                    self._dirty[held.id] = held
            await asyncio.sleep(RETRY_S)
            return
        for held, append, verdict in zip(due, group, verdicts, strict=True):
            if held.id not in self._written_s:
                continue  # it ended meanwhile; its commit tells
            if verdict is AppendVerdict.APPENDED:
                held.log.confirmed(append.events)
            else:
                self._on_fenced(held.id)

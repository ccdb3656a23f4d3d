"""Follow one job to its end: its final record, or its events as they come.

Wake-ups are hints: every reader reads after it subscribed, again at every wake-up, and every
`REREAD_S` anyway. Called by: clients, gateway.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from tenacity import stop_after_delay, wait_random_exponential

from codeyard.shared.errors import JobNotFound, ResultTimeout, StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.record import Event, EventKind, Record
from codeyard.shared.retries import repeat
from codeyard.shared.store.port import Store

T = TypeVar("T")

REREAD_S = 2.0
STORE_AWAY_S = 30.0  # a stream, which has no end of its own, waits this long for a store that does not answer
ANSWER_S = 1.0  # for an answer when the time to wait is over
WAIT = wait_random_exponential(multiplier=0.1, max=2.0)


async def wait_final(store: Store, job_id: JobId, timeout_s: float) -> Record:
    """The record once the job is final. Raises ResultTimeout, JobNotFound. A store that does not answer is waited for
    as long as the job itself; StoreUnavailable is raised if it does not answer at the end of that either."""
    until_s = time.monotonic() + timeout_s
    async with store.watch(job_id) as wakeup:
        while True:
            [record] = await _until(until_s, lambda: store.read([job_id]))
            if record is None:
                raise JobNotFound(job_id)
            if record.state.final:
                return record
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise ResultTimeout(job_id, waited_s=timeout_s)
            await wakeup.wait(min(REREAD_S, left_s))


async def follow(store: Store, job_id: JobId, *, after: int = 0) -> AsyncGenerator[Event, None]:
    """The job's events with `seq > after`, to the `end` event. Sequence numbers have no gap and no repeat.

    Raises JobNotFound if there is no such job (any more), StoreUnavailable if the store stays away.
    """
    async with store.watch(job_id) as wakeup:
        while True:
            events = await _patiently(partial(store.events, job_id, after=after))
            for event in events:
                after = event.seq
                yield event
                if event.kind is EventKind.END:
                    return
            if events:
                continue  # there may be more than one page
            [record] = await _patiently(lambda: store.read([job_id]))
            if record is None:
                raise JobNotFound(job_id)
            if record.state.final and after >= record.last_seq:
                return  # the caller had seen the end already
            if record.last_seq <= after:
                await wakeup.wait(REREAD_S)


async def within(timeout_s: float, call: Callable[[], Awaitable[T]]) -> T:
    """One question to the store, asked again for so long if there is no answer: its restart is not seen. Raises
    StoreUnavailable."""
    return await _until(time.monotonic() + timeout_s, call)


async def _until(until_s: float, call: Callable[[], Awaitable[T]]) -> T:
    left_s = max(0.0, until_s - time.monotonic())
    try:
        async with asyncio.timeout(left_s + ANSWER_S):
            return await repeat(call, (StoreUnavailable,), wait=WAIT, stop=stop_after_delay(left_s))
    except TimeoutError:
        raise StoreUnavailable("no answer in time") from None


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    return await repeat(call, (StoreUnavailable,), wait=WAIT, stop=stop_after_delay(STORE_AWAY_S))

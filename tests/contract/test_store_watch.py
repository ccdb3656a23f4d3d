"""Waiters learn of events and ends, whoever makes them: a hint, after which they read."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest
from support.store_calls import commit_of, make_job, reservation_of, run_jobs, tokens
from support.stores import StoreYard, record_of

from codeyard.shared.job import Job
from codeyard.shared.record import State
from codeyard.shared.store.port import Append, Claimed, Recovery, Store, Wakeup

FAR_S = 30.0  # a wake-up that is missed fails the test by its duration
SOON_S = 10.0


async def read_until(store: Store, wakeup: Wakeup, job: Job, state: State) -> None:
    """As a waiting caller does, but without the two-second safety net."""
    async with asyncio.timeout(SOON_S):
        while (await record_of(store, job)).state is not state:
            await wakeup.wait(FAR_S)


async def _commit(store: Store, stores: StoreYard, job: Job, claimed: Claimed) -> None:
    await store.commit([commit_of(job, claimed)])


async def _expire(store: Store, stores: StoreYard, job: Job, claimed: Claimed) -> None:
    await stores.elapse(job.timeout_s + 1)
    await store.recover([Recovery(job.id, "p2")])


async def _cancel(store: Store, stores: StoreYard, job: Job, claimed: Claimed) -> None:
    await stores.elapse(stores.timing.lease_s + 1)
    await store.cancel([job.id])


End = Callable[[Store, StoreYard, Job, Claimed], Awaitable[None]]


@pytest.mark.parametrize(
    "end, state", [(_commit, State.SUCCEEDED), (_expire, State.EXPIRED), (_cancel, State.CANCELLED)]
)
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_waiter_is_woken_when_the_job_ends(
    stores: StoreYard, store: Store, end: End, state: State, elsewhere: bool
) -> None:
    """Through the same store or another one: worker and gateway are different processes."""
    ender = await stores.open() if elsewhere else store
    [claimed] = await run_jobs(store, job := make_job())

    async with store.watch(job.id) as wakeup, asyncio.TaskGroup() as tasks:
        tasks.create_task(read_until(store, wakeup, job, state))
        await end(ender, stores, job, claimed)


async def test_a_waiter_is_woken_by_each_flush_of_events(stores: StoreYard, store: Store) -> None:
    """Streaming lives from it."""
    other = await stores.open()
    [claimed] = await run_jobs(store, job := make_job())
    seen = 0

    async with store.watch(job.id) as wakeup, asyncio.timeout(SOON_S):
        for seq in range(1, 6):
            await other.append([Append(job.id, claimed.fence, [tokens(seq)])])
            while not await store.events(job.id, after=seen):
                await wakeup.wait(FAR_S)
            seen = seq


async def test_an_end_between_entering_and_waiting_is_not_missed(store: Store) -> None:
    """Enter, read, wait: what happens between the last two must wake at once."""
    [claimed] = await run_jobs(store, job := make_job())

    async with store.watch(job.id) as wakeup:
        await store.commit([commit_of(job, claimed)])
        await read_until(store, wakeup, job, State.SUCCEEDED)
        async with asyncio.timeout(SOON_S):
            await wakeup.wait(FAR_S)


async def test_every_waiter_of_a_job_is_woken_and_one_that_left_disturbs_none(store: Store) -> None:
    """A hundred clients may watch one job."""
    [claimed] = await run_jobs(store, job := make_job())

    async with store.watch(job.id) as first, store.watch(job.id) as second:
        async with store.watch(job.id):
            pass
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read_until(store, first, job, State.SUCCEEDED))
            tasks.create_task(read_until(store, second, job, State.SUCCEEDED))
            await store.commit([commit_of(job, claimed)])


async def test_waiting_ends_with_its_timeout(store: Store) -> None:
    """Nothing happens to the job: the caller reads anyway, now and then."""
    await store.reserve([reservation_of(job := make_job())])
    begun_s = time.monotonic()

    async with store.watch(job.id) as wakeup:
        for _ in range(3):  # a hint may come for nothing, but not always
            await wakeup.wait(0.05)

    assert 0.05 <= time.monotonic() - begun_s < SOON_S


async def test_a_store_opened_on_another_threads_loop_works_beside_the_first(stores: StoreYard, store: Store) -> None:
    """The lease keeper renews from a thread of its own."""
    [claimed] = await run_jobs(store, job := make_job())
    failures: list[BaseException] = []

    async def commit_elsewhere() -> None:
        other = await stores.open()
        stores.opened.remove(other)
        await other.commit([commit_of(job, claimed)])
        await other.close()

    def run() -> None:
        try:
            asyncio.run(commit_elsewhere())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    async with store.watch(job.id) as wakeup:
        thread.start()
        await read_until(store, wakeup, job, State.SUCCEEDED)
    await asyncio.to_thread(thread.join)

    assert failures == []

"""The outbox of webhooks, on every store: there with the final state, and one deliverer has an entry at a time."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from support.store_calls import commit_of, make_job, reservation_of, run_jobs
from support.stores import SLACK_S, StoreYard, record_of

from codeyard.shared.job import Job
from codeyard.shared.record import Callback, Record, Result, State
from codeyard.shared.store.port import (
    CallbackOutcome,
    Commit,
    NoteCallback,
    Recovery,
    Redrive,
    RedriveVerdict,
    Store,
    TakeCallback,
)

URL = "https://hooks.example.com/jobs"
LEASE_S = 60.0


def note(record: Record, outcome: CallbackOutcome, *, delay_s: float = 0.0) -> NoteCallback:
    return NoteCallback(record.id, record.incarnation, record.callback_attempts, outcome, delay_s)


async def taken(store: Store, job: Job) -> Record | None:
    [record] = await store.take_callbacks([TakeCallback(job.id, LEASE_S)])
    return record


async def surely_taken(store: Store, job: Job) -> Record:
    record = await taken(store, job)
    assert record is not None
    return record


async def done(store: Store) -> Job:
    """A job that has succeeded, with a callback."""
    job = make_job(callback_url=URL)
    [claimed] = await run_jobs(store, job)
    await store.commit([commit_of(job, claimed)])
    return job


async def _commits(store: Store, job: Job) -> None:
    [claimed] = await run_jobs(store, job)
    await store.commit([commit_of(job, claimed)])


async def _cancels(store: Store, job: Job) -> None:
    await store.reserve([reservation_of(job)])
    await store.cancel([job.id])


@pytest.mark.parametrize(
    "ends, state", [(_commits, State.SUCCEEDED), (_cancels, State.CANCELLED)], ids=["commit", "cancel"]
)
async def test_the_entry_is_there_with_the_final_state(
    store: Store, ends: Callable[[Store, Job], Awaitable[None]], state: State
) -> None:
    """One script writes both: whoever dies after it leaves a callback that somebody will deliver."""
    job, other = make_job(callback_url=URL), make_job()
    await ends(store, job)
    await ends(store, other)

    assert await store.callbacks_due(10) == [job.id]
    record = await surely_taken(store, job)
    assert (record.state, record.callback, record.callback_attempts) == (state, Callback.DUE, 1)
    assert record.job.callback_url == URL
    assert await taken(store, other) is None


async def test_an_expired_job_calls_back_and_one_that_was_never_accepted_does_not(stores: StoreYard) -> None:
    """The caller of the second was told that it is not known to be accepted."""
    store = await stores.open()
    accepted, never = make_job(callback_url=URL, timeout_s=200.0), make_job(callback_url=URL, timeout_s=80_000.0)
    [claimed] = await run_jobs(store, accepted)
    await store.reserve([reservation_of(never)])
    await stores.elapse(400.0)

    await store.recover([Recovery(job.id, "p2") for job in (accepted, never)])

    assert {(await record_of(store, job)).state for job in (accepted, never)} == {State.EXPIRED}
    assert await store.callbacks_due(10) == [accepted.id]
    assert claimed.fence


async def test_nothing_is_due_before_the_end(store: Store) -> None:
    """A caller is told once, of the end."""
    job = make_job(callback_url=URL)
    await run_jobs(store, job)

    assert await store.callbacks_due(10) == []
    assert await taken(store, job) is None
    assert (await record_of(store, job)).callback is Callback.WAITING


async def test_of_many_who_ask_one_gets_it(store: Store) -> None:
    """Every gateway looks at the same outbox."""
    job = await done(store)

    answers = await asyncio.gather(*(taken(store, job) for _ in range(10)))

    assert sum(answer is not None for answer in answers) == 1
    assert await store.callbacks_due(10) == []


async def test_a_deliverer_that_dies_is_followed_by_another_when_its_lease_is_over(stores: StoreYard) -> None:
    """At least once: nobody knows whether the first one's request arrived."""
    store = await stores.open()
    job = await done(store)
    first = await surely_taken(store, job)
    await stores.elapse(LEASE_S + SLACK_S)

    second = await surely_taken(store, job)

    assert (first.callback_attempts, second.callback_attempts) == (1, 2)
    late = await store.note_callbacks([note(first, CallbackOutcome.AGAIN), note(first, CallbackOutcome.GIVEN_UP)])
    assert late == [False, False]
    assert await store.note_callbacks([note(second, CallbackOutcome.DELIVERED)]) == [True]


async def test_what_arrived_is_noted_even_when_somebody_else_has_it_by_now(stores: StoreYard) -> None:
    """The other one's delivery is a repeat that its receiver recognises by its id; a third must not follow."""
    store = await stores.open()
    job = await done(store)
    first = await surely_taken(store, job)
    await stores.elapse(LEASE_S + SLACK_S)
    await surely_taken(store, job)

    assert await store.note_callbacks([note(first, CallbackOutcome.DELIVERED)]) == [True]
    assert (await record_of(store, job)).callback is Callback.DELIVERED


async def test_one_to_be_tried_again_is_due_after_its_delay(stores: StoreYard) -> None:
    """By the store's clock, whichever gateway it is then."""
    store = await stores.open()
    job = await done(store)
    record = await surely_taken(store, job)
    await store.note_callbacks([note(record, CallbackOutcome.AGAIN, delay_s=300.0)])

    assert await store.callbacks_due(10) == []
    await stores.elapse(200.0)
    assert await taken(store, job) is None
    await stores.elapse(100.0 + SLACK_S)
    assert await store.callbacks_due(10) == [job.id]
    assert (await surely_taken(store, job)).callback_attempts == 2


@pytest.mark.parametrize("outcome", [CallbackOutcome.DELIVERED, CallbackOutcome.GIVEN_UP])
async def test_one_that_is_over_stays_in_the_record_and_leaves_the_outbox(
    stores: StoreYard, outcome: CallbackOutcome
) -> None:
    """Also for the person who asks why nothing came. Repeating the note is safe."""
    store = await stores.open()
    job = await done(store)
    record = await surely_taken(store, job)

    assert await store.note_callbacks([note(record, outcome), note(record, outcome)]) == [True, True]

    await stores.elapse(LEASE_S + SLACK_S)
    assert await store.callbacks_due(10) == []
    assert (await record_of(store, job)).callback.value == outcome.value


async def test_a_redriven_job_calls_back_again_and_its_last_life_has_no_word_any_more(store: Store) -> None:
    """Its end is another one."""
    job = make_job(callback_url=URL)
    [claimed] = await run_jobs(store, job)
    failed = Result(state=State.FAILED)
    await store.commit([Commit(job.id, claimed.fence, "p1", failed)])
    old = await surely_taken(store, job)
    [redriven] = await store.redrive([Redrive(job, job.digest(), old.incarnation, failed, "i-2", "p-2")])
    assert redriven.verdict is RedriveVerdict.REDRIVEN

    assert await store.note_callbacks([note(old, CallbackOutcome.DELIVERED)]) == [False]
    assert await store.callbacks_due(10) == []
    record = await record_of(store, job)
    assert (record.callback, record.callback_attempts) == (Callback.WAITING, 0)


async def test_an_entry_ends_with_its_record(stores: StoreYard) -> None:
    """Nobody may be told of a job that can no longer be read; and the outbox does not grow for ever."""
    store = await stores.open()
    job = await done(store)
    await stores.elapse(700_000.0)

    assert await taken(store, job) is None
    assert await store.callbacks_due(10) == []

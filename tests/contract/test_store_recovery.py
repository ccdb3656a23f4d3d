"""What the reconciler asks of a store, and how records end."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.store_calls import claim_of, commit_of, make_job, reservation_of, run_jobs, tokens
from support.stores import SLACK_S, StoreYard, record_of, stream_of

from codeyard.shared.job import Job
from codeyard.shared.record import State
from codeyard.shared.store.port import (
    Append,
    ClaimVerdict,
    Commit,
    Queued,
    Recovered,
    RecoverVerdict,
    Recovery,
    Release,
    Store,
)
from codeyard.shared.store.transitions import MAX_QUEUE_CHECK_S, REPUBLISH_RETRY_S

NOT_DUE, EXPIRED = RecoverVerdict.NOT_DUE, RecoverVerdict.EXPIRED
ASK_QUEUE, REPUBLISH = RecoverVerdict.ASK_QUEUE, RecoverVerdict.REPUBLISH


async def queued(store: Store, **fields: Any) -> Job:
    job = make_job(**fields)
    await store.reserve([reservation_of(job)])
    await store.mark_queued([Queued(job.id, "p1")])
    return job


async def recover(store: Store, job: Job, *, queue_empty: bool | None = None) -> Recovered:
    [recovered] = await store.recover([Recovery(job.id, "p2", queue_empty)])
    return recovered


async def test_due_jobs_come_oldest_first_and_no_more_than_asked(stores: StoreYard, store: Store) -> None:
    """A backlog after an outage is worked off in the order in which it was promised."""
    jobs = []
    for _ in range(4):
        jobs.append(await queued(store))
        await stores.elapse(10)
    assert await store.due(10) == []

    await stores.elapse(stores.timing.queue_check_s - 15)

    assert await store.due(10) == [job.id for job in jobs[:3]]
    assert await store.due(2) == [job.id for job in jobs[:2]]
    assert await store.due(0) == []


async def test_a_reservation_that_was_never_published_expires(stores: StoreYard, store: Store) -> None:
    """Its submitter died before the broker had it; nobody was promised anything."""
    await store.reserve([reservation_of(job := make_job())])
    assert (await recover(store, job)).verdict is NOT_DUE
    await stores.elapse(stores.timing.unpublished_s + 1)
    assert await store.due(10) == [job.id]

    recovered = await recover(store, job)

    record = await record_of(store, job)
    assert recovered.verdict is EXPIRED
    assert record.state is State.EXPIRED
    assert record.result is not None
    assert record.result.error is not None
    assert record.result.error.code == "never_published"
    assert await store.due(10) == []
    assert (await recover(store, job)).verdict is NOT_DUE


async def test_a_job_whose_queue_was_purged_is_published_again(stores: StoreYard, store: Store) -> None:
    """The broker lost its message, or a person emptied the queue: the job was accepted and must end."""
    job = await queued(store)
    await stores.elapse(stores.timing.queue_check_s + 1)

    asked = await recover(store, job)
    answered = await recover(store, job, queue_empty=True)
    [verdict] = await store.mark_queued([Queued(job.id, "p2")])

    assert (asked.verdict, answered.verdict, verdict) == (ASK_QUEUE, REPUBLISH, "queued")
    assert asked.record is not None
    assert answered.record is not None
    assert asked.record.job == answered.record.job == job
    record = await record_of(store, job)
    assert (record.state, record.publication) == (State.QUEUED, "p2")
    [claimed] = await store.claim([claim_of(job, "p2")])
    assert (claimed.verdict, claimed.suspect) == (ClaimVerdict.RUN, False)


async def test_a_job_in_a_long_queue_is_looked_at_ever_more_rarely(stores: StoreYard, store: Store) -> None:
    """A day's backlog must not be asked about every minute."""
    job = await queued(store)
    waits = []
    for _ in range(5):
        await stores.elapse((await record_of(store, job)).check_at - await stores.now() + 1)
        assert (await recover(store, job)).verdict is ASK_QUEUE
        assert (await recover(store, job, queue_empty=False)).verdict is NOT_DUE
        waits.append((await record_of(store, job)).check_at - await stores.now())

    assert waits[0] == pytest.approx(stores.timing.queue_check_s, abs=SLACK_S)
    assert waits == pytest.approx(sorted(waits), abs=SLACK_S)
    assert waits[-1] == pytest.approx(MAX_QUEUE_CHECK_S, abs=SLACK_S)


async def test_a_frozen_owners_job_is_published_again_and_its_late_commit_refused(
    stores: StoreYard, store: Store
) -> None:
    """Its link is open, so the broker will not redeliver: the message in its hand is as good as lost."""
    [frozen] = await run_jobs(store, job := make_job())
    await stores.elapse(stores.timing.lease_s + stores.timing.grace_s + 1)
    assert await store.due(10) == [job.id]

    recovered = await recover(store, job)
    await store.mark_queued([Queued(job.id, "p2")])
    [claimed] = await store.claim([claim_of(job, "p2", owner="worker-2")])
    [late] = await store.commit([commit_of(job, frozen)])

    assert recovered.verdict is REPUBLISH
    assert (claimed.verdict, claimed.suspect) == (ClaimVerdict.RUN, True)
    assert (late.verdict, late.may_ack) == ("fenced", True)


async def test_the_owner_that_wakes_before_the_new_message_may_still_commit(stores: StoreYard, store: Store) -> None:
    """Its work is as good as any; the second message then finds the job final."""
    [slow] = await run_jobs(store, job := make_job())
    await stores.elapse(stores.timing.lease_s + stores.timing.grace_s + 1)
    await recover(store, job)

    [committed] = await store.commit([commit_of(job, slow)])
    [verdict] = await store.mark_queued([Queued(job.id, "p2")])
    [claimed] = await store.claim([claim_of(job, "p2", owner="worker-2")])

    assert (committed.verdict, verdict, claimed.verdict) == ("committed", "passed", ClaimVerdict.FINAL)


async def test_a_live_owner_is_left_alone(stores: StoreYard, store: Store) -> None:
    """Asked about too early, by a reconciler with an old list."""
    [claimed] = await run_jobs(store, job := make_job())
    await stores.elapse(stores.timing.lease_s - 10)

    for answer in (None, True, False):
        assert (await recover(store, job, queue_empty=answer)).verdict is NOT_DUE

    record = await record_of(store, job)
    assert (record.state, record.fence) == (State.RUNNING, claimed.fence)
    assert record.check_at == pytest.approx(record.lease_until + stores.timing.grace_s, abs=0.001)


async def test_only_one_of_two_reconcilers_publishes_and_another_follows_if_it_dies(
    stores: StoreYard, store: Store
) -> None:
    """Every worker and gateway has one."""
    other = await stores.open()
    await run_jobs(store, job := make_job())
    await stores.elapse(stores.timing.lease_s + stores.timing.grace_s + 1)

    first = await asyncio.gather(recover(store, job), recover(other, job))
    await stores.elapse(REPUBLISH_RETRY_S + 1)
    [second] = await asyncio.gather(recover(other, job))

    assert sorted(one.verdict for one in first) == [NOT_DUE, REPUBLISH]
    assert second.verdict is REPUBLISH


@pytest.mark.parametrize("state", ["queued", "lost", "released"])
async def test_a_job_past_its_deadline_expires_wherever_it_waits(stores: StoreYard, store: Store, state: str) -> None:
    """Even if no worker ever comes back."""
    job = await queued(store, timeout_s=600.0)
    if state != "queued":
        [claimed] = await store.claim([claim_of(job)])
    if state == "released":
        await store.release([Release(job.id, claimed.fence, "p1")])
    await stores.elapse(601)
    assert await store.due(10) == [job.id]

    assert (await recover(store, job)).verdict is EXPIRED
    assert (await record_of(store, job)).state is State.EXPIRED
    assert len(await stream_of(store, job)) == 1
    assert await store.due(10) == []


async def test_a_running_job_outlives_its_deadline_while_its_owner_lives(stores: StoreYard, store: Store) -> None:
    """The worker ends it in the engine; the store does not pull it from under its feet."""
    job = await queued(store, timeout_s=60.0)
    [claimed] = await store.claim([claim_of(job)])
    await stores.elapse(61)

    assert (await recover(store, job)).verdict is NOT_DUE
    [committed] = await store.commit([commit_of(job, claimed)])
    assert committed.verdict == "committed"


async def test_a_cancel_whose_owner_died_is_finished_by_the_reconciler(stores: StoreYard, store: Store) -> None:
    """Publishing it again only to end it would be a detour."""
    await run_jobs(store, job := make_job())
    await store.cancel([job.id])
    await stores.elapse(stores.timing.lease_s + stores.timing.grace_s + 1)

    assert (await recover(store, job)).verdict is NOT_DUE
    assert (await record_of(store, job)).state is State.CANCELLED


async def test_a_group_of_due_jobs_has_each_its_verdict(stores: StoreYard, store: Store) -> None:
    """The reconciler asks about all that is due at once."""
    reserved, waiting, missing = make_job(), await queued(store), make_job()
    await store.reserve([reservation_of(reserved)])
    [claimed] = await run_jobs(store, done := make_job())
    await store.commit([commit_of(done, claimed)])
    await run_jobs(store, lost := make_job())
    await stores.elapse(stores.timing.unpublished_s + 1)

    jobs = (waiting, missing, reserved, done, lost)
    outcomes = await store.recover([Recovery(job.id, "p2") for job in jobs])

    assert [one.verdict for one in outcomes] == [ASK_QUEUE, NOT_DUE, EXPIRED, NOT_DUE, REPUBLISH]


# The end of a record -------------------------------------------------------------------------------


async def test_a_record_ends_with_its_time_and_its_key_is_free_again(stores: StoreYard, store: Store) -> None:
    """Results are kept past the deadline as promised, and not for ever."""
    [claimed] = await run_jobs(store, job := make_job("key"))
    await store.append([Append(job.id, claimed.fence, [tokens(1)])])
    await store.commit([commit_of(job, claimed)])
    left_s = (await record_of(store, job)).expires_at - await stores.now()
    assert left_s == pytest.approx(job.timeout_s + stores.timing.longest_run_s + stores.timing.retention_s, abs=SLACK_S)
    await stores.elapse(left_s - 10)
    assert (await record_of(store, job)).state is State.SUCCEEDED

    await stores.elapse(11)

    assert await store.read([job.id]) == [None]
    assert await store.events(job.id, after=0) == []
    assert await store.recent(10) == []
    assert await store.due(10) == []
    assert await store.cancel([job.id]) == ["missing"]
    other = make_job("key", prompt="class A:")
    [reserved] = await store.reserve([reservation_of(other)])
    assert (reserved.verdict, reserved.record.last_seq) == ("new", 0)
    assert await stream_of(store, other) == []


async def _just_reserved(store: Store, stores: StoreYard) -> Job:
    await store.reserve([reservation_of(job := make_job())])
    return job


async def _made_from_a_message(store: Store, stores: StoreYard) -> Job:
    job = make_job()
    [claimed] = await store.claim([claim_of(job)])
    await store.append([Append(job.id, claimed.fence, [tokens(1)])])
    return job


async def _finished(store: Store, stores: StoreYard) -> Job:
    [claimed] = await run_jobs(store, job := make_job())
    await store.commit([Commit(job.id, claimed.fence, "p1", commit_of(job, claimed).result, [tokens(1), tokens(2)])])
    return job


async def _resubmitted(store: Store, stores: StoreYard) -> Job:
    await store.reserve([reservation_of(job := make_job())])
    await stores.elapse(stores.timing.unpublished_s + 1)
    await store.recover([Recovery(job.id, "p2")])
    await store.reserve([reservation_of(job, "p3")])
    await store.cancel([job.id])
    return job


LIVES = (_just_reserved, _made_from_a_message, _finished, _resubmitted)


@pytest.mark.parametrize("life", LIVES)
async def test_everything_of_a_job_has_an_end(
    stores: StoreYard, store: Store, life: Callable[[Store, StoreYard], Any]
) -> None:
    """Ten million jobs a month fill any server that keeps one key of each."""
    job = await life(store, stores)
    record = await record_of(store, job)

    if stores.is_redis:
        left_s = record.expires_at - await stores.now()
        lifetimes = {key: left for key, left in (await stores.lifetimes()).items() if job.id in key}
        assert lifetimes
        assert lifetimes == {key: pytest.approx(left_s, abs=SLACK_S) for key in lifetimes}
    else:
        await stores.elapse(record.expires_at - await stores.now() + 1)
        await store.cancel([make_job().id])  # any write sweeps a group
        assert [await stores.num_rows(table) for table in ("jobs", "bodies", "events")] == [0, 0, 0]

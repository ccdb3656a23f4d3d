"""The claim table: what a worker is told of a delivery, row by row."""

from collections.abc import Awaitable, Callable

import pytest
from support.store_calls import claim_of, commit_of, make_job, reservation_of, run_jobs, success, tokens
from support.stores import SLACK_S, StoreYard, record_of, stream_of

from codeyard.shared.job import MAX_TIMEOUT_S, Job
from codeyard.shared.record import EventKind, State
from codeyard.shared.store.port import (
    Append,
    Claim,
    Claimed,
    ClaimVerdict,
    Commit,
    Queued,
    RecoverVerdict,
    Recovery,
    Release,
    Renewal,
    Store,
)


async def queued(store: Store, job: Job) -> Job:
    await store.reserve([reservation_of(job)])
    await store.mark_queued([Queued(job.id, "p1")])
    return job


async def test_a_queued_job_runs_under_a_new_fence(stores: StoreYard, store: Store) -> None:
    """The row of an ordinary life."""
    job = await queued(store, make_job(timeout_s=600.0))
    await stores.elapse(10)

    [claimed] = await store.claim([claim_of(job)])

    now, record = await stores.now(), await record_of(store, job)
    assert (claimed.verdict, claimed.attempt, claimed.last_seq, claimed.suspect) == (ClaimVerdict.RUN, 1, 0, False)
    assert claimed.fence == record.fence != ""
    assert claimed.deadline_in_s == pytest.approx(590, abs=SLACK_S)
    assert claimed.waited_s == pytest.approx(10, abs=SLACK_S)
    assert (record.state, record.owner, record.publication) == (State.RUNNING, "worker-1", "p1")
    assert record.lease_until == pytest.approx(now + stores.timing.lease_s, abs=SLACK_S)
    assert record.check_at == pytest.approx(record.lease_until + stores.timing.grace_s, abs=0.001)


async def test_a_worker_may_be_faster_than_the_publishers_confirm(store: Store) -> None:
    """The message is out before the record says so."""
    await store.reserve([reservation_of(job := make_job())])

    [claimed] = await store.claim([claim_of(job)])

    assert claimed.verdict is ClaimVerdict.RUN
    assert (await record_of(store, job)).queued_at > 0


async def _succeeded(store: Store, stores: StoreYard, job: Job) -> None:
    [claimed] = await store.claim([claim_of(job)])
    await store.commit([commit_of(job, claimed)])


async def _failed(store: Store, stores: StoreYard, job: Job) -> None:
    [claimed] = await store.claim([claim_of(job)])
    result = success().model_copy(update={"state": State.FAILED})
    await store.commit([Commit(job.id, claimed.fence, "p1", result)])


async def _cancelled(store: Store, stores: StoreYard, job: Job) -> None:
    await store.cancel([job.id])


async def _expired(store: Store, stores: StoreYard, job: Job) -> None:
    await stores.elapse(job.timeout_s + 1)
    await store.recover([Recovery(job.id, "p9")])


@pytest.mark.parametrize(
    "end, state",
    [
        (_succeeded, State.SUCCEEDED),
        (_failed, State.FAILED),
        (_cancelled, State.CANCELLED),
        (_expired, State.EXPIRED),
    ],
)
async def test_a_final_job_is_final_for_every_delivery(
    stores: StoreYard, store: Store, end: Callable[[Store, StoreYard, Job], Awaitable[None]], state: State
) -> None:
    """A message that comes late is acked, whichever publication it is of."""
    job = await queued(store, make_job())
    await end(store, stores, job)
    before = await record_of(store, job)
    assert before.state is state

    outcomes = await store.claim([claim_of(job), claim_of(job, "p7", owner="worker-2")])

    assert [one.verdict for one in outcomes] == [ClaimVerdict.FINAL, ClaimVerdict.FINAL]
    assert await record_of(store, job) == before


async def test_past_its_deadline_a_job_is_committed_as_expired(stores: StoreYard, store: Store) -> None:
    """Nobody waits for it any more; the GPU has better things to do."""
    job = await queued(store, make_job(timeout_s=600.0))
    await stores.elapse(601)

    [claimed] = await store.claim([claim_of(job)])

    record = await record_of(store, job)
    assert claimed.verdict is ClaimVerdict.EXPIRED
    assert (record.state, record.check_at) == (State.EXPIRED, 0.0)
    assert record.result is not None
    assert record.result.error is not None
    assert record.result.error.code == "deadline_exceeded"
    assert [(event.kind, event.state) for event in await stream_of(store, job)] == [(EventKind.END, State.EXPIRED)]


async def test_a_cancel_that_the_owner_never_heard_of_ends_the_job_at_the_next_claim(
    stores: StoreYard, store: Store
) -> None:
    """Its owner died between the request and the renewal that would have told it."""
    await run_jobs(store, job := make_job())
    await store.cancel([job.id])
    await stores.elapse(stores.timing.lease_s + 1)

    [claimed] = await store.claim([claim_of(job, owner="worker-2")])

    assert claimed.verdict is ClaimVerdict.CANCELLED
    assert (await record_of(store, job)).state is State.CANCELLED


async def test_after_its_lease_a_job_goes_to_the_next_owner_as_a_suspect(stores: StoreYard, store: Store) -> None:
    """The owner died, and the job may be why."""
    [first] = await run_jobs(store, job := make_job())
    await store.append([Append(job.id, first.fence, [tokens(1), tokens(2)])])
    await stores.elapse(stores.timing.lease_s + 1)

    [second] = await store.claim([claim_of(job, owner="worker-2")])

    record = await record_of(store, job)
    assert (second.verdict, second.attempt, second.suspect, second.last_seq) == (ClaimVerdict.RUN, 2, True, 2)
    assert second.fence not in {"", first.fence}
    assert (record.owner, record.crashes, record.alone_crashes) == ("worker-2", 1, 0)


async def test_a_redelivery_to_its_own_owner_is_adopted(store: Store) -> None:
    """The link broke, not the worker: it goes on under its fence and takes the new delivery tag."""
    [first] = await run_jobs(store, job := make_job())
    before = await record_of(store, job)

    [again] = await store.claim([claim_of(job)])

    assert (again.verdict, again.fence, again.attempt) == (ClaimVerdict.ADOPT, first.fence, 1)
    assert await record_of(store, job) == before


async def test_a_redelivery_to_another_worker_is_held_while_the_lease_is_live(stores: StoreYard, store: Store) -> None:
    """Acked it would be lost if the owner dies; run it would be generated twice."""
    await run_jobs(store, job := make_job())
    await stores.elapse(30)

    [claimed] = await store.claim([claim_of(job, owner="worker-2")])

    assert (claimed.verdict, claimed.fence) == (ClaimVerdict.HOLD, "")
    assert claimed.hold_s == pytest.approx(stores.timing.lease_s - 30, abs=SLACK_S)


async def test_another_publication_of_a_live_job_is_a_duplicate(store: Store) -> None:
    """Even at its own owner: the delivery in its hand is the one that counts."""
    await run_jobs(store, job := make_job())
    before = await record_of(store, job)

    outcomes = await store.claim([claim_of(job, "p2", owner="worker-2"), claim_of(job, "p2")])

    assert [one.verdict for one in outcomes] == [ClaimVerdict.DUPLICATE, ClaimVerdict.DUPLICATE]
    assert await record_of(store, job) == before


async def test_an_older_publication_may_claim_a_job_that_waits(store: Store) -> None:
    """Published twice by the reconciler, both messages are good; whichever comes first becomes the owner's."""
    job = await queued(store, make_job())
    await store.mark_queued([Queued(job.id, "p2")])

    [claimed] = await store.claim([claim_of(job, "p1")])
    [late] = await store.claim([claim_of(job, "p2", owner="worker-2")])

    assert (claimed.verdict, late.verdict) == (ClaimVerdict.RUN, ClaimVerdict.DUPLICATE)
    assert (await record_of(store, job)).publication == "p1"


async def test_without_a_record_it_is_made_from_the_message(stores: StoreYard, store: Store) -> None:
    """How other languages publish, and how a store that was lost is survived."""
    job = make_job(timeout_s=600.0)
    now = await stores.now()

    [claimed] = await store.claim([Claim(job, job.digest(), "p1", "worker-1", published_at=now - 100)])

    record = await record_of(store, job)
    assert (claimed.verdict, claimed.attempt) == (ClaimVerdict.RUN, 1)
    assert claimed.deadline_in_s == pytest.approx(500, abs=SLACK_S)
    assert (record.state, record.job, record.incarnation, record.owner) == (State.RUNNING, job, "p1", "worker-1")
    [committed] = await store.commit([commit_of(job, claimed)])
    assert committed.may_ack


async def test_a_message_cannot_ask_for_more_than_the_longest_timeout(stores: StoreYard, store: Store) -> None:
    """A publisher's clock years ahead would keep a record for years."""
    job, now = make_job(), await stores.now()

    await store.claim([Claim(job, job.digest(), "p1", "worker-1", deadline_at=now + 9e9)])

    assert (await record_of(store, job)).deadline_at == pytest.approx(now + MAX_TIMEOUT_S, abs=SLACK_S)


async def test_without_a_record_and_past_its_deadline_nothing_is_made(stores: StoreYard, store: Store) -> None:
    """It may have run long ago, and its record's time be over: it must not run again."""
    stated, computed, now = make_job(), make_job(timeout_s=600.0), await stores.now()

    outcomes = await store.claim(
        [
            Claim(stated, stated.digest(), "p1", "worker-1", deadline_at=now - 10),
            Claim(computed, computed.digest(), "p1", "worker-1", published_at=now - 700),
        ]
    )

    assert [one.verdict for one in outcomes] == [ClaimVerdict.RECORD_MISSING, ClaimVerdict.RECORD_MISSING]
    assert await store.read([stated.id, computed.id]) == [None, None]


async def test_a_message_of_another_incarnation_is_a_duplicate(store: Store) -> None:
    """Ids come back after their record's time; an old message must not run the new job."""
    job = await queued(store, make_job())

    [claimed] = await store.claim([Claim(job, job.digest(), "p1", "worker-1", incarnation="older")])

    assert claimed.verdict is ClaimVerdict.DUPLICATE
    assert (await record_of(store, job)).state is State.QUEUED


async def test_a_message_with_another_body_is_a_conflict_that_touches_nothing(store: Store) -> None:
    """Whoever published it past the reserve used a key twice; the recorded job is innocent."""
    job = await queued(store, make_job("key"))
    other = make_job("key", prompt="class A:")
    before = await record_of(store, job)

    [claimed] = await store.claim([claim_of(other)])

    assert claimed.verdict is ClaimVerdict.CONFLICT
    assert await record_of(store, job) == before


async def test_every_delivery_of_a_group_has_its_own_verdict(stores: StoreYard, store: Store) -> None:
    """A worker claims what it received in one round trip, twins included."""
    done, waiting, unknown = make_job(), await queued(store, make_job()), make_job()
    [claimed] = await run_jobs(store, done)
    await store.commit([commit_of(done, claimed)])
    past = await stores.now() - 10

    outcomes = await store.claim(
        [
            claim_of(done),
            claim_of(waiting),
            Claim(unknown, unknown.digest(), "p1", "worker-1", deadline_at=past),
            claim_of(waiting),
            claim_of(waiting, owner="worker-2"),
            claim_of(waiting, "p2"),
        ]
    )

    assert [one.verdict for one in outcomes] == [
        ClaimVerdict.FINAL,
        ClaimVerdict.RUN,
        ClaimVerdict.RECORD_MISSING,
        ClaimVerdict.ADOPT,
        ClaimVerdict.HOLD,
        ClaimVerdict.DUPLICATE,
    ]


async def _crash(stores: StoreYard, store: Store, job: Job, *, alone: bool) -> Claimed:
    """Claimed, perhaps started by itself, and its owner dies."""
    [claimed] = await store.claim([claim_of(job)])
    if alone:
        await store.renew([Renewal(job.id, claimed.fence, alone=True)])
    await stores.elapse(stores.timing.lease_s + 1)
    return claimed


async def test_only_crashes_while_alone_make_a_job_poison(stores: StoreYard, store: Store) -> None:
    """Its neighbours, or a machine that was taken away, may have been the cause of all others."""
    job = await queued(store, make_job(timeout_s=80_000.0))
    for _ in range(5):
        await _crash(stores, store, job, alone=False)
    for _ in range(stores.timing.poison_after):
        assert (await _crash(stores, store, job, alone=True)).verdict is ClaimVerdict.RUN

    [claimed] = await store.claim([claim_of(job)])

    record = await record_of(store, job)
    assert (claimed.verdict, claimed.suspect) == (ClaimVerdict.POISON, True)
    assert (record.crashes, record.alone_crashes, record.state) == (8, 3, State.RUNNING)
    failed = success().model_copy(update={"state": State.FAILED})
    [committed] = await store.commit([Commit(job.id, claimed.fence, "p1", failed)])
    assert committed.may_ack
    assert (await record_of(store, job)).state is State.FAILED


async def test_being_alone_is_forgotten_with_the_lease(stores: StoreYard, store: Store) -> None:
    """The next owner runs it in a group again unless it says otherwise."""
    job = await queued(store, make_job())
    await _crash(stores, store, job, alone=True)
    await _crash(stores, store, job, alone=False)

    await store.claim([claim_of(job)])

    record = await record_of(store, job)
    assert (record.crashes, record.alone_crashes, record.alone) == (2, 1, False)


async def test_a_suspect_that_was_handed_back_is_still_a_suspect(stores: StoreYard, store: Store) -> None:
    """A drain proves nothing about the job; only a commit does."""
    job = await queued(store, make_job())
    await _crash(stores, store, job, alone=True)
    [claimed] = await store.claim([claim_of(job)])
    await store.renew([Renewal(job.id, claimed.fence, alone=True)])
    await store.release([Release(job.id, claimed.fence, "p1")])

    [again] = await store.claim([claim_of(job, owner="worker-2")])

    record = await record_of(store, job)
    assert (again.verdict, again.suspect) == (ClaimVerdict.RUN, True)
    assert (record.crashes, record.alone_crashes, record.alone) == (1, 1, False)


async def test_a_lost_job_is_claimed_by_its_redelivery_before_the_reconciler_looks(
    stores: StoreYard, store: Store
) -> None:
    """The broker notices a dead worker at once; the reconciler then finds a live owner and leaves it alone."""
    await run_jobs(store, job := make_job())
    await stores.elapse(stores.timing.lease_s + stores.timing.grace_s + 1)
    [claimed] = await store.claim([claim_of(job, owner="worker-2")])

    [recovered] = await store.recover([Recovery(job.id, "p2")])

    assert (claimed.verdict, recovered.verdict) == (ClaimVerdict.RUN, RecoverVerdict.NOT_DUE)
    assert (await record_of(store, job)).publication == "p1"

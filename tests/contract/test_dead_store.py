"""Redriving in the store: the one way out of a final state, on every adapter."""

from dataclasses import replace

import pytest
from support.store_calls import claim_of, commit_of, make_job, reservation_of, run_jobs, success, tokens
from support.stores import StoreYard, record_of, stream_of

from codeyard.shared.envelope import new_nonce
from codeyard.shared.job import Job
from codeyard.shared.record import Failure, Result, State
from codeyard.shared.store.port import (
    Append,
    Claim,
    ClaimVerdict,
    Commit,
    Queued,
    QueuedVerdict,
    RecoverVerdict,
    Recovery,
    Redrive,
    RedriveVerdict,
    ReserveVerdict,
    Store,
)
from codeyard.shared.store.transitions import MAX_HISTORY

FAILED = Result(state=State.FAILED, error=Failure(code="engine_error", message='it said "no"\n'))


def redrive_of(job: Job, died_in: str) -> Redrive:
    return Redrive(job, job.digest(), died_in, FAILED, new_nonce(), new_nonce())


def first_life(job: Job) -> str:
    return reservation_of(job).incarnation


async def dead_job(store: Store, *, result: Result = FAILED) -> Job:
    """One that streamed two tokens and then ended."""
    [claimed] = await run_jobs(store, job := make_job())
    await store.append([Append(job.id, claimed.fence, [tokens(1), tokens(2)])])
    await store.commit([Commit(job.id, claimed.fence, "p1", result)])
    return job


async def test_a_redriven_job_is_queued_in_a_new_incarnation_with_its_old_outcome_kept(store: Store) -> None:
    """Same id, so that whoever waits for it finds it; a fresh chance; and the reason it died is not forgotten."""
    job = await dead_job(store)
    before = await record_of(store, job)

    [redriven] = await store.redrive([request := redrive_of(job, first_life(job))])

    after = await record_of(store, job)
    assert redriven.verdict is RedriveVerdict.REDRIVEN
    assert redriven.record == after
    assert (after.id, after.job, after.state, after.incarnation) == (job.id, job, State.QUEUED, request.incarnation)
    assert (after.attempt, after.counter, after.crashes, after.fence, after.result) == (0, 0, 0, "", None)
    [past] = after.history
    assert (past.incarnation, past.attempt, past.result) == (before.incarnation, 1, FAILED)
    assert await stream_of(store, job) == []
    assert after.deadline_at == pytest.approx(after.created_at + job.timeout_s, abs=0.01)


async def test_a_redriven_job_runs_and_commits_like_any_other(store: Store) -> None:
    """Its fences are new: what the old life still sends is refused."""
    job = await dead_job(store)
    old_fence = (await record_of(store, job)).fence
    request = redrive_of(job, first_life(job))
    await store.redrive([request])

    [queued] = await store.mark_queued([Queued(job.id, request.publication)])
    [stale] = await store.claim([claim_of(job)])
    [claimed] = await store.claim([Claim(job, job.digest(), request.publication, "worker-2", request.incarnation)])
    [late] = await store.append([Append(job.id, old_fence, [tokens(1)])])
    [committed] = await store.commit([Commit(job.id, claimed.fence, request.publication, success())])

    assert (queued, stale.verdict, claimed.verdict) == (QueuedVerdict.QUEUED, ClaimVerdict.DUPLICATE, ClaimVerdict.RUN)
    assert claimed.attempt == 1
    assert (late, committed.verdict) == ("fenced", "committed")
    record = await record_of(store, job)
    assert (record.state, record.result) == (State.SUCCEEDED, success())
    assert [past.result for past in record.history] == [FAILED]
    assert [event.seq for event in await stream_of(store, job)] == [1]


async def test_redriving_twice_is_redriving_once(store: Store) -> None:
    """Until the publish is known to be confirmed it is asked for again; afterwards the letter is done with."""
    job = await dead_job(store)
    request = redrive_of(job, first_life(job))

    [first] = await store.redrive([request])
    [again] = await store.redrive([redrive_of(job, first_life(job))])
    await store.mark_queued([Queued(job.id, "p9")])
    [done] = await store.redrive([redrive_of(job, first_life(job))])

    assert (first.verdict, again.verdict) == (RedriveVerdict.REDRIVEN, RedriveVerdict.REDRIVEN)
    assert first.record == again.record
    assert done.verdict is RedriveVerdict.ALREADY
    record = await record_of(store, job)
    assert (record.incarnation, len(record.history)) == (request.incarnation, 1)


@pytest.mark.parametrize("ending", [State.SUCCEEDED, State.FAILED])
async def test_a_letter_of_an_earlier_life_never_runs_a_job_that_ended_since(store: Store, ending: State) -> None:
    """A letter may be there twice, because dead-lettering comes before the commit."""
    job = await dead_job(store)
    request = redrive_of(job, first_life(job))
    await store.redrive([request])
    claim = Claim(job, job.digest(), request.publication, "worker-2", request.incarnation)
    [claimed] = await store.claim([claim])
    result = success() if ending is State.SUCCEEDED else FAILED
    await store.commit([Commit(job.id, claimed.fence, request.publication, result)])

    [copy] = await store.redrive([redrive_of(job, first_life(job))])

    assert copy.verdict is RedriveVerdict.ALREADY
    assert (await record_of(store, job)).state is ending


async def test_two_copies_in_one_group_give_one_life(store: Store) -> None:
    """Both are told to publish, and name the same life."""
    job = await dead_job(store)

    first, second = await store.redrive([redrive_of(job, first_life(job)) for _ in range(2)])

    assert first.record is not None
    assert second.record is not None
    assert first.record.incarnation == second.record.incarnation


async def test_a_job_whose_record_is_gone_is_made_anew_from_the_letter(store: Store) -> None:
    """Records end with their lifetime; letters do not. The letter's own words become the history."""
    job = make_job()

    [redriven] = await store.redrive([redrive_of(job, 'message:"1"')])
    [again] = await store.redrive([redrive_of(job, 'message:"1"')])

    assert (redriven.verdict, again.verdict) == (RedriveVerdict.REDRIVEN, RedriveVerdict.REDRIVEN)
    [past] = (await record_of(store, job)).history
    assert (past.incarnation, past.attempt, past.result) == ('message:"1"', 0, FAILED)


async def test_only_a_dead_job_is_redriven(store: Store) -> None:
    """A live one would run twice, and a success or a cancel is nobody's to undo."""
    [running] = [make_job()]
    await run_jobs(store, running)
    succeeded = await dead_job(store, result=success())
    await store.reserve([reservation_of(cancelled := make_job())])
    await store.cancel([cancelled.id])
    other = await dead_job(store)

    found = await store.redrive(
        [
            redrive_of(running, first_life(running)),
            redrive_of(succeeded, first_life(succeeded)),
            redrive_of(cancelled, first_life(cancelled)),
            redrive_of(other, "another life"),
            replace(redrive_of(other, first_life(other)), digest="another body"),
        ]
    )

    verdicts = [one.verdict for one in found]
    assert verdicts == ["live", "ended", "ended", "superseded", "conflict"]
    states = [(await record_of(store, job)).state for job in (running, succeeded, cancelled, other)]
    assert states == ["running", "succeeded", "cancelled", "failed"]


async def test_a_redrive_that_died_before_its_publish_is_published_by_the_reconciler(
    stores: StoreYard, store: Store
) -> None:
    """From the store's yes on it is an accepted job; and its queue need not be empty for that."""
    job = await dead_job(store)
    await store.redrive([redrive_of(job, first_life(job))])
    await stores.elapse(10.0)

    assert await store.due(10) == [job.id]
    [found] = await store.recover([Recovery(job.id, "p7")])
    await store.mark_queued([Queued(job.id, "p7")])
    [later] = await store.recover([Recovery(job.id, "p8", queue_empty=False)])

    assert found.verdict is RecoverVerdict.REPUBLISH
    assert later.verdict is RecoverVerdict.NOT_DUE


async def test_a_redriven_job_that_no_worker_ever_saw_can_be_redriven_again(stores: StoreYard, store: Store) -> None:
    """Its model may have had no worker until the deadline; the letter is still the way back."""
    job = await dead_job(store)
    await store.redrive([redrive_of(job, first_life(job))])
    await stores.elapse(job.timeout_s + 1)
    await store.recover([Recovery(job.id, "p7")])
    assert (await record_of(store, job)).state is State.EXPIRED

    [again] = await store.redrive([redrive_of(job, first_life(job))])

    assert again.verdict is RedriveVerdict.REDRIVEN
    record = await record_of(store, job)
    assert (record.state, len(record.history)) == (State.QUEUED, 2)


async def test_a_submit_under_the_key_attaches_to_the_redriven_job(store: Store) -> None:
    """The same key and body mean the same job, in whichever life it is."""
    job = await dead_job(store)
    await store.redrive([redrive_of(job, first_life(job))])

    [reserved] = await store.reserve([reservation_of(job, "p5")])

    assert (reserved.verdict, reserved.record.state) == (ReserveVerdict.ATTACHED, State.QUEUED)


async def test_the_history_is_bounded(store: Store) -> None:
    """A job that somebody redrives for ever must not outgrow the store."""
    job = await dead_job(store)
    died_in, lives = first_life(job), []
    for _ in range(MAX_HISTORY + 2):
        lives.append(died_in)
        request = redrive_of(job, died_in)
        await store.redrive([request])
        claim = Claim(job, job.digest(), request.publication, "worker-2", request.incarnation)
        [claimed] = await store.claim([claim])
        await store.commit([Commit(job.id, claimed.fence, request.publication, FAILED)])
        died_in = request.incarnation

    history = (await record_of(store, job)).history

    assert [past.incarnation for past in history] == lives[-MAX_HISTORY:]


async def test_a_cut_after_the_effect_is_repeated_without_harm(store: Store) -> None:
    """The same request again finds its own life and is told to publish it."""
    job = await dead_job(store)
    request = redrive_of(job, first_life(job))

    [first] = await store.redrive([request])
    [repeated] = await store.redrive([request])

    assert repeated == first
    [committed] = await store.commit([commit_of(job, (await store.claim([claim_of(job)]))[0])])
    assert committed.verdict == "fenced"

"""Between claim and end: leases, the event stream, the one commit, release and cancel."""

import pytest
from support.store_calls import claim_of, commit_of, make_job, reservation_of, run_jobs, success, tokens
from support.stores import SLACK_S, StoreYard, record_of, stream_of

from codeyard.shared.job import Job
from codeyard.shared.record import Event, EventKind, State
from codeyard.shared.store.port import (
    Append,
    AppendVerdict,
    CancelVerdict,
    Claimed,
    ClaimVerdict,
    Commit,
    Committed,
    CommitVerdict,
    Queued,
    Release,
    ReleaseVerdict,
    Renewal,
    Renewed,
    Store,
)

APPENDED = AppendVerdict.APPENDED
COMMITTED = Committed(CommitVerdict.COMMITTED, may_ack=True)
ALREADY_FINAL = Committed(CommitVerdict.ALREADY_FINAL, may_ack=True)


async def taken_over(stores: StoreYard, store: Store, publication: str = "p1") -> tuple[Job, Claimed, Claimed]:
    """A job whose first owner was silent for too long, with the stale claim and the live one."""
    [stale] = await run_jobs(store, job := make_job())
    await store.append([Append(job.id, stale.fence, [tokens(1)])])
    await stores.elapse(stores.timing.lease_s + 1)
    [live] = await store.claim([claim_of(job, publication, owner="worker-2")])
    assert live.verdict is ClaimVerdict.RUN
    return job, stale, live


# Leases


async def test_a_renewed_lease_lasts_from_now(stores: StoreYard, store: Store) -> None:
    """Long generations keep their owner."""
    [claimed] = await run_jobs(store, job := make_job())
    for _ in range(3):
        await stores.elapse(stores.timing.lease_s - 10)
        assert await store.renew([Renewal(job.id, claimed.fence)]) == [Renewed(held=True)]

    now, record = await stores.now(), await record_of(store, job)
    assert record.lease_until == pytest.approx(now + stores.timing.lease_s, abs=SLACK_S)
    assert record.check_at == pytest.approx(record.lease_until + stores.timing.grace_s, abs=0.001)
    [other] = await store.claim([claim_of(job, owner="worker-2")])
    assert other.verdict is ClaimVerdict.HOLD


async def test_a_lease_that_lapsed_untaken_can_be_renewed(stores: StoreYard, store: Store) -> None:
    """A short pause of the machine should not cost the work when nobody else wanted it."""
    [claimed] = await run_jobs(store, job := make_job())
    await stores.elapse(stores.timing.lease_s + 1)

    assert await store.renew([Renewal(job.id, claimed.fence)]) == [Renewed(held=True)]
    assert (await record_of(store, job)).crashes == 0


async def test_a_renewal_brings_the_cancel_request_and_keeps_alone(store: Store) -> None:
    """The keeper of leases is how an owner learns of either."""
    [claimed] = await run_jobs(store, job := make_job())
    await store.cancel([job.id])

    first = await store.renew([Renewal(job.id, claimed.fence, alone=True)])
    second = await store.renew([Renewal(job.id, claimed.fence)])

    assert first == second == [Renewed(held=True, cancel_requested=True)]
    assert (await record_of(store, job)).alone


async def test_a_stale_owner_is_refused_in_everything(stores: StoreYard, store: Store) -> None:
    """It may be a worker that was frozen, and wakes with its old convictions."""
    job, stale, live = await taken_over(stores, store)
    before, stream = await record_of(store, job), await stream_of(store, job)

    renewed = await store.renew([Renewal(job.id, stale.fence)])
    appended = await store.append([Append(job.id, stale.fence, [tokens(2)])])
    committed = await store.commit([commit_of(job, stale)])
    released = await store.release([Release(job.id, stale.fence, "p1")])

    assert renewed == [Renewed(held=False)]
    assert appended == [AppendVerdict.FENCED]
    assert committed == [Committed(CommitVerdict.FENCED, may_ack=False)]  # the live owner counts on this publication
    assert released == [ReleaseVerdict.FENCED]
    assert await record_of(store, job) == before
    assert await stream_of(store, job) == stream
    assert await store.commit([commit_of(job, live)]) == [COMMITTED]


async def test_a_refused_commit_may_ack_a_delivery_that_nobody_counts_on(stores: StoreYard, store: Store) -> None:
    """The job was published again: the old message would only come back for nothing."""
    job, stale, _ = await taken_over(stores, store, publication="p2")

    assert await store.commit([commit_of(job, stale)]) == [Committed(CommitVerdict.FENCED, may_ack=True)]


async def test_an_owner_learns_that_its_job_is_gone(store: Store) -> None:
    """Its record's time may be over, or the store was lost: nothing here can be written any more."""
    job = make_job()

    assert await store.renew([Renewal(job.id, "i.1")]) == [Renewed(held=False)]
    assert await store.append([Append(job.id, "i.1", [tokens(1)])]) == [AppendVerdict.FENCED]
    assert await store.commit([commit_of(job, Claimed(ClaimVerdict.RUN, "i.1"))]) == [
        Committed(CommitVerdict.FENCED, may_ack=False)
    ]
    assert await store.release([Release(job.id, "i.1", "p1")]) == [ReleaseVerdict.FENCED]


# Events


async def test_events_are_read_in_order_from_anywhere(store: Store) -> None:
    """A client that reconnects asks for what came after the last it saw."""
    [claimed] = await run_jobs(store, job := make_job())
    sent = [
        tokens(1, "de"),
        tokens(2, "f é\n\U0001f600"),
        Event(seq=3, kind=EventKind.RESTARTED),
        tokens(4, "x" * 5_000),
    ]
    await store.append([Append(job.id, claimed.fence, sent[:2]), Append(job.id, claimed.fence, sent[2:])])

    assert await stream_of(store, job) == sent
    assert await store.events(job.id, after=2) == sent[2:]
    assert await store.events(job.id, after=1, limit=2) == sent[1:3]
    assert await store.events(job.id, after=4) == []
    assert (await record_of(store, job)).last_seq == 4


async def test_repeated_events_are_skipped(store: Store) -> None:
    """The owner repeats a flush whose answer was lost, with more behind it."""
    [claimed] = await run_jobs(store, job := make_job())
    await store.append([Append(job.id, claimed.fence, [tokens(1), tokens(2)])])

    repeated = await store.append([Append(job.id, claimed.fence, [tokens(1), tokens(2)])])
    longer = await store.append([Append(job.id, claimed.fence, [tokens(2), tokens(3)])])

    assert repeated == longer == [APPENDED]
    assert await stream_of(store, job) == [tokens(1), tokens(2), tokens(3)]


@pytest.mark.parametrize("seqs", [(2,), (1, 3), (5, 6)])
async def test_a_gap_in_the_stream_is_refused_whole(store: Store, seqs: tuple[int, ...]) -> None:
    """Something was lost on the way; a reader must never see a text with a hole in it."""
    [claimed] = await run_jobs(store, job := make_job())
    neighbour = make_job()
    [other] = await run_jobs(store, neighbour)

    verdicts = await store.append(
        [
            Append(job.id, claimed.fence, [tokens(seq) for seq in seqs]),
            Append(neighbour.id, other.fence, [tokens(1)]),
        ]
    )

    assert verdicts == [AppendVerdict.FENCED, APPENDED]
    assert await stream_of(store, job) == []
    assert (await record_of(store, job)).last_seq == 0


async def test_the_stream_goes_on_under_the_next_owner(stores: StoreYard, store: Store) -> None:
    """What was streamed stays; the new owner continues, or restarts, behind it."""
    job, _, live = await taken_over(stores, store)
    restarted = Event(seq=live.last_seq + 1, kind=EventKind.RESTARTED)

    assert await store.append([Append(job.id, live.fence, [restarted])]) == [APPENDED]
    assert await stream_of(store, job) == [tokens(1), restarted]


# The commit


async def test_a_commit_ends_the_job_with_the_rest_of_its_stream(stores: StoreYard, store: Store) -> None:
    """Result, usage and the last tokens are visible together or not at all."""
    [claimed] = await run_jobs(store, job := make_job())
    await store.append([Append(job.id, claimed.fence, [tokens(1, "a")])])

    rest = [tokens(1, "a"), tokens(2, "b")]
    outcome = await store.commit([Commit(job.id, claimed.fence, "p1", success("ab"), rest)])

    record = await record_of(store, job)
    assert outcome == [COMMITTED]
    assert (record.state, record.result, record.owner) == (State.SUCCEEDED, success("ab"), "")
    assert (record.check_at, record.lease_until, record.last_seq) == (0.0, 0.0, 3)
    assert record.finished_at == pytest.approx(await stores.now(), abs=SLACK_S)
    end = Event(seq=3, kind=EventKind.END, state=State.SUCCEEDED)
    assert await stream_of(store, job) == [tokens(1, "a"), tokens(2, "b"), end]


async def test_the_first_commit_wins_and_its_own_repeat_says_so_too(stores: StoreYard, store: Store) -> None:
    """Exactly one result: a repeat is told it is in, anyone else that it is final."""
    job, stale, live = await taken_over(stores, store)
    outcomes = [
        *await store.commit([commit_of(job, live, "mine")]),
        *await store.commit([commit_of(job, live, "mine")]),
    ]
    before, stream = await record_of(store, job), await stream_of(store, job)

    late = await store.commit([commit_of(job, stale, "late"), commit_of(job, live, "another")])

    assert outcomes == [COMMITTED, COMMITTED]
    assert late == [ALREADY_FINAL, ALREADY_FINAL]
    assert await record_of(store, job) == before
    assert await stream_of(store, job) == stream
    assert before.result == success("mine")


async def test_nothing_is_written_after_the_end(store: Store) -> None:
    """`end` is the last event, for ever."""
    [claimed] = await run_jobs(store, job := make_job())
    await store.commit([commit_of(job, claimed)])
    before, stream = await record_of(store, job), await stream_of(store, job)

    assert await store.append([Append(job.id, claimed.fence, [tokens(2)])]) == [AppendVerdict.FENCED]
    assert await store.renew([Renewal(job.id, claimed.fence)]) == [Renewed(held=False)]
    assert await store.release([Release(job.id, claimed.fence, "p1")]) == [ReleaseVerdict.FENCED]
    assert await store.mark_queued([Queued(job.id, "p2")]) == ["passed"]
    assert await record_of(store, job) == before
    assert await stream_of(store, job) == stream


async def test_a_commit_with_a_gap_in_its_stream_is_refused(store: Store) -> None:
    """The result's text is the stream's; with a hole they would differ."""
    [claimed] = await run_jobs(store, job := make_job())

    outcome = await store.commit([Commit(job.id, claimed.fence, "p1", success(), [tokens(2)])])

    assert outcome == [Committed(CommitVerdict.FENCED, may_ack=False)]
    assert (await record_of(store, job)).state is State.RUNNING


async def test_commits_of_one_group_have_each_their_verdict(stores: StoreYard, store: Store) -> None:
    """256 results share a round trip; a stale one among them harms none."""
    job, stale, live = await taken_over(stores, store)
    missing = make_job()
    [other] = await run_jobs(store, neighbour := make_job())

    outcomes = await store.commit(
        [commit_of(job, stale), commit_of(missing, live), commit_of(neighbour, other), commit_of(job, live, "last")]
    )

    assert [one.verdict for one in outcomes] == ["fenced", "fenced", "committed", "committed"]
    assert (await record_of(store, job)).result == success("last")


# Release and cancel


@pytest.mark.parametrize("charge, attempt", [(False, 1), (True, 2)])
async def test_a_released_job_waits_again_and_is_no_suspect(store: Store, charge: bool, attempt: int) -> None:
    """A hand-back ran nothing and costs no attempt; a retry does."""
    [claimed] = await run_jobs(store, job := make_job())

    released = await store.release([Release(job.id, claimed.fence, "p2", delay_s=5.0, charge=charge)])

    record = await record_of(store, job)
    assert released == [ReleaseVerdict.RELEASED]
    assert (record.state, record.publication, record.owner) == (State.QUEUED, "p2", "")
    [again] = await store.claim([claim_of(job, "p2", owner="worker-2")])
    assert (again.verdict, again.attempt, again.suspect) == (ClaimVerdict.RUN, attempt, False)


async def test_a_release_is_repeated_without_effect(store: Store) -> None:
    """Its answer may be lost; the attempt must be given back once only."""
    [claimed] = await run_jobs(store, job := make_job())
    request = Release(job.id, claimed.fence, "p2")
    await store.release([request])
    before = await record_of(store, job)

    assert await store.release([request]) == [ReleaseVerdict.RELEASED]
    assert await record_of(store, job) == before
    assert before.attempt == 0


async def test_the_delayed_copys_look_comes_after_its_delay(stores: StoreYard, store: Store) -> None:
    """The reconciler must not take a message on a delay queue for lost."""
    [claimed] = await run_jobs(store, job := make_job())

    await store.release([Release(job.id, claimed.fence, "p2", delay_s=125.0, charge=True)])

    expected = await stores.now() + 125 + stores.timing.queue_check_s
    assert (await record_of(store, job)).check_at == pytest.approx(expected, abs=SLACK_S)


async def test_releasing_a_job_whose_cancel_was_asked_ends_it(store: Store) -> None:
    """Nobody wants it run again."""
    [claimed] = await run_jobs(store, job := make_job())
    await store.cancel([job.id])

    assert await store.release([Release(job.id, claimed.fence, "p2")]) == [ReleaseVerdict.RELEASED]
    assert (await record_of(store, job)).state is State.CANCELLED


@pytest.mark.parametrize("state", ["reserved", "queued", "released", "lost"])
async def test_a_job_that_nobody_runs_is_cancelled_at_once(stores: StoreYard, store: Store, state: str) -> None:
    """Final now; its message is acked when it comes."""
    job = make_job()
    await store.reserve([reservation_of(job)])
    if state != "reserved":
        await store.mark_queued([Queued(job.id, "p1")])
    if state in {"released", "lost"}:
        [claimed] = await store.claim([claim_of(job)])
    if state == "released":
        await store.release([Release(job.id, claimed.fence, "p1")])
    if state == "lost":
        await stores.elapse(stores.timing.lease_s + 1)

    verdicts = [*await store.cancel([job.id]), *await store.cancel([job.id])]

    record = await record_of(store, job)
    assert verdicts == [CancelVerdict.CANCELLED, CancelVerdict.ALREADY_FINAL]
    assert record.state is State.CANCELLED
    assert record.result is not None
    assert record.result.error is not None
    assert record.result.error.code == "cancelled"
    assert [(event.seq, event.kind, event.state) for event in await stream_of(store, job)] == [
        (1, EventKind.END, State.CANCELLED)
    ]


async def test_a_running_job_is_asked_to_stop_and_its_owner_ends_it(store: Store) -> None:
    """What was generated so far is the owner's to commit."""
    [claimed] = await run_jobs(store, job := make_job())
    await store.append([Append(job.id, claimed.fence, [tokens(1)])])

    asked = [*await store.cancel([job.id]), *await store.cancel([job.id])]
    stopped = success("x").model_copy(update={"state": State.CANCELLED, "finish_reason": "abort"})
    committed = await store.commit([Commit(job.id, claimed.fence, "p1", stopped)])

    assert asked == [CancelVerdict.REQUESTED, CancelVerdict.REQUESTED]
    assert committed == [COMMITTED]
    assert (await record_of(store, job)).result == stopped
    assert await store.cancel([job.id, make_job().id]) == [CancelVerdict.ALREADY_FINAL, CancelVerdict.MISSING]

"""What each Store call does to one record: pure functions of the record, the request and the clock.

This is the protocol. SQLite and the tests' in-memory store run these functions; `redis/*.lua` is a
port of them, and the contract suite runs on all. Each returns a `Step`: the outcome for the caller,
the record to write (None: unchanged), and the events to append. Design: docs/protocol.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from codeyard.shared.job import MAX_TIMEOUT_S, Job
from codeyard.shared.record import Callback, Event, EventKind, Failure, Past, Record, Result, State
from codeyard.shared.store.port import (
    Append,
    AppendVerdict,
    CallbackOutcome,
    CancelVerdict,
    Claim,
    Claimed,
    ClaimVerdict,
    Commit,
    Committed,
    CommitVerdict,
    NoteCallback,
    Queued,
    QueuedVerdict,
    Recovered,
    RecoverVerdict,
    Recovery,
    Redrive,
    Redriven,
    RedriveVerdict,
    Release,
    ReleaseVerdict,
    Renewal,
    Renewed,
    Reservation,
    Reserved,
    ReserveVerdict,
    TakeCallback,
    Timing,
)

MAX_QUEUE_CHECK_S = 600.0
REPUBLISH_RETRY_S = 5.0  # a reconciler that died between its decision and its publish is followed by another
NEVER_PUBLISHED = "never_published"
MAX_HISTORY = 16  # earlier lives of a redriven job that its record keeps, the newest

OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True, slots=True)
class Step(Generic[OutcomeT]):
    outcome: OutcomeT
    record: Record | None = None
    events: Sequence[Event] = ()


def reserve(record: Record | None, request: Reservation, now: float, timing: Timing) -> Step[Reserved]:
    """New, attach, or conflict. A job that was never accepted may be submitted again under its key."""
    if record is not None and not was_never_accepted(record):
        if record.digest != request.digest:
            return Step(Reserved(ReserveVerdict.CONFLICT, record))
        own = record.publication == request.publication and record.state is State.RESERVED
        return Step(Reserved(ReserveVerdict.NEW if own else ReserveVerdict.ATTACHED, record))
    deadline_at = now + request.job.timeout_s
    made = Record(
        id=request.job.id,
        state=State.RESERVED,
        job=request.job,
        digest=request.digest,
        incarnation=request.incarnation,
        publication=request.publication,
        created_at=now,
        deadline_at=deadline_at,
        check_at=min(deadline_at, now + timing.unpublished_s),
        expires_at=deadline_at + timing.longest_run_s + timing.retention_s,
        last_seq=0,
        callback=_wanted(request.job),
    )
    return Step(Reserved(ReserveVerdict.NEW, made), made)


def mark_queued(record: Record | None, request: Queued, now: float, timing: Timing) -> Step[QueuedVerdict]:
    """The broker has confirmed `publication`. Never overwrites a live owner or a final state."""
    if record is None:
        return Step(QueuedVerdict.MISSING)
    if record.state.final or _is_live(record, now):
        return Step(QueuedVerdict.LAPSED if was_never_accepted(record) else QueuedVerdict.PASSED)
    if record.state is State.RUNNING:
        record = _without_lost_owner(record)
    return Step(
        QueuedVerdict.QUEUED,
        _changed(
            record,
            state=State.QUEUED,
            publication=request.publication,
            queued_at=record.queued_at or now,
            check_at=min(record.deadline_at, now + timing.queue_check_s),
        ),
    )


def claim(record: Record | None, request: Claim, now: float, timing: Timing) -> Step[Claimed]:
    """The claim table of docs/protocol.md, row by row."""
    if record is None:
        record = _from_message(request, now, timing)
        if record.deadline_at <= now:
            return Step(Claimed(ClaimVerdict.RECORD_MISSING))
    elif request.incarnation and request.incarnation != record.incarnation:
        return Step(Claimed(ClaimVerdict.DUPLICATE))
    elif request.digest != record.digest:
        return Step(Claimed(ClaimVerdict.CONFLICT))

    if record.state.final:
        return Step(Claimed(ClaimVerdict.FINAL))
    if record.cancel_requested:
        return _ended(
            record, State.CANCELLED, "cancelled", "cancelled on request", now, Claimed(ClaimVerdict.CANCELLED)
        )
    if record.deadline_at <= now:
        return _expired(record, now, Claimed(ClaimVerdict.EXPIRED))

    if _is_live(record, now):
        if record.publication != request.publication:
            return Step(Claimed(ClaimVerdict.DUPLICATE))
        if record.owner == request.owner:
            return Step(_claimed(ClaimVerdict.ADOPT, record, now))
        return Step(Claimed(ClaimVerdict.HOLD, hold_s=record.lease_until - now))

    if record.state is State.RUNNING:
        record = _without_lost_owner(record)
    counter = record.counter + 1
    taken = _changed(
        record,
        state=State.RUNNING,
        publication=request.publication,
        counter=counter,
        fence=f"{record.incarnation}.{counter}",
        owner=request.owner,
        lease_until=now + timing.lease_s,
        attempt=record.attempt + 1,
        queued_at=record.queued_at or now,
        started_at=now,
        check_at=now + timing.lease_s + timing.grace_s,
    )
    poison = taken.alone_crashes >= timing.poison_after
    return Step(_claimed(ClaimVerdict.POISON if poison else ClaimVerdict.RUN, taken, now), taken)


def renew(record: Record | None, request: Renewal, now: float, timing: Timing) -> Step[Renewed]:
    """The owner is alive. A lease that lapsed but was not taken is simply longer."""
    if record is None or not _owns(record, request.fence):
        return Step(Renewed(held=False))
    longer = _changed(
        record,
        lease_until=now + timing.lease_s,
        check_at=now + timing.lease_s + timing.grace_s,
        alone=record.alone or request.alone,
    )
    return Step(Renewed(held=True, cancel_requested=record.cancel_requested), longer)


def append(record: Record | None, request: Append, now: float, timing: Timing) -> Step[AppendVerdict]:
    """Events join the stream under the fence; those already there are skipped, a gap is refused."""
    if record is None or not _owns(record, request.fence):
        return Step(AppendVerdict.FENCED)
    fresh = [event for event in request.events if event.seq > record.last_seq]
    if not fresh:
        return Step(AppendVerdict.APPENDED)
    if not _continues(record.last_seq, fresh):
        return Step(AppendVerdict.FENCED)
    return Step(AppendVerdict.APPENDED, _changed(record, last_seq=fresh[-1].seq), fresh)


def commit(record: Record | None, request: Commit, now: float, timing: Timing) -> Step[Committed]:
    """First one wins. Refused for its fence, the delivery may go only if nobody counts on it."""
    if record is None:
        return Step(Committed(CommitVerdict.FENCED, may_ack=False))
    if record.state.final:
        mine = record.fence == request.fence and record.result is not None and record.result == request.result
        verdict = CommitVerdict.COMMITTED if mine else CommitVerdict.ALREADY_FINAL
        return Step(Committed(verdict, may_ack=True))
    fresh = [event for event in request.events if event.seq > record.last_seq]
    if not _owns(record, request.fence) or not _continues(record.last_seq, fresh):
        return Step(Committed(CommitVerdict.FENCED, may_ack=record.publication != request.publication))
    return _ended_with(record, request.result, fresh, now, Committed(CommitVerdict.COMMITTED, may_ack=True))


def release(record: Record | None, request: Release, now: float, timing: Timing) -> Step[ReleaseVerdict]:
    """The owner gives the job up on purpose, which makes nobody a suspect. A cancel asked for meanwhile ends it."""
    if record is None or record.fence != request.fence or record.state.final:
        return Step(ReleaseVerdict.FENCED)
    if record.state is not State.RUNNING:
        return Step(ReleaseVerdict.RELEASED)  # a repeat: nobody claimed it since, or the fence would differ
    if record.cancel_requested:
        return _cancelled(record, now, ReleaseVerdict.RELEASED)
    return Step(
        ReleaseVerdict.RELEASED,
        _changed(
            record,
            state=State.QUEUED,
            publication=request.publication,
            owner="",
            lease_until=0.0,
            alone=False,
            attempt=record.attempt if request.charge else record.attempt - 1,
            check_at=min(record.deadline_at, now + request.delay_s + timing.queue_check_s),
        ),
    )


def cancel(record: Record | None, now: float, timing: Timing) -> Step[CancelVerdict]:
    """Final at once where nobody runs it; else the owner learns of it with its next renewal."""
    if record is None:
        return Step(CancelVerdict.MISSING)
    if record.state.final:
        return Step(CancelVerdict.ALREADY_FINAL)
    if _is_live(record, now):
        return Step(CancelVerdict.REQUESTED, _changed(record, cancel_requested=True))
    return _cancelled(record, now, CancelVerdict.CANCELLED)


def recover(record: Record | None, request: Recovery, now: float, timing: Timing) -> Step[Recovered]:
    """A due job: expire it, leave it, or have it published again.

    Publishing again changes nothing here but the next look; `mark_queued` follows the confirm. A
    reconciler that dies between the two is followed by another, and a duplicate message is harmless.
    """
    if record is None or record.state.final or (record.check_at > now and request.queue_empty is None):
        return Step(Recovered(RecoverVerdict.NOT_DUE))
    if _is_live(record, now):
        return Step(Recovered(RecoverVerdict.NOT_DUE), _changed(record, check_at=record.lease_until + timing.grace_s))
    if record.cancel_requested:
        return _cancelled(record, now, Recovered(RecoverVerdict.NOT_DUE))
    if record.deadline_at <= now:
        return _expired(record, now, Recovered(RecoverVerdict.EXPIRED))
    if record.state is State.RESERVED:
        reason = "the broker never confirmed it; submit it again"
        record = _changed(record, callback=Callback.NONE)  # nobody was told that it is accepted
        return _ended(record, State.EXPIRED, NEVER_PUBLISHED, reason, now, Recovered(RecoverVerdict.EXPIRED))
    if record.state is State.RUNNING or _is_unpublished(record) or request.queue_empty:
        later = _changed(record, check_at=min(record.deadline_at, now + REPUBLISH_RETRY_S))
        return Step(Recovered(RecoverVerdict.REPUBLISH, later), later)
    if request.queue_empty is None:
        return Step(Recovered(RecoverVerdict.ASK_QUEUE, record))
    wait_s = min(MAX_QUEUE_CHECK_S, max(timing.queue_check_s, now - record.queued_at))
    return Step(Recovered(RecoverVerdict.NOT_DUE), _changed(record, check_at=min(record.deadline_at, now + wait_s)))


def redrive(record: Record | None, request: Redrive, now: float, timing: Timing) -> Step[Redriven]:
    """A dead job runs once more under its id: a new incarnation, the old outcome kept in its history.

    From here on it is an accepted job again. Whoever redrives publishes it, and the reconciler does if that
    one dies before `mark_queued`. Repeated until then it is told to be published again, never run twice:
    the claim table takes one publication. Events begin anew; those of the old life are dropped.
    """
    if record is None:
        return _lives_again(
            request, (Past(incarnation=request.died_in, attempt=0, result=request.outcome),), now, timing
        )
    if record.digest != request.digest:
        return Step(Redriven(RedriveVerdict.CONFLICT))
    unused = record.state is State.EXPIRED and record.counter == 0  # a redrive that no worker ever saw
    if record.incarnation != request.died_in:
        if request.died_in not in {past.incarnation for past in record.history}:
            return Step(Redriven(RedriveVerdict.SUPERSEDED))
        if _is_unpublished(record):
            return Step(Redriven(RedriveVerdict.REDRIVEN, record))
        if not unused:
            return Step(Redriven(RedriveVerdict.ALREADY))
    elif not record.state.final:
        return Step(Redriven(RedriveVerdict.LIVE))
    elif record.state not in (State.FAILED, State.EXPIRED):
        return Step(Redriven(RedriveVerdict.ENDED))
    assert record.result is not None  # of every final record
    past = Past(incarnation=record.incarnation, attempt=record.attempt, result=record.result)
    return _lives_again(request, (*record.history, past)[-MAX_HISTORY:], now, timing)


def take_callback(record: Record | None, request: TakeCallback, now: float, timing: Timing) -> Step[Record | None]:
    """One deliverer at a time, as long as it is heard of within its lease; after that, at least once."""
    if record is None or record.callback is not Callback.DUE or record.callback_at > now:
        return Step(None)
    taken = _changed(record, callback_attempts=record.callback_attempts + 1, callback_at=now + request.lease_s)
    return Step(taken, taken)


def note_callback(record: Record | None, request: NoteCallback, now: float, timing: Timing) -> Step[bool]:
    """What arrived has arrived, whoever says so. Otherwise the newest delivery has the word."""
    if record is None or record.incarnation != request.incarnation:
        return Step(False)
    if record.callback is not Callback.DUE:
        return Step(record.callback == request.outcome.value)
    if request.outcome is not CallbackOutcome.DELIVERED and record.callback_attempts != request.attempt:
        return Step(False)
    if request.outcome is CallbackOutcome.AGAIN:
        return Step(True, _changed(record, callback_at=now + request.delay_s))
    return Step(True, _changed(record, callback=Callback(request.outcome.value), callback_at=0.0))


# Helpers -------------------------------------------------------------------------------------------


def _wanted(job: Job) -> Callback:
    return Callback.WAITING if job.callback_url else Callback.NONE


def _is_live(record: Record, now: float) -> bool:
    return record.state is State.RUNNING and record.lease_until > now


def _owns(record: Record, fence: str) -> bool:
    return record.state is State.RUNNING and record.fence == fence


def was_never_accepted(record: Record) -> bool:
    """The reconciler gave it up while it was only reserved: whoever asks for it again begins anew."""
    error = record.result.error if record.result else None
    return record.state is State.EXPIRED and error is not None and error.code == NEVER_PUBLISHED


def _is_unpublished(record: Record) -> bool:
    """Redriven, and its publish not known to be confirmed. Any other queued job has been queued at some time."""
    return record.state is State.QUEUED and record.queued_at == 0


def _continues(last_seq: int, events: Sequence[Event]) -> bool:
    return all(event.seq == last_seq + n for n, event in enumerate(events, start=1))


def _changed(record: Record, **fields: Any) -> Record:
    return record.model_copy(update=fields)


def _without_lost_owner(record: Record) -> Record:
    """Its lease ended without release: the job may be what killed the owner."""
    return _changed(
        record,
        owner="",
        lease_until=0.0,
        crashes=record.crashes + 1,
        alone_crashes=record.alone_crashes + int(record.alone),
        alone=False,
    )


def _from_message(request: Claim, now: float, timing: Timing) -> Record:
    """A publisher that did not reserve, or a store that lost the record."""
    base = request.published_at if request.published_at is not None else now
    asked = request.deadline_at if request.deadline_at is not None else base + request.job.timeout_s
    deadline_at = min(asked, now + MAX_TIMEOUT_S)
    return Record(
        id=request.job.id,
        state=State.QUEUED,
        job=request.job,
        digest=request.digest,
        incarnation=request.incarnation or request.publication,
        publication=request.publication,
        created_at=now,
        queued_at=now,
        deadline_at=deadline_at,
        expires_at=deadline_at + timing.longest_run_s + timing.retention_s,
        callback=_wanted(request.job),
    )


def _lives_again(request: Redrive, history: tuple[Past, ...], now: float, timing: Timing) -> Step[Redriven]:
    deadline_at = now + request.job.timeout_s
    record = Record(
        id=request.job.id,
        state=State.QUEUED,
        job=request.job.model_copy(),  # how the adapters tell a new life, whose events begin anew
        digest=request.digest,
        incarnation=request.incarnation,
        publication=request.publication,
        created_at=now,
        deadline_at=deadline_at,
        check_at=min(deadline_at, now + REPUBLISH_RETRY_S),
        expires_at=deadline_at + timing.longest_run_s + timing.retention_s,
        history=history,
        callback=_wanted(request.job),
    )
    return Step(Redriven(RedriveVerdict.REDRIVEN, record), record)


def _claimed(verdict: ClaimVerdict, record: Record, now: float) -> Claimed:
    return Claimed(
        verdict,
        fence=record.fence,
        attempt=record.attempt,
        deadline_in_s=record.deadline_at - now,
        waited_s=now - record.created_at,
        last_seq=record.last_seq,
        suspect=record.crashes > 0,
    )


def _cancelled(record: Record, now: float, outcome: OutcomeT) -> Step[OutcomeT]:
    return _ended(record, State.CANCELLED, "cancelled", "cancelled on request", now, outcome)


def _expired(record: Record, now: float, outcome: OutcomeT) -> Step[OutcomeT]:
    reason = f"not finished within its {record.job.timeout_s:g} s"
    return _ended(record, State.EXPIRED, "deadline_exceeded", reason, now, outcome)


def _ended(record: Record, state: State, code: str, message: str, now: float, outcome: OutcomeT) -> Step[OutcomeT]:
    return _ended_with(record, Result(state=state, error=Failure(code=code, message=message)), (), now, outcome)


def _ended_with(record: Record, result: Result, tail: Sequence[Event], now: float, outcome: OutcomeT) -> Step[OutcomeT]:
    last = record.last_seq + len(tail) + 1
    if record.callback is Callback.WAITING:
        record = _changed(record, callback=Callback.DUE, callback_at=now)
    done = _changed(
        record,
        state=result.state,
        result=result,
        owner="",
        lease_until=0.0,
        finished_at=now,
        check_at=0.0,
        last_seq=last,
    )
    return Step(outcome, done, [*tail, Event(seq=last, kind=EventKind.END, state=result.state)])

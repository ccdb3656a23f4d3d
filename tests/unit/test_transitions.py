"""What holds in every life a job can have, whatever is called on it in whatever order."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from support.store_calls import make_job, reservation_of, success, tokens
from support.store_model import LIVES, Life, Model, new_jobs

from codeyard.shared.record import Callback, EventKind, Record, State
from codeyard.shared.store import transitions
from codeyard.shared.store.port import (
    Append,
    AppendVerdict,
    Claim,
    ClaimVerdict,
    Commit,
    Release,
    ReleaseVerdict,
    Timing,
)
from codeyard.shared.store.transitions import NEVER_PUBLISHED

NOW = 1_000_000.0
TIMING = Timing(lease_s=100, grace_s=40, unpublished_s=300, queue_check_s=220, longest_run_s=1_000, retention_s=500_000)


@dataclass
class Witness:
    """Sees every record after every call, and remembers."""

    before: dict[str, Record] = field(default_factory=dict)
    fences: dict[str, set[str]] = field(default_factory=dict)

    def see(self, model: Model, now: float) -> None:
        for job_id, record in model.records.items():
            self._check_alone(model, record, now)
            previous = self.before.get(job_id)
            if previous is not None and previous is not record:
                self._check_step(previous, record)
        self.before = dict(model.records)

    def _check_alone(self, model: Model, record: Record, now: float) -> None:
        stream = model.streams.get(record.id, [])
        assert [event.seq for event in stream] == list(range(1, record.last_seq + 1)), "the stream has a gap"
        ends = [event for event in stream if event.kind is EventKind.END]
        assert ends == (stream[-1:] if record.state.final else []), "`end` is the last event of a final job only"
        assert (record.result is not None) == record.state.final, "a result is what makes a job final"
        assert (record.check_at > 0) != record.state.final, "an unfinished job nobody would look at"
        assert (record.owner != "") == (record.state is State.RUNNING), "only a running job has an owner"
        assert record.check_at <= max(now, record.deadline_at, record.lease_until) + TIMING.grace_s
        assert 0 <= record.attempt <= record.counter
        assert 0 <= record.alone_crashes <= record.crashes <= record.counter
        assert record.expires_at >= record.deadline_at + TIMING.longest_run_s + TIMING.retention_s - 0.001
        assert (record.callback_at > 0) == (record.callback is Callback.DUE), "a due callback nobody would look at"
        assert record.callback is not Callback.DUE or record.state.final, "a callback before the end"
        assert record.callback is not Callback.WAITING or not record.state.final, "an end that nobody is told"

    def _check_step(self, previous: Record, record: Record) -> None:
        if record.incarnation != previous.incarnation or record.created_at != previous.created_at:
            assert was_never_accepted(previous) or was_redriven(previous, record), (
                "only a job that was never accepted may be made anew, or one that died"
            )
            return
        if previous.state.final:
            assert previous.callback is Callback.DUE, "a callback that is over changed"
            assert calling(record) == calling(previous), "a final record changed"
            return
        assert record.job is previous.job
        assert record.counter in {previous.counter, previous.counter + 1}
        assert record.crashes in {previous.crashes, previous.crashes + 1}
        assert (record.fence != previous.fence) == (record.counter != previous.counter)
        assert record.cancel_requested >= previous.cancel_requested, "a cancel request was forgotten"
        assert record.last_seq >= previous.last_seq


def was_never_accepted(record: Record) -> bool:
    error = record.result.error if record.result else None
    return record.state is State.EXPIRED and error is not None and error.code == NEVER_PUBLISHED


def calling(record: Record) -> Record:
    """What is left when what deliveries change is taken away."""
    return record.model_copy(update={"callback": Callback.NONE, "callback_at": 0.0, "callback_attempts": 0})


def was_redriven(previous: Record, record: Record) -> bool:
    dead = previous.state in (State.FAILED, State.EXPIRED)
    return dead and bool(record.history) and record.history[-1].result == previous.result


@settings(max_examples=300, deadline=None)
@given(life=LIVES)
def test_no_order_of_calls_breaks_a_records_invariants(life: Life) -> None:
    """One result, a stream without gap, always someone who looks: the whole contract rests on these."""
    model, witness, jobs, now = Model(TIMING), Witness(), new_jobs(), NOW
    for pause_s, group in life:
        now += pause_s
        model.forget(now)
        witness.before = {job_id: record for job_id, record in witness.before.items() if job_id in model.records}
        for plan in group:
            job = jobs[plan.job]
            model.call(plan.name, [plan.request(job, model.records.get(job.id), now)], now)
            witness.see(model, now)


def running() -> tuple[Record, str]:
    job = make_job()
    record = transitions.reserve(None, reservation_of(job), NOW, TIMING).record
    claim = Claim(job, job.digest(), "p1", "worker-1")
    step = transitions.claim(record, claim, NOW, TIMING)
    assert step.record is not None
    return step.record, step.outcome.fence


def test_a_fence_of_an_earlier_incarnation_is_never_the_present_one() -> None:
    """Counters begin again with each incarnation; the nonce keeps them apart."""
    record, fence = running()
    job = record.job
    again = transitions.claim(None, Claim(job, job.digest(), "p1", "worker-2", "another"), NOW, TIMING)

    assert again.outcome.verdict is ClaimVerdict.RUN
    assert again.record is not None
    assert again.record.counter == record.counter
    assert again.outcome.fence != fence


def test_the_empty_fence_owns_nothing() -> None:
    """A record that was never claimed has the empty fence; a caller without one must not get in."""
    record = transitions.reserve(None, reservation_of(make_job()), NOW, TIMING).record
    assert record is not None

    append = transitions.append(record, Append(record.id, "", [tokens(1)]), NOW, TIMING)
    commit = transitions.commit(record, Commit(record.id, "", "p1", success()), NOW, TIMING)

    assert (append.outcome, append.record) == (AppendVerdict.FENCED, None)
    assert (commit.outcome.verdict, commit.record) == ("fenced", None)


def test_an_append_without_events_asks_only_whether_one_still_owns_the_job() -> None:
    """Nothing is written, so nothing can be wrong with it."""
    record, fence = running()

    assert transitions.append(record, Append(record.id, fence, []), NOW, TIMING).record is None
    assert transitions.append(record, Append(record.id, fence, []), NOW, TIMING).outcome is AppendVerdict.APPENDED
    assert transitions.append(record, Append(record.id, "old.1", []), NOW, TIMING).outcome is AppendVerdict.FENCED


def test_a_release_repeated_after_the_next_claim_is_fenced() -> None:
    """The first answer was lost; by now another owner runs it."""
    record, fence = running()
    request = Release(record.id, fence, "p1")
    released = transitions.release(record, request, NOW, TIMING).record
    claimed = transitions.claim(released, Claim(record.job, record.digest, "p1", "worker-2"), NOW, TIMING).record

    assert transitions.release(released, request, NOW, TIMING).outcome is ReleaseVerdict.RELEASED
    assert transitions.release(claimed, request, NOW, TIMING).outcome is ReleaseVerdict.FENCED


@pytest.mark.parametrize("past_s, verdict", [(-0.001, ClaimVerdict.HOLD), (0.0, ClaimVerdict.RUN)])
def test_a_lease_is_over_at_its_last_moment(past_s: float, verdict: ClaimVerdict) -> None:
    """Both adapters must draw this line at the same place."""
    record, _ = running()
    claim = Claim(record.job, record.digest, "p1", "worker-2")

    assert transitions.claim(record, claim, record.lease_until + past_s, TIMING).outcome.verdict is verdict


@pytest.mark.parametrize("past_s, verdict", [(-0.001, ClaimVerdict.RUN), (0.0, ClaimVerdict.EXPIRED)])
def test_a_deadline_is_reached_at_its_moment(past_s: float, verdict: ClaimVerdict) -> None:
    """As for leases."""
    job = make_job(timeout_s=600.0)
    record = transitions.reserve(None, reservation_of(job), NOW, TIMING).record
    assert record is not None
    claim = Claim(job, job.digest(), "p1", "worker-1")

    assert transitions.claim(record, claim, record.deadline_at + past_s, TIMING).outcome.verdict is verdict

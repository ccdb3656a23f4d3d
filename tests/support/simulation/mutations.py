"""Ways to break the protocol, each of which the simulation must find: proof that a green run means something.

Each is a small patch of the real code, in force while its context is entered. Called by: tests/simulation.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from codeyard.cli.dead_letters import Hand, Letter, Treated, redrive
from codeyard.producer import submission
from codeyard.producer.submission import Submitter
from codeyard.shared import reconciler
from codeyard.shared.broker.port import Consumer, Message, Publisher, PublishOutcome
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.record import Record, State
from codeyard.shared.store import transitions
from codeyard.shared.store.port import (
    Claim,
    Claimed,
    ClaimVerdict,
    Committed,
    CommitVerdict,
    Queued,
    QueuedVerdict,
    Redrive,
    Redriven,
    Release,
    ReleaseVerdict,
    Renewal,
    Renewed,
    Reservation,
    Reserved,
    ReserveVerdict,
    Store,
    Timing,
)
from codeyard.shared.store.transitions import Step
from codeyard.worker.execution import Attempt, execute
from codeyard.worker.held import Finished, HeldJob, Retry, TokenLog
from codeyard.worker.intake import Intake
from codeyard.worker.leases import LeaseKeeper
from codeyard.worker.patience import persist
from codeyard.worker.settler import Settler
from support.simulation import fleet, world
from support.simulation.plan import draw


@dataclass(frozen=True, slots=True)
class Mutation:
    """`apply` breaks the code for as long as its context is entered."""

    name: str
    apply: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Caught:
    """The first schedule that did not hold."""

    seed: int
    violation: str


def hunt(name: str, most: int) -> Caught | None:
    """Run seeds from 0 until one of the first `most` fails under the mutation."""
    [mutation] = [one for one in MUTATIONS if one.name == name]
    with mutation.apply():
        for seed in range(most):
            if violations := world.run(draw(seed)).violations:
                return Caught(seed, violations[0])
    return None


# The store's side: one transition each ---------------------------------------------------------------


def _fence_ignored(call: str) -> AbstractContextManager[object]:
    original = getattr(transitions, call)

    def broken(record: Record | None, request: Any, now: float, timing: Timing) -> Step[Any]:
        if record is not None and record.state is State.RUNNING:
            request = replace(request, fence=record.fence)
        step: Step[Any] = original(record, request, now, timing)
        return step

    return patch.object(transitions, call, broken)


def _first_commit_does_not_win() -> AbstractContextManager[object]:
    original = transitions.commit

    def broken(record: Record | None, request: Any, now: float, timing: Timing) -> Step[Committed]:
        step = original(record, request, now, timing)
        if record is None or step.outcome.verdict is not CommitVerdict.ALREADY_FINAL:
            return step
        return Step(step.outcome, record.model_copy(update={"state": request.result.state, "result": request.result}))

    return patch.object(transitions, "commit", broken)


def _claim(broken: Callable[[Record, Claim, float], Record]) -> AbstractContextManager[object]:
    """Claims that see another record than there is."""
    original = transitions.claim

    def claim(record: Record | None, request: Claim, now: float, timing: Timing) -> Step[Claimed]:
        return original(broken(record, request, now) if record is not None else None, request, now, timing)

    return patch.object(transitions, "claim", claim)


def _lease_not_checked() -> AbstractContextManager[object]:
    return _claim(lambda record, request, now: record.model_copy(update={"lease_until": 0.0}))


def _duplicates_run() -> AbstractContextManager[object]:
    def broken(record: Record, request: Claim, now: float) -> Record:
        other = record.publication != request.publication
        return record.model_copy(update={"lease_until": 0.0}) if other else record

    return _claim(broken)


def _fences_repeat() -> AbstractContextManager[object]:
    return _claim(lambda record, request, now: record.model_copy(update={"counter": max(0, record.counter - 1)}))


def _redelivery_acked() -> AbstractContextManager[object]:
    original = transitions.claim

    def broken(record: Record | None, request: Claim, now: float, timing: Timing) -> Step[Claimed]:
        step = original(record, request, now, timing)
        if step.outcome.verdict is ClaimVerdict.HOLD:
            return Step(Claimed(ClaimVerdict.DUPLICATE))
        return step

    return patch.object(transitions, "claim", broken)


def _cancel_not_told() -> AbstractContextManager[object]:
    original = transitions.renew

    def broken(record: Record | None, request: Renewal, now: float, timing: Timing) -> Step[Renewed]:
        step = original(record, request, now, timing)
        return Step(Renewed(step.outcome.held), step.record)

    return patch.object(transitions, "renew", broken)


def _other_body_attaches() -> AbstractContextManager[object]:
    original = transitions.reserve

    def broken(record: Record | None, request: Reservation, now: float, timing: Timing) -> Step[Reserved]:
        step = original(record, request, now, timing)
        if step.outcome.verdict is ReserveVerdict.CONFLICT:
            return Step(Reserved(ReserveVerdict.ATTACHED, step.outcome.record))
        return step

    return patch.object(transitions, "reserve", broken)


# The producer's and the reconciler's side ------------------------------------------------------------


class _Credulous:
    """A publisher that takes everything for confirmed."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def publish(self, group: Sequence[Message], *, timeout_s: float) -> list[PublishOutcome]:
        with suppress(BrokerUnavailable):
            await self._publisher.publish(group, timeout_s=timeout_s)
        return [PublishOutcome.CONFIRMED] * len(group)

    async def close(self) -> None:
        await self._publisher.close()


def _confirm_ignored() -> AbstractContextManager[object]:
    original = Submitter.__init__

    def broken(self: Submitter, publisher: Publisher, *args: Any, **options: Any) -> None:
        original(self, _Credulous(publisher), *args, **options)

    return patch.object(Submitter, "__init__", broken)


def _mark_queued_skipped() -> AbstractContextManager[object]:
    async def broken(self: Submitter, drafts: Sequence[Any], until_s: float) -> None:
        for draft in drafts:
            draft.outcome = submission.Accepted(draft.record, attached=False)

    return patch.object(Submitter, "_accept", broken)


def _late_confirm_accepted() -> AbstractContextManager[object]:
    original = transitions.mark_queued

    def broken(record: Record | None, request: Queued, now: float, timing: Timing) -> Step[QueuedVerdict]:
        step = original(record, request, now, timing)
        return Step(QueuedVerdict.PASSED) if step.outcome is QueuedVerdict.LAPSED else step

    return patch.object(transitions, "mark_queued", broken)


def _attached_to_what_was_given_up() -> AbstractContextManager[object]:
    return patch.object(submission, "was_never_accepted", lambda record: False)


def _never_republished() -> AbstractContextManager[object]:
    async def broken(*_: object) -> int:
        return 0

    return patch.object(reconciler, "_publish_again", broken)


def _dropped_acked_first() -> AbstractContextManager[object]:
    original = reconciler._fail_dropped

    async def broken(*args: Any) -> list[Any]:
        await original(*args)
        return []

    return patch.object(reconciler, "_fail_dropped", broken)


# The worker's side -----------------------------------------------------------------------------------


async def _ack(self: Settler, endings: Sequence[Finished | Retry]) -> None:
    consumer: Consumer = self._consumer
    await consumer.ack([ending.held.delivery for ending in endings])


def _ack_before_commit() -> AbstractContextManager[object]:
    original = Settler._finish

    async def broken(self: Settler, endings: Sequence[Finished]) -> None:
        await _ack(self, endings)
        await original(self, endings)

    return patch.object(Settler, "_finish", broken)


def _retry_acked_first() -> AbstractContextManager[object]:
    original = Settler._retry

    async def broken(self: Settler, endings: Sequence[Retry]) -> None:
        await _ack(self, endings)
        await original(self, endings)

    return patch.object(Settler, "_retry", broken)


def _failure_without_dead_letter() -> AbstractContextManager[object]:
    async def broken(self: Settler, messages: Sequence[Message]) -> None:
        return None

    return patch.object(Settler, "dead_letter", broken)


def _adopted_delivery_forgotten() -> AbstractContextManager[object]:
    """What this simulation found first: of a message that came twice, one was never acked."""

    def broken(self: Settler, held: HeldJob, delivery: Any) -> None:
        held.delivery = delivery

    return patch.object(Settler, "adopt", broken)


def _retry_published_first() -> AbstractContextManager[object]:
    """Found second: a copy that came before the job waited for it was acked as a duplicate."""
    original = Settler._retry

    async def broken(self: Settler, endings: Sequence[Retry]) -> None:
        store, publish = self._store, self._publish_all
        late = _LateRelease(store)

        async def then_release(*args: Any) -> None:
            await publish(*args)
            await persist(lambda: store.release(late.group))

        with patch.object(self, "_store", late), patch.object(self, "_publish_all", then_release):
            await original(self, endings)

    return patch.object(Settler, "_retry", broken)


class _LateRelease:
    """A store that only notes what is to be released."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.group: Sequence[Release] = ()

    async def release(self, group: Sequence[Release]) -> list[ReleaseVerdict]:
        self.group = group
        return [ReleaseVerdict.RELEASED] * len(group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _leases_not_renewed() -> AbstractContextManager[object]:
    return patch.object(LeaseKeeper, "hold", lambda self, job_id, fence: None)


@contextmanager
def _usage_added_per_attempt() -> Iterator[None]:
    used = dict[str, int]()

    async def broken(held: HeldJob, *args: Any, **options: Any) -> Attempt:
        attempt = await execute(held, *args, **options)
        job = held.fence.rpartition(".")[0]
        used[job] = used.get(job, 0) + attempt.result.usage.completion_tokens
        usage = attempt.result.usage.model_copy(update={"completion_tokens": used[job]})
        return replace(attempt, result=attempt.result.model_copy(update={"usage": usage}))

    with patch("codeyard.worker.runner.execute", broken):
        yield


def _restart_not_told() -> AbstractContextManager[object]:
    original = TokenLog.restart

    def broken(self: TokenLog) -> None:
        seen, self.last_seq = self.last_seq, 0
        original(self)
        self.last_seq = seen

    return patch.object(TokenLog, "restart", broken)


def _two_runs_under_one_fence() -> AbstractContextManager[object]:
    def broken(self: Intake, arrival: Any, answer: Claimed) -> None:
        held = self._hand.get(arrival.envelope.job.id)
        if held is not None and held.fence == answer.fence and answer.verdict is ClaimVerdict.ADOPT:
            self._settler.adopt(held, arrival.delivery)
            return
        held = HeldJob.of(arrival.envelope, arrival.delivery, answer, time.monotonic())
        self._hand.add(held)
        self._on_claimed(held)

    return patch.object(Intake, "_take", broken)


def _redrive(broken: Callable[[Record, Redrive], Redrive]) -> AbstractContextManager[object]:
    """Redrives that ask for something else than the letter says."""
    original = transitions.redrive

    def redrive(record: Record | None, request: Redrive, now: float, timing: Timing) -> Step[Redriven]:
        return original(record, broken(record, request) if record is not None else request, now, timing)

    return patch.object(transitions, "redrive", redrive)


def _redriven_by_any_letter() -> AbstractContextManager[object]:
    return _redrive(lambda record, request: replace(request, died_in=record.incarnation))


def _letter_acked_first() -> AbstractContextManager[object]:
    async def broken(hand: Hand, letters: Sequence[Letter], *args: Any, **options: Any) -> list[Treated]:
        await hand.ack(letters)
        return await redrive(hand, letters, *args, **options)

    return patch.object(fleet, "redrive", broken)


MUTATIONS = (
    Mutation("ack before the commit", _ack_before_commit),
    Mutation("fence ignored at commit", lambda: _fence_ignored("commit")),
    Mutation("fence ignored at append", lambda: _fence_ignored("append")),
    Mutation("the first commit does not win", _first_commit_does_not_win),
    Mutation("confirm ignored", _confirm_ignored),
    Mutation("mark queued skipped", _mark_queued_skipped),
    Mutation("lease not checked at a claim", _lease_not_checked),
    Mutation("leases not renewed", _leases_not_renewed),
    Mutation("duplicate publication runs", _duplicates_run),
    Mutation("redelivery acked while another owner is live", _redelivery_acked),
    Mutation("retry acked before its copy is confirmed", _retry_acked_first),
    Mutation("usage added per attempt", _usage_added_per_attempt),
    Mutation("cancel not told to the owner", _cancel_not_told),
    Mutation("reconciler publishes nothing again", _never_republished),
    Mutation("fences repeat", _fences_repeat),
    Mutation("another body attaches", _other_body_attaches),
    Mutation("failed without a dead letter", _failure_without_dead_letter),
    Mutation("a restart is not told to readers", _restart_not_told),
    Mutation("an adopted delivery is forgotten", _adopted_delivery_forgotten),
    Mutation("a retry's copy is published before the job waits for it", _retry_published_first),
    Mutation("a job is redriven by the letter of any of its deaths", _redriven_by_any_letter),
    Mutation("a dead letter is acked before its job lives again", _letter_acked_first),
)

RARE = (  # too rare for a few thousand schedules; tests/simulation/test_regressions.py has the plans that show them
    Mutation("a confirm that came too late is an acceptance", _late_confirm_accepted),
    Mutation("who attaches to a job that is given up is told that it is accepted", _attached_to_what_was_given_up),
    Mutation("two answers to one message are two runs under one fence", _two_runs_under_one_fence),
    Mutation("a dropped message is acked before its job is failed", _dropped_acked_first),
)

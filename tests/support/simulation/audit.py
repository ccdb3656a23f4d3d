"""What must hold at every step of a schedule, and what must be left at its end.

The audit sees the two servers at the moment a call takes effect, and hears what callers were told. It knows
the protocol's promises (docs/protocol.md) and shares no code with what keeps them: a transition that lets an
old fence write is caught by the audit's own comparison. Called by: world.py.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from codeyard.shared.job import JobId
from codeyard.shared.record import Event, EventKind, Record, Result, State
from codeyard.shared.store.port import CancelVerdict, ClaimVerdict, Timing
from codeyard.shared.store.transitions import NEVER_PUBLISHED, Step
from support.simulation.broker import Letter
from support.simulation.engine import PROMPT_TOKENS, answer_to, prompt_of
from support.simulation.loop import EPOCH_S
from support.simulation.plan import Death, EngineDies, How, JobPlan, Kind, LetterFault, Plan

WRITES_UNDER_FENCE = frozenset({"renew", "append", "commit", "release"})
SLACK_S = 1.5  # over a lease: the way there and back, and the drawn order
POISON_DEATHS = 3  # of engines or workers; a job that was alone under each of them is condemned


class Audit:
    """`violations` is empty after a good run. `arrows` are the state changes it saw."""

    def __init__(self, plan: Plan, timing: Timing, say: Callable[[str, str], None]) -> None:
        self.violations: list[str] = []
        self.arrows: set[str] = set()
        self.trouble_until: defaultdict[str, float] = defaultdict(lambda: float("-inf"))  # by process; store's clock
        self.records: dict[JobId, Record] = {}  # set by the world: the store's own
        self.streams: dict[JobId, list[Event]] = {}
        self._plan = plan
        self._timing = timing
        self._say = say
        self._jobs: dict[JobId, JobPlan] = {}
        self._letters: defaultdict[JobId, dict[int, Letter]] = defaultdict(dict)  # at the broker, dead ones apart
        self._dead: Counter[JobId] = Counter()
        self._lost: set[JobId] = set()  # a letter was lost by a fault: only the reconciler can help
        self._dropped: set[JobId] = set()
        self._fences: defaultdict[JobId, set[str]] = defaultdict(set)
        self._counters: dict[str, int] = {}  # by incarnation
        self._accepted: dict[JobId, set[str]] = {}  # incarnations that callers were told of
        self._foreign: set[JobId] = set()
        self._cancels_sent: set[JobId] = set()
        self._cancels_known: dict[str, float] = {}  # by incarnation: when the store knew
        self._cancelled: set[str] = set()  # incarnations of which a caller heard "cancelled"
        self._told: dict[tuple[JobId, str], Result] = {}
        self._redriven: set[tuple[JobId, str]] = set()  # and the incarnation it had died in

    def expect(self, job_id: JobId, job: JobPlan) -> None:
        self._jobs[job_id] = job

    def violated(self, job_id: JobId, what: str) -> None:
        number = self._jobs[job_id].number if job_id in self._jobs else "?"
        self.violations.append(f"job {number}: {what}")
        self._say("AUDIT", f"{job_id[:8]} {what}")

    # What callers were told --------------------------------------------------------------------------

    def accepted(self, job_id: JobId, digest: str) -> None:
        record = self.records.get(job_id)
        if record is None:
            return self.violated(job_id, "accepted, and there is no record")
        if record.state is State.RESERVED:
            self.violated(job_id, "accepted while it is only reserved")
        if _never_published(record):
            self.violated(job_id, "accepted although it was ended as never published")
        if record.digest != digest:
            self.violated(job_id, "accepted with the body of another")
        if not record.state.final and not self._is_in_custody(record) and not _is_unpublished(record):
            self.violated(job_id, "accepted, and no message of it is at the broker")
        self._accepted.setdefault(job_id, set()).add(record.incarnation)
        return None

    def accepted_from_abroad(self, job_id: JobId) -> None:
        self._foreign.add(job_id)

    def conflicted(self, job_id: JobId, digest: str) -> None:
        record = self.records.get(job_id)
        if record is None or (record.digest == digest and record.counter):
            self.violated(job_id, "a conflict with itself")

    def cancel_sent(self, job_id: JobId) -> None:
        self._cancels_sent.add(job_id)

    def cancel_answered(self, job_id: JobId, verdict: CancelVerdict) -> None:
        if verdict is CancelVerdict.CANCELLED and (record := self.records.get(job_id)) is not None:
            self._cancelled.add(record.incarnation)
            if record.state is not State.CANCELLED:
                self.violated(job_id, f"called cancelled, and it is {record.state}")

    def result_told(self, job_id: JobId, result: Result) -> None:
        record = self.records[job_id]
        if result not in (record.result, *(past.result for past in record.history)):
            self.violated(job_id, f"a caller was told {result.state}, the store has {record.state}")

    def stream_told(self, job_id: JobId, events: list[Event]) -> None:
        if [event.seq for event in events] != list(range(1, len(events) + 1)):
            self.violated(job_id, f"a reader saw the events {[event.seq for event in events]}")
        result = self.records[job_id].result
        if self.records[job_id].history:
            return  # it may have read the end of one life and the beginning of another
        if result is not None and result.state is State.SUCCEEDED and _text(events) != result.text:
            self.violated(job_id, "a reader's text is not the result's")

    # What the broker does ----------------------------------------------------------------------------

    def enqueued(self, letter: Letter) -> None:
        if ".jobs." in letter.queue or letter.queue.endswith(".dropped"):
            self._letters[letter.message_id][letter.number] = letter
        else:
            self._dead[letter.message_id] += 1

    def lost(self, letter: Letter) -> None:
        self._letters[letter.message_id].pop(letter.number, None)
        self._lost.add(letter.message_id)

    def dropped(self, letter: Letter) -> None:
        self._dropped.add(letter.message_id)

    def acked(self, letter: Letter) -> None:
        job_id = letter.message_id
        self._letters[job_id].pop(letter.number, None)
        record = self.records.get(job_id)
        if letter.queue.endswith(".dead"):
            self._check_redriven(letter, record)
        elif record is None:
            if not self._dead[job_id]:
                self.violated(job_id, "its message was acked, and there is no record of it")
        elif not record.state.final and _is_of(letter, record):
            self._check_ack(letter, record)

    def _check_redriven(self, letter: Letter, record: Record | None) -> None:
        """A dead letter leaves when its job lives again, and a message of it is at the broker or with a worker."""
        lives = [past.incarnation for past in record.history] if record is not None else []
        if record is None or _life_of(letter) not in lives:
            self.violated(letter.message_id, "its dead letter was acked, and it was not redriven")
        elif lives[-1] == _life_of(letter) and record.state is State.QUEUED and not self._is_in_custody(record):
            self.violated(record.id, "its dead letter was acked before it was published")

    def _check_ack(self, letter: Letter, record: Record) -> None:
        """Of the last message of a job at the broker. A job that runs is in the reconciler's care when its lease
        is over, so a duplicate may go; the message it runs by may not, nor any of a job that waits."""
        if self._is_in_custody(record) or _is_unpublished(record):
            return
        if record.state is not State.RUNNING:
            self.violated(record.id, f"its last message was acked while it is {record.state}")
        elif letter.headers["publication"] == record.publication:
            self.violated(record.id, "its owner's message was acked before the commit")

    def _is_in_custody(self, record: Record) -> bool:
        return record.id in self._lost or any(_is_of(one, record) for one in self._letters[record.id].values())

    # What the store does -----------------------------------------------------------------------------

    def stepped(self, call: str, before: Record | None, request: Any, step: Step[Any], now: float) -> None:
        if (after := step.record) is None:
            return
        self._say("store", f"{call} {after.id[:8]}: {before.state if before else 'none'} -> {after.state}")
        self.arrows.add(f"{before.state if before else 'none'} -> {after.state} by {_named(call, request)}")
        again = before is None or before.incarnation != after.incarnation
        if call == "redrive":
            self._check_redrive(before, after, request.died_in)
        elif before is not None and before.state.final and not (again and _never_published(before)):
            self.violated(after.id, f"{call} changed it after it was {before.state}")
        elif again and before is not None and before.incarnation in self._accepted.get(after.id, ()):
            self.violated(after.id, f"{call} began anew a job that was accepted")
        if _never_published(after) and after.incarnation in self._accepted.get(after.id, ()):
            self.violated(after.id, "accepted, and ended as never published")
        if before is not None and not again:
            self._check_owner(call, before, after, request, step, now)
        self._check_fence(before, after)
        self._check_cancel(call, before, after, now)
        self._check_events(call, 0 if before is None or again else before.last_seq, after, step)
        if after.state.final:
            self._check_end(call, after, step, now)

    def _check_redrive(self, before: Record | None, after: Record, died_in: str) -> None:
        """Out of a failure only, into one new life for each death, under the old name with the old end kept."""
        again = before is not None and before.state is State.EXPIRED and not before.counter  # nobody had claimed it
        if not self._dead[after.id]:
            self.violated(after.id, "redriven, and it has no dead letter")
        if before is None:
            self._say("audit", f"{after.id[:8]} had no record any more when it died")
        elif before.state not in (State.FAILED, State.EXPIRED):
            self.violated(after.id, f"redriven while it was {before.state}")
        elif before.incarnation != died_in and not again:
            self.violated(after.id, "redriven by the letter of another death")
        elif (after.id, after.digest, after.job) != (before.id, before.digest, before.job):
            self.violated(after.id, "redriven as another job")
        elif (after.history[-1].incarnation, after.history[-1].result) != (before.incarnation, before.result):
            self.violated(after.id, "redriven, and its old end forgotten")
        if (after.id, died_in) in self._redriven and not again:
            self.violated(after.id, "redriven twice for one death")
        self._redriven.add((after.id, died_in))
        self._accepted[after.id] = {after.incarnation}  # an accepted job again

    def _check_owner(self, call: str, before: Record, after: Record, request: Any, step: Step[Any], now: float) -> None:
        live = before.state is State.RUNNING and before.lease_until > now
        if call in WRITES_UNDER_FENCE and (request.fence != before.fence or before.state is not State.RUNNING):
            self.violated(after.id, f"{call} under the fence {request.fence[-6:]} of a former owner")
        given_out = call == "claim" and step.outcome.verdict in (ClaimVerdict.RUN, ClaimVerdict.POISON)
        if given_out and after.fence == before.fence:
            self.violated(after.id, f"given out again under the fence {after.fence[-6:]}")
        if given_out and live:
            self.violated(after.id, f"given to {after.owner} while {before.owner} has it")
        if before.state is State.RUNNING and not live and call in ("claim", "mark_queued") and not after.state.final:
            since = before.lease_until - self._timing.lease_s - SLACK_S
            if self._trouble(before.owner) < since:
                self.violated(after.id, f"the lease of {before.owner} ended though nothing kept it from renewing")
        if call == "claim" and before.cancel_requested and step.outcome.verdict is ClaimVerdict.RUN:
            self.violated(after.id, "a job to be cancelled was given out")

    def _trouble(self, owner: str) -> float:
        process = owner.partition(":")[0]
        return float("inf") if process == "dropped" else self.trouble_until[process]

    def _check_fence(self, before: Record | None, after: Record) -> None:
        if not after.fence or (before is not None and before.fence == after.fence):
            return
        if after.fence in self._fences[after.id]:
            self.violated(after.id, f"the fence {after.fence[-6:]} was given out twice")
        if after.counter <= self._counters.get(after.incarnation, 0):
            self.violated(after.id, f"fences went back to {after.counter}")
        self._fences[after.id].add(after.fence)
        self._counters[after.incarnation] = after.counter

    def _check_cancel(self, call: str, before: Record | None, after: Record, now: float) -> None:
        if after.cancel_requested:
            self._cancels_known.setdefault(after.incarnation, now)
        elif after.incarnation in self._cancels_known:
            self.violated(after.id, f"{call} forgot that it is to be cancelled")
        if after.incarnation in self._cancelled and after.state is not State.CANCELLED:
            self.violated(after.id, f"called cancelled, and {call} made it {after.state}")
        if after.state is State.SUCCEEDED and before is not None and after.cancel_requested:
            known = max(self._cancels_known[after.incarnation], self._trouble(before.owner))
            if now > known + self._timing.lease_s + SLACK_S:
                self.violated(after.id, f"it ran to its end, {now - known:.1f} s after it was to be cancelled")

    def _check_events(self, call: str, last_seq: int, after: Record, step: Step[Any]) -> None:
        seqs = [event.seq for event in step.events]
        if seqs != list(range(last_seq + 1, last_seq + 1 + len(seqs))) or (seqs and after.last_seq != seqs[-1]):
            self.violated(after.id, f"{call} wrote the events {seqs} after {last_seq}")

    def _check_end(self, call: str, after: Record, step: Step[Any], now: float) -> None:
        result, job = after.result, self._jobs.get(after.id)
        if result is None or job is None or result.state is not after.state:
            return self.violated(after.id, f"{after.state} without such a result")
        self._say("end", f"{after.id[:8]} {after.state} {result.error.code if result.error else ''}")
        if (wrong := self._wrong_end(job, after, result)) is not None:
            self.violated(after.id, wrong)
        deaths = 1 + sum(past.result.state is State.FAILED for past in after.history)
        if after.state is State.FAILED and self._dead[after.id] < deaths:
            self.violated(after.id, "failed, and it is not among the dead letters")
        if after.state is State.SUCCEEDED:
            events = [*self.streams.get(after.id, ()), *step.events]
            self._check_answer(after, result, events)
        return None

    def _wrong_end(self, job: JobPlan, after: Record, result: Result) -> str | None:
        code = result.error.code if result.error else ""
        match after.state:
            case State.SUCCEEDED:
                right = job.kind in (Kind.PLAIN, Kind.FAILS_ONCE)
            case State.CANCELLED:
                right = after.id in self._cancels_sent
            case State.EXPIRED:
                right = code == NEVER_PUBLISHED or after.finished_at >= after.deadline_at
            case _:
                right = code in self._failures_of(job, after)
        return None if right else f"a {job.kind} job {after.state} {code}"

    def _failures_of(self, job: JobPlan, after: Record) -> set[str]:
        allowed = {
            Kind.PLAIN: set[str](),
            Kind.FAILS_ONCE: {"engine_error"} if after.attempt >= 3 else set(),
            Kind.BROKEN: {"engine_error"},
            Kind.REFUSED: {"simulated"},
            Kind.KILLS: {"poison"},
            Kind.HANGS: {"poison"},
        }[job.kind]
        deaths = sum(isinstance(fault, Death | EngineDies) for fault in self._plan.faults)
        if deaths >= POISON_DEATHS:
            allowed = allowed | {"poison"}
        if after.id in self._dropped:
            allowed = allowed | {"dropped_by_broker"}
        return allowed

    def _check_answer(self, after: Record, result: Result, events: list[Event]) -> None:
        assert isinstance(after.job.prompt, str)
        answer = answer_to(after.job.prompt, after.job.sampling.max_tokens)
        if result.text != answer.text or result.finish_reason != answer.finish_reason:
            self.violated(after.id, f"a wrong answer: {result.text!r} {result.finish_reason}")
        if _text(events) != result.text:
            self.violated(after.id, f"the events say {_text(events)!r}, the result {result.text!r}")
        if result.usage.completion_tokens != len(answer.token_ids) or result.usage.prompt_tokens != PROMPT_TOKENS:
            self.violated(after.id, f"{result.usage} for {PROMPT_TOKENS} and {len(answer.token_ids)} tokens")

    # At the end --------------------------------------------------------------------------------------

    def finish(self, unsettled: str) -> None:
        """`unsettled` says what was still there when time was over; "" if nothing was."""
        if unsettled:
            self.violations.append(f"not drained: {unsettled}")
            return
        for job_id, incarnations in self._accepted.items():
            record = self.records.get(job_id)
            if record is None or not record.state.final or {record.incarnation} != incarnations:
                self.violated(job_id, "accepted, and not ended")
        for job_id in self._foreign:
            if job_id not in self.records and not self._dead[job_id] and job_id not in self._lost:
                self.violated(job_id, "published from abroad, and not ended")
        for job_id, record in self.records.items():
            if not record.state.final:
                self.violated(job_id, f"it stayed {record.state}")
            seqs = [event.seq for event in self.streams[job_id]]
            ends = [event.kind for event in self.streams[job_id][-1:]]
            if seqs != list(range(1, record.last_seq + 1)) or ends != [EventKind.END]:
                self.violated(job_id, f"its events are {seqs}")


def prompts_of(job: JobPlan) -> list[str]:
    """Every body this job is submitted with."""
    return [prompt_of(job, other=other) for other in {call.how is How.OTHER_BODY for call in job.calls}]


def letter_faults(plan: Plan) -> dict[int, LetterFault]:
    return {fault.nth: fault for fault in plan.faults if isinstance(fault, LetterFault)}


def _named(call: str, request: Any) -> str:
    """The call, and which of its two uses a release is."""
    if call != "release":
        return call
    return "retry" if request.charge else "hand-back"


def _never_published(record: Record) -> bool:
    error = record.result.error if record.result else None
    return record.state is State.EXPIRED and error is not None and error.code == NEVER_PUBLISHED


def _is_unpublished(record: Record) -> bool:
    """Redriven just now: whoever did it publishes it next, or else the reconciler."""
    return bool(record.history) and record.state is State.QUEUED and not record.queued_at


def _life_of(letter: Letter) -> str:
    """The incarnation that a dead letter tells the end of."""
    return str(letter.headers["incarnation"] or letter.headers["publication"])


def _is_of(letter: Letter, record: Record) -> bool:
    return letter.headers["incarnation"] in ("", record.incarnation)


def _text(events: list[Event]) -> str:
    text = ""
    for event in events:
        text = "" if event.kind is EventKind.RESTARTED else text + event.text
    return text


def by_clock(now_s: float) -> float:
    """Virtual seconds as the store tells them."""
    return EPOCH_S + now_s

"""The Store port: where records, events and results live, and who owns which job.

Promise, for every adapter:
- A method that touches the server takes a *group* and gives one outcome per item, in order. One bad
  item never fails its neighbours. Items of one group that name the same job act in order.
- An exception is `StoreUnavailable`: the fate of the whole group is unknown, and repeating it is safe.
- All times are the store's own clock. Nothing here ever blocks the event loop.

What each call does to a record is written once, as pure functions, in `transitions.py`; SQLite runs
them, Redis runs a Lua port of them, and one contract suite holds both to it.
Called by: producer.submission, shared.reading, shared.reconciler, worker.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from codeyard.shared.alias import Alias
from codeyard.shared.job import Job, JobId
from codeyard.shared.record import Event, Record, Result, State


@dataclass(frozen=True, slots=True)
class Timing:
    """The protocol's durations, in seconds. One fleet uses one set; checked in settings."""

    lease_s: float = 3.0  # a worker that misses this long has lost its jobs
    grace_s: float = 2.0  # added before the reconciler publishes a lapsed job again
    unpublished_s: float = 60.0  # a job still reserved after this was never accepted
    queue_check_s: float = 60.0  # first look whether a queued job's message is still there; then doubling
    longest_run_s: float = 3_600.0
    retention_s: float = 86_400.0  # results and dead letters are kept this long past the deadline
    poison_after: int = 3  # crashes while running alone


# Requests and outcomes, in the order of a job's life -----------------------------------------------


@dataclass(frozen=True, slots=True)
class Reservation:
    """`publication` and `incarnation` are fresh nonces of this submission; repeating a reserve with
    the same `publication` finds its own reservation and reports it as new."""

    job: Job
    digest: str
    publication: str
    incarnation: str


class ReserveVerdict(StrEnum):
    NEW = "new"
    ATTACHED = "attached"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class Reserved:
    verdict: ReserveVerdict
    record: Record  # the one in the store now; of a conflict, the other body's


@dataclass(frozen=True, slots=True)
class Queued:
    """`publication` of the job was confirmed by the broker."""

    job_id: JobId
    publication: str


class QueuedVerdict(StrEnum):
    QUEUED = "queued"
    PASSED = "passed"  # a worker was faster, or it is final: nothing changed
    LAPSED = "lapsed"  # ended as never published before this came: its caller must not hear that it was accepted
    MISSING = "missing"  # no record; the worker will create it from the message


@dataclass(frozen=True, slots=True)
class Claim:
    """One delivery asks to run. `job` is the decoded body; the rest comes from the message."""

    job: Job
    digest: str
    publication: str
    owner: str  # unique for every worker process ever started
    incarnation: str = ""  # "" from publishers that did not reserve: matches any
    published_at: float | None = None
    deadline_at: float | None = None


class ClaimVerdict(StrEnum):
    RUN = "run"
    ADOPT = "adopt"  # this owner has it already: take over the new delivery tag
    HOLD = "hold"  # another owner's lease is live on the same publication: keep unacked, ask again
    FINAL = "final"  # ack
    DUPLICATE = "duplicate"  # ack: another publication or incarnation is the live one
    EXPIRED = "expired"  # committed as expired just now: ack
    CANCELLED = "cancelled"  # committed as cancelled just now: ack
    POISON = "poison"  # owned under the new fence, to be dead-lettered and committed as failed
    RECORD_MISSING = "record_missing"  # no record and past its deadline: dead-letter, ack
    CONFLICT = "conflict"  # the message's body is not the record's: dead-letter, ack, touch nothing


@dataclass(frozen=True, slots=True)
class Claimed:
    verdict: ClaimVerdict
    fence: str = ""
    attempt: int = 0
    deadline_in_s: float = 0.0  # from now, by the store's clock
    waited_s: float = 0.0  # since the record was made
    last_seq: int = 0  # of the events there are; above 0 something was streamed before
    suspect: bool = False  # an owner's lease ended without release: run it apart
    hold_s: float = 0.0  # of HOLD: until the other lease is over


@dataclass(frozen=True, slots=True)
class Renewal:
    job_id: JobId
    fence: str
    alone: bool = False  # recorded before a suspect runs by itself, so that its crash counts


@dataclass(frozen=True, slots=True)
class Renewed:
    held: bool  # False: another owner has it, or it is final; stop working on it
    cancel_requested: bool = False


@dataclass(frozen=True, slots=True)
class Append:
    """Events with consecutive `seq`. Those already there are skipped, so a repeat is safe."""

    job_id: JobId
    fence: str
    events: Sequence[Event]


class AppendVerdict(StrEnum):
    APPENDED = "appended"
    FENCED = "fenced"  # another owner, final, gone, or a gap in `seq`: stop working on it


@dataclass(frozen=True, slots=True)
class Commit:
    """The outcome of one job. `events` are the unflushed rest of its stream; the store adds `end`."""

    job_id: JobId
    fence: str
    publication: str  # of the delivery in hand
    result: Result
    events: Sequence[Event] = ()


class CommitVerdict(StrEnum):
    COMMITTED = "committed"  # also when this very fence had committed it before
    ALREADY_FINAL = "already_final"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Committed:
    verdict: CommitVerdict
    may_ack: bool  # False only when fenced while the record still counts on this publication


@dataclass(frozen=True, slots=True)
class Release:
    """Give up ownership; the job is queued again. `publication` names the message that will bring it
    back: the delivery's own on a hand-back, the delayed copy's on a retry."""

    job_id: JobId
    fence: str
    publication: str
    delay_s: float = 0.0
    charge: bool = False  # False takes the claim's attempt back: nothing was run


class ReleaseVerdict(StrEnum):
    RELEASED = "released"
    FENCED = "fenced"


class CancelVerdict(StrEnum):
    CANCELLED = "cancelled"  # final now
    REQUESTED = "requested"  # a worker has it and will stop within about a renewal period
    ALREADY_FINAL = "already_final"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Recovery:
    """The reconciler looks at one due job. `publication` is fresh, used if it is published again.
    `queue_empty` answers an earlier ASK_QUEUE: has the job's queue no ready message?"""

    job_id: JobId
    publication: str
    queue_empty: bool | None = None


class RecoverVerdict(StrEnum):
    NOT_DUE = "not_due"  # someone else was faster, or it is final or gone
    EXPIRED = "expired"  # committed as expired just now
    ASK_QUEUE = "ask_queue"  # find out whether its queue is empty, then ask again
    REPUBLISH = "republish"  # publish `record.job` under the new publication, then `mark_queued`


@dataclass(frozen=True, slots=True)
class Recovered:
    verdict: RecoverVerdict
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Redrive:
    """Run a dead job once more. `job`, `digest` and `died_in` (its incarnation) come from the dead letter,
    and so does `outcome`, which stands in where the record is gone; `incarnation` and `publication` are
    fresh. To be published under `publication` afterwards, then `mark_queued`."""

    job: Job
    digest: str
    died_in: str
    outcome: Result
    incarnation: str
    publication: str


class RedriveVerdict(StrEnum):
    REDRIVEN = "redriven"  # queued in a new incarnation, by this call or one whose publish is not known of: publish it
    ALREADY = "already"  # redriven before, and published: the letter is done with
    LIVE = "live"  # not final: its worker died before it could commit, or is about to
    ENDED = "ended"  # succeeded or cancelled after all
    SUPERSEDED = "superseded"  # another incarnation that did not come from this letter has the id
    CONFLICT = "conflict"  # another body has the id


@dataclass(frozen=True, slots=True)
class Redriven:
    verdict: RedriveVerdict
    record: Record | None = None  # of REDRIVEN: what to publish


@dataclass(frozen=True, slots=True)
class TakeCallback:
    """One due callback asks to be delivered by whoever calls, within `lease_s`; then another may take it."""

    job_id: JobId
    lease_s: float


class CallbackOutcome(StrEnum):
    DELIVERED = "delivered"
    AGAIN = "again"  # to be tried again after `delay_s`
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True)
class NoteCallback:
    """How the delivery went that was taken as `attempt` (the record's `callback_attempts`) of `incarnation`."""

    job_id: JobId
    incarnation: str
    attempt: int
    outcome: CallbackOutcome
    delay_s: float = 0.0


class Wakeup(Protocol):
    async def wait(self, timeout_s: float) -> None:
        """Return when the job may have changed, or after `timeout_s`. A hint: always read after."""


class Store(Protocol):
    timing: Timing

    async def reserve(self, group: Sequence[Reservation]) -> list[Reserved]: ...

    async def mark_queued(self, group: Sequence[Queued]) -> list[QueuedVerdict]: ...

    async def claim(self, group: Sequence[Claim]) -> list[Claimed]: ...

    async def renew(self, group: Sequence[Renewal]) -> list[Renewed]: ...

    async def append(self, group: Sequence[Append]) -> list[AppendVerdict]: ...

    async def commit(self, group: Sequence[Commit]) -> list[Committed]: ...

    async def release(self, group: Sequence[Release]) -> list[ReleaseVerdict]: ...

    async def cancel(self, group: Sequence[JobId]) -> list[CancelVerdict]: ...

    async def read(self, group: Sequence[JobId]) -> list[Record | None]: ...

    async def states(self, group: Sequence[JobId]) -> list[State | None]:
        """The state alone of each record; None where there is none."""

    async def events(self, job_id: JobId, *, after: int, limit: int = 1_000) -> list[Event]:
        """Events with `seq > after`, in order. Empty if there are none (yet), or no such job."""

    def watch(self, job_id: JobId) -> AbstractAsyncContextManager[Wakeup]:
        """Be woken when the job gets events or a final state. Shares one subscription per process.
        Read after entering: what happened before is not announced again."""

    async def due(self, limit: int) -> list[JobId]:
        """Jobs whose `check_at` has passed, oldest first."""

    async def recover(self, group: Sequence[Recovery]) -> list[Recovered]: ...

    async def redrive(self, group: Sequence[Redrive]) -> list[Redriven]:
        """The one way out of a final state: failed or expired, to queued. Twice with the same letter is once."""

    async def callbacks_due(self, limit: int) -> list[JobId]:
        """Jobs whose callback is to be delivered now, those that wait longest first."""

    async def take_callbacks(self, group: Sequence[TakeCallback]) -> list[Record | None]:
        """The record of each that is the caller's to deliver now; None: it is not due, or somebody else has it."""

    async def note_callbacks(self, group: Sequence[NoteCallback]) -> list[bool]:
        """False: noted nothing, because another delivery of it has begun or ended since. One that arrived is
        always noted. What repeats an earlier note is True."""

    async def recent(self, limit: int) -> list[Record]:
        """The newest records, newest first; for people, so bounded and approximate."""

    async def aliases(self) -> Mapping[str, Alias]: ...

    async def swap_alias(self, expected: Alias | None, new: Alias) -> Alias:
        """Set an alias if `expected`, or nothing, is there now. Returns what is there then: `new` if it was
        set, by this call or an earlier one whose answer was lost. The one way an alias changes."""

    async def announce(self, owner: str, text: str, *, ttl_s: float) -> None:
        """Keep a worker's notice for `ttl_s`, in place of its last one; 0 withdraws it."""

    async def notices(self) -> Mapping[str, str]:
        """Every worker's that is not over, by owner."""

    async def ping(self) -> str:
        """Name and version of the server, e.g. "redis 7.0.15". Raises StoreUnavailable."""

    async def close(self) -> None: ...

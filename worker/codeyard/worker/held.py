"""A claimed job and the four ways it leaves the worker.

One `HeldJob` lives from claim to ack. Exactly one `Ending` is handed to the settler for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from codeyard.shared.broker.port import Delivery
from codeyard.shared.envelope import Envelope
from codeyard.shared.job import Job, JobId
from codeyard.shared.record import Event, EventKind, Result
from codeyard.shared.store.port import Claimed
from codeyard.worker.engines.port import Delta


@dataclass(slots=True, eq=False)
class TokenLog:
    """What one job has generated: all of it, and what its event stream does not hold yet.

    `text` is always the concatenation of the `tokens` events since the last `restarted`, sent or not.
    Written by the job's own task; the event writer only takes from `unsent`.
    """

    last_seq: int  # of the events made so far
    revision: str | None = None  # said with the first event made here
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    unsent: list[Event] = field(default_factory=list)
    _text: str = ""
    _token_ids: list[int] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self._text += delta.text
        self._token_ids.extend(delta.token_ids)

    def resume(self, events: Sequence[Event]) -> None:
        """Take over what an earlier owner streamed."""
        for event in events:
            if event.kind is EventKind.RESTARTED:
                self.text, self.token_ids = "", []
            elif event.kind is EventKind.TOKENS:
                self.text += event.text
                self.token_ids.extend(event.token_ids)

    def restart(self) -> None:
        """Generation begins again; readers who saw something are told."""
        seen = self.last_seq > 0
        self.text, self.token_ids, self._text, self._token_ids = "", [], "", []
        if seen:
            self._append(EventKind.RESTARTED)

    def flush(self) -> Sequence[Event]:
        """Every event the store has not confirmed, the newest tokens included."""
        if self._token_ids or self._text:
            self._append(EventKind.TOKENS, self._text, tuple(self._token_ids))
            self._text, self._token_ids = "", []
        return tuple(self.unsent)

    def confirmed(self, events: Sequence[Event]) -> None:
        last = events[-1].seq if events else 0
        self.unsent = [event for event in self.unsent if event.seq > last]

    def _append(self, kind: EventKind, text: str = "", token_ids: tuple[int, ...] = ()) -> None:
        self.last_seq += 1
        event = Event(seq=self.last_seq, kind=kind, text=text, token_ids=token_ids, revision=self.revision)
        self.revision = None
        self.unsent.append(event)


@dataclass(slots=True, eq=False)
class HeldJob:
    """Everything the worker knows of one claimed job. Times are monotonic seconds."""

    envelope: Envelope
    delivery: Delivery  # replaced when the job is redelivered to its own owner
    fence: str
    attempt: int
    suspect: bool
    claimed_s: float
    submitted_s: float
    deadline_s: float
    log: TokenLog
    alone: bool = False  # runs by itself under this fence, as the store knows
    first_token_s: float | None = None  # when this worker had its first token; None if an earlier owner had it
    alone_crashes: int = 0  # engines that died under it while it ran alone, in this process
    stop_reason: str | None = None  # why it was told to stop: cancelled, lost, preempted, drained
    abandoned: bool = False  # its engine died without ending it, so its task was cancelled

    @classmethod
    def of(cls, envelope: Envelope, delivery: Delivery, claimed: Claimed, now_s: float) -> "HeldJob":
        return cls(
            envelope=envelope,
            delivery=delivery,
            fence=claimed.fence,
            attempt=claimed.attempt,
            suspect=claimed.suspect,
            claimed_s=now_s,
            submitted_s=now_s - claimed.waited_s,
            deadline_s=now_s + claimed.deadline_in_s,
            log=TokenLog(last_seq=claimed.last_seq, revision=envelope.job.revision),
        )

    @property
    def job(self) -> Job:
        return self.envelope.job

    @property
    def id(self) -> JobId:
        return self.envelope.job.id

    @property
    def continuable(self) -> bool:
        """Whether generation can go on from tokens an earlier run left: a seed starts a generator of its
        own, and stop strings hold text back, so those start over."""
        return self.job.sampling.seed is None and not self.job.sampling.stop


@dataclass(frozen=True, slots=True)
class Finished:
    """Commit `result`, then ack. A failed one is dead-lettered first."""

    held: HeldJob
    result: Result


@dataclass(frozen=True, slots=True)
class Retry:
    """Publish a delayed copy, release the job, then ack."""

    held: HeldJob
    reason: str


@dataclass(frozen=True, slots=True)
class HandBack:
    """Release the job uncharged, then requeue."""

    held: HeldJob


@dataclass(frozen=True, slots=True)
class Lost:
    """Somebody else owns it or ended it. Ack only if nobody counts on this delivery."""

    held: HeldJob


Ending = Finished | Retry | HandBack | Lost

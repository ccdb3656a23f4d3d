"""A claimed job and the four ways it leaves the worker.

One `HeldJob` lives from claim to ack. Exactly one `Ending` is handed to the settler for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from codeyard.shared.broker.port import Delivery
from codeyard.shared.chat import Chat, TokenLogprob, ToolCall, ToolCallDelta
from codeyard.shared.envelope import Envelope
from codeyard.shared.job import Job, JobId, Prompt
from codeyard.shared.record import Event, EventKind, Result
from codeyard.shared.store.port import Claimed
from codeyard.worker.engines.port import Delta


@dataclass(slots=True, eq=False)
class _Call:
    """Pieces of one call that followed each other. `said`: its arguments."""

    index: int
    id: str | None
    name: str | None
    said: list[str]


@dataclass(slots=True, eq=False)
class Said:
    """What a row of deltas says together. Adding one takes as long after a long answer as after a short one."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)
    _content: list[str] | None = None  # None: no delta had any
    _calls: list[_Call] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.token_ids or self._calls or self.text or self.content)

    def add(self, said: Delta | Event) -> None:
        self._text.append(said.text)
        self.token_ids.extend(said.token_ids)
        self.logprobs.extend(said.logprobs)
        if said.content is not None:
            self._content = self._content or []
            self._content.append(said.content)
        for piece in said.tool_calls:
            if self._calls and piece.id is None and self._calls[-1].index == piece.index:
                self._calls[-1].said.append(piece.arguments)
            else:
                self._calls.append(_Call(piece.index, piece.id, piece.name, [piece.arguments]))

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def content(self) -> str | None:
        """None: all of the text."""
        return None if self._content is None else "".join(self._content)

    @property
    def pieces(self) -> tuple[ToolCallDelta, ...]:
        """Those of one call that follow each other are one."""
        return tuple(
            ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments="".join(call.said))
            for call in self._calls
        )

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Whole, in the order of their indices."""
        calls: dict[int, list[_Call]] = {}
        for call in self._calls:
            calls.setdefault(call.index, []).append(call)
        return tuple(
            ToolCall(
                id=of[0].id or "", name=of[0].name or "", arguments="".join(said for one in of for said in one.said)
            )
            for _, of in sorted(calls.items())
        )


@dataclass(slots=True, eq=False)
class TokenLog:
    """What one job has generated: all of it, and what its event stream does not hold yet.

    `text` is always the concatenation of the `tokens` events since the last `restarted`, sent or not.
    Written by the job's own task; the event writer only takes from `unsent`.
    """

    last_seq: int  # of the events made so far
    revision: str | None = None  # said with the first event made here
    said: Said = field(default_factory=Said)
    unsent: list[Event] = field(default_factory=list)
    _news: Said = field(default_factory=Said)

    @property
    def text(self) -> str:
        return self.said.text

    @property
    def token_ids(self) -> list[int]:
        return self.said.token_ids

    @property
    def num_new(self) -> int:
        """Tokens that no event holds yet."""
        return len(self._news.token_ids)

    def add(self, delta: Delta) -> None:
        self.said.add(delta)
        self._news.add(delta)

    def resume(self, events: Sequence[Event]) -> None:
        """Take over what an earlier owner streamed."""
        for event in events:
            if event.kind is EventKind.RESTARTED:
                self.said = Said()
            elif event.kind is EventKind.TOKENS:
                self.said.add(event)

    def restart(self) -> None:
        """Generation begins again; readers who saw something are told."""
        seen = self.last_seq > 0
        self.said, self._news = Said(), Said()
        if seen:
            self._append(EventKind.RESTARTED, Said())

    def flush(self) -> Sequence[Event]:
        """Every event the store has not confirmed, the newest tokens included."""
        if self._news:
            self._append(EventKind.TOKENS, self._news)
            self._news = Said()
        return tuple(self.unsent)

    def confirmed(self, events: Sequence[Event]) -> None:
        last = events[-1].seq if events else 0
        self.unsent = [event for event in self.unsent if event.seq > last]

    def _append(self, kind: EventKind, said: Said) -> None:
        self.last_seq += 1
        event = Event(
            seq=self.last_seq,
            kind=kind,
            text=said.text,
            token_ids=tuple(said.token_ids),
            content=said.content,
            tool_calls=said.pieces,
            logprobs=tuple(said.logprobs),
            revision=self.revision,
        )
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
    redeemed: Prompt | None = None  # the prompt, where the job has only its claim
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

    def continuable(self, *, resumes_calls: bool) -> bool:
        """Whether generation can go on from the tokens an earlier run left, to the very character. A seed starts
        a generator of its own, a format or a demanded call its grammar, and the log probabilities of those tokens
        are gone: such a job starts over. `resumes_calls`: whether the engine reads calls on from their text."""
        asked, prompt = self.job.sampling, self.redeemed or self.job.prompt
        afresh = (asked.seed, asked.output_format, asked.logprobs)
        calls = isinstance(prompt, Chat) and prompt.offers_tools
        free = isinstance(prompt, Chat) and prompt.tool_choice == "auto"
        return all(one is None for one in afresh) and (not calls or (free and resumes_calls))


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

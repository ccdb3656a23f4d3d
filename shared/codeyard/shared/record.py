"""What the store keeps of a job: its record, its events and its result.

    reserved -> queued -> running -> succeeded | failed | cancelled | expired
        |          |  ^------'  retry, hand-back, owner lost
        '----------'-----------------------------> cancelled | expired

`redrive` of a dead job is the one way out of a final state: queued again, in a new incarnation.
All times are seconds since the epoch by the store's clock, durations are seconds. Documented for
other languages in docs/wire-contract.md. How a record changes is decided in store/transitions.py.
"""

from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codeyard.shared.chat import TokenLogprob, ToolCall, ToolCallDelta
from codeyard.shared.errors import MalformedMessage
from codeyard.shared.job import Job, JobId, Lane

M = TypeVar("M", bound=BaseModel)


class State(StrEnum):
    RESERVED = "reserved"  # id taken, not yet confirmed by the broker: not accepted
    QUEUED = "queued"  # accepted; a message is at the broker
    RUNNING = "running"  # a worker owns it for as long as its lease
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})


class Usage(BaseModel):
    """Tokens, counted once per job however often it was generated."""

    model_config = ConfigDict(frozen=True)

    prompt_tokens: Annotated[int, Field(ge=0)] = 0
    completion_tokens: Annotated[int, Field(ge=0)] = 0


class Failure(BaseModel):
    """Why a job did not succeed: a stable code for programs, a sentence for people."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str


class Result(BaseModel):
    """The one committed outcome of a job.

    `text` is the concatenation of the `tokens` events after the last `restarted`; for a job that
    the store itself ended (cancelled or expired before a worker had it) it is empty.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    v: Literal[1] = 1
    state: State
    text: str = ""
    content: str | None = None  # of a chat that offers tools: `text` without the calls; None: all of `text`
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # where they were asked for, one for each token
    finish_reason: str | None = None  # stop | length | tool_calls | abort, as the engine names it
    stop: str | None = None  # the stop string that ended it, where one did
    usage: Usage = Usage()
    error: Failure | None = None
    engine: str | None = None  # which engine and version made it; "simulated" says so
    revision: str | None = None  # of the weights that made it: the one the job was pinned to
    batch_size: int | None = None  # jobs running in the engine when this one started, itself included
    first_token_s: float | None = None  # from this attempt's admission to its first token
    generate_s: float | None = None  # from this attempt's admission to its last token

    def encode(self) -> str:
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def decode(cls, body: str | bytes) -> "Result":
        return _decode(cls, body)


class EventKind(StrEnum):
    TOKENS = "tokens"  # more text; append it
    RESTARTED = "restarted"  # generation began again: drop the text so far
    END = "end"  # the job is final; always the last event


class Event(BaseModel):
    """One entry of a job's event stream. `seq` counts from 1 without gap or repeat."""

    model_config = ConfigDict(frozen=True, extra="allow")

    v: Literal[1] = 1
    seq: Annotated[int, Field(ge=1)]
    kind: EventKind
    text: str = ""
    token_ids: tuple[int, ...] = ()
    content: str | None = None  # of a chat that offers tools: what of `text` is for the reader; None: all
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    state: State | None = None  # of an `end` event
    revision: str | None = None  # of the weights; on the first event of each worker that generates it

    def encode(self) -> str:
        return self.model_dump_json(exclude_defaults=True, exclude_none=True)

    @classmethod
    def decode(cls, body: str | bytes) -> "Event":
        return _decode(cls, body)


class Past(BaseModel):
    """How an earlier incarnation of a job ended, before it was redriven."""

    model_config = ConfigDict(frozen=True)

    incarnation: str
    attempt: int
    result: Result

    def encode(self) -> str:
        return self.model_dump_json(exclude_none=True)


class Callback(StrEnum):
    """Of a job with a `callback_url`: where the delivery of its end is."""

    NONE = ""
    WAITING = "waiting"  # for the job's end
    DUE = "due"  # at `callback_at`; then, or when whoever took it has been silent for its lease, a gateway takes it
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class Record(BaseModel):
    """All the store knows of one job, but for its events.

    `fence` changes with every owner ("<incarnation>.<counter>"); a write under another fence is
    refused. `publication` names the message whose delivery the owner holds (running), or the
    newest one published (otherwise).
    """

    model_config = ConfigDict(frozen=True)

    id: JobId
    state: State
    job: Job
    digest: str
    incarnation: str  # nonce; another one under the same id is another job
    publication: str
    fence: str = ""
    counter: int = 0  # of fences given out in this incarnation
    owner: str = ""
    lease_until: float = 0.0
    attempt: int = 0  # claims that were not handed back
    crashes: int = 0  # leases that ended without release; above 0 the job is a suspect
    alone: bool = False  # the engine runs nothing but this job under the present fence
    alone_crashes: int = 0  # of them, those while it ran alone
    cancel_requested: bool = False
    created_at: float
    queued_at: float = 0.0
    started_at: float = 0.0  # the last claim
    finished_at: float = 0.0
    deadline_at: float
    check_at: float = 0.0  # when the reconciler looks at it next; 0 when final
    expires_at: float  # the end of every key of this job
    last_seq: int = 0  # of its events
    result: Result | None = None
    history: tuple[Past, ...] = ()  # of a redriven job, oldest first
    callback: Callback = Callback.NONE
    callback_at: float = 0.0  # when it is tried next; 0 unless due
    callback_attempts: int = 0  # deliveries that were begun

    @property
    def lane(self) -> Lane:
        return self.job.lane


class JobStatus(BaseModel):
    """What a caller sees of a record: over HTTP, from the clients, from `codeyard jobs --json`."""

    model_config = ConfigDict(frozen=True)

    id: JobId
    state: State
    lane: Lane
    model: str
    revision: str
    tenant: str
    key: str
    attempt: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    deadline_at: float
    cancel_requested: bool
    last_seq: int  # of its events: a stream resumes after at most this
    result: Result | None
    asked_model: str | None = None  # what the caller named, where `model` stands in for it
    callback: Callback | None = None  # where the delivery of its end is; None: nobody wanted one

    @classmethod
    def of(cls, record: Record) -> "JobStatus":
        job = record.job
        return cls(
            id=record.id,
            state=record.state,
            lane=job.lane,
            model=job.model,
            revision=job.revision,
            tenant=job.tenant,
            key=job.key,
            attempt=record.attempt,
            created_at=record.created_at,
            started_at=record.started_at or None,
            finished_at=record.finished_at or None,
            deadline_at=record.deadline_at,
            cancel_requested=record.cancel_requested,
            last_seq=record.last_seq,
            result=record.result,
            asked_model=job.asked_model,
            callback=record.callback or None,
        )


def _decode(kind: type[M], body: str | bytes) -> M:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise MalformedMessage(f"not a {kind.__name__.lower()}: {error.errors(include_url=False)[0]['msg']}") from None

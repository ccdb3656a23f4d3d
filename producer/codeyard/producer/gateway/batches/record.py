"""What is kept of a batch: where its input lies, how far it has come, how its items ended.

Everything else is derived: an item's job from (batch, custom_id), its result from that job's record, the files of
results from the input and those records. So nothing is stored twice, and a gateway that dies leaves nothing half
written. Times ending in `_at` are wall time, for people; `deadline_at` is by the store's clock and decides.
Called by: batches.
"""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codeyard.shared.blobs.port import Digest
from codeyard.shared.documents.port import Name
from codeyard.shared.errors import MalformedMessage

WINDOW_S = 86_400.0  # the one completion window that both APIs know
CANCEL = "cancel:"  # the one wish there is; then when, wall time in whole seconds
MAX_REFUSED = 1_000  # items whose refusal is kept word by word

KINDS = {"openai": "batch", "anthropic": "msgbatch"}  # of documents; ids begin with them too


class Outcome(StrEnum):
    """How an item ended."""

    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Counts(BaseModel):
    model_config = ConfigDict(frozen=True)

    succeeded: int = 0
    errored: int = 0
    cancelled: int = 0
    expired: int = 0

    @property
    def ended(self) -> int:
        return self.succeeded + self.errored + self.cancelled + self.expired

    def plus(self, outcome: Outcome, number: int = 1) -> "Counts":
        return self.model_copy(update={outcome.value: getattr(self, outcome.value) + number})


class Phase(StrEnum):
    WAITING = "waiting"  # for a gateway to take it
    RUNNING = "running"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"  # its input is not there
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (Phase.COMPLETED, Phase.FAILED, Phase.EXPIRED, Phase.CANCELLED)


class Refusal(BaseModel):
    """Why an item, or the batch, came to nothing before there was a job."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    param: str | None = None


class BatchRecord(BaseModel):
    """`line`: up to there every item has ended, and `done` counts them; the next owner goes on behind it. Beyond
    `high` nothing was submitted by anyone. `counts` is all that was known at the last write."""

    model_config = ConfigDict(frozen=True, extra="allow")

    v: Literal[1] = 1
    id: str
    api: Literal["openai", "anthropic"]
    endpoint: str
    input_file_id: str | None = None
    chunks: tuple[Digest, ...]
    num_items: int  # lines that are not blank
    metadata: dict[str, str] | None = None
    created_at: float
    deadline_at: float = 0.0
    phase: Phase = Phase.WAITING
    started_at: float | None = None
    finalizing_at: float | None = None
    ended_at: float | None = None
    line: int = 0
    high: int = 0
    done: Counts = Counts()
    counts: Counts = Counts()
    refused: dict[int, Refusal] = Field(default_factory=dict)  # by line
    unknown_models: tuple[str, ...] = ()
    output_bytes: int = 0
    error_bytes: int = 0
    problem: Refusal | None = None  # of a batch that failed

    def encode(self) -> str:
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def decode(cls, body: str) -> "BatchRecord":
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise MalformedMessage(f"not a batch: {error.errors(include_url=False)[0]['msg']}") from None

    def with_(self, **changed: Any) -> "BatchRecord":
        return self.model_copy(update=changed)

    def refusal_of(self, line: int, model: str) -> Refusal | None:
        """Why this item has no job, where it was refused one."""
        if model in self.unknown_models:
            return Refusal(code="model_not_found", message=f"no worker serves model {model!r}", param="model")
        return self.refused.get(line)


def name_of(api: str, tenant: str, batch_id: str) -> Name:
    return Name(KINDS[api], tenant, batch_id)

"""An alias: the name callers use for a model, and which revision of it new jobs are pinned to.

One document per alias in the store, replaced as a whole if it is still what was read: whoever moves it
moves everything about it in one write. How a rollout changes it is decided in shared/rollout.py.
Documented for other languages in docs/wire-contract.md.
"""

import zlib
from dataclasses import dataclass, replace
from enum import StrEnum

from pydantic import TypeAdapter, ValidationError

from codeyard.shared.errors import MalformedMessage
from codeyard.shared.job import JobId


class Phase(StrEnum):
    """Where a rollout is. The old revision serves all new jobs until `canary`, a part of them in it."""

    PREPARE = "prepare"  # every worker of the alias loads the new revision and tries it
    CANARY = "canary"  # it takes `percent` of the new jobs
    DRAIN = "drain"  # it takes all new jobs; those pinned to the old one finish there
    DONE = "done"  # the old one has nothing left and is let go
    FAILED = "failed"  # it could not be served, and never took a job
    ROLLED_BACK = "rolled_back"  # all new jobs go to the old one again; those pinned to the new one finish there

    @property
    def over(self) -> bool:
        """Nothing will change by itself any more."""
        return self in (Phase.DONE, Phase.FAILED, Phase.ROLLED_BACK)


@dataclass(frozen=True, slots=True)
class Target:
    """One revision of a model, and where workers load it from (None: their own settings say)."""

    revision: str
    location: str | None = None
    context_tokens: int | None = None  # the model's context length, where known


@dataclass(frozen=True, slots=True)
class Rollout:
    """The newest rollout of an alias, under way or over."""

    id: str
    phase: Phase
    old: Target
    location: str  # of the new revision
    percent: int = 100  # of new jobs it takes while `canary`; 100: all at once
    new: Target | None = None  # known when the first worker has loaded it
    started_at: float = 0.0  # for people; nothing is decided by it
    reason: str = ""  # why it failed or went back


@dataclass(frozen=True, slots=True)
class Alias:
    """What the store holds under a name."""

    name: str
    revision: str
    context_tokens: int | None = None
    location: str | None = None  # where workers load the revision from, if a rollout brought it
    shards: int = 1  # queues of each lane
    shards_per_tenant: int = 1  # of them, those one tenant's jobs go to
    rollout: Rollout | None = None

    @property
    def target(self) -> Target:
        return Target(self.revision, self.location, self.context_tokens)

    def pin(self, job_id: JobId) -> Target:
        """The revision a new job is pinned to: the same for the same id, so that a repeated submission
        does not change sides while a rollout is at `canary`."""
        rollout = self.rollout
        if rollout is None or rollout.phase is not Phase.CANARY or rollout.new is None:
            return self.target
        return rollout.new if zlib.crc32(job_id.encode()) % 100 < rollout.percent else self.target

    def claimed_by(self, mine: "Alias", *, move: bool) -> "Alias":
        """What a worker that starts to serve makes of it: its own facts on its own revision; another
        revision only gives way if it is told to `move` it."""
        if self.revision == mine.revision:
            return replace(mine, location=self.location, rollout=self.rollout)
        return mine if move else self

    def encode(self) -> str:
        """JSON; the name is the key it is stored under."""
        return _ADAPTER.dump_json(self, exclude={"name"}, exclude_none=True).decode()

    @classmethod
    def decode(cls, name: str, text: str | bytes) -> "Alias":
        """Raises MalformedMessage. Fields of later versions are ignored."""
        try:
            fields = _FIELDS.validate_json(text)
            return _ADAPTER.validate_python({**fields, "name": name})
        except ValidationError:
            raise MalformedMessage(f"alias {name!r} in the store is not one of ours: {text!s:.80}") from None


_ADAPTER = TypeAdapter(Alias)
_FIELDS = TypeAdapter(dict[str, object])

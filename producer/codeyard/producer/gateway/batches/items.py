"""The items of a batch: read from its lines, and answered in its API's form. Plain functions of plain values.

Called by: batches.expansion (what to submit), batches.results (what came of it).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from codeyard.producer.gateway.batches.record import BatchRecord, Outcome, Refusal
from codeyard.producer.gateway.files.lines import Line
from codeyard.producer.gateway.openai.convert import Wanted, key_of
from codeyard.shared.job import JobId, job_id_for_key
from codeyard.shared.record import JobStatus, State

OUTCOMES = {
    State.SUCCEEDED: Outcome.SUCCEEDED,
    State.FAILED: Outcome.ERRORED,
    State.CANCELLED: Outcome.CANCELLED,
    State.EXPIRED: Outcome.EXPIRED,
}

_BETWEEN = "\u00b7"  # no key that comes in a header holds it: nobody else's job has an item's key
_PLAIN = re.compile(r"[\x21-\x7e]{1,100}")


@dataclass(frozen=True, slots=True)
class Item:
    """One request. `asked` is the API's own reading of it, from which it is answered; several choices are several
    `wanted`."""

    line: int
    custom_id: str
    model: str
    wanted: tuple[Wanted, ...]
    asked: Any
    metadata: dict[str, Any] = field(default_factory=dict)

    def keys(self, batch_id: str) -> list[str]:
        """The idempotency key of each of its jobs: the same whoever expands the batch, however often."""
        custom = self.custom_id
        if not _PLAIN.fullmatch(custom):
            custom = f"{_BETWEEN}{hashlib.sha256(custom.encode()).hexdigest()}"
        return [key_of(f"{batch_id}{_BETWEEN}{custom}", place) for place in range(len(self.wanted))]

    def job_ids(self, batch_id: str, tenant: str) -> list[JobId]:
        return [job_id_for_key(tenant, key) for key in self.keys(batch_id)]


@dataclass(frozen=True, slots=True)
class Bad:
    """A line that is no request. `custom_id` where it could be read."""

    line: int
    custom_id: str | None
    refusal: Refusal


class Dialect(Protocol):
    """One API's way. Lines of results end without a line break."""

    def read(self, raw: bytes, line: int) -> Item | Bad: ...

    def answer(self, item: Item, statuses: Sequence[JobStatus]) -> bytes:
        """Of an item whose jobs are all final."""

    def refuse(self, one: Item | Bad, refusal: Refusal) -> bytes: ...

    def drop(self, item: Item, outcome: Outcome) -> bytes:
        """Of an item that never became a job, because the batch ended first."""


class Reader:
    """Reads a batch's lines in order. A `custom_id` that came before is refused, whatever its line holds."""

    def __init__(self, batch: BatchRecord, dialect: Dialect) -> None:
        self._dialect = dialect
        self._seen: set[bytes] = set()  # digests: 50,000 ids in about 4 MB
        self._most_bytes = 0

    def read(self, line: Line) -> Item | Bad:
        if line.raw is None:
            return Bad(line.number, None, Refusal(code="line_too_long", message="the line is too long"))
        one = self._dialect.read(line.raw, line.number)
        if one.custom_id is None:
            return one
        digest = hashlib.blake2b(one.custom_id.encode(errors="surrogatepass"), digest_size=12).digest()
        if digest in self._seen:
            message = "an earlier line has this custom_id"
            return Bad(line.number, one.custom_id, Refusal(code="duplicate_custom_id", message=message))
        self._seen.add(digest)
        return one


def outcome_of(states: Sequence[State]) -> Outcome:
    """Of the final states of an item's jobs: the first that did not succeed."""
    return next((OUTCOMES[state] for state in states if state is not State.SUCCEEDED), Outcome.SUCCEEDED)


def is_text(given: str) -> bool:
    """False for one with halves of characters, which JSON can spell and UTF-8 cannot."""
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def encoded(document: dict[str, Any], *, strictly: bool = False) -> bytes:
    """Raises UnicodeEncodeError if `strictly`; otherwise what is no text becomes question marks."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="strict" if strictly else "replace")

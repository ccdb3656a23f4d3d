"""The DocumentStore port: small texts by kind, tenant and id, each with an end; open ones are somebody's to work on.

A document is made once. One that is *open* has work left: whoever `take`s it owns it for as long as its lease, and
only its owner writes it; when the lease is over, anybody may take it. So the work goes on wherever a process is,
and no two do it at once. Others leave a *wish* beside the body, which the owner sees with its next write.

Promise, for every adapter: an exception is `StoreUnavailable`, and any call may be repeated. `now` in an answer is
the store's own clock, which also ends leases and documents. Ids sort by the time they were made (job.new_job_id).
One document in a call: nobody has groups of them.
Called by: the gateway's files and batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Name:
    """`kind` is one word of ours."""

    kind: str
    tenant: str
    id: str


@dataclass(frozen=True, slots=True)
class Document:
    name: Name
    body: str
    wish: str  # "" where nobody asked for anything
    now: float  # seconds since the epoch, when this was read


class DocumentStore(Protocol):
    async def create(self, name: Name, body: str, *, ttl_s: float, open: bool = False) -> bool:
        """False: the id is taken; nothing changed. A repeat with the same body is True again."""

    async def read(self, name: Name) -> Document | None: ...

    async def newest(self, kind: str, tenant: str, *, before: str | None = None, limit: int) -> list[Document]:
        """Newest first; those made before the one with the id `before`, which may be gone."""

    async def delete(self, name: Name) -> bool:
        """False: it was not there."""

    async def wish(self, name: Name, wish: str) -> Document | None:
        """Ask its owner for something. A closed document keeps the wish, and nobody acts on it."""

    async def lapsed(self, kind: str, *, limit: int) -> Sequence[Name]:
        """Open documents that nobody owns now. A hint: `take` decides."""

    async def take(self, name: Name, owner: str, *, lease_s: float) -> Document | None:
        """None: somebody else owns it, it is closed, or gone. One's own is taken again."""

    async def write(self, name: Name, owner: str, body: str, *, lease_s: float | None) -> Document | None:
        """The document as it is then, with the lease renewed; None closes it. None back: not the owner any more."""

    async def close(self) -> None: ...

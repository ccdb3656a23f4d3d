"""The BlobStore port: chunks of at most 1 MiB, by tenant and digest.

What is larger is a list of digests, in order: a claim in a job (shared.claims), a file's document. So equal
content of one tenant lies here once, an upload needs no name before its end, and a chunk is checked by its name.

A chunk lives as long as the last of its holders wants it. A holder is a name (a file's id; all claimed prompts
share one) with an end; holding again moves that end only to later. Who is done releases what it held; what
nobody releases ends by itself.

Promise, for every adapter: a method takes a group and gives one outcome per item, in order. An exception is
`StoreUnavailable`, and any call may be repeated. All times are the store's own clock.
Called by: blobs.whole, and through it producer.submission, the gateway's files, the worker.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

MAX_CHUNK_BYTES = 1_048_576

Digest = str
"""SHA-256 of a chunk's bytes, in hex."""


def digest_of(data: bytes) -> Digest:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the tenant's chunk for `ttl_s` from now, on behalf of `holder`."""

    tenant: str
    digest: Digest
    holder: str
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes to keep: 1 to MAX_CHUNK_BYTES of them, whose digest is `hold.digest`."""

    hold: Hold
    data: bytes


class PutVerdict(StrEnum):
    STORED = "stored"
    PRESENT = "present"  # equal bytes were here; they are held on
    OVER_QUOTA = "over_quota"  # the tenant has no room for it; nothing changed


class BlobStore(Protocol):
    async def put(self, group: Sequence[Chunk]) -> list[PutVerdict]: ...

    async def hold(self, group: Sequence[Hold]) -> list[bool]:
        """False: the chunk is not here, and not held."""

    async def release(self, tenant: str, holder: str, digests: Sequence[Digest]) -> None:
        """The holder needs them no more. A chunk without holders is gone. Unknown ones are ignored."""

    async def read(self, tenant: str, digests: Sequence[Digest]) -> list[bytes | None]:
        """None: it is not here."""

    async def used_bytes(self, tenant: str) -> int:
        """Of the tenant's chunks, each counted once."""

    async def close(self) -> None: ...

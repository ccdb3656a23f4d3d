"""Whole texts over the chunks of a BlobStore: cut, keep, read back.

Called by: producer.submission and worker.execution (claimed prompts), the gateway's files.
"""

from collections.abc import AsyncIterator, Sequence

from codeyard.shared.blobs.port import MAX_CHUNK_BYTES, BlobStore, Chunk, Digest, Hold, PutVerdict, digest_of
from codeyard.shared.errors import BlobMissing, StorageQuotaExceeded

GROUP = 4  # chunks in one round trip


def cut(data: bytes) -> list[bytes]:
    return [data[start : start + MAX_CHUNK_BYTES] for start in range(0, len(data), MAX_CHUNK_BYTES)]


async def keep(blobs: BlobStore, tenant: str, pieces: Sequence[bytes], *, holder: str, ttl_s: float) -> list[Digest]:
    """Hold these chunks, sending only those that are not there. Raises StorageQuotaExceeded, StoreUnavailable."""
    digests = [digest_of(piece) for piece in pieces]
    holds = [Hold(tenant, digest, holder, ttl_s) for digest in digests]
    there = await blobs.hold(holds)
    missing = [Chunk(hold, piece) for hold, piece, held in zip(holds, pieces, there, strict=True) if not held]
    for start in range(0, len(missing), GROUP):
        if PutVerdict.OVER_QUOTA in await blobs.put(missing[start : start + GROUP]):
            raise StorageQuotaExceeded(tenant)
    return digests


async def read(blobs: BlobStore, tenant: str, digests: Sequence[Digest]) -> AsyncIterator[bytes]:
    """Chunk by chunk. Raises BlobMissing, also for bytes that are not what their name says."""
    for digest in digests:
        [data] = await blobs.read(tenant, [digest])
        if data is None or digest_of(data) != digest:
            raise BlobMissing(digest)
        yield data


async def read_whole(blobs: BlobStore, tenant: str, digests: Sequence[Digest]) -> bytes:
    return b"".join([piece async for piece in read(blobs, tenant, digests)])

"""Bytes of unknown length into the store, a chunk at a time, while they arrive.

Nothing is known of a text before it is whole, so its chunks are held for an hour first; `keep` holds them as long
as they are wanted, and what was given up ends by itself, or at once with `drop`.
Called by: files.upload, batches.anthropic_routes.
"""

import contextlib

from codeyard.shared.blobs import whole
from codeyard.shared.blobs.port import MAX_CHUNK_BYTES, BlobStore, Digest, Hold
from codeyard.shared.errors import BlobMissing, StoreUnavailable

COMING_S = 3_600.0  # longer than any upload may take
HOLD_GROUP = 64  # chunks in one round trip


class Sink:
    def __init__(self, blobs: BlobStore, tenant: str, holder: str) -> None:
        self._blobs = blobs
        self._tenant = tenant
        self._holder = holder
        self._rest = bytearray()
        self.size_bytes = 0
        self.digests: list[Digest] = []

    async def write(self, data: bytes) -> None:
        """Raises StorageQuotaExceeded, StoreUnavailable."""
        self._rest += data
        self.size_bytes += len(data)
        while len(self._rest) >= MAX_CHUNK_BYTES:
            await self._send(bytes(self._rest[:MAX_CHUNK_BYTES]))
            del self._rest[:MAX_CHUNK_BYTES]

    async def keep(self, ttl_s: float) -> tuple[Digest, ...]:
        """It is whole: send the rest, and hold all of it for `ttl_s`."""
        if self._rest:
            await self._send(bytes(self._rest))
            self._rest.clear()
        await hold_all(self._blobs, self._tenant, self.digests, holder=self._holder, ttl_s=ttl_s)
        return tuple(self.digests)

    async def drop(self) -> None:
        """It will not be whole. If the store does not answer, its chunks end by themselves."""
        with contextlib.suppress(StoreUnavailable):
            await self._blobs.release(self._tenant, self._holder, self.digests)

    async def _send(self, piece: bytes) -> None:
        self.digests += await whole.keep(self._blobs, self._tenant, [piece], holder=self._holder, ttl_s=COMING_S)


async def hold_all(
    blobs: BlobStore, tenant: str, digests: "list[Digest] | tuple[Digest, ...]", *, holder: str, ttl_s: float
) -> None:
    """Raises BlobMissing, StoreUnavailable."""
    for start in range(0, len(digests), HOLD_GROUP):
        group = [Hold(tenant, digest, holder, ttl_s) for digest in digests[start : start + HOLD_GROUP]]
        for hold, held in zip(group, await blobs.hold(group), strict=True):
            if not held:
                raise BlobMissing(hold.digest)

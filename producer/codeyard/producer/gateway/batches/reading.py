"""Batches as their callers see them: looked up under the caller's tenant, whichever API asks."""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from typing import Literal

from codeyard.producer.gateway.batches.record import CANCEL, KINDS, BatchRecord, name_of
from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.shelves import Shelves
from codeyard.shared.documents.port import Document, Name
from codeyard.shared.job import new_job_id

Api = Literal["openai", "anthropic"]

KEYS = "batch-key"  # kind of the documents that say which batch was made under an Idempotency-Key

_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def new_batch_id(api: Api) -> str:
    return f"{KINDS[api]}_{new_job_id()}"


class Batches:
    """Of one API."""

    def __init__(self, shelves: Shelves, api: Api) -> None:
        self._shelves = shelves
        self._api: Api = api
        self._id = re.compile(f"{KINDS[api]}_{_UUID}")

    async def create(self, tenant: str, batch: BatchRecord, *, ttl_s: float, key: str | None, digest: str) -> "Seen":
        """The batch; under a key that was used before, the one made then, with the id it has. `digest`: of what
        makes two requests the same. Raises Refused where the key was another's."""
        documents = self._shelves.documents
        if key is not None:
            used = Name(KEYS, tenant, hashlib.sha256(f"{self._api} {key}".encode()).hexdigest())
            if not await documents.create(used, json.dumps([batch.id, digest]), ttl_s=ttl_s):
                batch = batch.with_(id=await self._made_under(used, digest))
        if not await documents.create(name_of(self._api, tenant, batch.id), batch.encode(), ttl_s=ttl_s, open=True):
            return await self.read(tenant, batch.id)
        self._shelves.new_batch.set()
        return Seen(batch)

    async def _made_under(self, used: Name, digest: str) -> str:
        """The id that belongs to a key. Whoever took it may have died before there was a batch."""
        found = await self._shelves.documents.read(used)
        batch_id, first = json.loads(found.body) if found is not None else ("", "")
        if first != digest:
            raise Refused("idempotency-conflict", "the key was used for another batch", field="Idempotency-Key")
        return str(batch_id)

    async def read(self, tenant: str, batch_id: str) -> "Seen":
        """Raises Refused."""
        found = None
        if self._id.fullmatch(batch_id):
            found = await self._shelves.documents.read(name_of(self._api, tenant, batch_id))
        if found is None:
            raise self._missing(batch_id)
        return Seen.of(found)

    async def newest(self, tenant: str, *, before: str | None, limit: int) -> "list[Seen]":
        kind = KINDS[self._api]
        return [Seen.of(one) for one in await self._shelves.documents.newest(kind, tenant, before=before, limit=limit)]

    async def cancel(self, tenant: str, batch_id: str) -> "Seen":
        """Ask for it; the gateway that owns it sees that within a second or so. Raises Refused."""
        seen = await self.read(tenant, batch_id)
        if seen.batch.phase.ended or seen.cancelling_at is not None:
            return seen
        wish = f"{CANCEL}{int(time.time())}"
        wished = await self._shelves.documents.wish(name_of(self._api, tenant, batch_id), wish)
        if wished is None:
            raise self._missing(batch_id)
        return Seen.of(wished)

    async def delete(self, tenant: str, batch_id: str) -> None:
        """Of a batch that has ended; its results go with it. Raises Refused."""
        batch = (await self.read(tenant, batch_id)).batch
        if not batch.phase.ended:
            raise Refused("invalid-parameter", "the batch has not ended; cancel it first", field="batch_id")
        await self._shelves.documents.delete(name_of(self._api, tenant, batch_id))
        await self._shelves.blobs.release(tenant, batch_id, batch.chunks)

    def _missing(self, batch_id: str) -> Refused:
        return Refused("no-such-document", f"there is no batch {batch_id[:100]}, or it has ended", field="batch_id")


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch, and when somebody wanted it cancelled."""

    batch: BatchRecord
    cancelling_at: int | None = None

    @classmethod
    def of(cls, document: Document) -> "Seen":
        when = document.wish.removeprefix(CANCEL)
        return cls(BatchRecord.decode(document.body), int(when) if when else None)

    @property
    def cancelling(self) -> bool:
        return self.cancelling_at is not None and not self.batch.phase.ended

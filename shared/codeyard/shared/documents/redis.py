"""Documents on Redis: a script for each change; a tenant's keys share its shard, drawn as in limits/redis.py.

    {ns}:{sNN}:<tenant>:<kind>:<id>    hash   body, wish, owner, and first: the body it was made with
    {ns}:{sNN}:<tenant>:<kind>-ids     zset   ids, all with the score 0: they sort by the time they were made
    {ns}:{sNN}:<kind>-open             zset   "<tenant> <id>" by the end of its lease, microseconds since the epoch

The tenant is percent-encoded. Every key ends with the last document it speaks of.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, unquote

from codeyard.shared.documents.port import Document, Name
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.redis_link import Item, RedisLink
from codeyard.shared.topology import NUM_STORE_SHARDS, Topology, store_shard

PAGE = 100  # ids looked at in one round trip


class RedisDocumentStore:
    def __init__(self, link: RedisLink, topology: Topology) -> None:
        self._link = link
        self._topology = topology

    @classmethod
    async def open(cls, settings: StoreSettings, topology: Topology) -> "RedisDocumentStore":
        """Raises StoreUnavailable, SettingsError."""
        return cls(await RedisLink.open(settings), topology)

    async def create(self, name: Name, body: str, *, ttl_s: float, open: bool = False) -> bool:
        done, *_ = await self._act(name, "create", body=body, ttl_s=ttl_s, open=open)
        return bool(done)

    async def read(self, name: Name) -> Document | None:
        _, now, body, wish = await self._act(name, "read")
        return _document(name, now, body, wish)

    async def newest(self, kind: str, tenant: str, *, before: str | None = None, limit: int) -> list[Document]:
        [_, ids, _] = self._item(Name(kind, tenant, ""), {}).keys
        found: list[Document] = []
        below = f"({before}" if before else "+"
        while len(found) < limit:
            page = await self._link.command("ZREVRANGEBYLEX", ids, below, "-", "LIMIT", 0, PAGE)
            documents = [await self.read(Name(kind, tenant, one)) for one in page[: limit - len(found)]]
            found += [one for one in documents if one is not None]
            if len(page) <= len(documents) < PAGE:
                break
            below = f"({page[len(documents) - 1]}"
        return found

    async def delete(self, name: Name) -> bool:
        done, *_ = await self._act(name, "delete")
        return bool(done)

    async def wish(self, name: Name, wish: str) -> Document | None:
        done, now, body, kept = await self._act(name, "wish", wish=wish)
        return _document(name, now, body, kept) if done else None

    async def lapsed(self, kind: str, *, limit: int) -> Sequence[Name]:
        shards = range(NUM_STORE_SHARDS)
        items = [Item(shard, (self._topology.shard_key(shard, f"{kind}-open"),), {"limit": limit}) for shard in shards]
        entries = [entry for found in await self._link.run("documents/look", items, {}) for entry in found]
        parts = [entry.partition(" ") for entry in entries[:limit]]
        return [Name(kind, unquote(tenant), doc_id) for tenant, _, doc_id in parts]

    async def take(self, name: Name, owner: str, *, lease_s: float) -> Document | None:
        done, now, body, wish = await self._act(name, "take", owner=owner, lease_s=lease_s)
        return _document(name, now, body, wish) if done else None

    async def write(self, name: Name, owner: str, body: str, *, lease_s: float | None) -> Document | None:
        renewed = {} if lease_s is None else {"lease_s": lease_s}  # JSON's null is something in Lua
        done, now, kept, wish = await self._act(name, "write", owner=owner, body=body, **renewed)
        return _document(name, now, kept, wish) if done else None

    async def close(self) -> None:
        await self._link.close()

    async def _act(self, name: Name, act: str, **request: Any) -> Sequence[Any]:
        entry = f"{quote(name.tenant, safe='')} {name.id}"
        item = self._item(name, {"act": act, "id": name.id, "entry": entry, **request})
        [outcome] = await self._link.run("documents/act", [item], {}, durable=act != "read")
        answer: Sequence[Any] = outcome
        return answer

    def _item(self, name: Name, request: dict[str, Any]) -> Item:
        tenant = quote(name.tenant, safe="")
        shard = store_shard(tenant)
        parts = (f"{tenant}:{name.kind}:{name.id}", f"{tenant}:{name.kind}-ids", f"{name.kind}-open")
        return Item(shard, tuple(self._topology.shard_key(shard, part) for part in parts), request)


def _document(name: Name, now: str, body: str | bool, wish: str) -> Document | None:
    return Document(name, body, wish, int(now) / 1_000_000) if isinstance(body, str) else None

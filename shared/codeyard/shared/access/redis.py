"""API keys on Redis: one hash for the fleet, a field for each key.

{ns}:api-keys   hash   id -> the key's JSON; without an end: revoking keeps the entry
"""

from collections.abc import Sequence

from codeyard.shared.access.keys import ApiKey
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.redis_link import RedisLink
from codeyard.shared.topology import Topology


class RedisKeyStore:
    def __init__(self, link: RedisLink, topology: Topology) -> None:
        self._link = link
        self._key = topology.key("api-keys")

    @classmethod
    async def open(cls, settings: StoreSettings, topology: Topology) -> "RedisKeyStore":
        """Raises StoreUnavailable, SettingsError."""
        return cls(await RedisLink.open(settings), topology)

    async def put(self, group: Sequence[ApiKey]) -> None:
        if group:
            fields = [text for key in group for text in (key.id, key.encode())]
            await self._link.command("HSET", self._key, *fields, durable=True)  # a revoked one must not come back

    async def read(self, group: Sequence[str]) -> list[ApiKey | None]:
        if not group:
            return []
        found = await self._link.command("HMGET", self._key, *group)
        return [ApiKey.decode(text) if text else None for text in found]

    async def every(self) -> list[ApiKey]:
        found = await self._link.command("HGETALL", self._key)
        return sorted(map(ApiKey.decode, found.values()), key=lambda key: (key.created_at, key.id))

    async def close(self) -> None:
        await self._link.close()

"""The KeyStore port: where API keys lie, so that every gateway sees them.

Promise, for every adapter: an exception is `StoreUnavailable`, and any call may be repeated. A key once put is
changed only by being put again, with `revoked_at`.
Called by: gateway.keys, the `codeyard keys` command.
"""

from collections.abc import Sequence
from typing import Protocol

from codeyard.shared.access.keys import ApiKey


class KeyStore(Protocol):
    async def put(self, group: Sequence[ApiKey]) -> None:
        """Keep them, in place of what had their ids."""

    async def read(self, group: Sequence[str]) -> list[ApiKey | None]:
        """The keys with these ids, in order; None where there is none."""

    async def every(self) -> list[ApiKey]:
        """All there are, revoked and expired ones too, oldest first."""

    async def close(self) -> None: ...

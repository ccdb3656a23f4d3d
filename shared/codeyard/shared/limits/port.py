"""The LimitStore port: what each tenant has used.

Promise, for every adapter: a method takes a group and gives one outcome per item, in order; items of one
tenant act in order. An exception is `StoreUnavailable`; repeating a call is safe: it may charge a bucket twice
and never lets through more than the limits say. All times are the store's own clock.
Called by: gateway.limits.
"""

from collections.abc import Sequence
from typing import Protocol

from codeyard.shared.job import JobId
from codeyard.shared.limits.rules import GiveBack, Take, Taken


class LimitStore(Protocol):
    async def take(self, group: Sequence[Take]) -> list[Taken]: ...

    async def give_back(self, group: Sequence[GiveBack]) -> None:
        """Unknown ids and tenants are ignored; tokens go back even if the id is not live."""

    async def live(self, tenant: str, *, start: int, count: int) -> list[JobId]:
        """Of the tenant's live jobs, `count` from the one in place `start` on, the first to end first."""

    async def close(self) -> None: ...

"""API keys, looked up in the store and remembered for a few seconds.

Promise: a revoked or expired key stops working within `key_cache_s`, a new one works at once, and a key that
the store cannot be asked about is not let in. Called by: gateway.auth.
"""

import time
from collections.abc import Callable
from functools import partial

from codeyard.producer.gateway.auth import Caller
from codeyard.producer.gateway.grouped import Grouped
from codeyard.shared.access.keys import ApiKey, Presented
from codeyard.shared.access.port import KeyStore
from codeyard.shared.errors import Unauthorized
from codeyard.shared.reading import within

NO_DIGEST = "0" * 64  # compared with where there is no key, so that an unknown id takes no less time


class ApiKeys:
    def __init__(
        self,
        store: KeyStore,
        *,
        cache_s: float,
        patience_s: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience_s`: a store that does not answer is asked again for so long."""
        self._read = Grouped(store.read)
        self._cache_s = cache_s
        self._patience_s = patience_s
        self._monotonic = monotonic
        self._known: dict[str, tuple[ApiKey, float]] = {}  # at most as many as there are keys in the store

    async def caller(self, presented: Presented) -> Caller:
        """Raises Unauthorized, StoreUnavailable."""
        key = await self._key(presented.id)
        fits = presented.matches(key.digest if key else NO_DIGEST)
        if key is None or not fits:
            raise Unauthorized("there is no such API key")
        if (state := key.state(time.time())) != "valid":
            raise Unauthorized(f"this API key is {state}")
        return Caller(key.tenant, key.scopes, f"key {key.id}")

    async def close(self) -> None:
        await self._read.close()

    async def _key(self, key_id: str) -> ApiKey | None:
        """Unknown ids are asked for each time: there may be a key by now."""
        key, until_s = self._known.get(key_id, (None, 0.0))
        if key is not None and self._monotonic() < until_s:
            return key
        self._known.pop(key_id, None)
        asked_s = self._monotonic()  # what is read may have been revoked just after
        read = partial(self._read, key_id)
        key = await (within(self._patience_s, read) if self._patience_s else read())
        if key is not None:
            self._known[key_id] = (key, asked_s + self._cache_s)
        return key

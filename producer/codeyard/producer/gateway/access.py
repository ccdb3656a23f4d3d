"""From the settings to what guards the gateway: who is let in, and how much each may use.

`CODEYARD_AUTH_MODE=auto` asks for credentials as soon as any are configured or made. With none at all the
gateway is in development mode: everyone is one tenant, it says so at start, and it listens on loopback only.
Called by: gateway.serve.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from codeyard.producer.gateway.auth import Authenticator, Credentials, Development
from codeyard.producer.gateway.jwks import KeySet, source_of
from codeyard.producer.gateway.keys import ApiKeys
from codeyard.producer.gateway.limits import Limits
from codeyard.producer.gateway.tokens import Tokens
from codeyard.shared.access.port import KeyStore
from codeyard.shared.connect import open_keys, open_limits
from codeyard.shared.errors import SettingsError
from codeyard.shared.settings import AuthSettings, Settings
from codeyard.shared.store.port import Store
from codeyard.shared.topology import Topology

log = logging.getLogger(__name__)

T = TypeVar("T")

LIMIT_TIMEOUT_S = 1.0  # for a limit to be asked; then it counts as a store that is down

WAYS_OUT = (
    "make a key with `codeyard keys make NAME`, or set CODEYARD_AUTH_STATIC_KEY or a JWT secret or key set "
    "(docs/auth.md), or listen on 127.0.0.1"
)


class Guard(Protocol):
    def __call__(self, port: T, /) -> T: ...


@dataclass(frozen=True, slots=True)
class Access:
    """`key_set` wants to be run, where there is one."""

    auth: Authenticator
    limits: Limits
    key_set: KeySet | None


@asynccontextmanager
async def opened_access(
    settings: Settings, store: Store, *, host: str, loopback: bool, guarded: Guard = lambda port: port
) -> AsyncIterator[Access]:
    """`guarded` puts what is opened here behind the store's breaker.
    Raises StoreUnavailable; SettingsError if everyone on the network could submit."""
    check_mode(settings.auth, host=host, loopback=loopback)
    topology = Topology(settings.namespace)
    async with AsyncExitStack() as stack:
        keys = await open_keys(settings.store, topology)
        stack.push_async_callback(keys.close)
        patience = settings.store.model_copy(update={"timeout_s": min(LIMIT_TIMEOUT_S, settings.store.timeout_s)})
        counts = await open_limits(patience, topology)
        stack.push_async_callback(counts.close)
        limits = Limits(settings.limit, guarded(counts), store.states)
        stack.push_async_callback(limits.close)
        if not await _asks_for_credentials(settings.auth, keys):
            if not loopback:
                raise SettingsError(_open_to_all(host))
            log.warning("development_mode", extra={"auth": "none", "listens": "loopback only", "hint": WAYS_OUT})
            yield Access(Development(), limits, None)
            return
        api_keys = ApiKeys(
            guarded(keys), cache_s=settings.auth.key_cache_s, patience_s=settings.gateway.submit_timeout_s
        )
        stack.push_async_callback(api_keys.close)
        key_set = None
        if (source := source_of(settings.auth)) is not None:
            stack.push_async_callback(source.close)
            key_set = KeySet(source, settings.auth)
        tokens = Tokens(settings.auth, key_set) if settings.auth.accepts_jwt else None
        yield Access(Credentials(settings.auth, api_keys, tokens), limits, key_set)


def check_mode(auth: AuthSettings, *, host: str, loopback: bool) -> None:
    """What needs no server to know. Raises SettingsError."""
    if auth.mode == "off" and not loopback:
        raise SettingsError(f"CODEYARD_AUTH_MODE=off: {_open_to_all(host)}")


async def _asks_for_credentials(auth: AuthSettings, keys: KeyStore) -> bool:
    if auth.mode != "auto":
        return auth.mode == "on"
    return auth.static_key is not None or auth.accepts_jwt or bool(await keys.every())


def _open_to_all(host: str) -> str:
    return f"the gateway does not listen on {host} without authentication, where anyone could submit: {WAYS_OUT}"

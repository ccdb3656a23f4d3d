"""Who is calling: from the credentials of a request to a Caller, in any protocol.

    Authorization: Bearer <API key or JWT>      x-api-key: <the same>      one of them, once

A text with the form of an API key is one (gateway.keys); anything else is a JWT (gateway.tokens). Whatever is
presented, the answer is a Caller, Unauthorized, or StoreUnavailable / AuthUnavailable: what cannot be checked
is not let in. Credentials never appear in errors or logs. docs/auth.md is the page.
Called by: gateway.app, rpc.door, rpc.calls.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from codeyard.shared.access.keys import Presented, Scope, digest_of, presented
from codeyard.shared.errors import Forbidden, Unauthorized
from codeyard.shared.settings import AuthSettings

MAX_CREDENTIAL = 8_192  # characters; a JWT with a dozen claims has one or two thousand


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` says which credential it was, for logs; never the credential."""

    tenant: str
    scopes: frozenset[Scope]
    name: str

    def require(self, scope: Scope) -> None:
        """Raises Forbidden."""
        if scope not in self.scopes and Scope.ADMIN not in self.scopes:
            raise Forbidden(f"these credentials do not have the scope {scope.value!r}")


class Authenticator(Protocol):
    async def caller(self, authorization: Sequence[str], api_key: Sequence[str]) -> Caller:
        """From all values of the two headers. Raises Unauthorized, StoreUnavailable, AuthUnavailable."""


class Checks(Protocol):
    """One kind of credential."""

    async def caller(self, credential: str) -> Caller: ...


class KeyChecks(Protocol):
    async def caller(self, presented: Presented) -> Caller: ...


class Development:
    """Everyone is the development tenant. Only for a gateway that nobody else can reach."""

    CALLER = Caller("default", frozenset(Scope), "development")

    async def caller(self, authorization: Sequence[str], api_key: Sequence[str]) -> Caller:
        return self.CALLER


class Credentials:
    """Callers show a credential, each time."""

    def __init__(self, settings: AuthSettings, keys: KeyChecks, tokens: Checks | None) -> None:
        self._keys = keys
        self._tokens = tokens
        self._static_digest = ""
        if settings.static_key is not None:
            self._static_digest = digest_of(settings.static_key.get_secret_value())
        self._static_caller = Caller(settings.static_tenant, frozenset(Scope), "static key")

    async def caller(self, authorization: Sequence[str], api_key: Sequence[str]) -> Caller:
        credential = credential_of(authorization, api_key)
        if self._static_digest and hmac.compare_digest(self._static_digest, digest_of(credential)):
            return self._static_caller
        if (key := presented(credential)) is not None:
            return await self._keys.caller(key)
        if self._tokens is None:
            raise Unauthorized("this is no API key")
        return await self._tokens.caller(credential)


def credential_of(authorization: Sequence[str], api_key: Sequence[str]) -> str:
    """The one credential there is. Raises Unauthorized: two that differ could be one for a proxy, one for us."""
    given = {value.strip() for value in api_key}
    for value in authorization:
        scheme, _, credential = value.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("the Authorization header must be `Bearer` and a credential")
        given.add(credential.strip())
    if len(given) > 1 or len(authorization) > 1 or len(api_key) > 1:
        raise Unauthorized("several credentials; send one")
    credential = given.pop() if given else ""
    if not credential:
        raise Unauthorized("no credentials; send `Authorization: Bearer ...` or `x-api-key: ...`")
    if len(credential) > MAX_CREDENTIAL or not credential.isascii():
        raise Unauthorized(f"a credential has at most {MAX_CREDENTIAL} ASCII characters")
    return credential

"""JSON Web Tokens (RFC 7519), by the rules of RFC 8725: the key says which algorithm, never the token.

    HS256           the shared secret, and only that
    RS256, ES256    a key of the set with the token's `kid`, made for that algorithm (gateway.jwks)
    exp nbf aud iss required and checked, with a small leeway; anything else is not accepted

The tenant and the scopes are claims. Called by: gateway.auth.
"""

from collections.abc import Iterable
from typing import Any

import jwt
from jwt import exceptions
from pydantic import TypeAdapter, ValidationError

from codeyard.producer.gateway.auth import Caller
from codeyard.producer.gateway.jwks import PUBLIC_ALGORITHMS, KeySet
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import Unauthorized
from codeyard.shared.settings import AuthSettings, Tenant

# In the order of asking: the first that fits. PyJWT's own words may quote the token.
SENTENCES: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.ExpiredSignatureError, "the token has expired"),
    (exceptions.ImmatureSignatureError, "the token is not valid yet"),
    (exceptions.InvalidAudienceError, "the token is for another audience"),
    (exceptions.InvalidIssuerError, "the token is from another issuer"),
    (exceptions.InvalidSignatureError, "the token's signature does not fit"),
    (exceptions.InvalidAlgorithmError, "the token's algorithm is not accepted"),
)
_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)
_SCOPES = {scope.value: scope for scope in Scope}


class Tokens:
    def __init__(self, settings: AuthSettings, keys: KeySet | None) -> None:
        self._settings = settings
        self._keys = keys
        self._secret = settings.hs256_secret.get_secret_value().encode() if settings.hs256_secret else b""
        self._required = ["exp", "aud", "iss", *(["nbf"] if settings.require_nbf else [])]

    async def caller(self, credential: str) -> Caller:
        """Raises Unauthorized, AuthUnavailable."""
        claims = await self._claims(credential)
        tenant = claims.get(self._settings.tenant_claim)
        try:
            _TENANT.validate_python(tenant, strict=True)
        except ValidationError:
            raise Unauthorized(
                f"the token's claim {self._settings.tenant_claim!r} must name a tenant: "
                "1 to 128 letters, digits and ._:@|/+-, the first a letter or digit"
            ) from None
        return Caller(str(tenant), _scopes(claims.get(self._settings.scope_claim)), "token")

    async def _claims(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            algorithm, key = await self._key(header.get("alg"), header.get("kid"))
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=self._settings.leeway_s,
                options={"require": self._required},
            )
        except exceptions.MissingRequiredClaimError as error:
            raise Unauthorized(f"the token has no claim {error.claim!r}") from None  # one of ours
        except (exceptions.PyJWTError, ValueError, TypeError, RecursionError) as error:
            said = (sentence for kind, sentence in SENTENCES if isinstance(error, kind))
            raise Unauthorized(next(said, "this is neither an API key nor a token")) from None

    async def _key(self, algorithm: Any, kid: Any) -> tuple[str, Any]:
        """The algorithm that the key is for, and the key."""
        if algorithm == "HS256" and self._secret:
            return "HS256", self._secret
        if isinstance(algorithm, str) and algorithm in PUBLIC_ALGORITHMS and self._keys is not None:
            return algorithm, await self._keys.find(kid if isinstance(kid, str) else None, algorithm)
        raise Unauthorized("the token's algorithm is not accepted")


def _scopes(claim: Any) -> frozenset[Scope]:
    """Of text with blanks between (RFC 8693) or a list; those of other services are passed over."""
    names: Iterable[Any] = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else ()
    return frozenset(_SCOPES[name] for name in names if isinstance(name, str) and name in _SCOPES)

"""Credentials as an issuer would make them, and as an attacker would; where they lie, as the test wants it."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from codeyard.producer.gateway.jwks import SourceFailed
from codeyard.shared.access.keys import ApiKey, MadeKey, Scope, make_key
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.settings import AuthSettings

ISSUER, AUDIENCE = "https://issuer.example", "codeyard"
SECRET = "a-shared-secret-of-forty-characters-or-so"

STATIC = "a-static-key-of-at-least-thirty-two-characters"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def rsa_key(name: str = "one", bits: int = 2_048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65_537, key_size=bits)


@cache
def ec_key(name: str = "one") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_jwk(key: PrivateKey, kid: str | None = None, **more: Any) -> dict[str, Any]:
    algorithm: Any = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    entry: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    return {
        **{name: value for name, value in entry.items() if name != "key_ops"},
        **({"kid": kid} if kid else {}),
        **more,
    }


def key_set(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"keys": entries}).encode()


def claims(**changed: Any) -> dict[str, Any]:
    """Valid from a minute ago for an hour; a claim given as None is left out."""
    now = int(time.time())
    given = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + 3_600,
        "sub": "service-7",
        "tenant": "acme",
        "scope": "submit read cancel",
        **changed,
    }
    return {name: value for name, value in given.items() if value is not None}


def token(key: Any = SECRET, algorithm: str = "HS256", *, kid: str | None = None, **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, algorithm=algorithm, headers={"kid": kid} if kid else None)


def forged(header: dict[str, Any], payload: dict[str, Any] | None = None, *, hmac_key: bytes | None = None) -> str:
    """Put together by hand: what a library would refuse to make."""
    parts = [_base64(json.dumps(part).encode()) for part in (header, payload if payload is not None else claims())]
    signature = b""
    if hmac_key is not None:
        signature = hmac.new(hmac_key, ".".join(parts).encode(), hashlib.sha256).digest()
    return ".".join([*parts, _base64(signature)])


def auth_settings(**given: Any) -> AuthSettings:
    return AuthSettings.model_validate({"issuer": ISSUER, "audience": AUDIENCE, **given})


class MadeUpSource:
    """A key set that the test changes, and takes away."""

    def __init__(self, *entries: dict[str, Any]) -> None:
        self.text = key_set(*entries)
        self.away = False
        self.num_reads = 0

    def put(self, *entries: dict[str, Any]) -> None:
        self.text = key_set(*entries)

    async def read(self) -> bytes:
        self.num_reads += 1
        if self.away:
            raise SourceFailed("away")
        return self.text

    async def close(self) -> None:
        pass


class MadeUpKeys:
    """A KeyStore in memory, which the test takes away."""

    def __init__(self, *keys: ApiKey) -> None:
        self.keys = {key.id: key for key in keys}
        self.away = False
        self.num_reads = 0

    async def put(self, group: Sequence[ApiKey]) -> None:
        self.keys |= {key.id: key for key in group}

    async def read(self, group: Sequence[str]) -> list[ApiKey | None]:
        self.num_reads += 1
        if self.away:
            raise StoreUnavailable("away")
        return [self.keys.get(key_id) for key_id in group]

    async def every(self) -> list[ApiKey]:
        return list(self.keys.values())

    async def close(self) -> None:
        pass


def some_key(*scopes: Scope, tenant: str = "acme", expires_in_s: float | None = None) -> MadeKey:
    return make_key("laptop", tenant=tenant, scopes=scopes or [Scope.READ], now=time.time(), expires_in_s=expires_in_s)


def _base64(text: bytes) -> str:
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()

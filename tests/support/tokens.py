"""Tokens and key sets as an issuer would make them, and as an attacker would."""

import base64
import hashlib
import hmac
import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from codeyard.producer.gateway.jwks import SourceFailed
from codeyard.shared.settings import AuthSettings

ISSUER, AUDIENCE = "https://issuer.example", "codeyard"
SECRET = "a-shared-secret-of-forty-characters-or-so"

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


def _base64(text: bytes) -> str:
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()

"""API keys: what one looks like, what is kept of it, who it stands for.

    cy_<id>_<secret>     id: 12 of 0-9a-z, public, in logs and lists; secret: 43 of 0-9A-Za-z, shown once

The store keeps a SHA-256 of the whole key and nothing it could be told from. A slow, salted hash is for
passwords that people choose: 43 random characters are 256 bits, which nobody tries out, and a hash that takes
a microsecond leaves nothing to flood the gateway with.
Called by: the `codeyard keys` command, gateway.keys.
"""

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codeyard.shared.errors import MalformedMessage, SettingsError
from codeyard.shared.settings import Tenant

ID_CHARACTERS = string.digits + string.ascii_lowercase
SECRET_CHARACTERS = string.digits + string.ascii_letters
NUM_ID = 12
NUM_SECRET = 43  # log2(62) * 43 = 256 bits

_KEY = re.compile(rf"cy_([0-9a-z]{{{NUM_ID}}})_[0-9A-Za-z]{{{NUM_SECRET}}}")


class Scope(StrEnum):
    """What a caller may do, with jobs of its own tenant only."""

    SUBMIT = "submit"
    READ = "read"  # status, results, events, lists
    CANCEL = "cancel"
    ADMIN = "admin"  # all of these, and /metrics where it is not open


class ApiKey(BaseModel):
    """What the store knows of a key. Times are wall time, seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="allow")

    v: Literal[1] = 1
    id: Annotated[str, Field(pattern=rf"^[0-9a-z]{{{NUM_ID}}}$")]
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]  # for people
    tenant: Tenant
    scopes: frozenset[Scope]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def state(self, now: float) -> Literal["valid", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "valid"

    def encode(self) -> str:
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def decode(cls, body: str) -> "ApiKey":
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise MalformedMessage(f"not an API key: {error.errors(include_url=False)[0]['msg']}") from None


@dataclass(frozen=True, slots=True)
class Presented:
    """A text that has the form of a key."""

    id: str
    digest: str

    def matches(self, digest: str) -> bool:
        """In constant time."""
        return hmac.compare_digest(self.digest, digest)


@dataclass(frozen=True, slots=True, repr=False)
class MadeKey:
    """A new key. `text` exists nowhere else: show it, then forget it."""

    key: ApiKey
    text: str


def make_key(
    name: str, *, tenant: str, scopes: Collection[Scope], now: float, expires_in_s: float | None = None
) -> MadeKey:
    """Raises SettingsError for a name or tenant that no key can have."""
    key_id = "".join(secrets.choice(ID_CHARACTERS) for _ in range(NUM_ID))
    text = f"cy_{key_id}_" + "".join(secrets.choice(SECRET_CHARACTERS) for _ in range(NUM_SECRET))
    try:
        key = ApiKey(
            id=key_id,
            name=name,
            tenant=tenant,
            scopes=frozenset(scopes),
            digest=digest_of(text),
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingsError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return MadeKey(key, text)


def presented(text: str) -> Presented | None:
    """None for anything that has not the form of a key."""
    found = _KEY.fullmatch(text)
    return Presented(found[1], digest_of(text)) if found else None


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

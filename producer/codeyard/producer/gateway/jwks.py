"""The public keys that tokens are signed with, from a file or a URL (JWK sets, RFC 7517), kept fresh.

Promise: a key that is new in the set is found without a restart, by its `kid`; one taken out stops working
within `jwks_refresh_s`; while the set cannot be read the last good one counts; unknown `kid`s make at most one
look in `jwks_retry_s`, whoever sends them. Keys that sign by another algorithm than RS256 or ES256, are too
short, private, symmetric or not for signing are passed over.
Called by: gateway.tokens (find), gateway.serve (run).
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import httpx
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from codeyard.shared.errors import AuthUnavailable, Unauthorized
from codeyard.shared.settings import AuthSettings, masked

log = logging.getLogger(__name__)

PUBLIC_ALGORITHMS = frozenset({"RS256", "ES256"})
MAX_SET_BYTES = 1_048_576
MIN_RSA_BITS = 2_048  # RFC 7518, 3.3


class Source(Protocol):
    async def read(self) -> bytes:
        """The set's JSON. Raises SourceFailed."""

    async def close(self) -> None: ...


class SourceFailed(Exception):
    """The set cannot be read now."""


class KeySet:
    """Belongs to one event loop."""

    def __init__(self, source: Source, settings: AuthSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._refresh_s = settings.jwks_refresh_s
        self._retry_s = settings.jwks_retry_s
        self._clock = clock
        self._keys: dict[tuple[str | None, str], list[PyJWK]] | None = None  # None: none was ever read
        self._looked_s = float("-inf")  # when the last look ended
        self._looking = asyncio.Lock()

    async def find(self, kid: str | None, algorithm: str) -> PyJWK:
        """The one key with this `kid` for this algorithm; without a `kid`, the only one for the algorithm.

        Raises Unauthorized if there is none, AuthUnavailable if no set was ever read.
        """
        key = self._known(kid, algorithm)
        if key is None:
            async with self._looking:
                if self._clock() - self._looked_s >= self._retry_s:
                    await self.look()
            key = self._known(kid, algorithm)
        if key is not None:
            return key
        if self._keys is None:
            raise AuthUnavailable("the key set that tokens are checked with has not been readable yet")
        raise Unauthorized("no key of the key set fits the token")

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the set fresh until `stop`."""
        while not stop.is_set():
            async with self._looking:
                good = await self.look()
            try:
                async with asyncio.timeout(self._refresh_s if good else min(self._retry_s, self._refresh_s)):
                    await stop.wait()
            except TimeoutError:
                continue

    async def look(self) -> bool:
        """Read the set. False: it could not be read, and the last good one still counts."""
        try:
            self._keys = parsed(await self._source.read())
        except SourceFailed as error:
            log.warning("key_set_unreadable", extra={"error": str(error), "kept": self._keys is not None})
            return False
        finally:
            self._looked_s = self._clock()
        return True

    async def close(self) -> None:
        await self._source.close()

    def _known(self, kid: str | None, algorithm: str) -> PyJWK | None:
        found = (self._keys or {}).get((kid, algorithm), [])
        return found[0] if len(found) == 1 else None


def parsed(text: bytes) -> dict[tuple[str | None, str], list[PyJWK]]:
    """The usable keys by `kid` and algorithm, and all of an algorithm under `kid` None. Raises SourceFailed."""
    try:
        entries = json.loads(text)["keys"]
        if not isinstance(entries, list):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SourceFailed("not a JWK set") from None
    keys: dict[tuple[str | None, str], list[PyJWK]] = {}
    for entry in entries:
        key = _usable(entry)
        if key is None:
            log.info("key_passed_over", extra={"kid": str(entry.get("kid"))[:64] if isinstance(entry, dict) else None})
            continue
        keys.setdefault((None, key.algorithm_name), []).append(key)
        if isinstance(kid := entry.get("kid"), str):
            keys.setdefault((kid, key.algorithm_name), []).append(key)
    return keys


def _usable(entry: Any) -> PyJWK | None:
    """The algorithm follows from the type of the key; what else the entry says must agree."""
    try:
        algorithm = {("RSA", None): "RS256", ("EC", "P-256"): "ES256"}.get((entry.get("kty"), entry.get("crv")))
        if (
            algorithm is None
            or entry.get("alg", algorithm) != algorithm
            or entry.get("use", "sig") != "sig"
            or "verify" not in entry.get("key_ops", ["verify"])
            or "d" in entry  # a private key that somebody published: tokens by it prove nothing
        ):
            return None
        key = PyJWK.from_dict(entry, algorithm)
    except (PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return key if algorithm == "ES256" or key.key.key_size >= MIN_RSA_BITS else None


# Sources -------------------------------------------------------------------------------------------


def source_of(settings: AuthSettings) -> Source | None:
    if settings.jwks_file is not None:
        return FileSource(settings.jwks_file)
    return UrlSource(settings.jwks_url, timeout_s=settings.jwks_timeout_s) if settings.jwks_url else None


class FileSource:
    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self) -> bytes:
        try:
            return await asyncio.to_thread(self._path.read_bytes)
        except OSError as error:
            raise SourceFailed(f"{self._path}: {error.strerror}") from None

    async def close(self) -> None:
        pass


class UrlSource:
    """No redirects: they could lead away from https, and from the host that was configured."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(timeout=timeout_s, follow_redirects=False)

    async def read(self) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s), self._http.stream("GET", self._url) as answer:
                if answer.status_code != 200:
                    raise SourceFailed(f"{masked(self._url)} answers {answer.status_code}")
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_SET_BYTES:
                        raise SourceFailed(f"{masked(self._url)} answers with more than {MAX_SET_BYTES} bytes")
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, TimeoutError, OSError) as error:
            raise SourceFailed(f"{masked(self._url)}: {type(error).__name__}") from None
        return bytes(body)

    async def close(self) -> None:
        await self._http.aclose()

"""The key set: rotation without a restart, and what a source that fails or lies can do."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.tokens import MadeUpSource, auth_settings, ec_key, key_set, public_jwk, rsa_key, token

from codeyard.producer.gateway.jwks import MAX_SET_BYTES, KeySet, SourceFailed, UrlSource, parsed, source_of
from codeyard.producer.gateway.tokens import Tokens
from codeyard.shared.errors import AuthUnavailable, Unauthorized


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def tokens_from(source: MadeUpSource, clock: Clock) -> Tokens:
    auth = auth_settings(jwks_url="https://issuer.example/keys", jwks_retry_s=10)
    return Tokens(auth, KeySet(source, auth, clock=clock))


async def test_a_key_that_is_new_in_the_set_is_found_without_a_restart() -> None:
    """Rotation: the issuer publishes the next key, then signs with it."""
    old, new, clock = rsa_key("old"), rsa_key("new"), Clock()
    source = MadeUpSource(public_jwk(old, "old"))
    tokens = tokens_from(source, clock)
    await tokens.caller(token(old, "RS256", kid="old"))

    source.put(public_jwk(old, "old"), public_jwk(new, "new"))
    clock.now += 11

    await tokens.caller(token(new, "RS256", kid="new"))
    await tokens.caller(token(old, "RS256", kid="old"))


async def test_a_key_that_was_taken_out_of_the_set_stops_working() -> None:
    """At the next regular look at the latest; a leaked key must not work for ever."""
    key, clock = rsa_key("leaked"), Clock()
    source = MadeUpSource(public_jwk(key, "leaked"))
    keys = KeySet(source, auth_settings(), clock=clock)
    await keys.find("leaked", "RS256")

    source.put(public_jwk(rsa_key(), "k1"))
    await keys.look()

    with pytest.raises(Unauthorized):
        await keys.find("leaked", "RS256")


async def test_unknown_kids_make_one_look_in_ten_seconds_however_many_come() -> None:
    """Whoever makes them up must not turn the gateway against its issuer."""
    clock, source = Clock(), MadeUpSource(public_jwk(rsa_key(), "k1"))
    tokens = tokens_from(source, clock)

    for n in range(20):
        with pytest.raises(Unauthorized):
            await tokens.caller(token(rsa_key(), "RS256", kid=f"made-up-{n}"))
    assert source.num_reads == 1

    clock.now += 10
    several = [tokens.caller(token(rsa_key(), "RS256", kid="made-up")) for _ in range(10)]
    await asyncio.gather(*several, return_exceptions=True)
    assert source.num_reads == 2


async def test_the_last_good_set_is_kept_while_the_source_is_away() -> None:
    """An issuer's restart must not lock every caller out."""
    clock, source = Clock(), MadeUpSource(public_jwk(rsa_key(), "k1"))
    tokens = tokens_from(source, clock)
    await tokens.caller(token(rsa_key(), "RS256", kid="k1"))

    source.away = True
    clock.now += 1_000
    with pytest.raises(Unauthorized):
        await tokens.caller(token(rsa_key("x"), "RS256", kid="unknown"))  # makes it look, in vain

    await tokens.caller(token(rsa_key(), "RS256", kid="k1"))


async def test_without_any_set_nobody_is_let_in_and_nobody_is_told_that_the_token_is_wrong() -> None:
    """503, not 401: clients throw credentials away that were called wrong."""
    source = MadeUpSource()
    source.away = True

    with pytest.raises(AuthUnavailable):
        await tokens_from(source, Clock()).caller(token(rsa_key(), "RS256", kid="k1"))


async def test_two_keys_without_kid_are_not_tried_one_after_the_other() -> None:
    """It must be clear which key is meant."""
    source = MadeUpSource(public_jwk(rsa_key("a")), public_jwk(rsa_key("b")))

    with pytest.raises(Unauthorized):
        await tokens_from(source, Clock()).caller(token(rsa_key("a"), "RS256"))


@pytest.mark.parametrize(
    "entry",
    [
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA", "kid": "k"},
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "k"},
        public_jwk(rsa_key("short", 1_024), "k"),
        public_jwk(rsa_key(), "k", use="enc"),
        public_jwk(rsa_key(), "k", alg="PS256"),
        public_jwk(rsa_key(), "k", alg="HS256"),
        public_jwk(rsa_key(), "k", key_ops=["encrypt"]),
        public_jwk(rsa_key(), "k", d="AQAB"),
        public_jwk(ec_key(), "k", crv="P-384"),
        public_jwk(ec_key(), "k", x="AAAA"),
        {"kty": ["RSA"], "kid": "k"},
        {"kty": "RSA", "n": 7, "e": None},
        {"kty": "RSA", "key_ops": 7},
        {},
        "k",
        None,
    ],
)
def test_a_key_that_is_not_for_signing_tokens_is_passed_over_and_its_neighbours_are_not(entry: Any) -> None:
    """One odd entry must not take the service down."""
    good = public_jwk(ec_key(), "good")

    assert set(parsed(key_set(entry, good))) == {(None, "ES256"), ("good", "ES256")}


@pytest.mark.parametrize("text", [b"", b"<html>", b"[]", b"7", b'{"keys": 7}', b"\xff", b"[" * 100_000])
def test_what_is_no_key_set_is_refused_whole(text: bytes) -> None:
    """A proxy's error page must not empty the set."""
    with pytest.raises(SourceFailed):
        parsed(text)


async def test_a_set_in_a_file_is_read_again_when_a_kid_is_unknown(tmp_path: Path) -> None:
    """Mounted secrets change in place."""
    path = tmp_path / "keys.json"
    path.write_bytes(key_set(public_jwk(rsa_key("old"), "old")))
    auth, clock = auth_settings(jwks_file=path), Clock()
    source = source_of(auth)
    assert source is not None
    tokens = Tokens(auth, KeySet(source, auth, clock=clock))
    await tokens.caller(token(rsa_key("old"), "RS256", kid="old"))

    path.write_bytes(key_set(public_jwk(rsa_key("new"), "new")))
    clock.now += 60

    await tokens.caller(token(rsa_key("new"), "RS256", kid="new"))
    path.unlink()
    clock.now += 60
    with pytest.raises(SourceFailed, match="No such file"):
        await source.read()
    await source.close()


async def test_the_set_is_kept_fresh_until_the_gateway_stops() -> None:
    """Looks go on by themselves, sooner after one that failed."""
    looks: asyncio.Queue[bool] = asyncio.Queue()

    class Noted(MadeUpSource):
        async def read(self) -> bytes:
            looks.put_nowait(self.away)
            return await super().read()

    source, stop = Noted(public_jwk(rsa_key(), "k1")), asyncio.Event()
    keys = KeySet(source, auth_settings(jwks_refresh_s=0.01, jwks_retry_s=0.01))
    running = asyncio.create_task(keys.run(stop))
    async with asyncio.timeout(15):
        assert await looks.get() is False
        source.away = True
        while not await looks.get():
            pass
        assert await looks.get() is True
        await keys.find("k1", "RS256")
        stop.set()
        await running


# Over HTTP -----------------------------------------------------------------------------------------

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def served(answer: Answer) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
    finally:
        server.close()


def says(status: str, body: bytes, *headers: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    return answer


async def reading(url: str, *, timeout_s: float = 10.0) -> bytes:
    source = UrlSource(url, timeout_s=timeout_s)
    try:
        return await source.read()
    finally:
        await source.close()


async def test_a_set_is_read_from_its_url() -> None:
    """Over a real socket."""
    text = key_set(public_jwk(rsa_key(), "k1"))
    async with served(says("200 OK", text)) as url:
        assert json.loads(await reading(url)) == json.loads(text)


async def test_a_redirect_is_not_followed() -> None:
    """It could lead to a host that nobody configured, or away from https."""
    async with served(says("302 Found", b"", "Location: http://127.0.0.1:1/")) as url:
        with pytest.raises(SourceFailed, match="302"):
            await reading(url)


async def test_an_endless_answer_is_cut_off() -> None:
    """Memory is everybody's."""

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" " * 65_536)
            await writer.drain()

    async with served(endless) as url:
        with pytest.raises(SourceFailed, match=str(MAX_SET_BYTES)):
            await reading(url)


async def test_a_silent_server_is_given_up_in_time() -> None:
    """Requests wait for it."""
    silent = asyncio.Event()

    async def says_nothing(writer: asyncio.StreamWriter) -> None:
        await silent.wait()

    async with served(says_nothing) as url:
        with pytest.raises(SourceFailed, match="Timeout"):
            await reading(url, timeout_s=0.05)
        silent.set()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/keys", "https://user:hunter2@127.0.0.1:1/keys"])
async def test_a_server_that_is_not_there_is_named_without_its_password(url: str) -> None:
    """The line goes to the log."""
    with pytest.raises(SourceFailed) as caught:
        await reading(url)

    assert "127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value)

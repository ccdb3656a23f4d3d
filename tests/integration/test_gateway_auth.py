"""Credentials and tenants over real HTTP, on real stores; where the gateway agrees to listen."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from support.fleet import Backend
from support.gateway import MODEL, PATIENCE_S, GatewayUnderTest, frames, gateway_running, settings_for
from support.tokens import AUDIENCE, ISSUER, ec_key, key_set, public_jwk, rsa_key, token

from codeyard.cli.main import main
from codeyard.producer.gateway.serve import is_loopback, run_gateway
from codeyard.shared.errors import SettingsError
from codeyard.shared.settings import AuthSettings, Settings

STATIC = "a-static-key-of-at-least-thirty-two-characters"
GOOD = json.dumps({"model": MODEL, "prompt": "def f("})


def with_auth(settings: Settings, **auth: Any) -> Settings:
    return settings.model_copy(update={"auth": AuthSettings.model_validate({"key_cache_s": 0, **auth})})


def cli(backend: Backend, *words: str) -> str:
    """A `codeyard` command on the same fleet; what it prints."""
    where = ["--broker", backend.broker_url, "--store", backend.store_url, "--namespace", backend.namespace]
    done = CliRunner().invoke(main, [*words, *where], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


@asynccontextmanager
async def key_server(path: Path) -> AsyncIterator[str]:
    """Serves the file at `path`, as it is at each request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = await asyncio.to_thread(path.read_bytes)
        writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
    finally:
        server.close()


# Keys and tokens -----------------------------------------------------------------------------------


async def test_a_key_works_from_when_it_is_made_to_when_it_is_revoked(backend: Backend) -> None:
    """By the command, in the store, for every gateway at once."""
    settings = with_auth(settings_for(backend.broker_url, backend.store_url, backend.namespace), mode="on")
    async with gateway_running(settings) as gateway:
        assert (await gateway.submit()).status_code == 401
        made = json.loads(await asyncio.to_thread(cli, backend, "keys", "make", "laptop", "--tenant", "acme", "--json"))
        headers = bearer(made["key"])

        accepted = await gateway.http.post(
            "/v1/jobs", content=GOOD, headers={**headers, "Content-Type": "application/json"}
        )
        assert (accepted.status_code, accepted.json()["tenant"]) == (202, "acme")
        assert (await gateway.http.get("/v1/jobs", headers={"x-api-key": made["key"]})).status_code == 200
        [listed] = json.loads(await asyncio.to_thread(cli, backend, "keys", "list", "--json"))
        assert listed == {name: value for name, value in made.items() if name != "key"}

        await asyncio.to_thread(cli, backend, "keys", "revoke", made["id"])
        refused = await gateway.http.get("/v1/jobs", headers=headers)

    assert (refused.status_code, refused.json()["detail"]) == (401, "this API key is revoked")


async def test_keys_of_the_issuer_rotate_under_a_running_gateway(embedded: Backend, tmp_path: Path) -> None:
    """Over HTTP, as issuers publish them."""
    published = tmp_path / "keys.json"
    published.write_bytes(key_set(public_jwk(rsa_key("old"), "old")))
    async with key_server(published) as url:
        auth = {"jwks_url": url, "issuer": ISSUER, "audience": AUDIENCE, "jwks_retry_s": 0.001}
        settings = with_auth(settings_for(embedded.broker_url, embedded.store_url, embedded.namespace), **auth)
        async with gateway_running(settings) as gateway:

            async def code(key: Any, algorithm: str, kid: str) -> int:
                return (await gateway.http.get("/v1/jobs", headers=bearer(token(key, algorithm, kid=kid)))).status_code

            assert await code(rsa_key("old"), "RS256", "old") == 200
            assert await code(ec_key("new"), "ES256", "new") == 401

            published.write_bytes(key_set(public_jwk(ec_key("new"), "new")))

            assert await code(ec_key("new"), "ES256", "new") == 200
            assert await code(rsa_key("old"), "RS256", "old") == 401


async def test_a_guessed_id_of_another_tenant_opens_nothing_on_the_real_thing(backend: Backend) -> None:
    """Status, wait, events, cancel, list and the same key again; the job itself is untouched."""
    auth = {"hs256_secret": "s" * 40, "issuer": ISSUER, "audience": AUDIENCE}
    settings = with_auth(settings_for(backend.broker_url, backend.store_url, backend.namespace), **auth)
    victim, attacker = (
        bearer(token("s" * 40, tenant="victim")),
        bearer(token("s" * 40, tenant="attacker", scope="admin")),
    )
    async with gateway_running(settings) as gateway:
        http, body = gateway.http, {"model": MODEL, "prompt": "def f("}
        keyed = {**victim, "Idempotency-Key": "release-1"}
        job_id = (await http.post("/v1/jobs", json=body, headers=keyed)).json()["id"]
        job = await gateway.claimed(job_id)
        await job.says("secret")

        refused = [
            await http.get(f"/v1/jobs/{job_id}", headers=attacker),
            await http.get(f"/v1/jobs/{job_id}", headers={**attacker, "Prefer": "wait=30"}),
            await http.get(f"/v1/jobs/{job_id}/events", headers={**attacker, "Last-Event-ID": "0"}),
            await http.delete(f"/v1/jobs/{job_id}", headers=attacker),
        ]
        listed = (await http.get("/v1/jobs", headers=attacker)).json()["jobs"]
        same_key = await http.post("/v1/jobs", json=body, headers={**attacker, "Idempotency-Key": "release-1"})
        await job.succeeds()
        async with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=victim) as answer:
            told = [frame.event async for frame in frames(answer)]
        mine = (await http.get("/v1/jobs", headers=victim)).json()["jobs"]

    assert [answer.status_code for answer in refused] == [404] * 4
    assert "secret" not in "".join(answer.text for answer in refused)
    assert listed == []
    assert (same_key.status_code, same_key.json()["attached"], same_key.json()["id"] == job_id) == (202, False, False)
    assert told == ["tokens", "end"]
    assert [one["id"] for one in mine] == [job_id]


# Where it listens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
@pytest.mark.parametrize("mode", ["auto", "off"])
async def test_without_authentication_it_does_not_listen_beyond_loopback(
    host: str, mode: str, tmp_path: Path, namespace: str
) -> None:
    """A gateway that anyone can use is nobody's wish; the message names the ways out."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    settings = with_auth(settings_for(url, url, namespace, host=host), mode=mode)
    listening = asyncio.Event()

    with pytest.raises(SettingsError, match="codeyard keys make"):
        async with asyncio.timeout(PATIENCE_S):
            await run_gateway(settings, asyncio.Event(), on_ready=lambda _: listening.set())

    assert not listening.is_set()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "::1"])
def test_loopback_is_what_the_name_resolves_to(host: str) -> None:
    """Not what it is called."""
    assert is_loopback(host, 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "localhost.invalid"])
def test_everything_else_is_not_loopback(host: str) -> None:
    """A name that does not resolve neither."""
    assert not is_loopback(host, 0)


@pytest.mark.parametrize("made", ["key in the store", "static key", "token secret", "asked for by name"])
async def test_with_any_credential_it_listens_on_all_addresses_and_asks(made: str, embedded: Backend) -> None:
    """One that is in the store counts as well as one that is configured."""
    auth: dict[str, Any] = {
        "static key": {"static_key": STATIC},
        "token secret": {"hs256_secret": "s" * 40, "issuer": ISSUER, "audience": AUDIENCE},
        "asked for by name": {"mode": "on"},
    }.get(made, {})
    if made == "key in the store":
        await asyncio.to_thread(cli, embedded, "keys", "make", "laptop")
    base = settings_for(embedded.broker_url, embedded.store_url, embedded.namespace, host="0.0.0.0")

    async with gateway_running(with_auth(base, **auth)) as gateway:
        port = gateway.url.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            refused, alive = await http.get("/v1/jobs"), await http.get("/healthz")

    assert (refused.status_code, alive.status_code) == (401, 200)


# On the wire ---------------------------------------------------------------------------------------


async def raw(gateway: GatewayUnderTest, sent: bytes) -> bytes:
    """What the gateway answers until it closes the connection, or until one whole answer is there."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        await writer.drain()
        async with asyncio.timeout(PATIENCE_S):
            return await reader.readuntil(b"}")
    except asyncio.IncompleteReadError as error:
        return error.partial
    finally:
        writer.close()


@asynccontextmanager
async def locked(backend: Backend) -> AsyncIterator[GatewayUnderTest]:
    settings = with_auth(settings_for(backend.broker_url, backend.store_url, backend.namespace), static_key=STATIC)
    async with gateway_running(settings) as gateway:
        yield gateway


@pytest.mark.parametrize(
    "header",
    [
        b"Authorization: Bearer x\r\n Bearer " + STATIC.encode(),
        b"Authorization: Bearer x\rAuthorization: Bearer " + STATIC.encode(),
        b"Authorization: Bearer x\nX-Evil: 1",
        b"Authorization: Bearer \x00" + STATIC.encode(),
        b"x-api-key: " + STATIC.encode() + b"\x0b",
        b"x-api-key : " + STATIC.encode(),
        b"x-api-key: a\r\nx-api-key: " + STATIC.encode(),
        b"Authorization: Bearer " + b"\xff" * 200,
        b"Authorization: " + b"Bearer " * 1_000,
    ],
)
async def test_a_header_that_is_broken_in_two_lets_nobody_in(header: bytes, embedded: Backend) -> None:
    """CR, LF, folding, NUL, blanks before the colon: refused by the parser or by us, and never a server error."""
    async with locked(embedded) as gateway:
        answer = await raw(gateway, b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"\r\n\r\n")
        again = await gateway.http.get("/v1/jobs", headers=bearer(STATIC))

    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"401", b"431"), answer
    assert b"X-Evil" not in answer
    assert again.status_code == 200


async def test_an_idempotency_key_with_a_line_break_is_refused_and_comes_back_nowhere(embedded: Backend) -> None:
    """Encoded, folded or raw."""
    async with locked(embedded) as gateway:
        head = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += b"Authorization: Bearer " + STATIC.encode() + f"\r\nContent-Length: {len(GOOD)}\r\n".encode()
        for key in (b"a\rb", b"a\x85b", b"a\x0bSet-Cookie: x=1", "a\u2028b".encode()):
            answer = await raw(gateway, head + b"Idempotency-Key: " + key + b"\r\n\r\n" + GOOD.encode())
            assert answer == b"" or answer.split(b" ")[1] == b"400", answer
            assert b"Set-Cookie" not in answer


async def test_a_stranger_who_sends_a_body_slowly_is_refused_at_once(embedded: Backend) -> None:
    """Before the first byte of it: slow bodies are for those who may send one."""
    async with locked(embedded) as gateway:
        answer = await raw(
            gateway,
            b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900000\r\n\r\n{",
        )

    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_a_body_over_the_limit_is_refused_with_the_right_key_too(embedded: Backend) -> None:
    """Counted as it comes, whoever sends it."""
    async with locked(embedded) as gateway:
        headers = {**bearer(STATIC), "Content-Type": "application/json"}
        answer = await gateway.http.post("/v1/jobs", content=b"x" * 18_000_000, headers=headers)

    assert (answer.status_code, answer.json()["type"]) == (413, "/docs#too-large")

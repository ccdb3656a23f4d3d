"""Where the gateway listens, and what it says while a server is away."""

import socket
from pathlib import Path

import httpx
import pytest
from support.brokers import comes_to
from support.gateway import gateway_running, settings_for
from support.servers import RedisServer


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def test_on_loopback_without_credentials_it_says_once_that_nobody_is_asked(
    tmp_path: Path, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Trying it out needs no key; a proxy in front of it must not make that a surprise."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"

    async with gateway_running(settings_for(url, url, namespace)) as gateway:
        assert gateway.url.startswith("http://127.0.0.1:")
        assert (await gateway.submit()).status_code == 202

    assert caplog.messages.count("development_mode") == 1


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")
async def test_an_ipv6_address_is_announced_as_a_url_that_works(tmp_path: Path, namespace: str) -> None:
    """Colons in a host need brackets."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"

    async with gateway_running(settings_for(url, url, namespace, host="::1")) as gateway:
        assert gateway.url.startswith("http://[::1]:")
        assert (await gateway.http.get("/healthz")).status_code == 200


@pytest.mark.services
async def test_while_the_store_is_away_callers_are_told_to_come_back_and_afterwards_all_is_there(
    tmp_path: Path, namespace: str, private_redis: RedisServer
) -> None:
    """503 with Retry-After, never a hang; alive all the while, and no restart needed."""
    settings = settings_for(f"sqlite:///{tmp_path / 'yard.db'}", private_redis.url, namespace, submit_timeout_s=1.5)
    settings = settings.model_copy(update={"store": settings.store.model_copy(update={"timeout_s": 0.5})})
    async with gateway_running(settings) as gateway:
        job = await gateway.finished("x", key="key-1")
        private_redis.kill()

        away = [
            await gateway.http.get(f"/v1/jobs/{job.job_id}"),
            await gateway.http.get(f"/v1/jobs/{job.job_id}/events"),
            await gateway.submit("key-2"),
            await gateway.http.delete(f"/v1/jobs/{job.job_id}"),
        ]
        ready, alive = await gateway.http.get("/readyz"), await gateway.http.get("/healthz")
        private_redis.start()

        async def status() -> int:
            return (await gateway.http.get("/readyz")).status_code

        assert await comes_to(status, 200) == 200
        replayed, later = await gateway.submit("key-1"), await gateway.submit("key-2")

    assert [answer.status_code for answer in away] == [503] * 4
    assert {answer.json()["type"] for answer in away} == {"/docs#store-unavailable"}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in away)
    assert (ready.json()["type"], alive.status_code) == ("/docs#not-ready", httpx.codes.OK)
    assert (replayed.status_code, later.status_code) == (200, 202)

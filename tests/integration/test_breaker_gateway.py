"""Breakers in a running gateway: a store that does not answer, a model whose engine fails."""

import asyncio
from pathlib import Path

import httpx
import pytest
from support.brokers import comes_to
from support.fleet import READY_S, Backend, gateway_task, worker_task
from support.gateway import gateway_running, settings_for
from support.servers import RedisServer

from codeyard.shared.record import State
from codeyard.shared.settings import BreakerSettings


@pytest.mark.services
async def test_a_store_that_hangs_is_not_waited_for_and_is_found_again_by_itself(
    tmp_path: Path, namespace: str, private_redis: RedisServer
) -> None:
    """A server that stands still is worse than one that is gone: each question costs its whole timeout."""
    settings = settings_for(f"sqlite:///{tmp_path / 'yard.db'}", private_redis.url, namespace, submit_timeout_s=1.5)
    settings = settings.model_copy(
        update={
            "store": settings.store.model_copy(update={"timeout_s": 0.3}),
            "breaker": BreakerSettings(requests=3, open_s=1.0),
        }
    )
    async with gateway_running(settings) as gateway:
        job = await gateway.finished("x", key="key-1")
        private_redis.freeze()

        async def status() -> httpx.Response:
            return await gateway.http.get(f"/v1/jobs/{job.job_id}")

        async def said() -> str:
            return "not asked" if "is asked again in" in (await status()).text else "asked"

        assert await comes_to(said, "not asked") == "not asked"
        refused = await gateway.submit("key-2")
        breaker = await gateway.metric('codeyard_breaker_state{kind="store",model=""}')
        private_redis.thaw()

        async def code() -> int:
            return (await status()).status_code

        assert await comes_to(code, 200) == 200
        again = await gateway.submit("key-1")

    assert (refused.status_code, refused.json()["type"]) == (503, "/docs#store-unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    assert breaker > 0
    assert (again.status_code, again.json()["attached"]) == (200, True)


async def test_a_model_whose_engine_fails_is_stood_in_for_and_the_result_says_by_what(embedded: Backend) -> None:
    """From a failing engine to the smaller model's result, as a caller of the gateway sees it; and the same key
    finds that result afterwards."""
    settings = embedded.settings(
        worker={"model": "coder=org/large,coder-small=org/small", "max_attempts": 1},
        gateway={"fallbacks": {"coder": "coder-small"}},
        breaker={"requests": 3, "open_s": 600, "window_s": 60},
    )
    async with (
        worker_task(settings),
        gateway_task(settings) as url,
        httpx.AsyncClient(base_url=url, timeout=READY_S, trust_env=False, headers={"Prefer": "wait=30"}) as http,
    ):
        failing = {"model": "coder", "prompt": "!fail", "sampling": {"max_tokens": 4}}
        ends = [(await http.post("/v1/jobs", json=failing)).json() for _ in range(3)]
        asked = {"model": "coder", "prompt": "def f():", "sampling": {"max_tokens": 4}}
        taken, again = [await http.post("/v1/jobs", json=asked, headers={"Idempotency-Key": "k"}) for _ in range(2)]
        small = await http.post("/v1/jobs", json={**asked, "model": "coder-small"})

    assert {end["result"]["error"]["code"] for end in ends} == {"engine_error"}
    job = taken.json()
    assert (job["state"], job["model"], job["asked_model"]) == (State.SUCCEEDED, "coder-small", "coder")
    assert job["result"]["revision"].startswith("coder-small-")
    assert taken.headers["x-codeyard-fallback-model"] == "coder-small"
    assert (again.json()["attached"], again.json()["result"]) == (True, job["result"])
    assert "asked_model" not in small.json()


async def test_an_interactive_job_without_workers_is_refused_and_served_when_one_comes(embedded: Backend) -> None:
    """The alias is known from an earlier worker; the gateway looks at who serves it now."""
    settings = embedded.settings(breaker={"unserved_s": 0}, worker={"model": "coder=org/large"})
    async with worker_task(settings):
        pass  # it makes its alias and its queues known, and goes
    asked = {"model": "coder", "prompt": "def f():", "lane": "interactive", "sampling": {"max_tokens": 4}}
    async with (
        gateway_task(settings) as url,
        httpx.AsyncClient(base_url=url, timeout=READY_S, trust_env=False) as http,
    ):
        async with asyncio.timeout(READY_S):
            while (refused := await http.post("/v1/jobs", json=asked)).status_code == 202:
                pass  # its last notice is still there
        async with worker_task(settings), asyncio.timeout(READY_S):
            while (served := await http.post("/v1/jobs", json=asked, headers={"Prefer": "wait=30"})).status_code == 503:
                pass

    assert (refused.status_code, refused.json()["type"]) == (503, "/docs#model-unavailable")
    assert (served.status_code, served.json()["state"]) == (200, State.SUCCEEDED)

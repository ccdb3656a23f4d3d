"""The life of a job over HTTP: real sockets, real store and broker, embedded and on servers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.gateway import GatewayUnderTest, gateway_running, settings_for

from codeyard.shared.job import Lane


@pytest_asyncio.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
async def gateway(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[GatewayUnderTest]:
    """Both ways of running it."""
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        settings = settings_for(url, url, namespace, max_wait_s=20)
    else:
        broker_url, store_url = request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url")
        settings = settings_for(broker_url, store_url, namespace, max_wait_s=20)
    async with gateway_running(settings) as running:
        yield running


async def test_a_submission_is_accepted_with_202_and_a_location_that_answers(gateway: GatewayUnderTest) -> None:
    """The contract of submit: accepted means queued, and the caller learns where to poll."""
    answer = await gateway.submit("key-1", lane="interactive")

    assert answer.status_code == 202
    body = answer.json()
    assert body["attached"] is False
    assert (body["state"], body["lane"], body["model"], body["key"]) == ("queued", "interactive", "tiny", "key-1")
    assert answer.headers["location"] == f"/v1/jobs/{body['id']}"
    polled = (await gateway.http.get(answer.headers["location"])).json()
    assert {**polled, "attached": False} == {**body, **polled, "attached": False}
    assert await gateway.depth(Lane.INTERACTIVE) == 1


async def test_the_same_submission_again_attaches_and_enqueues_nothing(gateway: GatewayUnderTest) -> None:
    """A retry after a lost answer must not generate twice."""
    first = await gateway.submit("key-1")
    second = await gateway.submit("key-1")

    assert (second.status_code, second.json()["attached"]) == (202, True)
    assert second.json()["id"] == first.json()["id"]
    assert await gateway.depth(Lane.STANDARD) == 1


async def test_replaying_a_finished_job_returns_its_outcome_byte_for_byte(gateway: GatewayUnderTest) -> None:
    """A final job answers every later submission of its key, always in the same words."""
    job = await gateway.finished("    return", " 1\n", key="key-1")

    replays = [await gateway.submit("key-1") for _ in range(3)]

    assert {answer.status_code for answer in replays} == {200}
    assert len({answer.content for answer in replays}) == 1
    polled = await gateway.http.get(f"/v1/jobs/{job.job_id}")
    assert replays[0].json()["attached"] is True
    assert replays[0].json()["result"]["text"] == "    return 1\n"
    result = polled.content[polled.content.index(b'"result":') : -1]
    assert result in replays[0].content


async def test_the_same_key_with_another_body_is_a_conflict_that_names_the_job(gateway: GatewayUnderTest) -> None:
    """The caller must not get an answer to a question it did not ask."""
    first = await gateway.submit("key-1", prompt="def f(")
    other = await gateway.submit("key-1", prompt="def g(")

    assert other.status_code == 409
    assert other.headers["content-type"] == "application/problem+json"
    assert (other.json()["type"], other.json()["job_id"]) == ("/docs#idempotency-conflict", first.json()["id"])


async def test_without_a_key_two_equal_submissions_are_two_jobs(gateway: GatewayUnderTest) -> None:
    """Equal prompts are not the same wish unless the caller says so."""
    ids = {(await gateway.submit()).json()["id"] for _ in range(2)}

    assert len(ids) == 2


async def test_prefer_wait_answers_200_with_the_result_as_soon_as_the_job_is_final(gateway: GatewayUnderTest) -> None:
    """One call instead of a polling loop."""
    job = await gateway.submit_and_claim("key-1")
    waiting = asyncio.create_task(gateway.http.get(f"/v1/jobs/{job.job_id}", headers={"Prefer": "wait=15"}))
    submitting = asyncio.create_task(
        gateway.http.post(
            "/v1/jobs",
            json={"model": "tiny", "prompt": "def f("},
            headers={"Idempotency-Key": "key-1", "Prefer": "respond-async, wait=15"},
        )
    )
    await job.says("pass")
    await job.succeeds()

    for answer in await asyncio.gather(waiting, submitting):
        assert answer.status_code == 200
        assert answer.headers["preference-applied"] == "wait=15"
        assert answer.json()["result"]["text"] == "pass"


async def test_prefer_wait_answers_202_when_the_job_takes_longer(gateway: GatewayUnderTest) -> None:
    """The wait is the caller's, not the job's: it goes on."""
    answer = await gateway.http.post(
        "/v1/jobs", json={"model": "tiny", "prompt": "def f("}, headers={"Prefer": "wait=0"}
    )

    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "wait=0"
    assert "result" not in answer.json()


async def test_a_wait_longer_than_the_gateway_allows_is_cut_and_says_so(gateway: GatewayUnderTest) -> None:
    """Preference-Applied tells what the caller really got."""
    job = await gateway.finished("x")

    answer = await gateway.http.get(f"/v1/jobs/{job.job_id}", headers={"Prefer": "wait=99999"})

    assert answer.headers["preference-applied"] == "wait=20"


async def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked_to_stop(gateway: GatewayUnderTest) -> None:
    """The three outcomes of cancel; none of them is an error, so that a repeated cancel is safe."""
    queued = (await gateway.submit()).json()["id"]
    running = await gateway.submit_and_claim()
    done = await gateway.finished("x")

    outcomes = [
        (await gateway.http.delete(f"/v1/jobs/{job_id}")).json()["outcome"]
        for job_id in (queued, queued, running.job_id, done.job_id)
    ]

    assert outcomes == ["cancelled", "already_final", "requested", "already_final"]
    cancelled = (await gateway.http.get(f"/v1/jobs/{queued}")).json()
    assert (cancelled["state"], cancelled["result"]["error"]["code"]) == ("cancelled", "cancelled")
    assert (await gateway.http.get(f"/v1/jobs/{running.job_id}")).json()["cancel_requested"] is True


@pytest.mark.parametrize("job_id", ["00000000-0000-5000-8000-000000000000", "nope", "%2e%2e", "a" * 500])
async def test_an_unknown_job_is_404_in_every_route(gateway: GatewayUnderTest, job_id: str) -> None:
    """Also for what cannot be an id: it never reaches the store."""
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        answer = await gateway.http.request(method, f"/v1/jobs/{job_id}{path}")
        assert (answer.status_code, answer.json()["type"]) == (404, "/docs#job-not-found")


async def test_recent_lists_the_newest_first_and_refuses_a_silly_limit(gateway: GatewayUnderTest) -> None:
    """For people who ask what is going on."""
    ids = [(await gateway.submit(f"key-{n}")).json()["id"] for n in range(3)]

    listed = (await gateway.http.get("/v1/jobs", params={"limit": 2})).json()["jobs"]

    assert [job["id"] for job in listed] == ids[:0:-1]
    for limit in ("0", "1001", "many", "-1", "1.5"):
        answer = await gateway.http.get("/v1/jobs", params={"limit": limit})
        assert (answer.status_code, answer.json()["field"]) == (400, "limit")


async def test_a_model_nobody_serves_is_404(gateway: GatewayUnderTest) -> None:
    """The name is wrong, or its worker was never started; the answer says both."""
    answer = await gateway.http.post("/v1/jobs", json={"model": "no-such", "prompt": "x"})

    assert (answer.status_code, answer.json()["type"]) == (404, "/docs#unknown-model")


async def test_readyz_names_both_servers_with_their_versions(gateway: GatewayUnderTest) -> None:
    """The first look of the person on call."""
    answer = await gateway.http.get("/readyz")

    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ready",
        "broker": await gateway.broker.ping(),
        "store": await gateway.store.ping(),
    }


async def test_metadata_and_token_ids_arrive_as_they_were_sent(gateway: GatewayUnderTest) -> None:
    """What the worker gets is what the caller wrote, to the last code point."""
    metadata = {"file": "ünï\u2028code.py", "n": [1, 2.5, None, {"deep": True}]}
    answer = await gateway.http.post(
        "/v1/jobs",
        json={"model": "tiny", "prompt": [5, 0, 7], "metadata": metadata, "sampling": {"stop": ["\n\n"], "seed": 3}},
    )

    [record] = await gateway.store.read([answer.json()["id"]])

    assert record is not None
    assert record.job.prompt == (5, 0, 7)
    assert record.job.metadata == metadata
    assert (record.job.sampling.stop, record.job.sampling.seed) == (("\n\n",), 3)


async def test_concurrent_submissions_of_one_key_make_one_job(gateway: GatewayUnderTest) -> None:
    """A caller whose retries overlap its first try."""
    answers = await asyncio.gather(*(gateway.submit("key-1") for _ in range(20)))

    assert len({answer.json()["id"] for answer in answers}) == 1
    assert [answer.json()["attached"] for answer in answers].count(False) == 1


async def test_every_outcome_of_a_submission_is_counted(gateway: GatewayUnderTest) -> None:
    """Dashboards show who is turned away, and why."""
    await gateway.submit("key-1", lane="bulk")
    await gateway.submit("key-1", lane="bulk")
    await gateway.submit("key-1", lane="bulk", prompt="other")
    await gateway.http.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})

    for lane, outcome in (
        ("bulk", "accepted"),
        ("bulk", "attached"),
        ("bulk", "idempotency-conflict"),
        ("unknown", "malformed-json"),
    ):
        assert await gateway.metric(f'codeyard_submissions_total{{lane="{lane}",outcome="{outcome}"}}') == 1


async def test_a_second_gateway_answers_for_the_firsts_jobs(gateway: GatewayUnderTest) -> None:
    """Gateways hold no state: a load balancer may send each request anywhere."""
    job = await gateway.finished("x", key="key-1")

    async with gateway_running(gateway.settings) as other:
        replayed = await other.submit("key-1")

    assert (replayed.status_code, replayed.json()["id"]) == (200, job.job_id)

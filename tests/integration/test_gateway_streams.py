"""Server-sent events over real sockets: resume, stop, hang up."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from support.gateway import PATIENCE_S, GatewayUnderTest, frames, gateway_running, next_frames, settings_for


@pytest_asyncio.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
async def gateway(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[GatewayUnderTest]:
    """Both ways of running it."""
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        settings = settings_for(url, url, namespace)
    else:
        settings = settings_for(
            request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url"), namespace
        )
    async with gateway_running(settings) as running:
        yield running


async def test_a_stream_gives_every_event_as_it_is_made_and_ends_with_end(gateway: GatewayUnderTest) -> None:
    """The reader sees tokens while the job runs, not after."""
    job = await gateway.submit_and_claim()
    await job.says("one ")

    async with gateway.http.stream("GET", f"/v1/jobs/{job.job_id}/events") as answer:
        reader = frames(answer)
        [first] = await next_frames(reader, 1)
        await job.says("two ", "three")  # only now, so it cannot have been read before
        second, third = await next_frames(reader, 2)
        await job.succeeds()
        [end] = await next_frames(reader, 1)
        rest = [frame async for frame in reader]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert [frame.id for frame in (first, second, third, end)] == ["1", "2", "3", "4"]
    assert [frame.event for frame in (first, second, third, end)] == ["tokens", "tokens", "tokens", "end"]
    assert "".join(json.loads(frame.data)["text"] for frame in (first, second, third)) == "one two three"
    assert json.loads(end.data) == {"seq": 4, "kind": "end", "state": "succeeded"}
    assert rest == []


async def test_resuming_at_any_event_gives_exactly_the_rest(gateway: GatewayUnderTest) -> None:
    """A reader that lost its connection must get no token twice and miss none."""
    job = await gateway.finished(*(f"piece{n}\n" for n in range(10)))
    url = f"/v1/jobs/{job.job_id}/events"
    whole = (await gateway.http.get(url)).text.partition("\n\n")[2]

    for seen in range(11):
        rest = await gateway.http.get(url, headers={"Last-Event-ID": str(seen)})
        by_query = await gateway.http.get(url, params={"after": seen})
        assert rest.content == by_query.content
        expected = whole if seen == 0 else whole.partition(f"id: {seen}\n")[2].partition("\n\n")[2]
        assert rest.text.partition("\n\n")[2] == expected


async def test_coming_back_after_the_end_is_204_so_that_an_eventsource_stops(gateway: GatewayUnderTest) -> None:
    """An EventSource reconnects whenever a response ends; 204 is the one way to tell it not to."""
    job = await gateway.finished("x")

    answer = await gateway.http.get(f"/v1/jobs/{job.job_id}/events", headers={"Last-Event-ID": "2"})

    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("last_event_id", ["x", "-1", "1.0", "", "3", "9" * 40, "0x1", "1, 2", "\u00b2"])
async def test_a_last_event_id_this_stream_never_gave_is_400(gateway: GatewayUnderTest, last_event_id: str) -> None:
    """Replaying everything instead would show the reader its tokens twice."""
    job = await gateway.finished("x")

    answer = await gateway.http.get(
        f"/v1/jobs/{job.job_id}/events", headers=[(b"Last-Event-ID", last_event_id.encode("latin-1"))]
    )

    assert (answer.status_code, answer.json()["field"]) == (400, "Last-Event-ID")


async def test_the_header_wins_over_the_query_that_an_eventsource_repeats(gateway: GatewayUnderTest) -> None:
    """EventSource reconnects to its first URL, `?after=` included."""
    job = await gateway.finished("a", "b", "c")

    answer = await gateway.http.get(
        f"/v1/jobs/{job.job_id}/events", params={"after": 0}, headers={"Last-Event-ID": "3"}
    )

    assert "id: 4\nevent: end" in answer.text
    assert "id: 3\n" not in answer.text


async def test_a_reader_that_hangs_up_leaves_nothing_behind(gateway: GatewayUnderTest) -> None:
    """Streams are counted down, and the job goes on without a reader."""
    job = await gateway.submit_and_claim()
    await job.says("x")
    async with gateway.http.stream("GET", f"/v1/jobs/{job.job_id}/events") as answer:
        await next_frames(frames(answer), 1)
        assert await gateway.metric("codeyard_streams_open") == 1

    await _comes_to(gateway, "codeyard_streams_open", 0)

    await job.succeeds()
    assert (await gateway.http.get(f"/v1/jobs/{job.job_id}")).json()["state"] == "succeeded"


async def test_a_waiter_that_hangs_up_is_let_go_at_once(gateway: GatewayUnderTest) -> None:
    """Held waits would pile up behind impatient callers."""
    job = await gateway.submit_and_claim()
    with pytest.raises(httpx.ReadTimeout):
        await gateway.http.get(f"/v1/jobs/{job.job_id}", headers={"Prefer": "wait=60"}, timeout=0.2)

    await _comes_to(gateway, 'codeyard_http_requests_total{route="GET /v1/jobs/{job_id}",status="499"}', 1)


async def test_a_slow_reader_holds_nobody_and_gets_everything(gateway: GatewayUnderTest) -> None:
    """Back-pressure ends at the gateway: the worker writes to the store and knows no reader."""
    job = await gateway.submit_and_claim()
    async with gateway.http.stream("GET", f"/v1/jobs/{job.job_id}/events") as answer:
        for start in range(0, 2_000, 500):
            await job.says(*(f"{number:0>1000}" for number in range(start, start + 500)))
        await job.succeeds()  # 2 MB before the reader takes its first byte: more than any buffer holds

        ids = [int(frame.id) async for frame in frames(answer)]

    assert ids == list(range(1, 2_002))


async def test_stopping_the_gateway_ends_streams_so_that_they_resume_at_another(gateway: GatewayUnderTest) -> None:
    """A rollout: the stream ends cleanly, its reader comes back with the last id and gets the rest."""
    job = await gateway.submit_and_claim()
    await job.says("before ")
    async with (
        gateway_running(gateway.settings) as other,
        other.http.stream("GET", f"/v1/jobs/{job.job_id}/events") as answer,
    ):
        reader = frames(answer)
        seen = await next_frames(reader, 1)
        other.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            rest = [frame async for frame in reader]  # it ends, and without an error of the transfer
    await job.says("after")
    await job.succeeds()

    resumed = await gateway.http.get(f"/v1/jobs/{job.job_id}/events", headers={"Last-Event-ID": seen[-1].id})

    assert rest == []
    assert answer.headers["Connection"] == "close"  # who comes back at once must not come back on this connection
    assert [line for line in resumed.text.splitlines() if line.startswith("id")] == ["id: 2", "id: 3"]


async def test_stopping_the_gateway_answers_those_who_wait(gateway: GatewayUnderTest) -> None:
    """A wait is only a convenience: the answer is the job as it is, not an error."""
    job = await gateway.submit_and_claim()
    async with gateway_running(gateway.settings) as other:
        url = f"/v1/jobs/{job.job_id}"
        waiting = asyncio.create_task(other.http.get(url, headers={"Prefer": "wait=60"}))
        await _comes_to(other, "codeyard_waits_open", 1)
        other.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            answer = await waiting

    assert (answer.status_code, answer.json()["state"]) == (200, "running")


async def _comes_to(gateway: GatewayUnderTest, line: str, value: float) -> None:
    """Ask until it is so; each question is a round trip."""
    async with asyncio.timeout(PATIENCE_S):
        while await gateway.metric(line) != value:
            pass

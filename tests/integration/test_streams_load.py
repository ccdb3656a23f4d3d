"""Many streams on one gateway: idle ones, and ones of which every token is compared: bench_streams.py in small."""

import asyncio
from urllib.parse import urlsplit

import httpx
import pytest
from loadtest.bench_streams import Caller, Told, check_streams, open_readers
from support.fleet import Backend, gateway_task, worker_task
from support.gateway import PATIENCE_S

from codeyard.producer import AsyncClient

MODEL = "coder"


def caller_of(url: str) -> Caller:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return Caller(parts.hostname, parts.port)


async def streams_open(http: httpx.AsyncClient, count: int) -> None:
    """Return when so many are being read; each question is a round trip."""
    async with asyncio.timeout(PATIENCE_S):
        while f"codeyard_streams_open {count}.0" not in (await http.get("/metrics")).text:
            pass


async def test_two_hundred_streams_under_load_are_whole_although_most_are_cut_and_resumed(backend: Backend) -> None:
    """The same text as the stored result, sequence numbers without gap or repeat, one end: in every one."""
    settings = backend.settings(
        worker={"model": f"{MODEL}=org/coder", "flush_s": 0.02}, engine={"time_scale": 0.3, "max_running": 32}
    )
    async with worker_task(settings), gateway_task(settings) as url:
        async with asyncio.timeout(110):
            found = await check_streams(caller_of(url), MODEL, streams=200, at_once=32)

    assert found == {"whole": 200}


async def test_a_hundred_idle_readers_are_held_at_once_and_let_go_when_they_hang_up(backend: Backend) -> None:
    """They cost memory and nothing else; and each of them is told when at last something is said."""
    settings = backend.settings(worker={"model": f"{MODEL}=org/coder"})
    async with worker_task(settings):
        pass  # the model is known, and nobody works
    async with (
        gateway_task(settings) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http,
    ):
        caller = caller_of(url)
        job_id = await caller.submit(MODEL, "def f():", max_tokens=8)
        followed = [Told() for _ in range(20)]
        async with asyncio.TaskGroup() as tasks:
            for told in followed:
                tasks.create_task(caller.follow(job_id, told))
            async with open_readers(caller, job_id, 100):
                await streams_open(http, 120)
            await streams_open(http, 20)
            async with worker_task(settings), AsyncClient(settings=settings) as client:
                result = await client.result(job_id, timeout=PATIENCE_S)
        await streams_open(http, 0)

    assert {told.text for told in followed} == {result.text}
    assert {told.ended for told in followed} == {"succeeded"}


def test_a_reader_that_missed_an_event_is_found() -> None:
    """The check would be worth nothing if it took any stream for whole."""
    told = Told()
    for event in ({"seq": 1, "kind": "tokens", "text": "a"}, {"seq": 3, "kind": "tokens", "text": "c"}):
        told.hear(event)

    assert told.fault == "3 after 1"
    again = Told()
    for event in ({"seq": 1, "kind": "end", "state": "succeeded"}, {"seq": 2, "kind": "tokens", "text": "b"}):
        again.hear(event)
    assert again.fault == "an event after `end`"


@pytest.mark.parametrize("fault", ["another text", "a gap", "no end"])
async def test_a_gateway_that_loses_something_is_found(fault: str) -> None:
    """Against a server that answers as a gateway would, but for one thing."""
    answers = {
        "POST": b'{"id": "x"}',
        "GET /v1/jobs/x ": b'{"state": "succeeded", "finished_at": 1, "last_seq": 3, "result": {"text": "ab"}}',
    }
    events = [
        b'data: {"seq":1,"kind":"tokens","text":"a"}\n\n',
        b'data: {"seq":2,"kind":"tokens","text":"b"}\n\n',
        b'data: {"seq":3,"kind":"end","state":"succeeded"}\n\n',
    ]
    if fault == "another text":
        events[1] = events[1].replace(b'"b"', b'"c"')
    else:
        del events[1 if fault == "a gap" else 2]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = next((answer for start, answer in answers.items() if head.startswith(start)), b"".join(events))
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        caller = Caller("127.0.0.1", server.sockets[0].getsockname()[1])
        found = await check_streams(caller, MODEL, streams=1, at_once=1, seed=3)

    assert found["whole"] == 0
    assert found.total() == 1

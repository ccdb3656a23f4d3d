"""Callers that do not keep to HTTP, bodies made of noise, and the end of the process."""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.gateway import MODEL, PATIENCE_S, GatewayUnderTest, declared, gateway_running, settings_for

from codeyard.producer.gateway.problems import KINDS
from codeyard.producer.gateway.serve import listen, run_gateway
from codeyard.shared.errors import SettingsError

LIMIT = 10_000
HEAD = "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GOOD = json.dumps({"model": MODEL, "prompt": "def f("})


@pytest_asyncio.fixture
async def gateway(tmp_path: Path, namespace: str) -> AsyncIterator[GatewayUnderTest]:
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    async with gateway_running(settings_for(url, url, namespace, max_body_bytes=LIMIT)) as running:
        yield running


async def _raw(gateway: GatewayUnderTest, sent: str, *, hang_up: bool = False) -> str:
    """Everything the gateway answers until it closes the connection."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent.encode())
        await writer.drain()
        if hang_up:
            writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            return (await reader.read()).decode()
    finally:
        writer.close()


async def test_a_body_longer_than_it_declares_is_not_taken_for_the_job(gateway: GatewayUnderTest) -> None:
    """What comes after the declared length is another request, and no valid one; it ends the connection."""
    answer = await _raw(gateway, f"{HEAD}Content-Length: {len(GOOD)}\r\n\r\n{GOOD}{GOOD}", hang_up=True)

    assert re.findall(r"HTTP/1.1 (\d+)", answer)[-1] == "400"
    jobs = (await gateway.http.get("/v1/jobs")).json()["jobs"]
    records = await gateway.store.read([job["id"] for job in jobs])
    assert [record.job.prompt for record in records if record] in ([], ["def f("])


async def test_a_body_shorter_than_it_declares_submits_nothing(gateway: GatewayUnderTest) -> None:
    """The caller hung up before its job was whole."""
    answer = await _raw(gateway, f"{HEAD}Content-Length: {len(GOOD) + 5}\r\n\r\n{GOOD}", hang_up=True)

    assert "202" not in answer
    assert (await gateway.http.get("/v1/jobs")).json()["jobs"] == []


async def test_a_body_that_declares_too_much_is_refused_and_the_answer_arrives(gateway: GatewayUnderTest) -> None:
    """The caller is still sending when it is refused; closing at once would cost it the answer."""
    body = "x" * (LIMIT * 3)

    for head in (f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}", f"{HEAD}Transfer-Encoding: chunked\r\n\r\n"):
        chunked = "Transfer-Encoding" in head
        answer = await _raw(gateway, f"{head}{len(body):x}\r\n{body}\r\n0\r\n\r\n" if chunked else head)
        assert answer.startswith("HTTP/1.1 413 ")
        assert '"type": "/docs#too-large"' in answer


async def test_a_connection_serves_on_after_a_refusal(gateway: GatewayUnderTest) -> None:
    """Only a body that was not read ends the connection."""
    bad, good = f"{HEAD}Content-Length: 1\r\n\r\n{{", f"{HEAD}Connection: close\r\nContent-Length: {len(GOOD)}\r\n\r\n"

    answer = await _raw(gateway, f"{bad}{good}{GOOD}")

    assert re.findall(r"HTTP/1.1 (\d+)", answer) == ["400", "202"]


async def test_600_bodies_of_noise_are_answered_as_the_callers_fault_and_the_gateway_goes_on(
    gateway: GatewayUnderTest,
) -> None:
    """Through the whole way to the store, not only the parser. The seed makes a failure repeatable."""
    noise = random.Random(20_261_121)
    seen: set[int] = set()

    for _ in range(600):
        answer = await gateway.http.post(
            "/v1/jobs", content=_noisy(noise), headers={"Content-Type": "application/json"}
        )
        seen.add(answer.status_code)
        if answer.status_code != 202:
            assert answer.status_code in (400, 404, 413, 422), answer.text
            assert answer.json()["type"].removeprefix("/docs#") in KINDS

    assert {202, 400, 404, 413, 422} <= seen  # the noise reaches every branch
    assert (await gateway.submit()).status_code == 202


def _noisy(noise: random.Random) -> bytes:
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        1e308,
        "",
        "x" * 300,
        "\u0000",
        "\ud7ff\U0001f600",
        [],
        [[]],
        {},
        "nope",
    ]
    body: dict[str, Any] = {"model": MODEL, "prompt": "def f(", "lane": "bulk", "stream": False, "timeout_s": 60}
    body |= {"sampling": {"max_tokens": 5, "stop": ["\n"]}, "metadata": {"a": 1}}
    for _ in range(noise.choice((0, 1, 1, 2))):
        where = body["sampling"] if noise.random() < 0.3 and isinstance(body["sampling"], dict) else body
        where[noise.choice([*where, "temperature", "x"])] = noise.choice(odd)
    if noise.random() < 0.05:
        body["prompt"] = "y" * LIMIT
    raw = bytearray(json.dumps(body).encode())
    for _ in range(noise.choice((0, 0, 0, 1, 4))):
        raw[noise.randrange(len(raw))] = noise.randrange(256)
    return bytes(raw[: noise.randrange(len(raw))]) if noise.random() < 0.1 else bytes(raw)


async def test_a_taken_port_stops_the_gateway_with_what_to_do(tmp_path: Path, namespace: str) -> None:
    """One line for the person at the terminal, not a traceback."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = settings_for(url, url, namespace)
        gateway = settings.gateway.model_copy(update={"port": taken.getsockname()[1]})

        with pytest.raises(SettingsError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use; choose"):
            await run_gateway(settings.model_copy(update={"gateway": gateway}), asyncio.Event())


async def test_a_gateway_that_waits_for_its_servers_can_be_stopped(namespace: str) -> None:
    """SIGTERM during a fleet's start must not be lost behind a broker that is not up yet."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    settings = settings_for(f"amqp://guest:guest@127.0.0.1:{port}/", f"redis://127.0.0.1:{port}/0", namespace)
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, stop.set)

    async with asyncio.timeout(PATIENCE_S):
        await run_gateway(settings, stop)


def test_answers_are_sent_without_waiting_for_the_callers_acks() -> None:
    """Head and body leave in two writes: with Nagle's algorithm on, every answer would be 40 ms late."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as _:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.process
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_with_status_0_and_its_streams_in_order(
    tmp_path: Path, namespace: str, sign: signal.Signals
) -> None:
    """What a rollout does, many times a day."""
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    settings = settings_for(url, url, namespace)
    environment = {
        "PATH": "/usr/bin:/bin",
        "CODEYARD_NAMESPACE": namespace,
        "CODEYARD_BROKER_URL": url,
        "CODEYARD_STORE_URL": url,
        "PYTHONUNBUFFERED": "1",
    }
    command = (sys.executable, "-m", "codeyard.cli.main", "gateway", "--port", "0")
    async with declared(settings):
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(PATIENCE_S):
                base = (await process.stdout.readline()).decode().split()[1]
            host, port = base.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"{HEAD}Content-Length: {len(GOOD)}\r\n\r\n{GOOD}".encode())
            answer = (await reader.readuntil(b'"attached":false}')).decode()
            job_id = re.findall(r"location: /v1/jobs/(\S+)", answer)[0]
            writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await reader.readuntil(b"retry: 1000")

            process.send_signal(sign)
            async with asyncio.timeout(PATIENCE_S):
                rest = await reader.read()
                _, errors = await process.communicate()
            writer.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    assert rest.endswith(b"0\r\n\r\n")  # the last chunk: the response is whole
    assert process.returncode == 0
    assert b"Traceback" not in errors
    assert b"gateway_stopped" in errors

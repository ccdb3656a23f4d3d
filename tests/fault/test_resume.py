"""kill -9 of gateways, workers and clients under running streams: what was read, joined, is the stored result.

Two gateways, two workers and a client are processes. Streams come in waves, and in each wave one of the three kinds
is killed at a random point and started anew; a stream counts when it was running at what was killed. How the
streams of OpenAI and Anthropic end over a killed worker: tests/integration/test_openai_responses.py and
test_anthropic_takeover.py.
"""

import asyncio
import contextlib
import itertools
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from support import stream_reader
from support.fleet import Backend, WorkerProcess
from support.rpc import GatewayProcess, gateways

from codeyard.producer.async_client import AsyncClient, AsyncJob
from codeyard.worker.engines.simulated import simulated_completion
from codeyard.worker.simulation.virtual_time import pass_time

pytestmark = pytest.mark.process

Kind = Literal["gateway", "worker", "client"]
KINDS: tuple[Kind, ...] = ("gateway", "worker", "client")
MAX_TOKENS = 255
LEAST_TOKENS = 160  # 10 ms each: streams last 1.6 to 2.5 s
TIME_SCALE = 2.0
FLUSH_S = 0.1  # so a stream has some 20 events
KILLED_AFTER = (0.2, 10.0)  # events per stream of the wave, drawn for each kill
ARRIVE_WITHIN_S = 0.8  # each at a moment of its own, so that one kill meets each stream elsewhere
MOST_AT_ONCE = 20
PATIENCE_S = 180.0  # for a wave


@pytest.fixture
def backend(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> Backend:
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        return Backend(tmp_path, url, url, namespace)
    return Backend(tmp_path, request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url"), namespace)


@pytest.mark.parametrize(
    "backend,num_streams",
    [
        pytest.param("embedded", 9, marks=pytest.mark.timeout(300)),
        pytest.param("servers", 40, marks=[pytest.mark.services, pytest.mark.timeout(600)]),
        pytest.param("servers", 200, marks=[pytest.mark.services, pytest.mark.long, pytest.mark.timeout(1_800)]),
    ],
    indirect=["backend"],
)
async def test_whatever_is_killed_under_a_stream_its_text_is_the_stored_result(
    backend: Backend, num_streams: int
) -> None:
    """Byte for byte, no event twice and none missing, and nothing begins again."""
    chance = random.Random(num_streams)
    size = min(MOST_AT_ONCE, -(-num_streams // len(KINDS)))
    num_killed = dict.fromkeys(KINDS, 0)
    async with fleet(backend) as yard:
        for kind in itertools.cycle(KINDS):
            prompts = [f"def wave_{sum(num_killed.values())}_{n}_{chance.random()}():" for n in range(10 * size)]
            streams = await yard.wave(kind, chance, [prompt for prompt in prompts if is_long(prompt)][:size])
            num_killed[kind] += sum(stream.was_killed for stream in streams)

            for stream in streams:
                stream.check()
                assert "restarted" not in stream.kinds
                assert stream.stored == simulated_completion(stream.prompt, MAX_TOKENS)[0]
            if sum(num_killed.values()) >= num_streams:
                break

    print(f"streams under which something was killed, all read right: {num_killed}")
    assert min(num_killed.values()) > 0


@pytest.mark.parametrize("backend", [pytest.param("servers", marks=pytest.mark.services)], indirect=True)
@pytest.mark.timeout(300)
async def test_a_stream_that_cannot_go_on_says_restarted_and_what_follows_is_the_stored_result(
    backend: Backend,
) -> None:
    """The generator of a seeded job cannot be wound forward: its reader is told to forget what it read, and the
    numbers go on."""
    chance = random.Random(5)
    prompts = [prompt for prompt in (f"def seeded_{n}():" for n in range(60)) if is_long(prompt)][:6]
    async with fleet(backend) as yard:
        streams = await yard.wave("worker", chance, prompts, killed_after=(2.0, 6.0), sampling={"seed": 7})

    for stream in streams:
        stream.check()
        assert stream.kinds.count("restarted") == (1 if stream.was_killed and stream.seen else 0)
    assert any("restarted" in stream.kinds for stream in streams)


@dataclass(eq=False)
class Stream:
    """One job's stream as its client has read it, lives and connections joined. `seen` is how many events that
    were when something was killed."""

    prompt: str
    job: AsyncJob
    turn: int  # which gateway it asks first
    events: list[dict[str, Any]] = field(default_factory=list)
    was_killed: bool = False
    seen: int = 0
    stored: str = ""

    @property
    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]

    @property
    def ended(self) -> bool:
        return self.kinds[-1:] == ["end"]

    def check(self) -> None:
        assert [event["seq"] for event in self.events] == list(range(1, len(self.events) + 1))
        assert self.kinds.count("end") == 1
        assert self.events[-1] == {"seq": len(self.events), "kind": "end", "state": "succeeded"}
        begun = max((n for n, kind in enumerate(self.kinds) if kind == "restarted"), default=-1) + 1
        text = "".join(event.get("text", "") for event in self.events[begun:])
        assert text.encode() == self.stored.encode()


class Client:
    """The process that reads the streams of a wave. What it said before it was killed is what it had read."""

    def __init__(self, addresses: Path, streams: Sequence[Stream], heard: Callable[[], None]) -> None:
        self._addresses = addresses
        self._streams = {stream.job.id: stream for stream in streams}
        self._heard = heard
        self._process: asyncio.subprocess.Process | None = None

    async def read(self) -> int:
        """Start, hear all that it says, and return its exit status."""
        left = [[id, len(one.events), one.turn] for id, one in self._streams.items() if not one.ended]
        command = (sys.executable, stream_reader.__file__, str(self._addresses), json.dumps(left))
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdout=pipe, limit=1 << 20)
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # else it was killed within it
                job_id, _, _, event = line.decode().split(" ", 3)
                self._streams[job_id].events.append(json.loads(event))
                self._heard()
        return await self._process.wait()

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()


@dataclass
class Fleet:
    gateways: list[GatewayProcess]
    workers: list[WorkerProcess]
    client: AsyncClient
    addresses: Path

    async def wave(
        self,
        kind: Kind,
        chance: random.Random,
        prompts: Sequence[str],
        *,
        killed_after: tuple[float, float] = KILLED_AFTER,
        sampling: dict[str, Any] | None = None,
    ) -> list[Stream]:
        """The streams of these prompts, read to their ends over one kill, and their results."""
        victim = chance.randrange(2)
        options = {"max_tokens": MAX_TOKENS, **(sampling or {})}

        async def submitted(prompt: str, pause_s: float) -> AsyncJob:
            await pass_time(pause_s)
            return await self.client.submit(prompt, sampling=options, stream=True)

        arrivals = [submitted(prompt, chance.uniform(0, ARRIVE_WITHIN_S)) for prompt in prompts]
        streams = [
            Stream(prompt, job, victim if kind == "gateway" else n)
            for n, (prompt, job) in enumerate(zip(prompts, await asyncio.gather(*arrivals), strict=True))
        ]
        point = max(1, round(chance.uniform(*killed_after) * len(prompts)))
        reached = asyncio.Event()

        def heard() -> None:
            if sum(len(stream.events) for stream in streams) >= point:
                reached.set()

        self.publish_addresses()
        client = Client(self.addresses, streams, heard)
        reading = asyncio.create_task(client.read())
        try:
            async with asyncio.timeout(PATIENCE_S):
                arrived = asyncio.create_task(reached.wait())
                await asyncio.wait([reading, arrived], return_when=asyncio.FIRST_COMPLETED)
                arrived.cancel()
                for stream in streams:
                    stream.seen, stream.was_killed = len(stream.events), not stream.ended
                if kind == "client":
                    client.kill()
                    assert await reading in (-signal.SIGKILL, 0)  # 0: all had ended, and none counts
                    reading = asyncio.create_task(client.read())
                elif kind == "gateway":
                    await self.gateways[victim].kill()
                    await self.gateways[victim].start()
                    self.publish_addresses()
                else:
                    await self.replace(chance.choice([[0], [1], [0, 1]]))
                assert await reading == 0, "the client got an answer that no reader should get"
        finally:
            client.kill()
            await reading
        for stream in streams:
            stream.stored = (await stream.job.result(timeout=PATIENCE_S)).text
            if kind == "worker":  # else the other one had it
                stream.was_killed = (await stream.job.status()).attempt > 1
        return streams

    async def replace(self, places: Sequence[int]) -> None:
        """Kill these workers and start them anew."""
        for place in places:
            self.workers[place].signal(signal.SIGKILL)
        for place in places:
            await self.workers[place].ended()
        await asyncio.gather(*(self.workers[place].start() for place in places))

    def publish_addresses(self) -> None:
        made = self.addresses.with_suffix(".new")
        made.write_text("\n".join(gateway.url for gateway in self.gateways))
        made.replace(self.addresses)


@contextlib.asynccontextmanager
async def fleet(backend: Backend) -> AsyncIterator[Fleet]:
    """Either worker has room for a whole wave, and both have started."""
    settings = backend.settings(
        engine={"time_scale": TIME_SCALE, "max_running": MOST_AT_ONCE}, worker={"flush_s": FLUSH_S, "stall_s": 60}
    )
    workers = [WorkerProcess(settings, backend.folder) for _ in range(2)]
    try:
        async with gateways(settings, backend.folder, 2) as doors, backend.client() as client:
            await asyncio.gather(*(worker.start() for worker in workers))
            yield Fleet(doors, workers, client, backend.folder / "addresses")
    finally:
        for worker in workers:
            if worker.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    worker.signal(signal.SIGKILL)
                await worker.ended()


def is_long(prompt: str) -> bool:
    return len(simulated_completion(prompt, MAX_TOKENS)[1]) >= LEAST_TOKENS

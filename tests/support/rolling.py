"""A fleet of processes that is restarted piece by piece, and its users meanwhile: test_rolling_restart.py.

The users do what a user does, with nothing of ours but what users have: a plain HTTP client, OpenAI's SDK as it is
by default, our clients for Python and gRPC. Each works without pause until it is told to stop; what goes wrong for
one of them is an error of the run.
"""

import asyncio
import contextlib
import itertools
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from codeyard.producer import AsyncClient
from codeyard.producer.rpc.client import RpcClient
from codeyard.shared.access.keys import Scope, make_key
from codeyard.shared.connect import open_keys
from codeyard.shared.settings import Settings
from codeyard.shared.topology import Topology
from codeyard.worker.engines.simulated import simulated_completion
from support.fleet import READY_S
from support.servers import free_port

MODEL = "starter"
MAX_TOKENS = 40
WAIT = {"Prefer": "wait=10"}
READINESS_S = 0.1  # between two looks of the balancer
PATIENCE_S = 60.0


@dataclass
class Part:
    """A gateway or a worker: a process that is told to stop and started again as it was."""

    words: tuple[str, ...]
    log: Path
    says: tuple[bytes, ...]  # the first words of the lines that say it serves
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as lines:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "codeyard.cli.main", *self.words),
                stdout=asyncio.subprocess.PIPE,
                stderr=lines,
            )
        assert self.process.stdout is not None
        async with asyncio.timeout(READY_S):
            for word in self.says:
                assert (await self.process.stdout.readline()).startswith(word), self.log.read_text()[-2_000:]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(READY_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode

    async def restart(self) -> int:
        """Its exit status."""
        status = await self.stop()
        await self.start()
        return status


class Balancer:
    """TCP in front of gateways: a new connection goes to the next one whose /readyz says yes, and stays there."""

    def __init__(self, ports: list[int], probes: list[int]) -> None:
        """`ports` to forward to; `probes` are where the same gateways answer HTTP."""
        self._ports, self._probes = ports, probes
        self._ready = set(ports)
        self._turns = itertools.cycle(ports)
        self._links: set[asyncio.Task[None]] = set()
        self.blind = 0  # connections tried while no gateway was ready
        self.port = 0

    @contextlib.asynccontextmanager
    async def balancing(self) -> AsyncIterator["Balancer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        pairs = zip(self._ports, self._probes, strict=True)
        looking = [asyncio.create_task(self._look(port, probe)) for port, probe in pairs]
        try:
            yield self
        finally:
            server.close()
            for task in (*looking, *self._links):
                task.cancel()
            await asyncio.gather(*looking, *self._links, return_exceptions=True)

    async def all_ready(self) -> None:
        """What a platform waits for before it stops the next one."""
        async with asyncio.timeout(PATIENCE_S):
            while self._ready != set(self._ports):  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(READINESS_S)

    async def _look(self, port: int, probe: int) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as http:  # slow is not away
            while True:
                try:
                    ready = (await http.get(f"http://127.0.0.1:{probe}/readyz")).status_code == 200
                except httpx.TransportError:
                    ready = False
                (self._ready.add if ready else self._ready.discard)(port)
                await asyncio.sleep(READINESS_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            up = await self._connected()
            if up is not None:
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(_pump(reader, up[1]))
                    pumps.create_task(_pump(up[0], writer))
        except* OSError:
            pass  # one side is gone; the other is closed below
        finally:
            self._links.discard(task)
            writer.close()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """One that is ready and accepts; then, as balancers do where none is ready, any that accepts."""
        for only_ready in (True, False):
            for _ in self._ports:
                port = next(self._turns)
                if port in self._ready or not only_ready:
                    self.blind += not only_ready
                    with contextlib.suppress(OSError):
                        return await asyncio.open_connection("127.0.0.1", port)
        return None


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    finally:
        writer.close()


@dataclass
class Yard:
    gateways: list[Part]
    workers: list[Part]
    url: str
    grpc: str
    key: str  # of the API, kept in the store as keys are
    settings: Settings
    fronts: tuple[Balancer, Balancer]  # of HTTP and of gRPC


@contextlib.asynccontextmanager
async def yard(settings: Settings, folder: Path, *, num_gateways: int, num_workers: int) -> AsyncIterator[Yard]:
    """A fleet, serving; killed at the end."""
    settings = settings.model_copy(update={"auth": settings.auth.model_copy(update={"mode": "on"})})
    config = folder / "yard.yaml"
    config.write_text(settings.model_dump_json())  # JSON is YAML
    common = ("--config", str(config), "--log-format", "json")
    http, grpc = ([free_port() for _ in range(num_gateways)] for _ in range(2))
    gateways = [
        Part(
            ("gateway", *common, "--port", str(port), "--grpc-port", str(rpc)),
            folder / f"gateway-{n}.log",
            (b"grpc ", b"gateway "),
        )
        for n, (port, rpc) in enumerate(zip(http, grpc, strict=True))
    ]
    workers = [Part(("worker", *common), folder / f"worker-{n}.log", (b"worker ",)) for n in range(num_workers)]
    try:
        await asyncio.gather(*(part.start() for part in (*gateways, *workers)))
        async with Balancer(http, http).balancing() as front, Balancer(grpc, http).balancing() as rpc_front:
            yield Yard(
                gateways,
                workers,
                url=f"http://127.0.0.1:{front.port}",
                grpc=f"ipv4:127.0.0.1:{rpc_front.port}",
                key=await _a_key(settings),
                settings=settings,
                fronts=(front, rpc_front),
            )
    finally:
        await asyncio.gather(*(part.stop(signal.SIGKILL) for part in (*gateways, *workers) if part.process is not None))


async def _a_key(settings: Settings) -> str:
    made = make_key("crowd", tenant="default", scopes=[Scope.SUBMIT, Scope.READ], now=time.time())
    keys = await open_keys(settings.store, Topology(settings.namespace))
    try:
        await keys.put([made.key])
    finally:
        await keys.close()
    return made.text


@dataclass
class Crowd:
    """All users at once. `errors` are what they saw; `ids` the jobs that were accepted, as far as users learn ids."""

    yard: Yard
    phase: str = "before"
    done: Counter[str] = field(default_factory=Counter)  # answers, by user
    by_phase: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    longest_s: dict[str, float] = field(default_factory=dict)  # one answer took, by phase
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def busy(self, users: dict[str, "User"], *, each: int) -> AsyncIterator["Crowd"]:
        """`each` of every kind of user, at work; at the end all finish what they have begun."""
        async with asyncio.TaskGroup() as tasks:
            for name, user in users.items():
                for _ in range(each):
                    tasks.create_task(self._work(name, user), name=name)
            try:
                yield self
            finally:
                self._stopping.set()

    async def goes_on(self, phase: str) -> None:
        """From now on it is this phase; return when each kind of user had two more answers and all is ready."""
        self.phase = phase
        before = Counter(self.done)
        for front in self.yard.fronts:
            await front.all_ready()
        async with asyncio.timeout(PATIENCE_S):
            while not self.errors and any(self.done[name] < before[name] + 2 for name in self.done):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def _work(self, name: str, user: "User") -> None:
        self.done[name] += 0
        async with contextlib.AsyncExitStack() as stack:
            ask = await user(self, stack)
            while not self._stopping.is_set():
                prompt, started_s, phase = f"def f{next(self._numbers)}(", time.monotonic(), self.phase
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        text = await ask(prompt)
                except Exception as error:  # whatever a user sees is a finding, of every kind
                    self.errors.append(f"{phase} -> {self.phase}: {name}: {error!r}"[:600])
                    return
                if text != simulated_completion(prompt, MAX_TOKENS)[0]:
                    self.errors.append(f"{phase} -> {self.phase}: {name}: another text: {text!r}"[:600])
                self.done[name] += 1
                self.by_phase[phase] += 1
                self.longest_s[phase] = max(self.longest_s.get(phase, 0.0), time.monotonic() - started_s)


Ask = Callable[[str], Awaitable[str]]
User = Callable[[Crowd, contextlib.AsyncExitStack], Awaitable[Ask]]


async def http_waiting(crowd: Crowd, stack: contextlib.AsyncExitStack) -> Ask:
    """Native routes: submit and wait; a wait that ends early is asked again, as its documentation says."""
    http = await stack.enter_async_context(_http(crowd))

    async def ask(prompt: str) -> str:
        answer = await http.post("/v1/jobs", json=_job(prompt), headers=WAIT)
        crowd.ids.append(_good(answer)["id"])
        while (status := _good(answer))["state"] not in ("succeeded", "failed", "cancelled", "expired"):
            answer = await http.get(f"/v1/jobs/{status['id']}", headers=WAIT)
        return str(status["result"]["text"])

    return ask


async def http_streaming(crowd: Crowd, stack: contextlib.AsyncExitStack) -> Ask:
    """Native event stream, read as an EventSource reads it: one that ends before `end` is gone on with from the
    last id."""
    http = await stack.enter_async_context(_http(crowd))

    async def ask(prompt: str) -> str:
        job_id = _good(await http.post("/v1/jobs", json={**_job(prompt), "stream": True}))["id"]
        crowd.ids.append(job_id)
        seqs: list[int] = []
        text, ended = "", False
        while not ended:
            headers = {"Last-Event-ID": str(seqs[-1])} if seqs else {}
            async with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
                assert answer.status_code == 200, (answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        event = json.loads(line[6:])
                        seqs.append(event["seq"])
                        text = "" if event["kind"] == "restarted" else text + event.get("text", "")
                        ended = event["kind"] == "end"
        assert seqs == list(range(1, len(seqs) + 1)), seqs
        return text

    return ask


async def openai_whole(crowd: Crowd, stack: contextlib.AsyncExitStack) -> Ask:
    """The SDK as it comes: it tries lost connections and 503s twice more, and knows no keys."""
    sdk = await stack.enter_async_context(openai.AsyncOpenAI(base_url=f"{crowd.yard.url}/v1", api_key=crowd.yard.key))

    async def ask(prompt: str) -> str:
        answer = await sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=MAX_TOKENS)
        return answer.choices[0].text

    return ask


async def openai_streaming(crowd: Crowd, stack: contextlib.AsyncExitStack) -> Ask:
    """A stream of completions cannot be resumed: the SDK shows whatever ends it early as an error."""
    sdk = await stack.enter_async_context(openai.AsyncOpenAI(base_url=f"{crowd.yard.url}/v1", api_key=crowd.yard.key))

    async def ask(prompt: str) -> str:
        stream = await sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=MAX_TOKENS, stream=True)
        pieces = [chunk async for chunk in stream if chunk.choices]
        assert pieces[-1].choices[0].finish_reason is not None, "half an answer"
        return "".join(chunk.choices[0].text for chunk in pieces)

    return ask


async def python_client(crowd: Crowd, stack: contextlib.AsyncExitStack) -> Ask:
    client = await stack.enter_async_context(AsyncClient(settings=crowd.yard.settings, timeout_s=30))

    async def ask(prompt: str) -> str:
        job = await client.submit(prompt, model=MODEL, sampling={"max_tokens": MAX_TOKENS})
        crowd.ids.append(job.id)
        return (await job.result(timeout=60)).text

    return ask


async def grpc_client(crowd: Crowd, stack: contextlib.AsyncExitStack) -> Ask:
    client = await stack.enter_async_context(RpcClient(crowd.yard.grpc, credential=crowd.yard.key, timeout_s=30))

    async def ask(prompt: str) -> str:
        job = await client.submit(prompt, model=MODEL, sampling={"max_tokens": MAX_TOKENS}, stream=True)
        crowd.ids.append(job.id)
        events = [event async for event in client.stream(job.id)]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        return "".join(event.text for event in events)

    return ask


USERS: dict[str, User] = {
    "HTTP, waiting": http_waiting,
    "HTTP, streaming": http_streaming,
    "OpenAI's SDK": openai_whole,
    "OpenAI's SDK, streaming": openai_streaming,
    "Python client": python_client,
    "gRPC client": grpc_client,
}


def _http(crowd: Crowd) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {crowd.yard.key}"}
    return httpx.AsyncClient(base_url=crowd.yard.url, headers=headers, timeout=60, trust_env=False)


def _job(prompt: str) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "sampling": {"max_tokens": MAX_TOKENS}}


def _good(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code in (200, 202), (answer.status_code, answer.text)
    document: dict[str, Any] = answer.json()
    return document

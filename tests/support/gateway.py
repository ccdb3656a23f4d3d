"""A running gateway over real HTTP, and the worker's side of it: jobs are driven through the store port."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aio_pika
import httpx

from codeyard.producer.gateway.serve import run_gateway
from codeyard.shared.alias import Alias
from codeyard.shared.broker.port import Broker
from codeyard.shared.connect import open_broker, open_store
from codeyard.shared.job import Lane
from codeyard.shared.record import Event, EventKind, Result, State, Usage
from codeyard.shared.settings import BrokerSettings, GatewaySettings, Settings, StoreSettings
from codeyard.shared.store.port import Append, AppendVerdict, Claim, ClaimVerdict, Commit, CommitVerdict, Store
from codeyard.shared.topology import DELAY_STEPS_S, Topology

MODEL = "tiny"
REVISION = "tiny-1"
PATIENCE_S = 15.0  # for what must happen; reached only by a failing test


@dataclass(slots=True)
class Running:
    """A job that this test owns as a worker would."""

    store: Store
    job_id: str
    fence: str
    publication: str
    last_seq: int = 0
    text: str = ""

    async def says(self, *pieces: str) -> None:
        events = [
            Event(seq=self.last_seq + n, kind=EventKind.TOKENS, text=piece, token_ids=(n,))
            for n, piece in enumerate(pieces, start=1)
        ]
        [verdict] = await self.store.append([Append(self.job_id, self.fence, events)])
        assert verdict is AppendVerdict.APPENDED
        self.last_seq += len(pieces)
        self.text += "".join(pieces)

    async def succeeds(self) -> None:
        result = Result(
            state=State.SUCCEEDED,
            text=self.text,
            finish_reason="stop",
            usage=Usage(prompt_tokens=3, completion_tokens=self.last_seq),
            engine="test",
        )
        [committed] = await self.store.commit([Commit(self.job_id, self.fence, self.publication, result)])
        assert committed.verdict is CommitVerdict.COMMITTED
        self.last_seq += 1


@dataclass(slots=True)
class GatewayUnderTest:
    url: str
    settings: Settings
    http: httpx.AsyncClient
    broker: Broker
    store: Store
    stop: asyncio.Event
    ended: asyncio.Task[None]
    grpc: str  # its address; "" where it is off

    async def submit(self, key: str | None = None, *, prompt: str = "def f(", **fields: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        return await self.http.post("/v1/jobs", json={"model": MODEL, "prompt": prompt, **fields}, headers=headers)

    async def claimed(self, job_id: str) -> Running:
        [record] = await self.store.read([job_id])
        assert record is not None
        claim = Claim(record.job, record.digest, record.publication, "worker-under-test", record.incarnation)
        [claimed] = await self.store.claim([claim])
        assert claimed.verdict is ClaimVerdict.RUN
        return Running(self.store, job_id, claimed.fence, record.publication, claimed.last_seq)

    async def submit_and_claim(self, key: str | None = None) -> Running:
        return await self.claimed((await self.submit(key)).json()["id"])

    async def finished(self, *pieces: str, key: str | None = None) -> Running:
        job = await self.submit_and_claim(key)
        await job.says(*pieces)
        await job.succeeds()
        return job

    async def depth(self, lane: Lane) -> int:
        [depth] = await self.broker.depth([Topology(self.settings.namespace).job_queue(REVISION, lane)])
        return depth

    async def metric(self, line: str) -> float:
        """The value of one series, e.g. `codeyard_streams_open`; 0 if it is not there."""
        for found in (await self.http.get("/metrics")).text.splitlines():
            if found.startswith(f"{line} "):
                return float(found.rsplit(" ", 1)[1])
        return 0.0


@contextlib.asynccontextmanager
async def working(gateway: GatewayUnderTest, *pieces: str) -> AsyncIterator[None]:
    """A worker that answers every job with these pieces."""
    topology = Topology(gateway.settings.namespace)
    consumer = await gateway.broker.consume({topology.job_queue(REVISION, lane): 8 for lane in Lane})

    async def work() -> None:
        while True:
            deliveries = await consumer.receive(8)
            for delivery in deliveries:
                job = await gateway.claimed(delivery.message_id)
                await job.says(*pieces)
                await job.succeeds()
            await consumer.ack(deliveries)

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await consumer.close()


def settings_for(broker_url: str, store_url: str, namespace: str, **gateway: Any) -> Settings:
    """A long lease: the test is the worker, and renews nothing."""
    return Settings(
        namespace=namespace,
        broker=BrokerSettings(url=broker_url, publish_timeout_s=5, queue_max_length=10_000),
        store=StoreSettings(url=store_url, lease_s=120),
        gateway=GatewaySettings(port=0, **gateway),
    )


@contextlib.asynccontextmanager
async def declared(settings: Settings) -> AsyncIterator[tuple[Broker, Store]]:
    """What a worker would have done at its start: queues for MODEL, and its alias."""
    topology = Topology(settings.namespace)
    async with contextlib.AsyncExitStack() as stack:
        broker = await open_broker(settings.broker, topology)
        stack.push_async_callback(broker.close)
        store = await open_store(settings.store, topology)
        stack.push_async_callback(store.close)
        queues = [topology.job_queue(REVISION, lane) for lane in Lane]
        await broker.declare(queues)
        await store.swap_alias(None, Alias(MODEL, REVISION))
        try:
            yield broker, store
        finally:
            if settings.broker.url.startswith("amqp"):
                await _delete_from_rabbitmq(settings.broker.url, topology, queues)


async def _delete_from_rabbitmq(url: str, topology: Topology, queues: Sequence[str]) -> None:
    """The server may be somebody's, named for the tests: leave it as it was."""
    delays = [topology.delay_queue(step) for step in DELAY_STEPS_S]
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        for queue in (*queues, topology.dead_queue, topology.dropped_queue, *delays):
            await channel.queue_delete(queue)
        for exchange in (topology.jobs_exchange, topology.dropped_queue, *delays):
            await channel.exchange_delete(exchange)


@contextlib.asynccontextmanager
async def gateway_running(settings: Settings) -> AsyncIterator[GatewayUnderTest]:
    """The gateway in this process, over real sockets, with a store and a broker of the test's own beside it."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    grpc = [""]
    async with declared(settings) as (broker, store):
        serving = asyncio.create_task(run_gateway(settings, stop, on_ready=ready.set_result, on_grpc=grpc.append))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.wait([serving, ready], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            async with httpx.AsyncClient(base_url=ready.result(), timeout=PATIENCE_S, trust_env=False) as http:
                yield GatewayUnderTest(ready.result(), settings, http, broker, store, stop, serving, grpc[-1])
        finally:
            stop.set()
            async with asyncio.timeout(PATIENCE_S):
                await serving


@dataclass(frozen=True, slots=True)
class Frame:
    """One server-sent event as a reader gets it."""

    id: str
    event: str
    data: str


async def frames(response: httpx.Response) -> AsyncIterator[Frame]:
    """A minimal reader of the event stream format: fields, blank line, comments skipped."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if not line:
            if "event" in fields:
                yield Frame(fields.get("id", ""), fields["event"], fields["data"])
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


async def next_frames(source: AsyncIterator[Frame], count: int) -> Sequence[Frame]:
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(source) for _ in range(count)]

"""What somebody else's server can do to a delivery, and what it cannot do to the gateway."""

import asyncio
import inspect
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from support.store_calls import commit_of, make_job, run_jobs

from codeyard.producer.webhooks.delivery import Deliverer
from codeyard.producer.webhooks.policy import Policy
from codeyard.producer.webhooks.sending import Answer, Fate, Sender
from codeyard.shared.job import Job
from codeyard.shared.record import Callback
from codeyard.shared.settings import StoreSettings, WebhookSettings
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.telemetry import Metrics
from codeyard.shared.topology import Topology

URL = "https://hooks.example.com/jobs"
SETTINGS = WebhookSettings(
    allowed_hosts=("hooks.example.com",),
    secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    delays_s=(0.0, 0.0),
    in_flight=4,
)
PATIENCE_S = 15.0

RAISED = sorted(
    {
        kind
        for _, kind in inspect.getmembers(httpx, inspect.isclass)
        if issubclass(kind, Exception) and kind not in {httpx.CookieConflict, httpx.HTTPStatusError}  # the client's own
    },
    key=lambda kind: kind.__name__,
)


async def public(host: str, port: int) -> list[str]:
    return ["93.184.216.34"]


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
async def test_whatever_the_http_library_raises_is_a_delivery_that_failed(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of a library that nobody catches would end the gateway."""

    async def broken(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        raise kind("so") if len(inspect.signature(kind).parameters) else kind()

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", broken)

    answer = await Sender(Policy(SETTINGS), timeout_s=5.0, resolve=public).send(URL, {}, b"{}")

    assert answer.fate is Fate.FAILED


async def test_the_next_address_is_tried_where_the_first_takes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name often has an IPv6 address that leads nowhere from here."""
    asked = []

    async def first_refuses(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if len(asked) == 1:
            raise httpx.ConnectError("refused")
        return httpx.Response(204, stream=httpx.ByteStream(b""))

    async def two(host: str, port: int) -> list[str]:
        return ["2606:2800:220:1:248:1893:25c8:1946", "93.184.216.34"]

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", first_refuses)

    answer = await Sender(Policy(SETTINGS), timeout_s=5.0, resolve=two).send(URL, {}, b"{}")

    assert (answer.fate, asked) == (Fate.ARRIVED, ["2606:2800:220:1:248:1893:25c8:1946", "93.184.216.34"])


class Stub(Sender):
    """Counts, and does what a test says."""

    def __init__(self, *answers: Answer | Exception) -> None:
        super().__init__(Policy(SETTINGS), timeout_s=5.0, resolve=public)
        self._answers = list(answers)
        self.sent = 0
        self.at_once = 0
        self.most_at_once = 0
        self.full = asyncio.Event()  # as many as may be under way are
        self.let_go = asyncio.Event()
        self.let_go.set()

    async def send(self, url: str, headers: object, body: bytes) -> Answer:
        self.sent += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.at_once == SETTINGS.in_flight:
            self.full.set()
        try:
            await self.let_go.wait()
        finally:
            self.at_once -= 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def ended(store: SqliteStore, count: int) -> list[Job]:
    jobs = [make_job(callback_url=URL) for _ in range(count)]
    claims = await run_jobs(store, *jobs)
    await store.commit([commit_of(job, claimed) for job, claimed in zip(jobs, claims, strict=True)])
    return jobs


async def comes_to(store: SqliteStore, jobs: list[Job], state: Callback) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while any(record is None or record.callback is not state for record in await store.read([j.id for j in jobs])):
            pass


async def store_in(folder: Path) -> SqliteStore:
    return await SqliteStore.open(StoreSettings(url=f"sqlite:///{folder / 'yard.db'}"), Topology("webhooks"))


async def test_an_error_that_nobody_thought_of_is_tried_again_and_ends_nothing(tmp_path: Path) -> None:
    """The deliverer is a task of the gateway: if it fails, so does everything."""
    store, stop = await store_in(tmp_path), asyncio.Event()
    sender = Stub(ValueError("of a new kind"), Answer(Fate.ARRIVED))
    deliverer = Deliverer(store, SETTINGS, sender, Metrics(CollectorRegistry()), period_s=0.01)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliverer.run(stop))
            await comes_to(store, await ended(store, 1), Callback.DELIVERED)
            stop.set()
    finally:
        await store.close()

    assert sender.sent == 2


async def test_no_more_than_so_many_requests_are_under_way_and_all_are_told(tmp_path: Path) -> None:
    """Receivers that hang must not take all connections of the gateway."""
    store, stop = await store_in(tmp_path), asyncio.Event()
    sender = Stub(Answer(Fate.ARRIVED))
    deliverer = Deliverer(store, SETTINGS, sender, Metrics(CollectorRegistry()), period_s=0.01)
    try:
        jobs = await ended(store, 30)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliverer.run(stop))
            await comes_to(store, jobs, Callback.DELIVERED)
            stop.set()
    finally:
        await store.close()

    assert sender.sent == 30
    assert sender.most_at_once <= SETTINGS.in_flight


async def test_a_stop_lets_what_is_under_way_end_and_takes_no_more(tmp_path: Path) -> None:
    """A request that was cut may have arrived: the receiver would have it twice for nothing."""
    store, stop = await store_in(tmp_path), asyncio.Event()
    sender = Stub(Answer(Fate.ARRIVED))
    sender.let_go.clear()
    deliverer = Deliverer(store, SETTINGS, sender, Metrics(CollectorRegistry()), period_s=0.01)
    try:
        jobs = await ended(store, SETTINGS.in_flight + 3)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliverer.run(stop))
            async with asyncio.timeout(PATIENCE_S):
                await sender.full.wait()
            stop.set()
            sender.let_go.set()
        states = [record.callback for record in await store.read([job.id for job in jobs]) if record]
    finally:
        await store.close()

    assert sender.sent == SETTINGS.in_flight
    assert sorted(states) == [Callback.DELIVERED] * SETTINGS.in_flight + [Callback.DUE] * 3

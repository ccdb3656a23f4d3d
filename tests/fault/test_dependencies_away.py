"""A broker or store that is away, in every way a network has, at every moment of a job's life.

The whole fleet is in this process: a worker, a gateway and the clients, all of which reach RabbitMQ and Redis by way
of a proxy. So the event loop can be looked at, too: what was lost leaves no task behind.
"""

import asyncio
import functools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.doors import DOORS, MAX_TOKENS, Doors, Told, gateway_front, open_doors
from support.fleet import fleet_settings, worker_task
from support.proxy import Away, TcpProxy, gaps_s

from codeyard.producer.submission import Submitter
from codeyard.shared.broker.backoff import LONGEST_S
from codeyard.shared.connect import open_broker, open_store
from codeyard.shared.errors import FleetError, StoreUnavailable
from codeyard.shared.job import JobId, Lane, new_job_id
from codeyard.shared.record import EventKind, State
from codeyard.shared.settings import BrokerSettings, Settings, StoreSettings
from codeyard.shared.topology import Topology
from codeyard.worker.engines.simulated import simulated_completion
from codeyard.worker.runner import Runner
from codeyard.worker.settler import Settler
from codeyard.worker.simulation.virtual_time import pass_time

pytestmark = pytest.mark.services

HASTY_S = 1.0  # what a caller in a hurry gives
GRACE_S = 6.0  # on top, on a machine where everything runs at once
PATIENCE_S = 60.0  # for what must happen; reached only by a failing test
NUM_JOBS = 12
LONG_TOKENS = 120
MOMENTS: dict[str, tuple[type, str]] = {
    "submitting": (Submitter, "_publish"),  # reserved, not yet at the broker
    "generating": (Runner, "_on_delta"),
    "settling": (Settler, "_finish"),  # the results are made, none is committed
}
SERVERS = ("broker", "store")
SHORT_S, LONG_S = 2.5, 60.0
AWAY_S = 4.0  # some six tries
AT_FIRST_USE = Counter({"Channel._reader": 4})  # to publish and to ask on: of the worker and of the gateway
IN_CI = [("broker", Away.STALLED, "generating", SHORT_S)]  # a full store: test_backpressure.py
AFTER_EACH_OTHER = [
    pytest.param(server, away, moment, SHORT_S, marks=pytest.mark.long)
    for server in SERVERS
    for away in Away
    for moment in ("idle", *MOMENTS)
    if (server, away, moment, SHORT_S) not in IN_CI
]
A_MINUTE = [
    pytest.param(server, away, "generating", LONG_S, marks=pytest.mark.long) for server in SERVERS for away in Away
]


@dataclass
class Yard:
    settings: Settings
    hasty: Doors
    patient: Doors
    proxies: dict[str, TcpProxy]
    accepted: dict[JobId, str] = field(default_factory=dict)  # prompt of each

    async def submit(self, number: int) -> JobId:
        """One of the flow; as the errors say, again with the same key, until it is accepted."""
        prompt, stream = f"def flow_{number}():", number % 3 == 0
        async with asyncio.timeout(PATIENCE_S + LONG_S):
            while True:
                try:
                    job = await self.hasty.client.submit(
                        prompt,
                        idempotency_key=f"flow-{number}",
                        stream=stream,
                        sampling={"max_tokens": LONG_TOKENS},
                    )
                except FleetError:
                    await pass_time(0.1)
                else:
                    self.accepted[job.id] = simulated_completion(prompt, LONG_TOKENS)[0]
                    return job.id

    async def asked(self, name: str) -> dict[str, JobId | Told]:
        """What each door says to a caller in a hurry, within the time it was given."""

        async def ask(door: str) -> JobId | Told:
            async with asyncio.timeout(HASTY_S + GRACE_S):
                return await self.hasty.ask(door, prompt_of(name, door), f"{name}-{door}")

        return dict(zip(DOORS, await asyncio.gather(*map(ask, DOORS)), strict=True))

    async def insisted(self, name: str) -> None:
        """A job through each door, for callers with time."""

        async def insist(door: str) -> None:
            prompt = prompt_of(name, door)
            job_id = await self.patient.insist(door, prompt, f"{name}-{door}")
            self.accepted[job_id] = simulated_completion(prompt, MAX_TOKENS)[0]

        await asyncio.gather(*map(insist, DOORS))

    async def ended(self) -> set[str | None]:
        """Every accepted job has ended, once and with its result, and there are no others. Who ran them."""
        client = self.hasty.client
        for job_id, text in self.accepted.items():
            result = await client.result(job_id, timeout=PATIENCE_S)
            events = await client.store.events(job_id, after=0)
            assert (result.state, result.text) == (State.SUCCEEDED, text)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            assert [event.kind for event in events].count(EventKind.END) == 1
        assert {status.id for status in await client.recent(1_000)} == set(self.accepted)
        return {record.owner for record in await client.store.read(list(self.accepted)) if record is not None}


@asynccontextmanager
async def yard(folder: Path, broker_url: str, store_url: str, namespace: str, away_s: float) -> AsyncIterator[Yard]:
    async with TcpProxy.to(broker_url) as to_broker, TcpProxy.to(store_url) as to_store:
        settings = fleet_settings(
            folder,
            to_broker.url(broker_url),
            to_store.url(store_url),
            namespace,
            broker={"url": to_broker.url(broker_url), "publish_timeout_s": HASTY_S, "heartbeat_s": 2},
            store={"timeout_s": 1.0, "unpublished_s": 180.0},  # who waits longer than this is given up
            worker={"stall_s": 120},
            engine={"time_scale": 1.0},
            gateway={"submit_timeout_s": HASTY_S},
        )
        async with (
            worker_task(settings),
            gateway_front(settings) as (url, rpc),
            open_doors(settings, url, rpc, timeout_s=HASTY_S) as hasty,
            open_doors(settings, url, rpc, timeout_s=away_s + PATIENCE_S) as patient,
        ):
            yield Yard(settings, hasty, patient, {"broker": to_broker, "store": to_store})


@pytest.mark.parametrize("server,away,moment,away_s", [*IN_CI, *AFTER_EACH_OTHER, *A_MINUTE])
@pytest.mark.timeout(300)
# aiormq's, of a connection given up in the middle of its handshake
@pytest.mark.filterwarnings("ignore:Exception ignored in. <coroutine object Connection.close")
async def test_a_server_that_is_away_is_named_in_time_and_everything_goes_on_when_it_is_back(
    server: str,
    away: Away,
    moment: str,
    away_s: float,
    rabbitmq_url: str,
    redis_url: str,
    tmp_path: Path,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who is in a hurry hears which server it is, and when to come again; who has time waits; what was accepted ends
    once; nothing was restarted, and nothing hangs."""
    async with yard(tmp_path, rabbitmq_url, redis_url, namespace, away_s) as here:
        proxy, began = here.proxies[server], asyncio.Event()
        assert (await here.hasty.http.get("/readyz")).status_code == 200  # and the gateway has a connection to ask on
        await here.insisted("first")
        first = await here.ended()
        tasks, links = others(), here.proxies["broker"].links

        def begin() -> None:
            if not began.is_set():
                began.set()
                away.begin(proxy)

        if moment == "idle":
            begin()
        else:
            before(monkeypatch, *MOMENTS[moment], begin)
        async with asyncio.TaskGroup() as flow:
            done = next(iter(here.accepted))
            for number in range(NUM_JOBS):
                flow.create_task(here.submit(number))
            async with asyncio.timeout(PATIENCE_S):
                await began.wait()
            back_s = asyncio.get_running_loop().time() + away_s
            insisting = flow.create_task(here.insisted("waits"))
            reading = flow.create_task(here.patient.client.result(done, timeout=PATIENCE_S + LONG_S))
            told = await here.asked("hurries")
            await read_in_a_hurry(here.hasty, server, done)
            await pass_time(max(0.0, back_s - asyncio.get_running_loop().time()))
            let_in_early = insisting.done()
            away.end(proxy)
        await here.insisted("hurries")  # the same keys once more, as the errors say
        owners = await here.ended()

        for door, refusal in told.items():
            assert isinstance(refusal, Told), door
            assert refusal.kind == f"{server}-unavailable", (door, refusal)
            if refusal.status is not None:
                assert refusal.retry_after_s is not None, (door, refusal)
                assert refusal.retry_after_s >= 1
        assert not let_in_early
        assert reading.result().state is State.SUCCEEDED
        assert owners == first, "the worker was another one in between"
        await nothing_left(tasks, here.proxies["broker"], links)


async def read_in_a_hurry(doors: Doors, server: str, done: JobId) -> None:
    """A job that has ended can be read without a broker; without a store that is said in time, too."""
    if server == "broker":
        assert (await doors.http.get(f"/v1/jobs/{done}")).json()["state"] == "succeeded"
        assert (await asyncio.to_thread(doors.blocking.status, done)).state is State.SUCCEEDED
        return
    async with asyncio.timeout(HASTY_S + GRACE_S):
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(doors.blocking.result, done, HASTY_S)


def prompt_of(name: str, door: str) -> str:
    return f"def {name}_{door.replace(' ', '_')}():"


def others() -> Counter[str]:
    """What runs on this loop, by what it is. Not the proxies; nor what a store has for wake-ups, three tasks from the
    first time that somebody waits there."""
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]  # type: ignore[union-attr]  # a coroutine
    return Counter(name for name in names if not name.startswith(("TcpProxy", "Wakeups")))


async def nothing_left(tasks: Counter[str], proxy: TcpProxy, links: int) -> None:
    """No more tasks than before, no more connections to the broker; those to the store lie in a pool, which grows as
    it is needed. What is under way now may end first."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while others() - tasks - AT_FIRST_USE or proxy.links > links:
                await pass_time(0.05)
    except TimeoutError:
        pytest.fail(f"left: {others() - tasks - AT_FIRST_USE}; connections: {proxy.links}, before {links}")


def before(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, do: Callable[[], None]) -> None:
    """Do it before each call of this method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def hooked(*args: Any, **more: Any) -> Any:
        do()
        return original(*args, **more)

    monkeypatch.setattr(owner, name, hooked)


async def test_clients_that_were_cut_off_come_back_each_at_its_own_pace_and_ever_slower(
    rabbitmq_url: str, redis_url: str, namespace: str
) -> None:
    """A fleet that comes back to a restarted server all at once would bring it down again: pauses double, and a part
    of each is chance. Consumers at the broker, readers at the store; seen from the server's side."""
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(TcpProxy.to(url)) for url in (rabbitmq_url, redis_url) for _ in range(3)
        ]
        await declared(rabbitmq_url, namespace)
        for proxy in proxies[:3]:
            await consuming(stack, proxy.url(rabbitmq_url), namespace)
        for proxy in proxies[3:]:
            await watching(stack, proxy.url(redis_url), namespace)
        cut_s = asyncio.get_running_loop().time()
        for proxy in proxies:
            proxy.refuse()
        await pass_time(AWAY_S)
        pauses = [gaps_s(proxy, since_s=cut_s) for proxy in proxies]
        for proxy in proxies:
            opened = proxy.links_opened
            proxy.accept()
            await proxy.wait_links_opened(opened + 1)

    for one in pauses:
        assert 3 <= len(one) <= 10, f"{len(one)} tries within {AWAY_S:g} s"
        assert max(one[-2:]) > 2 * min(one), one
        assert max(one) < LONGEST_S + GRACE_S
    for several in (pauses[:3], pauses[3:]):
        fourth_s = [sum(one[:3]) for one in several]
        assert max(fourth_s) - min(fourth_s) > 0.02, "all at once"


async def declared(url: str, namespace: str) -> None:
    topology = Topology(namespace)
    broker = await open_broker(BrokerSettings(url=url), topology)
    await broker.declare([queue_of(topology)])
    await broker.close()


def queue_of(topology: Topology) -> str:
    return topology.job_queue("weights:1", Lane.BULK)


async def consuming(stack: AsyncExitStack, url: str, namespace: str) -> None:
    topology = Topology(namespace)
    broker = await open_broker(BrokerSettings(url=url), topology)
    stack.push_async_callback(broker.close)
    await broker.consume({queue_of(topology): 1})


async def watching(stack: AsyncExitStack, url: str, namespace: str) -> None:
    store = await open_store(StoreSettings(url=url), Topology(namespace))
    stack.push_async_callback(store.close)
    await stack.enter_async_context(store.watch(new_job_id()))

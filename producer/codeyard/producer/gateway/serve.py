"""The gateway process: connect, settle who may call, serve HTTP and gRPC, reconcile, drain.

    told to stop    /readyz says no and connections end with their next answer; all is served for `leave_s`
    then            no more connections; what its caller goes on with elsewhere ends: native streams and waits
    after drain_s   what is left ends too, and says so

Called by: the `codeyard gateway` and `codeyard up` commands.
"""

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import TypeVar, cast

import uvicorn
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from codeyard.producer.async_client import AsyncClient
from codeyard.producer.gateway.access import Access, check_mode, opened_access
from codeyard.producer.gateway.app import Probe, create_app
from codeyard.producer.gateway.batches.runner import run_batches
from codeyard.producer.gateway.fallback import GuardedJobs
from codeyard.producer.gateway.health import Breakers
from codeyard.producer.gateway.jobs import Jobs
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.gateway.surfaces import surfaces
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.producer.gateway.waiting import unless
from codeyard.producer.webhooks.delivery import Deliverer
from codeyard.producer.webhooks.policy import Policy
from codeyard.producer.webhooks.sending import Sender
from codeyard.shared.broker.port import Broker, Publisher
from codeyard.shared.connect import open_broker, open_documents, open_store
from codeyard.shared.errors import BrokerUnavailable, SettingsError, StoreUnavailable
from codeyard.shared.reconciler import Reconciled, run_reconciler
from codeyard.shared.settings import GatewaySettings, Settings, StoreSettings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics
from codeyard.shared.topology import Topology

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKLOG = 2_048  # connections not yet taken
KEEP_ALIVE_S = 75  # longer than proxies keep idle connections (nginx: 60 s), so that they close first
DRAIN_MARGIN_S = 2  # on top of the longest submission or answer, for requests under way when told to stop


async def run_gateway(
    settings: Settings,
    stop: asyncio.Event,
    *,
    on_ready: Callable[[str], None] = lambda _: None,
    on_grpc: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until `stop` is set. `on_ready` gets the URL once requests are answered; `on_grpc`, before that, the
    address of gRPC, where it is on.

    Waits for a broker or store that is not up yet. Raises SettingsError if the port cannot be had, or if it
    would listen beyond loopback without authentication.
    """
    loopback = is_loopback(settings.gateway.host, settings.gateway.port)
    check_mode(settings.auth, host=settings.gateway.host, loopback=loopback)
    metrics = Metrics()
    metrics.watch_process()
    metrics.watch_tasks(asyncio.get_running_loop())
    breakers = Breakers(settings.breaker, metrics)
    client = _client(settings, breakers)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        if await unless(_patiently(client.open), stop.wait()) is None:
            return

        async def enter() -> Access:
            opening = opened_access(
                settings,
                client.store,
                host=settings.gateway.host,
                loopback=loopback,
                guarded=breakers.following_store,
            )
            return await stack.enter_async_context(opening)

        async def shelve() -> Shelves:
            documents = await open_documents(settings.store, client.topology)
            stack.push_async_callback(documents.close)
            return Shelves(await client.blobs(), documents)

        access = await unless(_patiently(enter), stop.wait())
        shelves = await unless(_patiently(shelve), stop.wait())
        if access is not None and shelves is not None:
            jobs = GuardedJobs(client, breakers, client.store, settings.breaker, fallbacks=settings.gateway.fallbacks)
            stack.push_async_callback(jobs.close)
            await _serve(client, jobs, metrics, settings, access, shelves, stop, on_ready, on_grpc)


async def _serve(
    client: AsyncClient,
    jobs: Jobs,
    metrics: Metrics,
    everything: Settings,
    access: Access,
    shelves: Shelves,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
    on_grpc: Callable[[str], None],
) -> None:
    settings = everything.gateway
    broker = cast(Broker, client.publisher)  # a client's own way of opening one gives the whole port
    policy = Policy(everything.webhook)
    stopping, closing = asyncio.Event(), asyncio.Event()
    kit = Kit(
        settings,
        metrics,
        stopping,
        client.store,
        callbacks=policy,
        shelves=shelves,
        leaving=stop,
        closing=closing,
    )
    probes: dict[str, Probe] = {"broker": broker.ping, "store": client.store.ping}
    app = create_app(
        jobs,
        kit,
        auth=access.auth,
        limits=access.limits,
        surfaces=surfaces(kit),
        open_metrics=everything.auth.open_metrics,
        probes=probes,
    )

    def jobs_of(tenant: str) -> TenantJobs:
        return TenantJobs(jobs, tenant, access.limits)

    with listen(settings.host, settings.port) as listener:
        url = _url(listener)

        def ready() -> None:
            log.info("gateway_ready", extra={"url": url})
            on_ready(url)

        server = _Server(app, settings, ready, stopping=stopping, closing=closing)
        async with _grpc(jobs, kit, access, probes, listener) as address, asyncio.TaskGroup() as tasks:
            if address is not None:
                on_grpc(address)
            tasks.create_task(
                run_reconciler(broker, client.store, client.topology, stop, on_done=_counted(metrics)),
                name="reconciler",
            )
            if everything.webhook.allowed_hosts:
                sender = Sender(policy, timeout_s=everything.webhook.timeout_s)
                deliverer = Deliverer(client.store, everything.webhook, sender, metrics)
                tasks.create_task(deliverer.run(stop), name="webhooks")
            if access.key_set is not None:
                tasks.create_task(access.key_set.run(stop), name="key set")
            tasks.create_task(run_batches(shelves, client.store, jobs_of, settings, metrics, stop), name="batches")
            tasks.create_task(server.stop_when(stop), name="stop")
            await server.serve(sockets=[listener])
    log.info("gateway_stopped", extra={"url": url})


def _grpc(
    jobs: Jobs, kit: Kit, access: Access, probes: dict[str, Probe], beside: socket.socket
) -> contextlib.AbstractAsyncContextManager[str | None]:
    """The address of gRPC, None where it is off. Imported here: the gateway does without it. It listens where
    `beside` does: a name may stand for more addresses than the one that was found to be loopback."""
    if (port := kit.settings.grpc_port) is None:
        return contextlib.nullcontext()
    try:
        from codeyard.producer.rpc.serving import serving
    except ImportError as error:
        raise SettingsError(f"gateway.grpc_port is set: pip install 'codeyard[grpc]' ({error})") from None
    return serving(jobs, kit, auth=access.auth, limits=access.limits, probes=probes, host=kit.settings.host, port=port)


def _client(settings: Settings, breakers: Breakers) -> AsyncClient:
    """Its broker and its store behind their breakers."""

    async def publisher(settings: Settings, topology: Topology) -> Publisher:
        return breakers.guarded_broker(await open_broker(settings.broker, topology))

    async def store(settings: StoreSettings, topology: Topology) -> Store:
        return breakers.guarded_store(await open_store(settings, topology))

    return AsyncClient(
        settings=settings,
        timeout_s=settings.gateway.submit_timeout_s,
        open_publisher=publisher,
        open_store=store,
    )


class _Server(uvicorn.Server):
    """uvicorn, told by an event when to stop: signals are the command's to handle."""

    def __init__(
        self,
        app: object,
        settings: GatewaySettings,
        ready: Callable[[], None],
        *,
        stopping: asyncio.Event,
        closing: asyncio.Event,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]  # FastAPI is an ASGI application; uvicorn's own type is narrower
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(max(settings.submit_timeout_s, settings.drain_s)) + DRAIN_MARGIN_S,
            )
        )
        self._leave_s, self._drain_s = settings.leave_s, settings.drain_s
        self._ready, self._stopping, self._closing = ready, stopping, closing

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def stop_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        await asyncio.sleep(self._leave_s)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        # Soon: after uvicorn has told every connection to end with its answer. A stream that ended before would leave
        # a connection that looks idle, to be closed under the reader who resumes on it.
        loop.call_soon(self._stopping.set)
        ending = loop.call_later(self._drain_s, self._closing.set)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Wait for servers that are not up yet, as in a fleet that starts all at once."""
    retrying = AsyncRetrying(
        retry=retry_if_exception_type((BrokerUnavailable, StoreUnavailable)),
        wait=wait_random_exponential(multiplier=0.2, max=5.0),
        before_sleep=_say_away,
        reraise=True,
    )
    return await retrying(attempt)


def _say_away(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("server_away", extra={"error": str(error), "attempt": state.attempt_number})


def _counted(metrics: Metrics) -> Callable[[Reconciled], None]:
    def count(done: Reconciled) -> None:
        metrics.reconciled.labels(outcome="expired").inc(done.expired)
        metrics.reconciled.labels(outcome="republished").inc(done.republished)
        metrics.reconciled.labels(outcome="left").inc(done.looked_at - done.expired - done.republished)

    return count


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises SettingsError if the address cannot be had."""
    try:
        family, address = _address(host, port)
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # a name's: negative
        raise SettingsError(
            f"cannot listen on {host}:{port}: {reason}; choose another with --port (0: any free one)"
        ) from None
    # Inherited by every connection. asyncio sets it only on sockets made with IPPROTO_TCP by name, and without
    # it an answer in two writes waits 40 ms for the caller's delayed ack.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str, port: int) -> bool:
    """Whether `listen` would take connections from this machine only."""
    try:
        _, address = _address(host, port)
    except OSError:
        return False  # `listen` will say why
    return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The first that the name stands for. Raises OSError."""
    [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return family, (str(address[0]), int(address[1]))

"""The gateway process: connect, serve HTTP, reconcile, drain.

SIGTERM or SIGINT: take no more connections, end event streams so that readers resume elsewhere, let
requests finish. Called by: the `codeyard gateway` and `codeyard up` commands.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from codeyard.producer.async_client import AsyncClient
from codeyard.producer.gateway.app import create_app
from codeyard.shared.connect import open_broker
from codeyard.shared.errors import BrokerUnavailable, SettingsError, StoreUnavailable
from codeyard.shared.reconciler import Reconciled, run_reconciler
from codeyard.shared.settings import Settings
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

DRAIN_S = 15  # for requests under way when the process is told to stop


async def run_gateway(
    settings: Settings, stop: asyncio.Event, *, on_ready: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until `stop` is set. `on_ready` gets the URL. Raises SettingsError if the port is taken."""
    listener = _listen(settings.gateway.host, settings.gateway.port)
    host, port = listener.getsockname()[:2]
    url = f"http://{host}:{port}"
    if host not in ("127.0.0.1", "::1"):
        log.warning("gateway_without_auth", extra={"host": host, "hint": "put it behind a proxy that checks callers"})
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        client = AsyncClient(settings=settings, timeout_s=settings.gateway.submit_timeout_s)
        await _open(client)
        stack.push_async_callback(client.close)
        broker = await open_broker(settings.broker, client.topology)
        stack.push_async_callback(broker.close)
        app = create_app(client, settings.gateway, metrics, stop)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=DRAIN_S, lifespan="off"
        )
        server = _Server(config)

        def count(done: Reconciled) -> None:
            metrics.reconciled.labels(outcome="expired").inc(done.expired)
            metrics.reconciled.labels(outcome="republished").inc(done.republished)

        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(sockets=[listener]), name="http")
            tasks.create_task(
                run_reconciler(broker, client.store, client.topology, stop, on_done=count), name="reconciler"
            )
            log.info("gateway_ready", extra={"url": url})
            on_ready(url)
            await stop.wait()
            server.should_exit = True
            await serving
    log.info("gateway_stopped", extra={"url": url})


class _Server(uvicorn.Server):
    """Signals are the command's to handle: it stops gateway and worker together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _open(client: AsyncClient) -> None:
    """Wait for servers that are not up yet, as in a fleet that starts all at once."""
    retrying = AsyncRetrying(
        retry=retry_if_exception_type((BrokerUnavailable, StoreUnavailable)),
        wait=wait_random_exponential(multiplier=0.2, max=5.0),
        before_sleep=lambda state: log.warning(
            "server_away", extra={"error": str(state.outcome.exception() if state.outcome else "")}
        ),
        reraise=True,
    )
    async for attempt in retrying:
        with attempt:
            await client.open()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), backlog=2_048, family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port (0: any free one)"
        ) from None

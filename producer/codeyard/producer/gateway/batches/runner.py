"""Batches that nobody works on find their gateway: here, among all there are.

A batch is a document with a lease and not a message at the broker: it takes hours, RabbitMQ takes a delivery back
after 30 minutes, and its progress has to be written down once a second anyway; that write renews the lease. Every
gateway looks once a second for documents whose lease is over, at once for those that were made here.
Called by: gateway.serve.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from codeyard.producer.gateway.batches.expansion import LEASE_S, Expansion
from codeyard.producer.gateway.batches.record import KINDS
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.documents.port import Document, Name
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.settings import GatewaySettings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

LOOK_S = 1.0
MOST = 16  # batches of one gateway at once; the others wait, or find another gateway

JobsOf = Callable[[str], TenantJobs]


async def run_batches(
    shelves: Shelves,
    store: Store,
    jobs_of: JobsOf,
    settings: GatewaySettings,
    metrics: Metrics,
    stop: asyncio.Event,
) -> None:
    """Until `stop` is set; what is under way then goes on with the next gateway, at once."""
    owner = f"{socket.gethostname()}:{os.getpid()}:{new_nonce()[:8]}"
    at_work: set[Name] = set()

    async def work(document: Document) -> None:
        try:
            await Expansion(
                document,
                owner,
                shelves,
                store,
                jobs_of(document.name.tenant),
                in_flight=settings.batch_in_flight,
                most_line_bytes=settings.max_body_bytes,
                metrics=metrics,
                stop=stop,
            ).run()
        except Exception:
            # The edge of a batch: a bug in one must not end the gateway. Its lease ends; another look takes it again.
            log.exception("batch_failed", extra={"batch": document.name.id})
        finally:
            at_work.discard(document.name)
            metrics.batches_owned.set(len(at_work))

    async with asyncio.TaskGroup() as tasks:
        while not stop.is_set():
            shelves.new_batch.clear()
            try:
                for name in await _lapsed(shelves):
                    if name in at_work or len(at_work) >= MOST:
                        continue
                    document = await shelves.documents.take(name, owner, lease_s=LEASE_S)
                    if document is not None:
                        at_work.add(name)
                        metrics.batches_owned.set(len(at_work))
                        tasks.create_task(work(document), name=f"batch {name.id}")
            except StoreUnavailable as error:
                log.warning("batches_not_seen", extra={"error": str(error)})
            await _pause(shelves.new_batch, stop)


async def _lapsed(shelves: Shelves) -> list[Name]:
    return [name for kind in KINDS.values() for name in await shelves.documents.lapsed(kind, limit=4 * MOST)]


async def _pause(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

"""Tell callers of their jobs' ends, from the store's outbox, until they took it or the schedule is over.

Any number of gateways may deliver at once: the store lets one take each entry, for a lease that is longer than a
request may last. One that dies is followed by another, so a receiver may get a message twice, with the same
`webhook-id`. A store that is away is only logged: the next look follows. Called by: gateway.serve.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable

from codeyard.producer.webhooks.sending import Answer, Fate, Sender
from codeyard.producer.webhooks.signing import body_of, signed_headers
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.record import Record
from codeyard.shared.settings import WebhookSettings
from codeyard.shared.store.port import CallbackOutcome, NoteCallback, Store, TakeCallback
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

PERIOD_S = 1.0  # between looks when nothing is due, jittered by half
LEASE_MARGIN_S = 30.0  # on top of a request's own time: for the store to be asked before and after


class Deliverer:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        settings: WebhookSettings,
        sender: Sender,
        metrics: Metrics,
        *,
        wall: Callable[[], float] = time.time,
        period_s: float = PERIOD_S,
    ) -> None:
        self._store = store
        self._settings = settings
        self._sender = sender
        self._count = metrics.webhooks
        self._wall = wall
        self._period_s = period_s
        self._free = settings.in_flight
        self._freed = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; requests under way end first, which takes no longer than one may."""
        async with asyncio.TaskGroup() as tasks:
            while not stop.is_set():
                taken: list[Record] = []
                if self._free:
                    try:
                        taken = await self._take(self._free)
                    except StoreUnavailable as error:
                        log.warning("webhooks_not_looked_up", extra={"error": str(error)})
                for record in taken:
                    self._free -= 1
                    tasks.create_task(self._deliver(record), name=f"webhook {record.id}")
                if not taken:
                    await self._pause(stop)

    async def _take(self, most: int) -> list[Record]:
        due = await self._store.callbacks_due(most)
        if not due:
            return []
        lease_s = self._settings.timeout_s + LEASE_MARGIN_S
        answers = await self._store.take_callbacks([TakeCallback(job_id, lease_s) for job_id in due])
        return [record for record in answers if record is not None]

    async def _deliver(self, record: Record) -> None:
        try:
            answer = await self._told(record)
            note = noted(record, answer, self._settings)
            self._count.labels(outcome=note.outcome.value).inc()
            _say(record, note, answer.reason)
            await self._store.note_callbacks([note])
        except StoreUnavailable as error:  # its lease runs out, and it is told again
            log.warning("webhook_not_noted", extra={"job": record.id, "error": str(error)})
        finally:
            self._free += 1
            self._freed.set()

    async def _told(self, record: Record) -> Answer:
        keys = self._settings.keys_of(record.job.tenant)
        if not keys:
            return Answer(Fate.HOPELESS, "no secret to sign with is configured for its tenant")
        body = body_of(record)
        headers = signed_headers(record, body, keys=keys, timestamp=int(self._wall()))
        try:
            return await self._sender.send(record.job.callback_url or "", headers, body)
        except Exception:
            # The edge of one delivery: whatever somebody else's server does, the gateway lives.
            log.exception("webhook_broke", extra={"job": record.id})
            return Answer(Fate.FAILED, "an error of ours; the log has it")

    async def _pause(self, stop: asyncio.Event) -> None:
        """Until it is time to look again, a slot is free where there was none, or `stop`."""
        self._freed.clear()
        waits = [asyncio.create_task(stop.wait()), asyncio.create_task(self._freed.wait())]
        try:
            timeout_s = self._period_s * random.uniform(0.5, 1.5)
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


def noted(record: Record, answer: Answer, settings: WebhookSettings) -> NoteCallback:
    """What becomes of a delivery: over, or tried again after the delay that its number has in the schedule."""
    outcome, delay_s = CallbackOutcome.GIVEN_UP, 0.0
    if answer.fate is Fate.ARRIVED:
        outcome = CallbackOutcome.DELIVERED
    elif answer.fate is Fate.FAILED and record.callback_attempts <= len(settings.delays_s):
        outcome, delay_s = CallbackOutcome.AGAIN, settings.delays_s[record.callback_attempts - 1]
    return NoteCallback(record.id, record.incarnation, record.callback_attempts, outcome, delay_s)


def _say(record: Record, note: NoteCallback, reason: str) -> None:
    """Never the URL: its path may be the receiver's secret."""
    about = {"job": record.id, "tenant": record.job.tenant, "attempt": note.attempt}
    if note.outcome is CallbackOutcome.DELIVERED:
        log.debug("webhook_delivered", extra=about)
    elif note.outcome is CallbackOutcome.AGAIN:
        log.info("webhook_failed", extra={**about, "reason": reason, "again_in_s": note.delay_s})
    else:
        log.warning("webhook_given_up", extra={**about, "reason": reason})

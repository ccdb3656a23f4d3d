"""Keep the leases of what this worker holds, from a thread of its own.

The thread has its own event loop and its own connection to the store, so that a busy event loop (a
long tokenisation, a slow JSON) costs no job its owner. A main loop that does not answer at all for
`stall_s` is taken for dead: renewing stops, and the jobs go to workers that live.
Where that is can be given (`Aside`): the tests' simulation has no threads.
Called by: worker.service. Does not know about: engines, deliveries.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from codeyard.shared.errors import FleetError, StoreUnavailable
from codeyard.shared.job import JobId
from codeyard.shared.store.port import Renewal, Store

log = logging.getLogger(__name__)

MAX_GROUP = 1_024  # renewals per round trip


class Aside(Protocol):
    """Where a program runs that the main event loop cannot hold up."""

    def start(self, program: Callable[[], Coroutine[Any, Any, None]]) -> None: ...

    async def ended(self) -> None:
        """Return when the program has."""


class OwnThread:
    """A daemon thread with an event loop of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None

    def start(self, program: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(program()), name=self._name, daemon=True)
        self._thread.start()

    async def ended(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)


class LeaseKeeper:
    """Renews every `renew_s` what `hold` was called for, until `drop`.

    `on_lost` and `on_cancel` are called in the main loop's thread, with a job id.
    """

    def __init__(
        self,
        open_store: Callable[[], Awaitable[Store]],
        *,
        renew_s: float,
        stall_s: float,
        on_lost: Callable[[JobId], None],
        on_cancel: Callable[[JobId], None],
        aside: Aside | None = None,
    ) -> None:
        self._open_store = open_store
        self._renew_s = renew_s
        self._stall_s = stall_s
        self._on_lost = on_lost
        self._on_cancel = on_cancel
        self._main = asyncio.get_running_loop()
        self._held: dict[JobId, str] = {}  # written by the main thread, read by the keeper's, under the lock
        self._lock = threading.Lock()
        self._beat_s = time.monotonic()  # written by the main thread
        self._stopping = threading.Event()
        self._wake: Callable[[], object] = lambda: None
        self._aside = aside or OwnThread("codeyard-leases")

    def start(self) -> None:
        self._aside.start(self._keep)

    async def stop(self) -> None:
        """Return when the thread has ended; what it held lapses."""
        self._stopping.set()
        self._wake()
        await self._aside.ended()

    def hold(self, job_id: JobId, fence: str) -> None:
        with self._lock:
            self._held[job_id] = fence

    def drop(self, job_id: JobId) -> None:
        with self._lock:
            self._held.pop(job_id, None)

    async def _keep(self) -> None:
        woken = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(woken.set)
        store: Store | None = None
        while not self._stopping.is_set():
            try:
                if store is None:
                    store = await self._open_store()
                await self._renew_all(store)
            except FleetError as error:
                log.warning("leases_not_renewed", extra={"error": str(error)})
            except Exception:
                # The thread's last line of defence: without it every job here is lost to another worker.
                log.exception("lease_renewal_failed")
            try:
                async with asyncio.timeout(self._renew_s):
                    await woken.wait()
            except TimeoutError:
                pass
        if store is not None:
            await store.close()

    async def _renew_all(self, store: Store) -> None:
        if not self._main_loop_lives():
            return
        with self._lock:
            held = list(self._held.items())
        for start in range(0, len(held), MAX_GROUP):
            group = [Renewal(job_id, fence) for job_id, fence in held[start : start + MAX_GROUP]]
            await self._renew(store, group)

    async def _renew(self, store: Store, group: Sequence[Renewal]) -> None:
        try:
            renewed = await store.renew(group)
        except StoreUnavailable:
            renewed = await store.renew(group)  # once more at once: a lease fits only a few periods
        for renewal, answer in zip(group, renewed, strict=True):
            if not answer.held:
                self._tell(self._lost, renewal)
            elif answer.cancel_requested:
                self._tell(self._cancelled, renewal)

    def _tell(self, what: Callable[[Renewal], None], renewal: Renewal) -> None:
        if not self._main.is_closed():
            self._main.call_soon_threadsafe(what, renewal)

    def _lost(self, renewal: Renewal) -> None:
        with self._lock:
            current = self._held.get(renewal.job_id) == renewal.fence
        if current:  # not dropped, and not claimed again, since the renewal was sent
            self._on_lost(renewal.job_id)

    def _cancelled(self, renewal: Renewal) -> None:
        self._on_cancel(renewal.job_id)

    def _main_loop_lives(self) -> bool:
        silent_s = time.monotonic() - self._beat_s
        if self._main.is_closed():
            return False
        self._main.call_soon_threadsafe(self._beat)
        if silent_s < self._stall_s:
            return True
        log.error("event_loop_stalled", extra={"silent_s": round(silent_s, 1)})
        return False

    def _beat(self) -> None:
        self._beat_s = time.monotonic()

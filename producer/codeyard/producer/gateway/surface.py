"""A surface: the routes of one API, and how that API says no.

The gateway speaks several APIs over the same jobs. Each is a `Surface`, made from the `Kit` they share; `app`
checks who is calling and hands every handler the caller's `TenantJobs`. What a handler raises is answered in
the surface's own words, with the status that `problems.KINDS` gives it.
Called by: app, and the modules of each API.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.sse import HEARTBEAT_S, EventStream
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.producer.gateway.waiting import hung_up, unless
from codeyard.producer.webhooks.policy import Policy
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import FleetError, ResultTimeout
from codeyard.shared.job import JobId
from codeyard.shared.record import JobStatus
from codeyard.shared.settings import GatewaySettings, WebhookSettings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics

NO_CALLBACKS = Policy(WebhookSettings())
TenantHandler = Callable[[Request, TenantJobs], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    path: str  # a template, e.g. "/v1/jobs/{job_id}"
    method: str
    scope: Scope
    handler: TenantHandler


@dataclass(frozen=True, slots=True)
class Surface:
    """`refuse` answers what a handler raised; its `kind_of` is never "internal-error"."""

    routes: Sequence[Route]
    refuse: Callable[[Refused | FleetError], Response]


@dataclass(frozen=True, slots=True)
class Kit:
    """What the handlers of all surfaces share. A stop has three steps: `leaving`, callers are sent elsewhere and
    still served; `stopping` ends waits and streams that go on at another gateway where they were; `closing` ends the
    others. Where the first or the last is None it is one with `stopping`."""

    settings: GatewaySettings
    metrics: Metrics
    stopping: asyncio.Event
    store: Store
    heartbeat_s: float = HEARTBEAT_S
    callbacks: Policy = NO_CALLBACKS
    shelves: Shelves | None = None  # None: no files and no batches
    leaving: asyncio.Event | None = None
    closing: asyncio.Event | None = None

    def until(self, *, resumable: bool) -> asyncio.Event:
        """What ends an answer. `resumable`: its caller goes on elsewhere by what it has, as its protocol says."""
        return self.stopping if resumable else self.closing or self.stopping

    async def final_within(
        self, request: Request, jobs: TenantJobs, job_id: JobId, wait_s: float, *, resumable: bool
    ) -> JobStatus | None:
        """The status once the job is final; None if it goes on, or the gateway stops.
        Raises ClientDisconnect if there is nobody left to tell; the job goes on."""
        gone = False

        async def caller_gone() -> None:
            nonlocal gone
            await hung_up(request.receive)
            gone = True

        try:
            with self.metrics.waits_open.track_inprogress():
                ended = self.until(resumable=resumable)
                status = await unless(jobs.wait(job_id, wait_s), caller_gone(), ended.wait())
        except ResultTimeout:
            return None
        if status is None and gone:
            raise ClientDisconnect
        return status

    def event_stream(
        self,
        frames: AsyncGenerator[str, None],
        *,
        resumable: bool,
        beat: str | None = None,
        farewell: str | None = None,
    ) -> EventStream:
        """`frames` as server-sent events; `beat` is the frame that keeps a silent connection open, `farewell`
        the last one of a stream that the gateway ends because it stops. A stream whose reader comes back at once
        has its connection for itself: to come back on the same one could be into its end."""
        return EventStream(
            frames,
            stopping=self.until(resumable=resumable),
            streams_open=self.metrics.streams_open,
            heartbeat_s=self.heartbeat_s,
            beat=beat,
            farewell=farewell,
            last_of_connection=resumable,
        )

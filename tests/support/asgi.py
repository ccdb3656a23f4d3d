"""The gateway's app without a socket, over jobs that a test makes up."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from codeyard.producer.gateway.app import Probe, create_app
from codeyard.shared.errors import JobNotFound, ResultTimeout
from codeyard.shared.job import JobId, Lane, job_id_for_key
from codeyard.shared.record import Event, JobStatus, State
from codeyard.shared.settings import GatewaySettings
from codeyard.shared.store.port import CancelVerdict
from codeyard.shared.telemetry import Metrics

JOB_ID = job_id_for_key("default", "key-1")


def status(state: State = State.QUEUED, **changed: Any) -> JobStatus:
    fields: dict[str, Any] = {
        "id": JOB_ID,
        "state": state,
        "lane": Lane.STANDARD,
        "model": "tiny",
        "revision": "tiny-1",
        "tenant": "default",
        "key": "key-1",
        "attempt": 0,
        "created_at": 1.5,
        "started_at": None,
        "finished_at": None,
        "deadline_at": 86_401.5,
        "cancel_requested": False,
        "last_seq": 0,
        "result": None,
    }
    return JobStatus(**{**fields, **changed})


@dataclass(frozen=True, slots=True)
class MadeUpJob:
    id: JobId
    attached: bool
    accepted_status: JobStatus
    estimated_start_s: float | None = None


@dataclass
class MadeUpJobs:
    """One job, known under JOB_ID. With `error`, every call raises it; `endless` streams never say a word."""

    error: Exception | None = None
    known: JobStatus = field(default_factory=status)
    events: list[Event] = field(default_factory=list)
    endless: bool = False
    submitted: list[Mapping[str, Any]] = field(default_factory=list)

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        self._fail()
        self.submitted.append({"prompt": prompt, **fields})
        return MadeUpJob(JOB_ID, False, self.known)

    async def status(self, job_id: JobId) -> JobStatus:
        self._fail()
        if job_id != JOB_ID:
            raise JobNotFound(job_id)
        return self.known

    async def wait(self, job_id: JobId, timeout: float) -> JobStatus:
        if not self.known.state.final:
            raise ResultTimeout(job_id, waited_s=timeout)
        return await self.status(job_id)

    async def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]:
        for event in self.events[after:]:
            yield event
        if self.endless:
            await asyncio.Event().wait()

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        await self.status(job_id)
        return CancelVerdict.CANCELLED

    async def recent(self, limit: int = 20) -> list[JobStatus]:
        self._fail()
        return [self.known]

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


async def _up() -> str:
    return "test 1.0"


def app_over(
    jobs: MadeUpJobs,
    *,
    probes: Mapping[str, Probe] | None = None,
    stopping: asyncio.Event | None = None,
    heartbeat_s: float = 15.0,
    **settings: Any,
) -> FastAPI:
    return create_app(
        jobs,
        GatewaySettings(**settings),
        probes=probes if probes is not None else {"broker": _up, "store": _up},
        metrics=Metrics(),
        stopping=stopping or asyncio.Event(),
        heartbeat_s=heartbeat_s,
    )


def http_to(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

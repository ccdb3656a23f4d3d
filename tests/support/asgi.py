"""The gateway's app without a socket, over jobs that a test makes up."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from unittest.mock import create_autospec

import httpx
from fastapi import FastAPI

from codeyard.producer.gateway.app import Probe, create_app
from codeyard.producer.gateway.auth import Authenticator, Development
from codeyard.producer.gateway.limits import Limits, States
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.gateway.surfaces import surfaces
from codeyard.shared.alias import Alias
from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.documents.port import DocumentStore
from codeyard.shared.errors import JobNotFound, ResultTimeout
from codeyard.shared.job import JobId, Lane, job_id_for_key
from codeyard.shared.limits.rules import GiveBack, Level, Live, Take, Taken, Verdict, take
from codeyard.shared.notice import ModelNotice, Notice
from codeyard.shared.record import Event, JobStatus, State
from codeyard.shared.settings import GatewaySettings, LimitSettings
from codeyard.shared.store.port import CancelVerdict, Store
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
    knows_only: JobId = JOB_ID

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        self._fail()
        self.submitted.append({"prompt": prompt, **fields})
        return MadeUpJob(JOB_ID, False, self.known)

    async def status(self, job_id: JobId) -> JobStatus:
        self._fail()
        if job_id != self.knows_only:
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


class MemoryLimits:
    """A LimitStore in memory, by the same rules. With `error`, every call raises it."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.now = 1_000.0
        self.levels: dict[str, tuple[Level | None, Level | None]] = {}
        self.jobs: dict[str, dict[JobId, tuple[int, float]]] = {}  # by tenant: tokens, end
        self.num_calls = 0

    async def take(self, group: Sequence[Take]) -> list[Taken]:
        self._called()
        return [self._take(ask) for ask in group]

    async def give_back(self, group: Sequence[GiveBack]) -> None:
        self._called()
        for back in group:
            self.jobs.get(back.tenant, {}).pop(back.job_id, None)
            requests, tokens = self.levels.get(back.tenant, (None, None))
            if tokens is not None:
                self.levels[back.tenant] = requests, Level(tokens.amount + back.tokens, tokens.at)

    async def live(self, tenant: str, *, start: int, count: int) -> list[JobId]:
        self._called()
        return list(self.jobs.get(tenant, {}))[start : start + count]

    async def close(self) -> None:
        pass

    def _called(self) -> None:
        self.num_calls += 1
        if self.error is not None:
            raise self.error

    def _take(self, ask: Take) -> Taken:
        live = self.jobs.setdefault(ask.tenant, {})
        for job_id in [job_id for job_id, (_, until) in live.items() if until <= self.now]:
            del live[job_id]
        known = Live(len(live), sum(tokens for tokens, _ in live.values()), ask.job_id in live)
        step = take(ask, *self.levels.get(ask.tenant, (None, None)), known, self.now)
        if step.taken.verdict is Verdict.GRANTED:
            self.levels[ask.tenant] = step.requests, step.tokens
        if step.taken.added:
            live[ask.job_id] = ask.tokens, self.now + ask.live_s
        return step.taken


async def no_records(group: Sequence[JobId]) -> list[State | None]:
    return [None] * len(group)


def limits_over(settings: LimitSettings, store: MemoryLimits | None = None, states: States = no_records) -> Limits:
    return Limits(settings, store or MemoryLimits(), states)


async def _up() -> str:
    return "test 1.0"


class MadeUpModels:
    """As much of a store as the admin routes ask for: two aliases, one worker that told nothing of rollouts."""

    def __init__(self) -> None:
        self.known = {"tiny": Alias("tiny", "tiny-1", 2_048), "other": Alias("other", "other-1")}

    async def aliases(self) -> Mapping[str, Alias]:
        return dict(self.known)

    async def swap_alias(self, expected: Alias | None, new: Alias) -> Alias:
        self.known[new.name] = new
        return new

    async def notices(self) -> Mapping[str, str]:
        return {"w": Notice("w", "fake", (ModelNotice("tiny", "tiny-1", "awake", serving=True),)).encode()}


def app_over(
    jobs: MadeUpJobs,
    *,
    models: MadeUpModels | None = None,
    auth: Authenticator | None = None,
    limits: Limits | None = None,
    open_metrics: bool = True,
    probes: Mapping[str, Probe] | None = None,
    stopping: asyncio.Event | None = None,
    heartbeat_s: float = 15.0,
    **settings: Any,
) -> FastAPI:
    kit = Kit(
        GatewaySettings(**settings),
        Metrics(),
        stopping or asyncio.Event(),
        cast(Store, models or MadeUpModels()),
        heartbeat_s,
        shelves=_untouched_shelves(),
    )
    return create_app(
        jobs,
        kit,
        auth=auth or Development(),
        limits=limits or limits_over(LimitSettings()),
        surfaces=surfaces(kit),
        open_metrics=open_metrics,
        probes=probes if probes is not None else {"broker": _up, "store": _up},
    )


@cache
def _untouched_shelves() -> Shelves:
    """There, and asked for nothing. Made once: it takes ten times as long as the rest of an app."""
    return Shelves(create_autospec(BlobStore), create_autospec(DocumentStore))


def http_to(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

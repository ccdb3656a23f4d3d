"""What the gateway needs of a client: the seam between HTTP and the way of a job.

`AsyncClient` is one. Errors are those of codeyard.shared.errors, as its methods document them.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from codeyard.shared.chat import Chat
from codeyard.shared.job import JobId, Lane, Sampling
from codeyard.shared.record import Event, JobStatus
from codeyard.shared.store.port import CancelVerdict


class AcceptedJob(Protocol):
    @property
    def id(self) -> JobId: ...

    @property
    def attached(self) -> bool:
        """It was there before, under the same key and body."""

    @property
    def estimated_start_s(self) -> float | None:
        """Seconds until a worker will begin it; None if that is not known, or it is not new."""

    @property
    def accepted_status(self) -> JobStatus:
        """As it was when it was accepted; of an attached job, as it is."""


class Jobs(Protocol):
    async def submit(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        model: str,
        lane: Lane | str,
        idempotency_key: str | None,
        sampling: Sampling | Mapping[str, Any] | None,
        stream: bool,
        timeout_s: float,
        metadata: Mapping[str, Any] | None,
        traceparent: str | None,
        tenant: str,
        job_id: JobId,
        callback_url: str | None = None,
        asked_model: str | None = None,
    ) -> AcceptedJob:
        """`job_id`: the one that the key, or its lack, leads to; limits have counted it already. `asked_model`:
        what the caller named, where `model` stands in for it."""

    async def status(self, job_id: JobId) -> JobStatus: ...

    async def wait(self, job_id: JobId, timeout: float) -> JobStatus: ...

    def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]: ...

    async def cancel(self, job_id: JobId) -> CancelVerdict: ...

    async def recent(self, limit: int = 20) -> list[JobStatus]: ...

"""The jobs of one tenant: what a caller sees of `Jobs`, in every protocol.

Promise: a job of another tenant is `JobNotFound`, whatever is asked of it and in the same words as one that
never was; a submission is counted against the tenant's limits before anything else is done, and what it took
is given back if it came to nothing. Ids of jobs with a key are derived from the tenant, so the same key of two
tenants is two jobs.
Called by: gateway.app and rpc.calls, one for each request.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from codeyard.producer.gateway.jobs import AcceptedJob, Jobs
from codeyard.producer.gateway.limits import Admission, Limits, estimate
from codeyard.shared.chat import Chat
from codeyard.shared.errors import FleetError, JobNotFound
from codeyard.shared.job import JobId, Lane, Sampling, job_id_for_key, new_job_id, shared_key
from codeyard.shared.limits.standing import Standing
from codeyard.shared.record import Event, EventKind, JobStatus
from codeyard.shared.store.port import CancelVerdict

MAX_LOOKED_AT = 1_000  # of the fleet's newest jobs, when a tenant's newest are listed


@dataclass(frozen=True, slots=True)
class Submitted:
    """An accepted job, and what the tenant has left."""

    job: AcceptedJob
    standing: Standing


class TenantJobs:
    def __init__(self, jobs: Jobs, tenant: str, limits: Limits) -> None:
        self._jobs = jobs
        self._tenant = tenant
        self._limits = limits
        self._own: set[JobId] = set()  # a job never changes its tenant
        self.stood_in: str | None = None  # the model that took a job submitted here in place of the one asked for

    @property
    def tenant(self) -> str:
        return self._tenant

    def body_bytes(self, most: int) -> int:
        return self._limits.body_bytes(self._tenant, most)

    async def submit(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        model: str,
        lane: Lane,
        idempotency_key: str | None,
        sampling: Sampling,
        stream: bool,
        timeout_s: float,
        metadata: Mapping[str, Any],
        traceparent: str | None,
        share: bool = False,
        callback_url: str | None = None,
    ) -> Submitted:
        """`share`: without a key, equal deterministic jobs are one. Raises what `Jobs.submit` and `Limits.admit`
        raise."""
        if share and idempotency_key is None:
            idempotency_key = shared_key(model, prompt, sampling)
        job_id = job_id_for_key(self._tenant, idempotency_key) if idempotency_key is not None else new_job_id()
        tokens = estimate(prompt, sampling)
        admission = await self._limits.admit(self._tenant, job_id, tokens=tokens, timeout_s=timeout_s)
        try:
            job = await self._jobs.submit(
                prompt,
                model=model,
                lane=lane,
                idempotency_key=idempotency_key,
                sampling=sampling,
                stream=stream,
                timeout_s=timeout_s,
                metadata=metadata,
                traceparent=traceparent,
                tenant=self._tenant,
                job_id=job_id,
                callback_url=callback_url,
            )
        except FleetError as error:
            if not getattr(error, "maybe_accepted", False):
                await self._limits.undo(admission, live=False)
            raise
        await self._settle(admission, job)
        self._own.add(job.id)
        if job.accepted_status.asked_model is not None:
            self.stood_in = job.accepted_status.model
        return Submitted(job, admission.standing)

    async def status(self, job_id: JobId) -> JobStatus:
        status = await self._jobs.status(job_id)
        if status.tenant != self._tenant:
            raise JobNotFound(job_id)
        self._own.add(job_id)
        return await self._seen(status)

    async def wait(self, job_id: JobId, timeout: float) -> JobStatus:
        await self._check(job_id)
        return await self._seen(await self._jobs.wait(job_id, timeout))

    async def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]:
        await self._check(job_id)
        async with aclosing(self._jobs.stream(job_id, after)) as events:
            async for event in events:
                if event.kind is EventKind.END:
                    await self._limits.ended(self._tenant, job_id)
                yield event

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        await self._check(job_id)
        verdict = await self._jobs.cancel(job_id)
        if verdict is not CancelVerdict.REQUESTED:
            await self._limits.ended(self._tenant, job_id)
        return verdict

    async def recent(self, limit: int = 20) -> list[JobStatus]:
        """The newest of the tenant among the fleet's MAX_LOOKED_AT newest; approximate, for people."""
        looked_at = limit
        while True:
            newest = await self._jobs.recent(looked_at)
            mine = [status for status in newest if status.tenant == self._tenant]
            if len(mine) >= limit or len(newest) < looked_at or looked_at >= MAX_LOOKED_AT:
                return mine[:limit]
            looked_at = min(MAX_LOOKED_AT, looked_at * 4)

    # -------------------------------------------------------------------------------------------------

    async def _check(self, job_id: JobId) -> None:
        """Raises JobNotFound. Before anything whose time or answer would tell that the job exists."""
        if job_id not in self._own:
            await self.status(job_id)

    async def _settle(self, admission: Admission, job: AcceptedJob) -> None:
        """A job that was there generates nothing new; one that is final takes up nothing at all."""
        if job.attached:
            await self._limits.undo(admission, live=not job.accepted_status.state.final)

    async def _seen(self, status: JobStatus) -> JobStatus:
        if status.state.final:
            await self._limits.ended(self._tenant, status.id)
        return status

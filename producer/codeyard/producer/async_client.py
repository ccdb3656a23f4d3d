"""The client for asyncio programs, and what the gateway and the blocking client are made of.

    async with AsyncClient("amqp://...", "redis://...") as client:
        job = await client.submit("def add(a, b):", model="starter", idempotency_key="add-1")
        result = await job.result(timeout=60)

Without URLs it uses the settings' ones (environment, codeyard.yaml), by default the embedded file.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Self, TypeVar

from codeyard.producer.grouping import GroupingSubmitter
from codeyard.producer.submission import Accepted, Submission, Submitter
from codeyard.producer.waits import WaitBoard
from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.broker.port import Broker, Publisher
from codeyard.shared.chat import Chat
from codeyard.shared.connect import open_blobs, open_broker, open_store
from codeyard.shared.errors import FleetError, JobNotFound
from codeyard.shared.job import DEFAULT_TIMEOUT_S, JobId, Lane, Sampling
from codeyard.shared.reading import follow, wait_final, within
from codeyard.shared.record import Event, EventKind, JobStatus, Result
from codeyard.shared.settings import Settings, StoreSettings, load
from codeyard.shared.store.port import CancelVerdict, Store
from codeyard.shared.topology import Topology

T = TypeVar("T")
OpenPublisher = Callable[[Settings, Topology], Awaitable[Publisher]]
OpenStore = Callable[[StoreSettings, Topology], Awaitable[Store]]


class AsyncClient:
    """Submits and reads jobs. Any number of tasks may use one client at once; make one per process.

    `timeout_s` bounds every submission and every question, retries included. Errors: codeyard.shared.errors, each named
    for what to do next; docs/clients.md is the table.
    """

    def __init__(
        self,
        broker_url: str | None = None,
        store_url: str | None = None,
        *,
        namespace: str | None = None,
        tenant: str = "default",
        settings: Settings | None = None,
        timeout_s: float = 15.0,
        open_publisher: OpenPublisher | None = None,
        open_store: OpenStore = open_store,
    ) -> None:
        self.settings = with_urls(settings or load(), broker_url, store_url, namespace)
        self.topology = Topology(self.settings.namespace)
        self._tenant = tenant
        self._timeout_s = timeout_s
        self._open_publisher = open_publisher or _open_broker
        self._open_store = open_store
        self._stack = AsyncExitStack()
        self._publisher: Publisher | None = None
        self._store: Store | None = None
        self._submitter: GroupingSubmitter | None = None
        self._blobs: BlobStore | None = None
        self._opening_blobs = asyncio.Lock()

    async def open(self) -> Self:
        """Connect. Raises BrokerUnavailable, StoreUnavailable, SettingsError."""
        try:
            self._store = await self._open_store(self.settings.store, self.topology)
            self._stack.push_async_callback(self._store.close)
            self._publisher = await self._open_publisher(self.settings, self.topology)
            self._stack.push_async_callback(self._publisher.close)
            board = WaitBoard(self._store)
            self._stack.push_async_callback(board.close)
            submitter = Submitter(
                self._publisher,
                self._store,
                self.blobs,
                self.topology,
                board,
                publish_timeout_s=min(self.settings.broker.publish_timeout_s, self._timeout_s),
                max_prompt_bytes=self.settings.store.max_prompt_bytes,
                refuse_late=self.settings.broker.refuse_late,
            )
            grouping = GroupingSubmitter(submitter, timeout_s=self._timeout_s)
            self._submitter = await self._stack.enter_async_context(grouping)
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        await self._stack.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def store(self) -> Store:
        return _opened(self._store)

    @property
    def publisher(self) -> Publisher:
        return _opened(self._publisher)

    async def blobs(self) -> BlobStore:
        """Where long prompts lie; connected when the first one comes. Raises StoreUnavailable, SettingsError."""
        async with self._opening_blobs:
            if self._blobs is None:
                self._blobs = await open_blobs(self.settings.store, self.topology)
                self._stack.push_async_callback(self._blobs.close)
            return self._blobs

    async def submit(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        model: str = "starter",
        lane: Lane | str = Lane.STANDARD,
        idempotency_key: str | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        stream: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        metadata: Mapping[str, Any] | None = None,
        share: bool = False,
        tenant: str | None = None,
        traceparent: str | None = None,
        job_id: JobId | None = None,
        callback_url: str | None = None,
        asked_model: str | None = None,
    ) -> "AsyncJob":
        """Return once the job is accepted: at the broker, confirmed. The same key and body attach to the
        job there; with `share` and no key, equal deterministic jobs of a tenant are one. Raises IdempotencyConflict,
        QueueFull, DeadlineTooSoon, UnknownModel, InvalidJob, StorageQuotaExceeded,
        BrokerUnavailable, StoreUnavailable."""
        submission = Submission(
            prompt=prompt,
            model=model,
            lane=lane,
            idempotency_key=idempotency_key,
            sampling=sampling if sampling is not None else Sampling(),
            stream=stream,
            timeout_s=timeout_s,
            tenant=tenant or self._tenant,
            metadata=metadata or {},
            share=share,
            traceparent=traceparent,
            job_id=job_id,
            callback_url=callback_url,
            asked_model=asked_model,
        )
        outcome = await _opened(self._submitter).submit(submission)
        if isinstance(outcome, FleetError):
            raise outcome
        return AsyncJob(self, outcome)

    async def submit_many(self, group: Sequence[Submission]) -> "list[AsyncJob | FleetError]":
        """One outcome per submission, in order; confirms are pipelined. Raises nothing for a single one."""
        mine = [one if one.tenant != "default" else replace(one, tenant=self._tenant) for one in group]
        outcomes = await _opened(self._submitter).submit_many(mine)
        return [AsyncJob(self, one) if isinstance(one, Accepted) else one for one in outcomes]

    async def status(self, job_id: JobId) -> JobStatus:
        """What is known of a job now. Raises JobNotFound, StoreUnavailable."""
        [record] = await within(self._timeout_s, lambda: self.store.read([job_id]))
        if record is None:
            raise JobNotFound(job_id)
        return JobStatus.of(record)

    async def wait(self, job_id: JobId, timeout: float) -> JobStatus:
        """The status once the job is final. Raises ResultTimeout, JobNotFound, StoreUnavailable."""
        return JobStatus.of(await wait_final(self.store, job_id, timeout))

    async def result(self, job_id: JobId, timeout: float = 60.0) -> Result:
        """The committed result, whatever the final state is: look at `result.state`. Raises as `wait`."""
        result = (await self.wait(job_id, timeout)).result
        assert result is not None, "a final record has its result"
        return result

    def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]:
        """Events with `seq > after` to the `end` event; go on after a break with the last `seq` you saw."""
        return follow(self.store, job_id, after=after)

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        """Ask for a job's end. Raises JobNotFound, StoreUnavailable."""
        [verdict] = await within(self._timeout_s, lambda: self.store.cancel([job_id]))
        if verdict is CancelVerdict.MISSING:
            raise JobNotFound(job_id)
        return verdict

    async def recent(self, limit: int = 20) -> list[JobStatus]:
        """The newest jobs, newest first."""
        return [JobStatus.of(record) for record in await within(self._timeout_s, lambda: self.store.recent(limit))]


class AsyncJob:
    """An accepted job. `attached`: it was there before, under the same key. `estimated_start_s`: seconds from
    its acceptance until a worker will begin it, as measured lately; None if that is not known."""

    def __init__(self, client: AsyncClient, accepted: Accepted) -> None:
        self._client = client
        self.id: JobId = accepted.record.id
        self.attached = accepted.attached
        self.estimated_start_s = accepted.estimated_start_s
        self.accepted_status = JobStatus.of(accepted.record)

    async def result(self, timeout: float = 60.0) -> Result:
        return await self._client.result(self.id, timeout)

    async def status(self) -> JobStatus:
        return await self._client.status(self.id)

    def stream(self, after: int = 0) -> AsyncIterator[Event]:
        return self._client.stream(self.id, after)

    async def text_stream(self) -> AsyncIterator[str]:
        """Pieces of text as they come. Raises FleetError where generation began again: what was yielded is
        void then, and only `stream` can say so in its place."""
        async for event in self.stream():
            if event.kind is EventKind.RESTARTED:
                raise FleetError(f"job {self.id} was generated anew; read it with stream(), which tells where")
            if event.text:
                yield event.text

    async def cancel(self) -> CancelVerdict:
        return await self._client.cancel(self.id)


def with_urls(settings: Settings, broker_url: str | None, store_url: str | None, namespace: str | None) -> Settings:
    """The settings with what a caller gave instead, checked again."""
    changed: dict[str, Any] = {}
    if broker_url is not None:
        changed["broker"] = type(settings.broker).model_validate({**dict(settings.broker), "url": broker_url})
    if store_url is not None:
        changed["store"] = type(settings.store).model_validate({**dict(settings.store), "url": store_url})
    if namespace is not None:
        changed["namespace"] = namespace
    return settings.model_copy(update=changed)


def _opened(part: T | None) -> T:
    if part is None:
        raise FleetError("the client is not open: use `async with AsyncClient(...)` or await client.open()")
    return part


async def _open_broker(settings: Settings, topology: Topology) -> Broker:
    return await open_broker(settings.broker, topology)

"""The blocking client, for Django, Flask, Celery and scripts.

    with Client("amqp://...", "redis://...") as client:
        job = client.submit("def add(a, b):", idempotency_key="add-1")
        print(job.result(timeout=60).text)

One background thread per process runs an event loop with an AsyncClient on it, so the protocol is the
same code; for RabbitMQ it publishes through pika. The loop keeps heartbeats going while the program is
idle. Safe in threads. After a fork the child starts a thread and connections of its own and never
touches its parent's.
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

from codeyard.producer.async_client import AsyncClient, AsyncJob, with_urls
from codeyard.producer.submission import Submission
from codeyard.shared.broker.port import Publisher
from codeyard.shared.chat import Chat
from codeyard.shared.connect import open_broker
from codeyard.shared.errors import FleetError
from codeyard.shared.job import DEFAULT_TIMEOUT_S, JobId, Lane, Sampling
from codeyard.shared.record import Event, JobStatus, Result
from codeyard.shared.settings import Settings, load
from codeyard.shared.store.port import CancelVerdict
from codeyard.shared.topology import Topology

T = TypeVar("T")

CLOSE_S = 10.0
MARGIN_S = 10.0  # on top of a call's own timeout: the loop answers, or is dead


class Client:
    """See the module. Same calls and errors as AsyncClient."""

    def __init__(
        self,
        broker_url: str | None = None,
        store_url: str | None = None,
        *,
        namespace: str | None = None,
        tenant: str = "default",
        settings: Settings | None = None,
        timeout_s: float = 15.0,
    ) -> None:
        self.settings = with_urls(settings or load(), broker_url, store_url, namespace)
        self._tenant = tenant
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._loop: _LoopThread | None = None
        self._client: AsyncClient | None = None
        os.register_at_fork(after_in_child=self._forget_parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect and end the thread. The client can be used again; it connects anew."""
        with self._lock:
            if self._loop is not None and self._client is not None:
                self._loop.call(self._client.close(), CLOSE_S)
                self._loop.stop()
            self._loop = self._client = None

    def submit(
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
        callback_url: str | None = None,
        share: bool = False,
    ) -> "Job":
        """Return once the job is accepted. Errors as AsyncClient.submit."""
        client = self._open()
        job = self._run(
            client.submit(
                prompt,
                model=model,
                lane=lane,
                idempotency_key=idempotency_key,
                sampling=sampling,
                stream=stream,
                timeout_s=timeout_s,
                metadata=metadata,
                callback_url=callback_url,
                share=share,
            ),
            self._timeout_s,
        )
        return Job(self, job)

    def submit_many(self, group: Sequence[Submission]) -> "list[Job | FleetError]":
        """One outcome per submission, in order; confirms are pipelined."""
        outcomes = self._run(self._open().submit_many(group), self._timeout_s * (1 + len(group) // 256))
        return [one if isinstance(one, FleetError) else Job(self, one) for one in outcomes]

    def status(self, job_id: JobId) -> JobStatus:
        return self._run(self._open().status(job_id), self._timeout_s)

    def result(self, job_id: JobId, timeout: float = 60.0) -> Result:
        return self._run(self._open().result(job_id, timeout), timeout)

    def cancel(self, job_id: JobId) -> CancelVerdict:
        return self._run(self._open().cancel(job_id), self._timeout_s)

    def recent(self, limit: int = 20) -> list[JobStatus]:
        return self._run(self._open().recent(limit), self._timeout_s)

    def stream(self, job_id: JobId, after: int = 0) -> Iterator[Event]:
        """Events with `seq > after`, as they come, to the `end` event. Blocks between them."""
        events = self._open().stream(job_id, after)
        try:
            while True:
                try:
                    yield self._run(_next(events), None)
                except _Exhausted:
                    return
        finally:
            self._run(events.aclose(), CLOSE_S)

    def _open(self) -> AsyncClient:
        with self._lock:
            if self._client is None:
                loop = _LoopThread()
                client = AsyncClient(
                    tenant=self._tenant,
                    settings=self.settings,
                    timeout_s=self._timeout_s,
                    open_publisher=_open_publisher,
                )
                try:
                    loop.call(client.open(), self._timeout_s + MARGIN_S)
                except BaseException:
                    loop.stop()
                    raise
                self._loop, self._client = loop, client
            return self._client

    def _run(self, call: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        loop = self._loop
        if loop is None:
            call.close()
            raise FleetError("the client was closed while it was in use")
        return loop.call(call, None if timeout_s is None else timeout_s + MARGIN_S)

    def _forget_parent(self) -> None:
        """In a forked child: the thread is not here, and its sockets are the parent's."""
        self._lock = threading.Lock()
        _left_behind.append((self._loop, self._client))  # never collected: closing would speak on those sockets
        self._loop = self._client = None


class Job:
    """An accepted job. `attached`: it was there before, under the same key. `estimated_start_s`: seconds
    from its acceptance until a worker will begin it; None if that is not known."""

    def __init__(self, client: Client, job: AsyncJob) -> None:
        self._client = client
        self.id = job.id
        self.attached = job.attached
        self.estimated_start_s = job.estimated_start_s

    def result(self, timeout: float = 60.0) -> Result:
        """The committed result. Raises ResultTimeout; the job goes on then."""
        return self._client.result(self.id, timeout)

    def status(self) -> JobStatus:
        return self._client.status(self.id)

    def stream(self, after: int = 0) -> Iterator[Event]:
        return self._client.stream(self.id, after)

    def cancel(self) -> CancelVerdict:
        return self._client.cancel(self.id)


class _LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="codeyard-client", daemon=True)
        self._thread.start()

    def call(self, call: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise FleetError(f"no answer from the client's thread in {timeout_s} s") from None
        except BaseException:
            future.cancel()  # Ctrl-C here must not leave the call running there
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()


class _Exhausted(Exception):
    """StopAsyncIteration cannot cross a future."""


_left_behind: list[object] = []


async def _next(events: Any) -> Event:
    try:
        event: Event = await anext(events)
    except StopAsyncIteration:
        raise _Exhausted from None
    return event


async def _open_publisher(settings: Settings, topology: Topology) -> Publisher:
    if settings.broker.url.startswith("sqlite:"):
        return await open_broker(settings.broker, topology)
    from codeyard.producer.pika_publisher import PikaPublisher

    return PikaPublisher(settings.broker, topology)

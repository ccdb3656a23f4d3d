"""Wake-ups over one Redis subscription connection, however many watch.

    async with wakeups.watch(channel) as watcher:   # returns once the server confirmed the subscription
        ... read; if not there yet:
        await watcher.wait(2.0)

Promise: a message published after the context was entered ends `wait`; so does a connection that was
lost and came back, because a message may have fallen between. Everything else is the caller's timeout.
Called by: store.redis. Does not know about: jobs, records.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

CONFIRM_S = 2.0  # then enter without a confirmation: callers read every 2 s anyway
HEARTBEAT_S = 10.0  # of silence, then a ping; another one, and the peer is gone
BACKOFF_S = (0.05, 5.0)  # first and longest pause before connecting again


class Watcher:
    """One caller's interest in one channel."""

    def __init__(self) -> None:
        self.confirmed = asyncio.Event()
        self.signal = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Return at the next message, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.signal.wait()
        self.signal.clear()


class Wakeups:
    """One per store; belongs to the event loop it is first used in. `close()` ends its task."""

    def __init__(self, connect: Callable[[], Redis], *, anchor: str, timeout_s: float) -> None:
        """`anchor` is a channel that stays subscribed, so that an idle connection is still a subscriber.

        `connect` gives a new client each time: the server may be another one after a failover. It retries nothing,
        or it would reconnect under the reader's feet, from two tasks at once.
        """
        self._connect = connect
        self._anchor = anchor
        self._timeout_s = timeout_s
        self._watchers: dict[str, set[Watcher]] = {}  # callers write; the task reads
        self._subscribed: set[str] = set()  # confirmed and not taken back; only reader and writer write
        self._changed = asyncio.Event()  # `_watchers` has other channels than before
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watch(self, channel: str) -> AsyncIterator[Watcher]:
        self._ensure_running()
        watcher = Watcher()
        self._watchers.setdefault(channel, set()).add(watcher)
        try:
            if channel in self._subscribed:
                watcher.confirmed.set()
            self._changed.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_S):
                    await watcher.confirmed.wait()
            yield watcher
        finally:
            self._watchers[channel].discard(watcher)
            if not self._watchers[channel]:
                del self._watchers[channel]
                self._changed.set()

    async def close(self) -> None:
        """End the task and its connection. Raises what the task may have died of."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    # The task: one connection at a time, a reader and a writer on it -------------------------------

    def _ensure_running(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="redis-wakeups")
        elif self._task.done():
            self._task.result()  # it ends only by a bug: show it to whoever comes

    async def _run(self) -> None:
        pause_s, longest_s = BACKOFF_S
        while True:
            try:
                async with self._connected() as pubsub, asyncio.TaskGroup() as tasks:
                    pause_s = BACKOFF_S[0]
                    tasks.create_task(self._read(pubsub), name="redis-wakeups-read")
                    tasks.create_task(self._write(pubsub), name="redis-wakeups-write")
            except* (RedisError, OSError, TimeoutError) as lost:
                log.debug("wakeups_lost", extra={"reason": str(lost.exceptions[0]), "retry_s": pause_s})
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(longest_s, 2 * pause_s)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[PubSub]:
        client = self._connect()
        pubsub = client.pubsub()
        try:
            async with asyncio.timeout(self._timeout_s):
                await pubsub.subscribe(self._anchor)
            yield pubsub
        finally:
            self._subscribed.clear()
            await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it without annotations
            await client.aclose()

    async def _write(self, pubsub: PubSub) -> None:
        """Keep the server's subscriptions equal to the channels somebody watches."""
        asked: set[str] = set()
        while True:
            self._changed.clear()
            wanted = set(self._watchers)
            async with asyncio.timeout(self._timeout_s):
                if gone := asked - wanted:
                    self._subscribed -= gone
                    await pubsub.unsubscribe(*gone)
                if new := wanted - asked:
                    await pubsub.subscribe(*new)
            asked = wanted
            await self._changed.wait()

    async def _read(self, pubsub: PubSub) -> None:
        """Pass on what arrives. Raises RedisError when the connection is gone, or silent for too long."""
        pinged = False
        while True:
            message = await pubsub.get_message(timeout=HEARTBEAT_S)
            if message is None:
                if pinged:
                    raise RedisConnectionError(f"no answer to a ping within {HEARTBEAT_S:g} s")
                async with asyncio.timeout(self._timeout_s):
                    await pubsub.ping()
                pinged = True
                continue
            pinged = False
            if message["type"] == "subscribe":
                self._confirm(message["channel"])
            elif message["type"] == "unsubscribe":
                self._subscribed.discard(message["channel"])
            elif message["type"] == "message":
                for watcher in self._watchers.get(message["channel"], ()):
                    watcher.signal.set()

    def _confirm(self, channel: str) -> None:
        """Confirmed for the first time: it may be entered. Once more: the connection was gone meanwhile."""
        self._subscribed.add(channel)
        for watcher in self._watchers.get(channel, ()):
            if watcher.confirmed.is_set():
                watcher.signal.set()
            watcher.confirmed.set()

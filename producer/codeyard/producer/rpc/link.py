"""The client's line to the gateways: one channel, calls tried again, our errors instead of gRPC's.

A target may stand for several gateways, as DNS does or `ipv4:10.0.0.1:9090,10.0.0.2:9090`: the channel takes
another one when the one it has goes away. Called by: rpc.client, rpc.client_inference.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from codeyard.producer.rpc.codeyard_pb2_grpc import FleetStub
from codeyard.producer.rpc.refusals import GatewayUnavailable, told_by
from codeyard.shared.errors import AuthUnavailable, BrokerUnavailable, FleetError, StoreUnavailable

T = TypeVar("T")

COME_BACK = (GatewayUnavailable, BrokerUnavailable, StoreUnavailable, AuthUnavailable)  # the same again may do

KEEPALIVE_MS = 30_000  # of silence while a call is open, then a ping; gateways allow one every 10 s
KEEPALIVE_ANSWER_MS = 10_000
MAX_MESSAGE_BYTES = 64 * 1_048_576  # of a result with 131,072 tokens and a few likely others for each
RECONNECT_MS = 200, 5_000  # first and longest pause of the channel before it tries an address again
CONNECT_MS = 5_000  # for a connection to be made, TLS included
STEADY_S = 30.0  # a call that lasted this long had a gateway: longer than it takes to find out that there is none
PAUSE_S = 0.1, 2.0  # first and longest pause of a stream before it goes on


class Link:
    def __init__(
        self, target: str, *, credential: str | None, tls: grpc.ChannelCredentials | None, options: dict[str, Any]
    ) -> None:
        given = {
            "grpc.keepalive_time_ms": KEEPALIVE_MS,
            "grpc.keepalive_timeout_ms": KEEPALIVE_ANSWER_MS,
            "grpc.http2.ping_timeout_ms": KEEPALIVE_ANSWER_MS,  # on a silent line this is what counts
            "grpc.http2.max_pings_without_data": 0,  # no bound: two would be all that a silent stream gets
            "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
            "grpc.initial_reconnect_backoff_ms": RECONNECT_MS[0],
            "grpc.min_reconnect_backoff_ms": CONNECT_MS,
            "grpc.max_reconnect_backoff_ms": RECONNECT_MS[1],
            **options,
        }
        pairs = list(given.items())
        self._channel = (
            grpc.aio.insecure_channel(target, pairs) if tls is None else grpc.aio.secure_channel(target, tls, pairs)
        )
        self.stub: Any = FleetStub(self._channel)
        self.metadata = (("authorization", f"Bearer {credential}"),) if credential is not None else ()

    async def close(self) -> None:
        await self._channel.close(None)

    async def call(self, method: Callable[..., Awaitable[T]], request: Any, *, timeout_s: float) -> T:
        """One answer to one message; asked again until `timeout_s` has passed. Raises our errors."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(COME_BACK),
            wait=wait_random_exponential(multiplier=PAUSE_S[0], max=PAUSE_S[1]),
            stop=stop_after_delay(timeout_s),
            reraise=True,
        )
        said: FleetError | None = None
        async for attempt in retrying:
            with attempt:
                left_s = max(0.1, timeout_s - (attempt.retry_state.seconds_since_start or 0.0))
                try:
                    with translated():
                        return await method(request, timeout=left_s, metadata=self.metadata)
                except GatewayUnavailable as error:
                    raise said or error from None  # what a gateway said is more than that time is up
                except COME_BACK as error:
                    said = error
                    raise
        raise AssertionError("tenacity returns or raises")


@contextmanager
def translated() -> Iterator[None]:
    """gRPC's errors as ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise told_by(error).error() from None
    except grpc.aio.UsageError as error:  # the channel is closed
        raise FleetError(f"the client is not open: {error}") from None


class Patience:
    """Of a stream whose connection is lost: tries again, with growing pauses, until nobody was there for `away_s`."""

    def __init__(self, away_s: float) -> None:
        self._away_s = away_s
        self._called_s = 0.0
        self.heard()

    def calling(self) -> None:
        self._called_s = time.monotonic()

    def heard(self) -> None:
        """Somebody is there."""
        self._until_s: float | None = None
        self._longest_s = PAUSE_S[0]

    async def pause(self) -> bool:
        """After a call that ended early. False if it is time to give up."""
        now_s = time.monotonic()
        if now_s - self._called_s > STEADY_S:
            self.heard()  # it stood, though nothing came
        if self._until_s is None:
            self._until_s = now_s + self._away_s
        if now_s >= self._until_s:
            return False
        await asyncio.sleep(random.uniform(self._longest_s / 2, self._longest_s))
        self._longest_s = min(PAUSE_S[1], self._longest_s * 2)
        return True

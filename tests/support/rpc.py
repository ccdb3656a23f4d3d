"""The gRPC service without a gateway around it, over jobs that a test makes up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import grpc

from codeyard.producer.gateway.auth import Authenticator, Development
from codeyard.producer.gateway.limits import Limits
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.rpc.codeyard_pb2_grpc import FleetStub
from codeyard.producer.rpc.serving import Probe, serving
from codeyard.shared.settings import GatewaySettings, LimitSettings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics
from support.asgi import MadeUpJobs, limits_over


@dataclass(frozen=True, slots=True)
class Service:
    address: str
    stub: Any
    channel: grpc.aio.Channel
    metrics: Metrics
    stopping: asyncio.Event

    def counted(self, method: str, status: str) -> float:
        labels = {"route": method, "status": status}
        return self.metrics.registry.get_sample_value("codeyard_grpc_calls_total", labels) or 0.0


async def _up() -> str:
    return "test 1.0"


@contextlib.asynccontextmanager
async def service_over(
    jobs: MadeUpJobs,
    *,
    auth: Authenticator | None = None,
    limits: Limits | None = None,
    probes: dict[str, Probe] | None = None,
    **settings: Any,
) -> AsyncIterator[Service]:
    stopping = asyncio.Event()
    kit = Kit(GatewaySettings(**settings), Metrics(), stopping, cast(Store, None))
    started = serving(
        jobs,
        kit,
        auth=auth or Development(),
        limits=limits or limits_over(LimitSettings()),
        probes=probes if probes is not None else {"broker": _up, "store": _up},
        host="127.0.0.1",
        port=0,
    )
    async with started as address, grpc.aio.insecure_channel(address) as channel:
        yield Service(address, FleetStub(channel), channel, kit.metrics, stopping)


def status_and_kind(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    """What a refused call says to people and to programs."""
    return error.code(), str(dict(trailing(error)).get("codeyard-kind", ""))


def trailing(error: grpc.aio.AioRpcError) -> list[tuple[str, str | bytes]]:
    return list(error.trailing_metadata() or ())  # type: ignore[arg-type]  # an iterable of pairs

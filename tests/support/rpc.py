"""The gRPC service without a gateway around it, over jobs that a test makes up; and gateways as processes."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import httpx

from codeyard.producer.gateway.auth import Authenticator, Development
from codeyard.producer.gateway.limits import Limits
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.rpc.codeyard_pb2_grpc import FleetStub
from codeyard.producer.rpc.serving import Probe, serving
from codeyard.shared.settings import GatewaySettings, LimitSettings, Settings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics
from support.asgi import MadeUpJobs, limits_over
from support.fleet import READY_S


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


class GatewayProcess:
    """`codeyard gateway --grpc-port 0` with these settings. `start` returns when it serves."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._config = folder / "gateway.yaml"
        self._config.write_text(settings.model_dump_json())  # JSON is YAML
        self.process: asyncio.subprocess.Process | None = None
        self.grpc = ""
        self.url = ""

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "codeyard.cli.main", "gateway"),
            *("--config", str(self._config), "--port", "0", "--grpc-port", "0"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(READY_S):
            said = [await self.process.stdout.readline() for _ in range(2)]
        assert [line.partition(b" ")[0] for line in said] == [b"grpc", b"gateway"], "the gateway ended at start"
        self.grpc, self.url = (line.decode().split()[1] for line in said)

    async def num_calls(self, method: str) -> float:
        """Calls of a method that are over, however they ended."""
        async with httpx.AsyncClient(trust_env=False) as http:
            lines = (await http.get(f"{self.url}/metrics")).text.splitlines()
        series = f'codeyard_grpc_calls_total{{route="{method}",'
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series))

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(READY_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def gateways(settings: Settings, folder: Path, count: int = 1) -> AsyncIterator[list[GatewayProcess]]:
    """So many gateway processes; those that are left are killed at the end."""
    made = [GatewayProcess(settings, folder) for _ in range(count)]
    try:
        await asyncio.gather(*(one.start() for one in made))
        yield made
    finally:
        await asyncio.gather(*(one.kill() for one in made if one.process is not None))

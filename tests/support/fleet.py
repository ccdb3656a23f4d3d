"""A worker to test with: in this process as a task, or as a process of its own."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from codeyard.producer import AsyncClient
from codeyard.shared.notice import Notice, fleet
from codeyard.shared.record import State
from codeyard.shared.settings import Settings, load
from codeyard.worker.service import run_worker

FAULTS = {"!hang": "hang", "!die": "die", "!fail": "fail", "!exit": "exit"}
READY_S = 60.0


def latency_table(folder: Path) -> Path:
    """The shipped table with faults named by prompt prefix."""
    shipped = resources.files("codeyard.worker") / "data" / "vllm-h200-qwen2.5-7b.json"
    path = folder / "table.json"
    path.write_text(json.dumps({**json.loads(shipped.read_text()), "faults": FAULTS}))
    return path


def fleet_settings(folder: Path, broker_url: str, store_url: str, namespace: str, **groups: dict[str, Any]) -> Settings:
    """Simulated engine, ten times as fast as the table; leases short enough to wait for."""
    engine = {"latency_table": latency_table(folder), "time_scale": 0.1, "max_running": 8, **groups.pop("engine", {})}
    worker = {"engine": "simulated", "stall_s": 0.5, "drain_s": 10, **groups.pop("worker", {})}
    store = {"url": store_url, "lease_s": 1.0, "renew_s": 0.2, "grace_s": 0.2, **groups.pop("store", {})}
    overrides = {"namespace": namespace, "broker": {"url": broker_url}, "store": store, "worker": worker}
    return load(None, {**overrides, "engine": engine, **groups})


@dataclass(frozen=True)
class Backend:
    """Where a fleet of this test lives. `settings` and `client` make what belongs to it."""

    folder: Path
    broker_url: str
    store_url: str
    namespace: str

    def settings(self, **groups: dict[str, Any]) -> Settings:
        return fleet_settings(self.folder, self.broker_url, self.store_url, self.namespace, **groups)

    def client(self) -> AsyncClient:
        return AsyncClient(settings=self.settings(), timeout_s=10)


@contextlib.asynccontextmanager
async def worker_task(settings: Settings) -> AsyncIterator[asyncio.Event]:
    """A worker in this process, ready; yields its stop event and drains it at the end."""
    stop, ready = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_worker(settings, stop, on_ready=lambda _: ready.set()))
        async with asyncio.timeout(READY_S):
            await ready.wait()
        try:
            yield stop
        finally:
            stop.set()


@contextlib.asynccontextmanager
async def gateway_task(settings: Settings) -> AsyncIterator[str]:
    """A gateway in this process on a free port; yields its URL."""
    from codeyard.producer.gateway.serve import run_gateway  # needs the gateway extra

    stop, url = asyncio.Event(), asyncio.get_running_loop().create_future()
    on_free_port = settings.model_copy(update={"gateway": settings.gateway.model_copy(update={"port": 0})})
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_gateway(on_free_port, stop, on_ready=url.set_result))
        async with asyncio.timeout(READY_S):
            await url
        try:
            yield url.result()
        finally:
            stop.set()


class WorkerProcess:
    """`codeyard worker` with these settings. `start` returns when it serves."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._config = folder / "worker.yaml"
        self._config.write_text(settings.model_dump_json())  # JSON is YAML
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "codeyard.cli.main", "worker", "--config", str(self._config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(READY_S):
            line = await self.process.stdout.readline()
        assert line.startswith(b"worker "), "the worker ended at start"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def ended(self) -> int:
        """Its exit status."""
        assert self.process is not None
        async with asyncio.timeout(READY_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.contextmanager
def worker_process(settings: Settings, folder: Path) -> Iterator[None]:
    """The same for tests without an event loop; killed at the end."""
    config = folder / "worker.yaml"
    config.write_text(settings.model_dump_json())
    command = [sys.executable, "-m", "codeyard.cli.main", "worker", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"worker "), "the worker ended at start"
            yield
        finally:
            process.kill()


async def running(client: AsyncClient, job_id: str) -> None:
    """Return when a worker has claimed the job. Nobody announces that, so the record is polled."""
    async with asyncio.timeout(READY_S):
        while (await client.status(job_id)).state is not State.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def first_token(client: AsyncClient, job_id: str) -> None:
    """Return when a streaming job has shown its first token."""
    stream = client.stream(job_id)
    await anext(stream)
    await stream.aclose()


async def told(client: AsyncClient, what: Callable[[Notice], bool]) -> None:
    """Return when a worker has told this of itself; its notice is read as producers read it."""
    async with asyncio.timeout(READY_S):
        while not any(what(notice) for notice in await fleet(client.store)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)

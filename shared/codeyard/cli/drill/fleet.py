"""The fleet of a drill: servers, workers, gateways and producers as processes, and the links between them.

The first of each kind of process reaches the servers straight, the others through a TCP proxy, so that a cut
or slow link meets a part of the fleet, as it does in life. Everything lives in one folder on 127.0.0.1 and
ends with this process, however that ends. Called by: faults, run.
"""

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Self

from codeyard.cli.drill import producing
from codeyard.cli.drill.plan import FAILING, LINKS, PROCESSES, SERVERS, FaultKind
from codeyard.cli.drill.producing import Gate, Spec
from codeyard.cli.drill.proxy import TcpProxy
from codeyard.cli.drill.servers import RabbitServer, RedisServer, free_port
from codeyard.cli.processes import Child
from codeyard.shared.broker.rabbitmq_nodes import node_urls
from codeyard.shared.settings import Settings, load
from codeyard.shared.store.redis_connections import each_host

LEASE_S, RENEW_S, GRACE_S = 2.0, 0.5, 1.0  # of a local fleet: short, so that a drill need not wait long
ENGINE_SPEED = 0.02  # of the latency table's times: the drill is about the protocol, not about an engine
SMALLEST_QUEUE = 200  # messages; a share of the jobs, so that it fills and still holds all that fail


@dataclass(frozen=True, slots=True)
class Size:
    """How many processes of each kind."""

    workers: int = 3
    gateways: int = 2
    producers: int = 4  # every second one submits over HTTP


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller asked for. `settings` name the servers where `against` is set, or `real` is not."""

    settings: Settings
    folder: Path
    namespace: str
    seed: int
    num_jobs: int
    real: bool  # a RabbitMQ and a Redis of its own
    against: bool = False  # somebody's fleet, which is not touched
    engine: str = "simulated"
    model: str = "starter"
    size: Size = Size()

    @property
    def can_fail(self) -> bool:
        """Whether the engine knows the prompts that are to fail."""
        return self.engine == "simulated" and not self.against

    @property
    def queue_max_length(self) -> int:
        return max(SMALLEST_QUEUE, self.num_jobs // 50)


@dataclass(slots=True)
class Fleet:
    wish: Wish
    settings: Settings  # by which the drill itself reaches broker and store, past every proxy
    workers: list[Child] = field(default_factory=list)
    gateways: list[Child] = field(default_factory=list)
    producers: list[Child] = field(default_factory=list)
    ledgers: list[Path] = field(default_factory=list)
    rabbitmq: RabbitServer | None = None
    redis: RedisServer | None = None
    to_broker: TcpProxy | None = None
    to_store: TcpProxy | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @classmethod
    async def start(cls, wish: Wish) -> Self:
        """Return when everything but the producers runs. Raises FleetError with the last lines of what did not."""
        fleet = cls(wish, wish.settings)
        try:
            await fleet._start()
        except BaseException:
            await fleet.close()
            raise
        return fleet

    @property
    def kinds(self) -> list[FaultKind]:
        """The faults that can be done to this fleet."""
        kinds = [*PROCESSES] if not self.wish.against else [FaultKind.KILL_PRODUCER]
        if self.rabbitmq is not None:
            kinds += SERVERS
        if self.to_broker is not None:
            kinds += LINKS
        return kinds

    @property
    def producing(self) -> list[Child]:
        """Producers that still have jobs to submit, or were killed over it."""
        return [one for one in self.producers if one.process is None or one.process.returncode != 0]

    @property
    def gate(self) -> Gate:
        return Gate(self.wish.folder / "gate", self.wish.num_jobs)

    async def start_producers(self) -> None:
        await asyncio.gather(*(one.start() for one in self.producers))

    async def close(self) -> None:
        for child in [*self.producers, *self.gateways, *self.workers]:
            if child.process is not None and child.process.returncode is None:
                await child.kill()
        await self._stack.aclose()

    # -------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        wish = self.wish
        broker_url, store_url = self.settings.broker.url, self.settings.store.url
        if wish.real and not wish.against:
            self.rabbitmq, self.redis = RabbitServer(wish.folder / "rabbitmq"), RedisServer(wish.folder / "redis")
            for server in (self.rabbitmq, self.redis):
                self._stack.push_async_callback(asyncio.to_thread, server.stop)
            await asyncio.gather(*(asyncio.to_thread(server.start) for server in (self.rabbitmq, self.redis)))
            broker_url, store_url = self.rabbitmq.url, self.redis.url
        if broker_url.startswith("amqp") and store_url.startswith("redis"):
            self.to_broker = await self._stack.enter_async_context(TcpProxy.to(node_urls(broker_url)[0]))
            self.to_store = await self._stack.enter_async_context(TcpProxy.to(each_host(store_url)[0]))
        if not wish.against:
            self.settings = self._own_settings(broker_url, store_url)
            self.workers = [self._worker(n) for n in range(wish.size.workers)]
            self.gateways = [self._gateway(n) for n in range(wish.size.gateways)]
            await asyncio.gather(*(child.start() for child in [*self.workers, *self.gateways]))
        self.producers = [self._producer(n) for n in range(wish.size.producers)]

    def _own_settings(self, broker_url: str, store_url: str) -> Settings:
        wish = self.wish
        given = {
            "namespace": wish.namespace,
            "auth": {"mode": "off"},  # on loopback, for this run
            "log_level": "WARNING",
            "broker": {"url": broker_url, "queue_max_length": wish.queue_max_length, "publish_timeout_s": 5.0},
            "store": {"url": store_url, "lease_s": LEASE_S, "renew_s": RENEW_S, "grace_s": GRACE_S},
            "worker": {"model": wish.model, "engine": wish.engine, "max_attempts": 2, "drain_s": 5.0},
            "engine": {"time_scale": ENGINE_SPEED, "enforce_eager": True, "max_running": 64},
        }
        if wish.engine == "simulated":
            given["engine"] |= {"latency_table": self._latency_table()}  # type: ignore[operator]  # a dict, as above
        return load(None, given)

    def _latency_table(self) -> Path:
        shipped = resources.files("codeyard.worker") / "data" / "vllm-h200-qwen2.5-7b.json"
        path = self.wish.folder / "table.json"
        path.write_text(json.dumps({**json.loads(shipped.read_text()), "faults": {FAILING: "fail"}}))
        return path

    def _config(self, name: str, *, through_proxy: bool) -> str:
        """A settings file for one process."""
        settings = self.settings
        if through_proxy and self.to_broker is not None and self.to_store is not None:
            broker = settings.broker.model_copy(update={"url": self.to_broker.url(settings.broker.url)})
            store = settings.store.model_copy(update={"url": self.to_store.url(settings.store.url)})
            settings = settings.model_copy(update={"broker": broker, "store": store})
        path = self.wish.folder / f"{name}.yaml"
        path.write_text(settings.model_dump_json())  # JSON is YAML
        path.chmod(0o600)  # URLs may hold passwords
        return str(path)

    def _worker(self, number: int) -> Child:
        config = self._config(f"worker-{number}", through_proxy=number > 0)
        return Child(f"worker {number}", ("worker", "--config", config), {}, "worker", keeps_settings=False)

    def _gateway(self, number: int) -> Child:
        """On a port that it comes back on."""
        config = self._config(f"gateway-{number}", through_proxy=number > 0)
        port = str(free_port())
        return Child(
            f"gateway {number}", ("gateway", "--config", config, "--port", port), {}, "gateway", keeps_settings=False
        )

    def _producer(self, number: int) -> Child:
        wish = self.wish
        spec = Spec(
            seed=wish.seed,
            first=number,
            step=wish.size.producers,
            num_jobs=wish.num_jobs,
            ledger=wish.folder / f"ledger-{number}",
            namespace=wish.namespace,
            model=wish.model.partition("=")[0],
            can_fail=wish.can_fail,
            gate=self.gate.path,
            gateways=self._urls(number) if number % 2 else (),
        )
        self.ledgers.append(spec.ledger)
        path = wish.folder / f"producer-{number}.json"
        path.write_text(spec.model_dump_json())
        arguments = (str(path), self._config(f"producer-{number}", through_proxy=number > 0))
        return Child(f"producer {number}", arguments, {}, producing.READY, producing.__name__, keeps_settings=False)

    def _urls(self, number: int) -> tuple[str, ...]:
        """Of all gateways, beginning with another one for each producer."""
        urls: Sequence[str] = [gateway.ready for gateway in self.gateways]
        start = number // 2 % len(urls) if urls else 0
        return (*urls[start:], *urls[:start])

"""No exception of a client library reaches a caller: each is translated where the library is called."""

import ast
import contextlib
import inspect
import sqlite3
from pathlib import Path
from types import ModuleType, SimpleNamespace

import aio_pika.exceptions
import aiormq.exceptions
import pamqp.exceptions
import pika.exceptions
import pytest
import redis.exceptions
from pamqp.commands import Basic

from codeyard.producer import pika_publisher
from codeyard.producer.pika_publisher import PikaPublisher
from codeyard.shared.broker.port import Message
from codeyard.shared.broker.rabbitmq_link import translated
from codeyard.shared.broker.sqlite import SqliteBroker
from codeyard.shared.embedded import transactions
from codeyard.shared.errors import BrokerUnavailable, StoreUnavailable
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store import redis_link
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology

ROOT = Path(__file__).parents[2]

# Who calls which library. A module that is new here needs its exceptions in a test below.
# Those of RabbitMQ go through rabbitmq_link's `translated`, those of Redis through redis_link's `_bounded`.
_PARTS = ("alarm", "consumer", "decoding", "link", "probe", "publishing")
RABBITMQ = {"rabbitmq", *(f"rabbitmq_{part}" for part in _PARTS)}
GRPC = {"calls", "client", "client_inference", "door", "link", "refusals", "server", "serving"}
CALLERS = {
    "aio_pika": RABBITMQ,
    "aiormq": RABBITMQ,
    "pamqp": RABBITMQ,
    "pika": {"pika_publisher", "probes"},  # probes: only asks whether a server answers
    "redis": {"redis_connections", "redis_link", "redis_probe", "redis_wakeups"},
    # What sending meets: test_webhooks_sending.py. demo and drill stand for a backend service: nobody's adapter.
    "httpx": {"demo", "jwks", "producing", "sending"},
    # What it raises: test_rpc_refusals.py.
    "grpc": {
        "calls",
        "client",
        "client_inference",
        "codeyard_pb2_grpc",
        "door",
        "link",
        "refusals",
        "server",
        "serving",
    },
    "jwt": {"jwks", "tokens"},  # what it raises: test_auth_tokens.py
}

# Declared, but raised nowhere in what we call: leftovers, and misuse of interfaces that we do not use.
NOT_MET = {
    "pika.exceptions.ChannelError",
    "pika.exceptions.DuplicateGetOkCallback",  # basic_get
    "pika.exceptions.ReentrancyError",  # BlockingConnection
    "redis.exceptions.ChildDeadlockedError",
    "redis.exceptions.IncorrectPolicyType",  # the cluster's routing by COMMAND policies
}


def exceptions_of(module: ModuleType) -> list[type[Exception]]:
    found = [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception) and not issubclass(kind, Warning)
        if f"{kind.__module__}.{kind.__name__}" not in NOT_MET
    ]
    assert found
    return sorted(set(found), key=lambda kind: f"{kind.__module__}.{kind.__name__}")


def made(kind: type[Exception]) -> Exception:
    """An instance as the library would raise it: one that can be printed."""
    said = "1 127.0.0.1:7000"  # what MOVED and ASK say
    nacked = (None, Basic.Nack(1))
    returned = (SimpleNamespace(delivery=Basic.Return(312, "NO_ROUTE", "jobs", "queue")), Basic.Nack(1))
    some = ((said,), (), (said, "more"), (320, said), (2, 1), (said, "more", "yet more"), nacked, returned)
    for arguments in some:
        with contextlib.suppress(TypeError, IndexError, AttributeError, ValueError):
            error = kind(*arguments)
            assert str(error) is not None
            assert repr(error)
            return error
    raise AssertionError(f"cannot make a {kind}")


def test_only_adapters_call_a_client_library() -> None:
    """Anything above them would have to know its exceptions."""
    for root in ("shared", "producer", "worker"):
        for path in (ROOT / root / "codeyard").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for library in {name.partition(".")[0] for name in names} & set(CALLERS):
                    assert path.stem in CALLERS[library], f"{path} calls {library}"


@pytest.mark.parametrize(
    "kind",
    [
        *exceptions_of(aio_pika.exceptions),
        *exceptions_of(aiormq.exceptions),
        *exceptions_of(pamqp.exceptions),
        ConnectionResetError,
        TimeoutError,
        EOFError,
    ],
)
def test_whatever_aio_pika_raises_becomes_broker_unavailable(kind: type[Exception]) -> None:
    """The reason stays in the message, the library's class does not leave."""
    with pytest.raises(BrokerUnavailable, match="publishing"), translated("publishing"):
        raise made(kind)


@pytest.mark.parametrize("kind", [*exceptions_of(redis.exceptions), ConnectionResetError, TimeoutError])
async def test_whatever_redis_raises_becomes_store_unavailable(kind: type[Exception]) -> None:
    """LOADING, READONLY and OOM included: the caller repeats, or tells its own caller to."""
    with pytest.raises(StoreUnavailable):
        async with redis_link._bounded(1.0):
            raise made(kind)


@pytest.mark.parametrize("kind", [*exceptions_of(pika.exceptions), ConnectionResetError])
async def test_whatever_pika_raises_becomes_broker_unavailable(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocking client gives up at its deadline with our error, after it has tried again."""

    async def fails(*_: object) -> None:
        raise made(kind)

    monkeypatch.setattr(pika_publisher._Connection, "open", fails)
    publisher = PikaPublisher(BrokerSettings(url="amqp://127.0.0.1:1/"), Topology("guard"))

    with pytest.raises(BrokerUnavailable):
        await publisher.publish([Message(queue="q", message_id="m", body=b"{}", headers={})], timeout_s=0.02)
    await publisher.close()


@pytest.mark.parametrize("kind", [*exceptions_of(sqlite3), OSError])
async def test_whatever_sqlite_raises_becomes_one_of_the_two(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk full, locked, damaged: the port's own error, as with a server that is away."""

    def fails(*_: object, **__: object) -> None:
        raise made(kind)

    url = f"sqlite:///{tmp_path / 'yard.db'}"
    store = await SqliteStore.open(StoreSettings(url=url), Topology("guard"))
    broker = await SqliteBroker.open(BrokerSettings(url=url), Topology("guard"))
    try:
        monkeypatch.setattr(transactions, "connect", fails)

        with pytest.raises(StoreUnavailable):
            await store.read(["5f0c7f4e-0000-7000-8000-000000000000"])
        with pytest.raises(BrokerUnavailable):
            await broker.depth(["q"])
    finally:
        monkeypatch.undo()
        await store.close()
        await broker.close()

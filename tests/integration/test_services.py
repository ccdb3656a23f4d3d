"""The tests' own servers: ready when handed over, gone when the tests are, and never somebody else's."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest
import redis
from support import servers
from support.probes import amqp_answers
from support.proxy import TcpProxy
from support.servers import RabbitServer, RedisServer, ServerFailed

pytestmark = pytest.mark.services


def test_the_session_servers_answer_when_handed_over(rabbitmq_url: str, redis_url: str) -> None:
    """A test must not have to wait for its server."""
    assert amqp_answers(rabbitmq_url)
    with redis.Redis.from_url(redis_url) as client:
        assert client.ping()


def test_a_killed_redis_comes_back_with_every_confirmed_write(private_redis: RedisServer) -> None:
    """The fixture runs Redis as we tell users to: appendfsync always."""
    with redis.Redis.from_url(private_redis.url) as client:
        client.set("kept", "yes")

    private_redis.restart()

    with redis.Redis.from_url(private_redis.url) as client:
        assert client.get("kept") == b"yes"


def test_a_killed_rabbitmq_comes_back_with_every_confirmed_message(private_rabbitmq: RabbitServer) -> None:
    """Durable data must survive a kill, or a test of durability would blame our code.

    The queue is older than the first stop: RabbitMQ 3.10 killed within seconds of declaring a quorum queue
    knows the queue's name afterwards, but starts no leader for it, and every call on it times out.
    """
    with pika.BlockingConnection(pika.URLParameters(private_rabbitmq.url)) as connection:
        connection.channel().queue_declare("kept", durable=True, arguments={"x-queue-type": "quorum"})
    private_rabbitmq.stop()
    private_rabbitmq.start()
    with pika.BlockingConnection(pika.URLParameters(private_rabbitmq.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("", "kept", b"job", pika.BasicProperties(delivery_mode=2), mandatory=True)

    private_rabbitmq.restart()

    with pika.BlockingConnection(pika.URLParameters(private_rabbitmq.url)) as connection:
        _, _, body = connection.channel().basic_get("kept", auto_ack=True)
    assert body == b"job"


def test_a_server_that_cannot_start_fails_with_its_log(tmp_path: Path) -> None:
    """The reason belongs in the test report, not in a file that is gone."""
    server = RedisServer(tmp_path)
    (tmp_path / "appendonlydir").write_text("a file where redis-server wants a folder")

    with pytest.raises(ServerFailed, match="appendonlydir"):
        server.start()


@pytest.mark.parametrize("kind", ["RedisServer", "RabbitServer"])
def test_servers_end_when_the_test_process_is_killed(tmp_path: Path, kind: str) -> None:
    """A run that was killed with -9 must leave no server, port mapper or wrapper behind."""
    if not getattr(servers, kind).available():
        pytest.skip(f"no program for {kind}")
    script = (
        "import sys, pathlib\n"
        f"from support.servers import {kind}\n"
        f"server = {kind}(pathlib.Path(sys.argv[1])).start()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with _owner_of(script, tmp_path) as owner:
        assert _processes_in(tmp_path)

        owner.send_signal(signal.SIGKILL)

    _until_none(tmp_path)


def test_any_process_ends_when_the_test_process_is_killed(tmp_path: Path) -> None:
    """Also one that a test started without ceremony, in a session of its own."""
    script = (
        "import subprocess, sys\n"
        "from support.watchdog import watching\n"
        "with watching():\n"
        "    subprocess.Popen(['sleep', '600'], cwd=sys.argv[1], stdout=subprocess.DEVNULL, start_new_session=True)\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with _owner_of(script, tmp_path) as owner:
        assert _processes_in(tmp_path)

        owner.send_signal(signal.SIGKILL)

    _until_none(tmp_path)


async def test_a_proxy_cuts_before_or_after_the_effect(redis_url: str, namespace: str) -> None:
    """Both sides of an unknown outcome must be reachable, or only one of them is ever tested."""
    async with TcpProxy.to(redis_url) as proxy:
        with redis.Redis.from_url(redis_url) as direct:
            proxy.drop_requests(containing=b"INCR")
            with pytest.raises(redis.ConnectionError):
                await asyncio.to_thread(_incr, proxy.url(redis_url), namespace)
            assert direct.get(namespace) is None

            proxy.drop_replies(after=b"INCR")
            with pytest.raises(redis.ConnectionError):
                await asyncio.to_thread(_incr, proxy.url(redis_url), namespace)
            assert direct.get(namespace) == b"1"

            assert await asyncio.to_thread(_incr, proxy.url(redis_url), namespace) == 2
            assert proxy.cuts == 2
            direct.delete(namespace)


@contextlib.contextmanager
def _owner_of(script: str, folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that stands for a test run, once it has printed `ready`."""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        yield owner


def _incr(url: str, key: str) -> int:
    """One INCR without the client's own retry."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as client:
        return int(client.incr(key))


def _processes_in(directory: Path) -> list[int]:
    """Processes that work in `directory` or were given it (Linux)."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                given = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
                if str(directory).encode() in given or (process / "cwd").readlink().is_relative_to(directory):
                    found.append(int(process.name))
            except OSError:
                continue  # ended meanwhile
    return found


def _until_none(directory: Path) -> None:
    """Wait for the processes to end, on their pidfds; fails if one is still there after 10 s."""
    import select

    for pid in _processes_in(directory):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([handle], [], [], 10)
            assert ended, f"process {pid} outlived the tests: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}"
        finally:
            os.close(handle)

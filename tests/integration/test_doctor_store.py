"""What `codeyard doctor` says of a real Redis: safe, unsafe in each way there is, or out of reach."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.doctor import healthy, only, place, worst
from support.proxy import TcpProxy
from support.redis_server import running_redis
from support.servers import free_port

from codeyard.cli.checks.check import Finding, Status
from codeyard.cli.checks.store import check_store

pytestmark = pytest.mark.services

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
IN_CLI = "in redis-cli: "
BRISK = ("--shutdown-timeout", "0")  # a primary waits for its replicas when it is told to stop


async def store(url: str, **settings: object) -> list[Finding]:
    return await check_store(place(store={"url": url, **settings}, answer_s=2.0))


async def test_a_redis_run_as_ours_are_is_healthy(redis_url: str) -> None:
    """And the line says what makes it so."""
    findings = await store(redis_url)
    assert healthy(findings)
    assert "fsync always" in findings[-1].text
    assert "noeviction" in findings[-1].text


UNSAFE = {
    "no file": (("--appendonly", "no"), "keeps no append-only file", "CONFIG SET appendonly yes"),
    "every second": (("--appendonly", "yes", "--appendfsync", "everysec"), "the last second", "appendfsync always"),
    "never": (("--appendonly", "yes", "--appendfsync", "no"), "appendfsync no", "appendfsync always"),
    "evicts": (
        (*DURABLE, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"),
        "throws accepted jobs away",
        "noeviction",
    ),
}


@pytest.mark.parametrize("options,said,way_out", UNSAFE.values(), ids=UNSAFE.keys())
async def test_a_redis_that_may_lose_accepted_jobs_is_named_with_the_way_out(
    tmp_path: Path, options: tuple[str, ...], said: str, way_out: str
) -> None:
    """It works until the day it restarts, or fills up."""
    async with running_redis(tmp_path, *options) as server:
        finding = worst(await store(server.url))
    assert said in finding.text
    assert way_out in finding.way_out
    assert finding.status is Status.FAIL


async def test_a_redis_that_is_nearly_full_warns_and_a_full_one_fails(tmp_path: Path) -> None:
    """A full one takes no more jobs: better to hear of it before."""
    async with running_redis(tmp_path, *DURABLE) as server:
        await server.command("SET", "big", "x" * 20_000_000)
        used = int((await server.command("INFO", "memory"))["used_memory"])
        await server.command("CONFIG", "SET", "maxmemory", int(used * 1.05))
        nearly = worst(await store(server.url))
        await server.command("CONFIG", "SET", "maxmemory", used // 2)
        full = await store(server.url)
    assert nearly.status is Status.WARN
    assert "takes no more jobs" in nearly.text
    assert only(full, Status.FAIL) == [f"{server.url} is full"]


async def test_the_way_out_of_an_unsafe_redis_leads_out(tmp_path: Path) -> None:
    """The commands as they are printed."""
    async with running_redis(tmp_path, "--appendonly", "no") as server:
        way_out = worst(await store(server.url)).way_out.removeprefix(IN_CLI)
        for command in way_out.split("; ")[:2]:  # no file to REWRITE here
            await server.command(*command.split())
        assert healthy(await store(server.url))
        await server.kill()  # told to stop while it writes its first file, it takes ten seconds


async def test_eviction_without_a_limit_is_a_warning_and_a_second_lost_with_replicas_too(tmp_path: Path) -> None:
    """Neither loses anything today."""
    async with running_redis(tmp_path, *DURABLE, "--maxmemory-policy", "allkeys-lru") as server:
        assert worst(await store(server.url)).status is Status.WARN

    options = ("--appendonly", "yes", "--appendfsync", "everysec", *BRISK)
    async with running_redis(tmp_path / "p", *options) as primary, follower(tmp_path / "r", primary.port) as replica:
        await until_it_follows(primary.command, replica)
        finding = worst(await store(primary.url, replicas=1))
        assert finding.status is Status.WARN
        assert "everysec" in finding.text


@asynccontextmanager
async def follower(folder: Path, port: int) -> AsyncIterator[str]:
    async with running_redis(folder, *DURABLE, "--replicaof", "127.0.0.1", str(port)) as replica:
        yield replica.url
        await replica.kill()  # told to stop while it writes its first file, it takes ten seconds


async def until_it_follows(command: object, replica: str) -> None:
    """WAIT answers with the replicas that have what was written."""
    assert callable(command)
    async with asyncio.timeout(20):
        while await command("WAIT", 1, 500) < 1:
            pass


async def test_a_replica_is_refused_and_missing_replicas_are_missed(tmp_path: Path) -> None:
    """The URL must name the primary; an ack that waits for a replica that is not there waits for ever."""
    async with (
        running_redis(tmp_path / "p", *DURABLE, *BRISK) as primary,
        follower(tmp_path / "r", primary.port) as replica,
    ):
        await until_it_follows(primary.command, replica)
        assert healthy(await store(primary.url, replicas=1))
        assert "CODEYARD_STORE_REPLICAS is 2" in worst(await store(primary.url, replicas=2)).text
        finding = worst(await store(replica))
    assert "read-only replica" in finding.text
    assert "name the primary" in finding.way_out


async def test_every_primary_of_a_cluster_is_looked_at(tmp_path: Path) -> None:
    """One unsafe node of many loses the jobs of its slots."""
    options = ("--cluster-enabled", "yes")
    safe, unsafe = (running_redis(tmp_path / name, *options, *more) for name, more in (("a", DURABLE), ("b", ())))
    async with safe as one, unsafe as other:
        await one.command("CLUSTER", "ADDSLOTSRANGE", 0, 8_000)
        await other.command("CLUSTER", "ADDSLOTSRANGE", 8_001, 16_383)
        bus = (await other.command("CONFIG GET", "cluster-port"))["cluster-port"]
        await one.command("CLUSTER", "MEET", "127.0.0.1", other.port, bus)
        await one.cluster_formed()
        findings = await store(one.url)
    assert f"127.0.0.1:{other.port} keeps no append-only file" in worst(findings).text
    assert [text.split()[3] for text in only(findings, Status.OK)] == [f"127.0.0.1:{one.port}:"]


async def test_a_password_that_is_wrong_or_left_out_is_said_without_printing_it(tmp_path: Path) -> None:
    """Two different mistakes, two ways out."""
    async with running_redis(tmp_path, *DURABLE) as server:
        await server.command("CONFIG", "SET", "requirepass", "right")
        bare = server.url.removeprefix("redis://")
        without = worst(await store(server.url))
        wrong = worst(await store(f"redis://:hunter2@{bare}"))
        right = await store(f"redis://:right@{bare}")
    assert "wants a password" in without.text
    assert "refused user or password" in wrong.text
    assert "hunter2" not in f"{wrong.text}{wrong.way_out}"
    assert healthy(right)
    assert "right@" not in str(right)


async def test_a_user_without_the_rights_gets_the_rule_that_gives_them(tmp_path: Path) -> None:
    """The rule that is printed is enough: for the doctor, and for the store."""
    async with running_redis(tmp_path, *DURABLE) as server:
        await server.command("ACL", "SETUSER", "yard", "on", ">pw", "~codeyard:*", "+@read", "+@connection", "+info")
        url = f"redis://yard:pw@{server.url.removeprefix('redis://')}"
        finding = worst([one for one in await store(url) if one.status is Status.FAIL])
        assert "may not run" in finding.text
        rule = finding.way_out.removeprefix(IN_CLI)
        assert rule.startswith("ACL SETUSER NAME ")
        await server.command(*rule.replace("NAME", "yard").split())
        assert healthy(await store(url))


async def test_a_server_that_says_nothing_ends_within_the_limit_that_is_named(redis_url: str) -> None:
    """A network that swallows packets: the link is open, no answer comes."""
    async with TcpProxy.to(redis_url) as proxy:
        proxy.stall()
        finding = worst(await check_store(place(store={"url": proxy.url(redis_url)}, answer_s=0.3)))
    assert "no answer within 0.3 s" in finding.text


async def test_nobody_there_and_no_such_host_are_told_apart() -> None:
    """The one is started, the other is mended."""
    refused = worst(await store(f"redis://127.0.0.1:{free_port()}/0"))
    unknown = worst(await store("redis://no-such-host.invalid/0"))
    assert "nobody listens there" in refused.text
    assert "redis-server" in refused.way_out
    assert "no host no-such-host.invalid" in unknown.text


async def test_something_else_that_listens_is_no_redis() -> None:
    """A URL with the wrong port."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        finding = worst(await store(f"redis://127.0.0.1:{port}/0"))
    assert finding.status is Status.FAIL
    assert f"127.0.0.1:{port}" in finding.text


class SpokenRedis:
    """A server that answers as a Redis with this INFO would: for versions and states that cannot be run here."""

    def __init__(self, **info: str | int) -> None:
        self.info = {"redis_version": "7.0.15", "redis_mode": "standalone", "role": "master", "aof_enabled": 1, **info}
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = "".join(f"{name}:{value}\r\n" for name, value in self.info.items()).encode()
        while line := await reader.readline():
            words = []
            for _ in range(int(line[1:])):
                length = int((await reader.readline())[1:])
                words.append((await reader.readexactly(length + 2))[:-2].decode().upper())
            match words:
                case ["INFO", *_]:
                    writer.write(b"$%d\r\n%s\r\n" % (len(text), text))
                case ["TIME"]:
                    writer.write(b"*2\r\n$10\r\n1000000000\r\n$1\r\n0\r\n")
                case ["CONFIG", *_] | ["CONFIG GET", *_]:
                    writer.write(b"-ERR unknown command 'CONFIG'\r\n")
                case ["EVAL", *_]:
                    writer.write(b"-LOADING Redis is loading the dataset in memory\r\n")
                case _:
                    writer.write(b"+OK\r\n")
            await writer.drain()
        writer.close()


async def test_a_redis_that_is_too_old_is_refused_by_its_version() -> None:
    """Before 7.0 a script has no flags."""
    async with SpokenRedis(redis_version="6.2.14") as url:
        finding = worst(await store(url))
    assert "6.2.14" in finding.text
    assert "upgrade" in finding.way_out


@pytest.mark.parametrize(
    "info,said",
    [({"loading": 1}, "still loading"), ({"redis_mode": "sentinel"}, "Sentinel"), ({"role": "slave"}, "read-only")],
)
async def test_a_redis_in_no_state_to_serve_says_which(info: dict[str, str | int], said: str) -> None:
    """Each has another way out."""
    async with SpokenRedis(**info) as url:
        assert said in worst(await store(url)).text


async def test_a_clock_that_is_off_and_a_hosted_redis_that_hides_its_settings_are_warnings() -> None:
    """Neither is known to lose anything."""
    async with SpokenRedis(maxmemory_policy="noeviction") as url:
        warnings = only(await store(url), Status.WARN)
    assert any("behind of this machine's" in text for text in warnings)
    assert any("CONFIG is not allowed" in text for text in warnings)


async def test_an_unused_port_of_ours_is_not_taken_for_a_server() -> None:
    """Bound and not listening: refused, as by nobody."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert "nobody listens" in worst(await store(f"redis://127.0.0.1:{bound.getsockname()[1]}/0")).text

"""`codeyard drill` with real processes, and the number it stands for: 0 lost, 0 duplicated, 0 wrong."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import services
from support.fleet import fleet_settings, worker_task
from support.servers import RabbitServer, RedisServer

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

LONG_S = 3_000
LINKS = ("cut_broker", "cut_store", "delay_broker", "delay_store")


async def drill(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the report, standard error)."""
    command = (sys.executable, "-m", "codeyard.cli.main", "drill", "--json", *arguments)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    told, errors = await process.communicate()
    assert told, errors.decode()
    assert process.returncode is not None
    return process.returncode, json.loads(told), errors.decode()


def check(report: dict[str, Any], status: int, *, jobs: int, faults: int) -> None:
    ledger = report["ledger"]
    assert report["findings"] == []
    assert {ledger[kind] for kind in ("lost", "duplicated", "wrong", "streams_not_their_result")} == {0}
    ended = sum(ledger[state] for state in ("succeeded", "failed", "expired", "cancelled"))
    assert ledger["accepted"] == ended
    assert ledger["accepted"] + ledger["refused"] >= jobs
    assert len(report["faults"]) == faults
    assert [fault for fault in report["faults"] if fault["recovery_s"] is None] == []
    assert (status, report["good"]) == (0, True)


def need_servers() -> None:
    for server, package in ((RabbitServer, "rabbitmq-server"), (RedisServer, "redis-server")):
        if not server.available():
            services.missing(f"{package} to kill", package, None)


@pytest.mark.services
async def test_five_thousand_jobs_under_faults_of_every_sort_are_all_accounted_for() -> None:
    """The proof that nothing is lost, in CI: processes, both servers and their links, each broken."""
    need_servers()
    kinds = ("kill_worker", "kill_gateway", "kill_producer", "pause_worker", "fill_queue")
    more = ("restart_broker", "restart_store", "cut_broker")
    chosen = [word for kind in (*kinds, *more) for word in ("--kind", kind)]

    status, report, _ = await drill("--jobs", "5000", "--faults", "8", "--seed", "1", *chosen)

    check(report, status, jobs=5_000, faults=8)
    assert {fault["kind"] for fault in report["faults"]} == {*kinds, *more}
    assert report["ledger"]["failed"] > 0


async def test_the_embedded_file_passes_the_drill_without_any_server(tmp_path: Path) -> None:
    """On a laptop nothing is installed, and the promise is the same. The timeline can be drawn."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "drill.png"

    arguments = ("--embedded", "--jobs", "600", "--faults", "3", "--seed", "2", "--plot", str(picture))
    status, report, _ = await drill(
        *arguments, "--kind", "kill_worker", "--kind", "kill_producer", "--kind", "kill_gateway"
    )

    check(report, status, jobs=600, faults=3)
    assert "sqlite" in report["servers"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.services
async def test_somebodys_own_fleet_is_drilled_by_its_producers_alone(
    rabbitmq_url: str, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    """A staging fleet: the drill starts and breaks nothing there but its own producers and their links."""
    settings = fleet_settings(tmp_path, rabbitmq_url, redis_url, namespace)
    place = ("--broker", rabbitmq_url, "--store", redis_url, "--namespace", namespace)
    async with worker_task(settings):
        status, report, _ = await drill("--against", *place, "--jobs", "400", "--faults", "3", "--seed", "3")

    check(report, status, jobs=400, faults=3)
    assert report["ledger"]["failed"] == 0
    assert {fault["kind"] for fault in report["faults"]} <= {"kill_producer", *LINKS}


async def test_somebodys_fleet_is_never_met_by_accident() -> None:
    """Settings in the environment must not be enough to fill a production queue."""
    command = (sys.executable, "-m", "codeyard.cli.main", "drill", "--against", "--broker", "amqp://localhost")
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)

    _, errors = await process.communicate()

    assert process.returncode == 1
    assert "--namespace" in errors.decode()


async def test_a_fault_that_the_fleet_cannot_have_is_refused_by_name() -> None:
    """The embedded file has no broker to restart."""
    command = (sys.executable, "-m", "codeyard.cli.main", "drill", "--embedded", "--jobs", "10")
    more = ("--kind", "restart_broker", "--workers", "1")
    process = await asyncio.create_subprocess_exec(*command, *more, stderr=asyncio.subprocess.PIPE)

    _, errors = await process.communicate()

    assert process.returncode == 1
    assert "knows no restart_broker" in errors.decode()


@pytest.mark.long
@pytest.mark.services
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_hundred_thousand_jobs_under_two_hundred_faults_are_all_accounted_for(seed: int) -> None:
    """The number that the project promises, for three seeds."""
    need_servers()

    status, report, _ = await drill("--jobs", "100000", "--faults", "200", "--seed", str(seed))

    check(report, status, jobs=100_000, faults=200)


@pytest.mark.long
@pytest.mark.services
@pytest.mark.vllm
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_two_thousand_jobs_of_real_vllm_under_twenty_faults_are_all_accounted_for(seed: int) -> None:
    """The same promise where answers are generated: a killed worker takes a real engine with it."""
    need_servers()
    pytest.importorskip("vllm")

    status, report, _ = await drill("--engine", "vllm", "--jobs", "2000", "--faults", "20", "--seed", str(seed))

    check(report, status, jobs=2_000, faults=20)

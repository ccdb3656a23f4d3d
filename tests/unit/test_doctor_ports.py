"""Ports that are free, taken by us, taken by somebody with a name, or not to be had."""

import errno
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.doctor import healthy, only, place, worst
from support.servers import free_port

from codeyard.cli.checks.check import Finding, Status
from codeyard.cli.checks.ports import Bound, check_ports, port_finding, try_port
from codeyard.cli.checks.processes import _is_codeyard, listener, process
from codeyard.shared.telemetry import Metrics, start_metrics_server


@pytest.fixture(autouse=True)
def _gateway_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this environment has."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@contextmanager
def taken() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


async def ports(gateway: int, metrics: int | None = None, host: str = "127.0.0.1") -> list[Finding]:
    there = place(gateway={"host": host, "port": gateway}, worker={"metrics_port": metrics}, answer_s=1.0)
    return await check_ports(there)


async def test_free_ports_are_free_and_stay_so() -> None:
    """Looking must not take them."""
    one, two = free_port(), free_port()
    for _ in range(2):
        assert [finding.status for finding in await ports(one, two)] == [Status.OK, Status.OK]


async def test_a_taken_port_is_told_with_its_owner() -> None:
    """This very process, as /proc knows it."""
    with taken() as port:
        gateway, metrics = await ports(port, port)
    for finding, variable in ((gateway, "CODEYARD_GATEWAY_PORT"), (metrics, "CODEYARD_WORKER_METRICS_PORT")):
        assert finding.status is Status.FAIL
        assert f"127.0.0.1:{port} is taken by" in finding.text
        assert f"(pid {os.getpid()})" in finding.text
        assert variable in finding.way_out


async def test_the_port_of_grpc_is_looked_at_where_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken, or nothing installed that could listen there."""
    with taken() as port:
        there = place(gateway={"host": "127.0.0.1", "port": free_port(), "grpc_port": port}, answer_s=1.0)
        _, busy, _ = await check_ports(there)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "grpc" else name)
        _, missing, _ = await check_ports(there)

    assert (busy.status, missing.status) == (Status.FAIL, Status.FAIL)
    assert f"127.0.0.1:{port} is taken by" in busy.text
    assert "CODEYARD_GATEWAY_GRPC_PORT" in busy.way_out
    assert "codeyard[grpc]" in missing.way_out


async def test_a_port_that_our_own_worker_has_is_no_trouble() -> None:
    """A doctor beside a worker that runs: it answers with our metrics."""
    with start_metrics_server(0, Metrics()) as server:
        port = int(server.url.rsplit(":", 1)[1].split("/")[0])
        findings = await ports(free_port(), port)
    assert healthy(findings)
    assert "taken by codeyard itself" in findings[1].text


async def test_another_programs_metrics_are_not_ours() -> None:
    """Many programs answer at /metrics."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"# HELP node_cpu_seconds_total ...\n")

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        findings = await ports(free_port(), server.server_port)
        server.shutdown()
    assert worst(findings).status is Status.FAIL


async def test_a_host_that_is_not_here_and_port_0() -> None:
    """A typo in the address; any free port."""
    assert "192.0.2.1 is no address of this machine" in worst(await ports(free_port(), host="192.0.2.1")).text
    assert "no-such-host.invalid is no address" in worst(await ports(1, host="no-such-host.invalid")).text
    assert only(await ports(0), Status.OK) == ["gateway: any free port of 127.0.0.1"]


def test_a_port_below_1024_says_who_may() -> None:
    """Only root, as a rule."""
    bound = Bound(errno.EACCES, "Permission denied")
    assert "from 1024 up" in port_finding("gateway", "0.0.0.0", 80, bound).way_out


async def test_without_the_gateways_packages_its_port_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's machine."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with taken() as port:
        assert healthy(await ports(port))


def test_a_process_below_ours_is_ours_and_a_file_of_that_name_is_not(tmp_path: Path) -> None:
    """An engine's process under a worker; an editor with our sources open."""
    assert _is_codeyard(["/x/bin/python", "/x/bin/codeyard", "worker"])
    assert _is_codeyard(["/x/bin/python", "-m", "codeyard.cli.main", "gateway"])
    assert not _is_codeyard(["vim", "-R", "/home/me/codeyard/notes"])
    assert not _is_codeyard(["python", "-m", "codeyardish"])

    (tmp_path / "codeyard").symlink_to(sys.executable)
    engine = "import os; print(os.getpid(), flush=True); input()"
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {engine!r}])"
    command = [str(tmp_path / "codeyard"), "-c", worker]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as top:
        assert top.stdout is not None
        child = int(top.stdout.readline())
        found = process(child)
        top.communicate(b"\n")
    assert found.ours
    assert found.pid == child


def test_nobody_is_known_where_proc_says_nothing(tmp_path: Path) -> None:
    """Another operating system, or another user's process."""
    with taken() as port:
        assert listener(port, tmp_path) is None
        assert try_port("127.0.0.1", port, within_s=0.2).owner is not None
    assert str(process(1, tmp_path)) == "a process (pid 1)"

"""`codeyard doctor` as a person, an init container and a script call it: a process, its output, its exit status."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.doctor import healthy, place
from support.proxy import TcpProxy
from support.redis_server import running_redis

from codeyard.cli import doctor as command
from codeyard.cli.checks.check import Check, Finding, Place, Status, aside, ok
from codeyard.cli.doctor import CHECKS, NAMES

QUICK = [word for name in NAMES if name != "engine" for word in ("--only", name)]
PASSWORD = "correct-horse-battery-staple"


def doctor(
    folder: Path, *words: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """With an environment that has no setting but those given, and a state folder of its own."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("CODEYARD_")}
    around |= {"XDG_STATE_HOME": str(folder / "state"), **(environment or {})}
    return subprocess.run(
        [sys.executable, "-m", "codeyard.cli.main", "doctor", *words],
        env=around,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.process
def test_a_fresh_machine_is_sound_and_stays_as_it_was(tmp_path: Path) -> None:
    """The first command of a new user. Readable without colour, a line for each finding."""
    done = doctor(tmp_path, *QUICK, "--only", "settings", environment={"CODEYARD_GATEWAY_PORT": "0"})

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert re.match(r"ok    python    Python 3\.", lines[3])
    assert re.search(r"^\d+ ok, \d+ warnings?, 0 failures, \d+ skipped in \d+\.\d s$", lines[-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_settings_that_cannot_be_read_fail_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    """With the name that was meant, and without the value."""
    done = doctor(
        tmp_path, environment={"CODEYARD_BROKER_URLL": f"amqp://u:{PASSWORD}@h", "CODEYARD_STORE_LEASE_S": "x"}
    )

    assert done.returncode == 1
    assert "FAIL  settings  CODEYARD_BROKER_URLL is no setting\n" in done.stdout
    assert "-> did you mean CODEYARD_BROKER_URL?" in done.stdout
    assert "CODEYARD_STORE_LEASE_S: Input should be a valid number" in done.stdout
    assert "ok    python" in done.stdout
    assert PASSWORD not in done.stdout + done.stderr


@pytest.mark.process
def test_a_taken_port_fails_and_names_its_owner(tmp_path: Path) -> None:
    """This test holds it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        done = doctor(tmp_path, "--only", "ports", environment={"CODEYARD_WORKER_METRICS_PORT": str(port)})

    assert done.returncode == 1
    assert f"worker metrics: 127.0.0.1:{port} is taken by" in done.stdout
    assert f"(pid {os.getpid()})" in done.stdout


@pytest.mark.process
def test_warnings_count_only_when_asked_to(tmp_path: Path) -> None:
    """`--strict` is for pipelines."""
    misspelt = {"CODEYARD_BROKR_URL": "amqp://h/"}
    assert doctor(tmp_path, "--only", "settings", environment=misspelt).returncode == 0
    assert doctor(tmp_path, "--only", "settings", "--strict", environment=misspelt).returncode == 1
    assert doctor(tmp_path, "--only", "settings", "--strict").returncode == 0


@pytest.mark.process
def test_json_is_one_document_with_everything_in_it(tmp_path: Path) -> None:
    """For scripts: names, statuses, texts, ways out."""
    done = doctor(
        tmp_path, "--only", "models", "--only", "python", "--json", environment={"CODEYARD_WORKER_MODEL": "/no"}
    )

    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert document["ok"] is False
    assert [check["name"] for check in document["checks"]] == ["python", "models"]
    [finding] = document["checks"][1]["findings"]
    assert finding["status"] == "fail"
    assert "/no" in finding["text"]
    assert finding["way_out"]


@pytest.mark.process
def test_the_effective_settings_are_shown_with_their_source_and_without_secrets(tmp_path: Path) -> None:
    """A line each, that grep finds; or JSON."""
    (tmp_path / "codeyard.yaml").write_text(f"namespace: filed\nstore: {{url: 'redis://:{PASSWORD}@h:1/0'}}\n")
    environment = {"CODEYARD_AUTH_STATIC_KEY": f"{PASSWORD}-and-more-of-it", "CODEYARD_LOG_LEVEL": "DEBUG"}
    words = ("--settings", "--broker", f"amqp://u:{PASSWORD}@h/")

    lines = doctor(tmp_path, *words, environment=environment).stdout.splitlines()
    shown = json.loads(doctor(tmp_path, *words, "--json", environment=environment).stdout)

    assert "CODEYARD_NAMESPACE=filed  # file" in lines
    assert "CODEYARD_STORE_URL=redis://:***@h:1/0  # file" in lines
    assert "CODEYARD_AUTH_STATIC_KEY=***  # environment" in lines
    assert "CODEYARD_BROKER_URL=amqp://u:***@h/  # argument" in lines
    assert "CODEYARD_STORE_LEASE_S=3.0  # default" in lines
    assert {"variable": "CODEYARD_LOG_LEVEL", "value": "DEBUG", "source": "environment"} in shown
    assert PASSWORD not in "".join(lines) + json.dumps(shown)


@pytest.mark.process
def test_the_checks_are_listed_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    """With what each looks at."""
    listed = doctor(tmp_path, "--list").stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(NAMES)
    assert doctor(tmp_path, "--only", "nonsense").returncode == 2


@pytest.mark.services
@pytest.mark.process
async def test_a_fleet_on_real_servers_is_sound(
    redis_url: str, rabbitmq_url: str, namespace: str, tmp_path: Path
) -> None:
    """What an init container runs, with no password in what it prints."""
    words = [word for name in ("broker", "queues", "store", "workers") for word in ("--only", name)]
    servers = ("--broker", rabbitmq_url, "--store", redis_url, "--namespace", namespace)
    done = await asyncio.to_thread(doctor, tmp_path, *words, *servers)
    assert done.returncode == 0, done.stdout
    assert "messages are confirmed" in done.stdout
    assert "append-only file, fsync always, noeviction" in done.stdout
    assert "guest:guest" not in done.stdout


@pytest.mark.services
@pytest.mark.process
async def test_an_unsafe_store_and_a_silent_broker_fail_in_time(rabbitmq_url: str, tmp_path: Path) -> None:
    """Each in its own line, with its own way out, and the limit that was waited for."""
    async with running_redis(tmp_path / "redis", "--appendonly", "no") as server, TcpProxy.to(rabbitmq_url) as hole:
        hole.stall()
        servers = ("--broker", hole.url(rabbitmq_url), "--store", server.url, "--timeout", "0.5")
        done = await asyncio.to_thread(
            doctor, tmp_path, "--only", "broker", "--only", "queues", "--only", "store", *servers
        )
    assert done.returncode == 1
    assert "gives no answer within 0.5 s" in done.stdout
    assert "keeps no append-only file" in done.stdout
    assert "-> in redis-cli: CONFIG SET appendonly yes" in done.stdout
    assert "2 failures" in done.stdout


# The command's own promises ------------------------------------------------------------------------


async def _break(there: Place) -> list[Finding]:
    raise ValueError("something new")


async def _fine(there: Place) -> list[Finding]:
    return [ok("fine")]


async def test_a_check_that_hangs_or_breaks_is_a_finding_and_the_others_go_on() -> None:
    """A thread in a network file system cannot be ended; the process must end all the same."""
    stuck, other_end = socket.socketpair()

    async def _hang(there: Place) -> list[Finding]:
        await aside(lambda: stuck.recv(1))
        return []

    calls: dict[str, Callable[[Place], Awaitable[list[Finding]]]] = {"hangs": _hang, "breaks": _break, "fine": _fine}
    checks = [Check(name, "", call, 0.05) for name, call in calls.items()]
    view = command._View(place(), quiet=True, refused=False)

    hangs, breaks, fine = await command._examine(checks, place(answer_s=0.001), "", view)
    other_end.close()
    stuck.close()

    assert "no end after 0.05 s" in hangs.findings[0].text
    assert "ValueError: something new" in breaks.findings[0].text
    assert healthy(fine.findings)


def test_every_check_has_a_limit_a_name_and_a_word_for_each_status() -> None:
    """Nothing here may hang for ever."""
    assert len(set(NAMES)) == len(CHECKS)
    assert all(0 < check.limit_s <= 300 and check.about for check in CHECKS)
    assert set(command.WORDS) == set(command.COLOURS) == set(Status)


@pytest.mark.parametrize("width", [60, 100, 12])
def test_long_lines_go_on_below_their_beginning_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut off, and the status column stays clear."""
    shown = _on_a_terminal(width, monkeypatch)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "".join(plain.split()) == "".join(f"FAIL store {'word ' * 30} -> {'way ' * 30}".split())
    if width >= 60:
        assert all(len(line) <= width for line in plain.splitlines())
        first, *rest = plain.splitlines()
        assert first.startswith("FAIL  store")
        assert not any(line[:14].strip() for line in rest)


def _on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    from rich.console import Console

    view = command._View(place(), quiet=True, refused=False)
    console = Console(width=width, force_terminal=True, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr(view, "_console", console)
    monkeypatch.setattr(view, "_quiet", False)
    found = Finding(Status.FAIL, "word " * 30, "way " * 30)
    view.show(command.Report("store", [replace(found, text=found.text.strip())], 0.1))
    console.file.close()
    text: Any = console.export_text()
    return str(text)

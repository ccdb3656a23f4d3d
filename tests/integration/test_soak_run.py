"""The soak itself, for a minute: that it works when somebody gives it an hour. Its verdict: tests/unit/test_soak.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loadtest.soak_load import Kind
from support.servers import RabbitServer, RedisServer
from support.services import missing

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.process
@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_minute_of_every_kind_of_job_is_accounted_for_and_every_process_is_measured(tmp_path: Path) -> None:
    """The exit status says what the figures say, whatever they are: a minute is too short to judge memory by."""
    for server in (RabbitServer, RedisServer):
        if not server.available():
            missing(f"{server.name} to start", server.name, None)
    found, picture = tmp_path / "soak.json", tmp_path / "soak.png"
    options = ("--minutes", "1", "--warm-up", "0.3", "--every", "1", "--rate", "8")

    ended = subprocess.run(
        [sys.executable, "-m", "loadtest.soak", *options, "--json", str(found), "--plot", str(picture)],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )

    assert found.exists(), ended.stdout + ended.stderr
    report = json.loads(found.read_text())
    assert report["jobs"]["wrong"] == 0, report["jobs"]["findings"]
    assert report["jobs"]["sent"] == report["jobs"]["ended_as_they_had_to"]
    assert set(report["jobs"]["by_kind"]) == set(Kind)
    for name in ("gateway", "worker 0", "worker 1"):
        assert len(report["samples"][name]) >= 10
        assert all(sample["tasks"] > 0 for sample in report["samples"][name])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (ended.returncode == 0) is report["good"]

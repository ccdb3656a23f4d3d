"""The load test itself: a few seconds of it against a real `codeyard up`."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loadtest.run import running_codeyard

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.process


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[str]:
    with running_codeyard(tmp_path / "up.log") as url:
        yield url


def test_every_kind_of_user_gets_its_jobs_done(gateway: str, tmp_path: Path) -> None:
    """A load test that counts its own mistakes as failures would be read as ours."""
    ended = _locust(gateway, tmp_path, "--users", "10", "--spawn-rate", "10", "--run-time", "3s")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    with (tmp_path / "report_stats.csv").open(newline="") as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    for name in ("/v1/jobs", "/v1/jobs/{id}", "/v1/jobs/{id}/events", "job interactive", "first token"):
        assert int(rows[name]["Request Count"]) > 0, name
    assert int(rows["Aggregated"]["Failure Count"]) == 0


def test_jobs_that_fail_are_reported_as_failures(gateway: str, tmp_path: Path) -> None:
    """Otherwise a run in which nothing worked would look like a fast one."""
    ended = _locust(gateway, tmp_path, "--users", "3", "--spawn-rate", "3", "--run-time", "1s", "--model", "nobody")

    assert ended.returncode == 1
    assert "POST /v1/jobs: 404" in ended.stdout + ended.stderr


def test_load_goes_to_this_machine_unless_told_otherwise(tmp_path: Path) -> None:
    """A mistyped host must not be flooded. (The address is reserved for documentation, RFC 5737.)"""
    ended = _locust("http://192.0.2.1", tmp_path, "--users", "1", "--run-time", "1s")

    assert ended.returncode != 0
    assert "--allow-remote" in ended.stdout + ended.stderr


def _locust(host: str, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"),
            *("--only-summary", "--csv", str(folder / "report"), "--host", host, "--stop-timeout", "20"),
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

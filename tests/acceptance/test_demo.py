"""The main job as a user runs it: the command's own audit decides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]


def demo(tmp_path: Path, *arguments: str) -> str:
    """What `codeyard demo` prints. Fails with it unless the exit status is 0."""
    done = subprocess.run(
        [sys.executable, "-m", "codeyard.cli.main", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return done.stdout


def check(output: str, engine: str) -> None:
    assert f"serves starter with {engine}" in output, "the banner names the engine"
    assert "accepted 100 = 97 succeeded + 2 failed + 1 cancelled + 0 expired" in output
    assert "killed with -9" in output
    assert "duplicates attached: 10; replayed byte for byte: 10" in output
    assert "every job ended as it should" in output


@pytest.mark.torch
def test_the_demo_on_embedded_adapters_with_torch(tmp_path: Path) -> None:
    """Two commands after a clone, this is what a newcomer sees."""
    check(demo(tmp_path), "torch")


@pytest.mark.torch
@pytest.mark.services
def test_the_demo_on_rabbitmq_and_redis(tmp_path: Path, rabbitmq_url: str, redis_url: str) -> None:
    """Changing two URLs changes nothing else."""
    check(demo(tmp_path, "--broker", rabbitmq_url, "--store", redis_url), "torch")


@pytest.mark.vllm
@pytest.mark.services
def test_the_demo_on_rabbitmq_and_redis_with_real_vllm(tmp_path: Path, rabbitmq_url: str, redis_url: str) -> None:
    """The whole product at once: durable queues, real vLLM, results in Redis."""
    check(demo(tmp_path, "--broker", rabbitmq_url, "--store", redis_url, "--engine", "vllm"), "vllm")

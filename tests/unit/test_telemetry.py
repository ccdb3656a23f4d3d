"""Log lines and metrics: what a process says about itself, and what it must never say."""

import asyncio
import io
import json
import logging
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from codeyard.shared.telemetry import Metrics, configure_logging, log_fields, start_metrics_server

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _logged(format: str, level: str = "INFO") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(level, format, stream=stream)  # type: ignore[arg-type]  # parametrized by the tests
    return stream


def test_a_text_line_is_time_level_event_and_fields() -> None:
    """People read these lines, and grep them by key=value."""
    stream = _logged("text")

    logging.getLogger("codeyard.test").info(
        "batch_settled", extra={"lane": "bulk", "num_jobs": 12, "generate_s": 0.8400001}
    )

    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO batch_settled lane=bulk num_jobs=12 generate_s=0.84\n",
        stream.getvalue(),
    )


def test_a_json_line_carries_the_same_fields_as_an_object() -> None:
    """Log shippers parse these lines."""
    stream = _logged("json")

    logging.getLogger("codeyard.test").warning("queue_full", extra={"queue": "q", "retry_s": 1.5, "level": "mine"})

    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "WARNING",
        "logger": "codeyard.test",
        "event": "queue_full",
        "queue": "q",
        "retry_s": 1.5,
    }


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_prompt_or_a_password_given_by_mistake_is_not_written(format: str) -> None:
    """Prompts are our users' code; one careless extra must not put them into a log store."""
    stream = _logged(format)

    logging.getLogger("codeyard.test").info(
        "oops", extra={"prompt": "def secret_sauce(", "password": "hunter2", "token_ids": [7, 8], "lane": "bulk"}
    )

    written = stream.getvalue()
    assert "secret_sauce" not in written
    assert "hunter2" not in written
    assert "17 not logged" in written
    assert "bulk" in written


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_value_with_a_line_break_cannot_forge_a_second_line(format: str) -> None:
    """Keys and model names come from callers."""
    stream = _logged(format)

    logging.getLogger("codeyard.test").info("a\nb", extra={"key": "x\n2026-01-01 ERROR forged"})

    assert stream.getvalue().count("\n") == 1


def test_fields_bound_once_are_on_every_line_inside_and_none_outside() -> None:
    """Ids are bound where the work starts instead of passed along."""
    stream = _logged("text")
    log = logging.getLogger("codeyard.test")

    with log_fields(job_id="j1"), log_fields(attempt=2):
        log.info("inside")
    log.info("outside")

    inside, outside = stream.getvalue().splitlines()
    assert inside.endswith("inside job_id=j1 attempt=2")
    assert outside.endswith("outside")


def test_an_exception_is_logged_with_its_traceback() -> None:
    """The person on call needs the cause."""
    stream = _logged("json")

    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("codeyard.test").exception("failed")

    assert "RuntimeError: boom" in json.loads(stream.getvalue())["exception"]


def test_libraries_speak_from_warning_up_unless_debugging() -> None:
    """A client library's chatter would bury the events."""
    stream = _logged("text")
    logging.getLogger("aio_pika.connection").info("chatter")
    assert stream.getvalue() == ""

    stream = _logged("text", "DEBUG")
    logging.getLogger("aio_pika.connection").info("chatter")
    assert "chatter" in stream.getvalue()


def test_every_metric_is_in_the_table_of_the_docs_with_the_same_words() -> None:
    """A metric that is not documented does not exist for the person who builds a dashboard."""
    rows = re.findall(r"^\| `(codeyard_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", (DOCS / "metrics.md").read_text(), re.M)

    declared = [
        (metric.name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.meaning)
        for metric in Metrics().declared
    ]

    assert [(name, kind, labels.strip(), meaning) for name, kind, labels, meaning in rows] == declared


def test_every_declared_metric_is_exposed_under_its_declared_name_and_labels() -> None:
    """The table is written from the declarations; prometheus_client must agree with them."""
    metrics = Metrics()
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
    }

    assert exposed == {metric.name: metric.kind for metric in metrics.declared}
    assert all(not {"job_id", "id", "tenant", "key"} & set(metric.labels) for metric in metrics.declared)


def test_two_processes_worth_of_metrics_do_not_meet() -> None:
    """Gateway and worker may share a process in tests and in `codeyard up`."""
    one, other = Metrics(), Metrics()

    one.retries.inc()

    assert b"codeyard_retries_total 1.0" in generate_latest(one.registry)
    assert b"codeyard_retries_total 0.0" in generate_latest(other.registry)


def test_the_workers_metrics_server_answers_on_loopback_until_closed() -> None:
    """The worker has no HTTP framework; this is its only port."""
    metrics = Metrics()
    metrics.running.labels(model="tiny").set(3)

    with start_metrics_server(0, metrics) as server:
        assert server.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(server.url, timeout=5) as answer:
            assert b'codeyard_running{model="tiny"} 3.0' in answer.read()

    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(server.url, timeout=5)


async def test_the_loops_tasks_are_counted_as_another_thread_asks_for_them() -> None:
    """The worker's metrics are read from a thread of their own; a task that ended is no task."""
    metrics, done = Metrics(), asyncio.Event()
    metrics.watch_tasks(asyncio.get_running_loop())

    def count() -> float:
        line = re.search(rb"^codeyard_loop_tasks ([0-9.]+)$", generate_latest(metrics.registry), re.M)
        return float(line[1]) if line else -1.0

    before = await asyncio.to_thread(count)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(done.wait())
        while_they_wait = await asyncio.to_thread(count)
        done.set()

    assert while_they_wait == before + 3
    assert await asyncio.to_thread(count) == before

"""What a process says about itself: log lines and metrics, declared in one place.

Logging: `configure_logging` once per process; after that every module uses
`log = logging.getLogger(__name__)` and `log.info("event_name", extra={...})`. Fields that belong to a
stretch of work (a job id) are bound once with `log_fields`. Prompts, completions and credentials are
never written: their field names are redacted here, whatever a caller passes.

Metrics: `Metrics` holds all of codeyard's, the gateway's and the worker's; docs/metrics.md is its table.
Names are `codeyard_*` in base units, label sets are fixed, and no label ever carries a job id.
Called by: gateway, worker, commands.
"""

import asyncio
import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TextIO
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

LogFormat = Literal["text", "json"]

# It logs a traceback for each lost link besides raising it; our adapters say it in one line.
ECHOING_LIBRARIES = ("aiormq",)
QUIET_LIBRARIES = ("aio_pika", "asyncio", "pika", "uvicorn", "httpx", "httpcore", "urllib3", "filelock")
REDACTED_FIELDS = frozenset(
    {"prompt", "completion", "text", "token_ids", "body", "password", "authorization", "api_key", "secret"}
)

_fields: ContextVar[Mapping[str, object] | None] = ContextVar("codeyard_log_fields", default=None)
_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


# Logging -------------------------------------------------------------------------------------------


def configure_logging(level: str = "INFO", format: LogFormat = "text", *, stream: TextIO | None = None) -> None:
    """Send every logger of the process to `stream` (stderr). Repeatable: the last call holds.

    Libraries speak from WARNING up, unless `level` is DEBUG.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "DEBUG" else logging.WARNING)
    for name in ECHOING_LIBRARIES:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "DEBUG" else logging.CRITICAL)


@contextlib.contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Add these fields to every line logged inside, also by tasks started inside."""
    token = _fields.set({**(_fields.get() or {}), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


class TextFormatter(logging.Formatter):
    """`2026-11-21T10:00:00.123Z INFO batch_settled lane=bulk num_jobs=12`, one line, then a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {name}={_as_text(value)}" for name, value in _extras(record).items())
        line = f"{_timestamp(record)} {record.levelname} {_one_line(record.getMessage())}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, the fields, and `exception` if any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in _extras(record).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    given = {name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES}
    given.pop("color_message", None)  # uvicorn's copy of its own message
    fields = {**(_fields.get() or {}), **given}
    return {name: _redacted(value) if name in REDACTED_FIELDS else value for name, value in fields.items()}


def _redacted(value: object) -> str:
    return f"<{len(value)} not logged>" if isinstance(value, str | bytes | list | tuple) else "<not logged>"


def _timestamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _as_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    plain = text and text.isprintable() and not any(char in text for char in ' "=')
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())


def _one_line(message: str) -> str:
    """No caller's text can start a second log line."""
    return message if message.isprintable() else json.dumps(message)


# Metrics -------------------------------------------------------------------------------------------

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each, which nobody reads
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3_600, 14_400)  # s
_RUNS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)  # s
_LOADS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)  # s
_TRIPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # s
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)  # jobs


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric as its readers know it."""

    name: str
    kind: str  # counter | gauge | histogram
    labels: tuple[str, ...]
    meaning: str


class Metrics:
    """Every metric of codeyard, on one registry. Gateway and worker each make one per process.

    The meaning beside each is its help text; docs/metrics.md shows the same words.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self.declared: list[Declared] = []  # in this order; docs/metrics.md is checked against it
        self._gateway()
        self._worker()
        self._models()
        self._both()

    def _gateway(self) -> None:
        self.submissions = self._counter(
            "codeyard_submissions_total",
            "Submissions answered. outcome: accepted, attached, or the problem type they were refused with.",
            "lane outcome",
        )
        self.http_requests = self._counter(
            "codeyard_http_requests_total",
            "HTTP requests by method and route template (`unmatched`: no such route) and status (499: hung up).",
            "route status",
        )
        self.http_request = self._histogram(
            "codeyard_http_request_seconds",
            "From a request's headers to the end of its answer; event streams and waits last as long as they last.",
            "route",
            _RUNS,
        )
        self.grpc_calls = self._counter(
            "codeyard_grpc_calls_total", "gRPC calls by method and the status that they ended with.", "route status"
        )
        self.grpc_call = self._histogram(
            "codeyard_grpc_call_seconds", "From a gRPC call's start to its end, as of HTTP requests.", "route", _RUNS
        )
        self.waits_open = self._gauge("codeyard_waits_open", "Requests held open by `Prefer: wait` or `wait_s` now.")
        self.streams_open = self._gauge("codeyard_streams_open", "Event streams being read over HTTP and gRPC now.")
        self.breaker_state = self._gauge(
            "codeyard_breaker_state",
            "Circuit breakers: 0 closed, 1 half-open, 2 open. kind: store, broker, model.",
            "kind model",
        )
        self.batches_owned = self._gauge("codeyard_batches_owned", "Batches this gateway works on.")
        self.batch_items = self._counter(
            "codeyard_batch_items_total",
            "Items of batches that this gateway saw end. outcome: succeeded, errored, cancelled, expired.",
            "outcome",
        )
        self.webhooks = self._counter(
            "codeyard_webhooks_total",
            "Deliveries of callbacks this gateway made. outcome: delivered, again (to be tried again), given_up.",
            "outcome",
        )

    def _worker(self) -> None:
        self.jobs = self._counter(
            "codeyard_jobs_total",
            "Jobs this worker committed. outcome: succeeded, failed, cancelled, expired.",
            "model lane outcome",
        )
        self.queue_wait = self._histogram(
            "codeyard_queue_wait_seconds", "From a job's record to its claim by this worker.", "lane", _WAITS
        )
        self.first_token = self._histogram(
            "codeyard_first_token_seconds",
            "From a job's record to its first token, or to its end if it does not stream.",
            "lane",
            _WAITS,
        )
        self.generate = self._histogram(
            "codeyard_generate_seconds", "From admission to the engine to the last token of a job.", "lane", _RUNS
        )
        self.batch_size = self._histogram(
            "codeyard_batch_size", "Jobs running in the engine when one joins, itself included.", "", _SIZES
        )
        self.window = self._gauge("codeyard_window", "Jobs this worker would let run in the engine at once.", "model")
        self.in_hand = self._gauge("codeyard_in_hand", "Deliveries this worker holds, running or waiting.", "lane")
        self.running = self._gauge("codeyard_running", "Jobs in the engine now.", "model")
        self.tokens = self._counter(
            "codeyard_tokens_total", "Tokens of committed jobs. kind: prompt, completion.", "model kind"
        )
        self.commit_group_size = self._histogram(
            "codeyard_commit_group_size", "Outcomes settled in one round trip to the store.", "", _SIZES
        )
        self.settle = self._histogram(
            "codeyard_settle_seconds", "From a finished generation to the ack of its delivery.", "", _TRIPS
        )
        self.retries = self._counter("codeyard_retries_total", "Jobs given to a delay queue to be tried again.")
        self.dead_letters = self._counter(
            "codeyard_dead_letters_total",
            "Deliveries dead-lettered. reason: the failure's stable code.",
            "reason",
        )
        self.engine_restarts = self._counter(
            "codeyard_engine_restarts_total", "Engines started again because they died or stalled."
        )
        self.lease_lost = self._counter(
            "codeyard_lease_lost_total", "Jobs in hand that another worker took or that ended elsewhere."
        )

    def _models(self) -> None:
        self.model_hits = self._counter("codeyard_model_hits_total", "Leases of an engine that was loaded.")
        self.model_misses = self._counter(
            "codeyard_model_misses_total",
            "Leases that had to wait for a model. tier: where it was, asleep or disk.",
            "tier",
        )
        self.model_load = self._histogram(
            "codeyard_model_load_seconds",
            "Getting a model ready, warm-up included. tier: from asleep, from disk.",
            "tier",
            _LOADS,
        )
        self.model_evictions = self._counter(
            "codeyard_model_evictions_total", "Models put away to make room. to: asleep, disk.", "to"
        )
        self.model_preloads = self._counter(
            "codeyard_model_preloads_total", "Models loaded ahead of need. outcome: used, wasted.", "outcome"
        )
        self.model_bytes = self._gauge(
            "codeyard_model_bytes",
            "Memory of loaded models. tier: awake (on the device), asleep (on the host).",
            "tier",
        )
        self.model_quarantined = self._gauge(
            "codeyard_model_quarantined_bytes", "Memory that closed engines did not give back; it counts as used."
        )
        self.memory_used = self._gauge(
            "codeyard_memory_used_bytes",
            "Memory in use. kind: host (this worker and its engines), device (the fullest GPU, by whomever).",
            "kind",
        )
        self.memory_limit = self._gauge(
            "codeyard_memory_limit_bytes",
            "Where intake stops. kind: host (less than set when others take it), device (absent without a limit).",
            "kind",
        )
        self.memory_window_factor = self._gauge(
            "codeyard_memory_window_factor", "What memory leaves of the window: 1 all of it, 0 while intake is stopped."
        )

    def _both(self) -> None:
        self.reconciled = self._counter(
            "codeyard_reconciled_total",
            "Due jobs the reconciler looked at. outcome: republished, expired, or left as they were.",
            "outcome",
        )
        self.loop_tasks = self._gauge("codeyard_loop_tasks", "Tasks on the process's event loop; 0 before it serves.")

    def _counter(self, name: str, meaning: str, labels: str = "") -> Counter:
        self.declared.append(Declared(name, "counter", tuple(labels.split()), meaning))
        return Counter(name, meaning, labels.split(), registry=self.registry)

    def _gauge(self, name: str, meaning: str, labels: str = "") -> Gauge:
        self.declared.append(Declared(name, "gauge", tuple(labels.split()), meaning))
        return Gauge(name, meaning, labels.split(), registry=self.registry)

    def _histogram(self, name: str, meaning: str, labels: str, buckets: tuple[float, ...]) -> Histogram:
        self.declared.append(Declared(name, "histogram", tuple(labels.split()), meaning))
        return Histogram(name, meaning, labels.split(), registry=self.registry, buckets=buckets)

    def watch_process(self) -> None:
        """Add the process's own memory, CPU time and open files (`process_*`). Once per process."""
        ProcessCollector(registry=self.registry)

    def watch_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count the loop's tasks whenever somebody reads `codeyard_loop_tasks`, from whichever thread."""
        self.loop_tasks.set_function(lambda: len(asyncio.all_tasks(loop)))


class MetricsServer:
    """The worker's `/metrics`: a thread of prometheus_client's, until `close`. A context manager."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        host, port = server.server_address[:2]
        self.url = f"http://{host!s}:{port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_metrics_server(port: int, metrics: Metrics, *, host: str = "127.0.0.1") -> MetricsServer:
    """Serve `metrics` over HTTP. Port 0 takes any free one; `url` says which.

    Raises OSError if the port is taken. Loopback unless told otherwise: metrics name models and lanes.
    """
    server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    return MetricsServer(server, thread)

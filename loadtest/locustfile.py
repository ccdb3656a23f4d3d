"""Backend services that submit code-generation jobs over HTTP and fetch the results, as Locust users.

    codeyard up --engine simulated --port 8080
    locust -f loadtest/locustfile.py --headless --users 20 --spawn-rate 10 --run-time 30s

`make load-locust` does both on a free port. Three kinds of user: most submit and poll, some wait within
the submission (`Prefer: wait`), some follow the tokens as server-sent events. Besides the HTTP calls the
report has a row `job <lane>` for each lane: from the submission to the outcome in the caller's hands;
and `first token`. A job that does not succeed within its limit is a failure, and Locust then exits with 1.
"""

import random
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from locust import HttpUser, between, events, task

from codeyard.cli.demo_prompts import standard_library_prompts

LANES = {"interactive": 5, "standard": 3, "bulk": 2}  # relative shares
PENDING = {"reserved", "queued", "running"}
POLL_S = (0.05, 0.5)  # between polls: the first wait, doubled up to the last
JOB_LIMIT_S = 60.0
HTTP_TIMEOUT_S = 15.0
WAIT_S = 10  # of `Prefer: wait`, within the HTTP timeout
PROMPTS = standard_library_prompts(200)


def _options(parser: Any) -> None:
    parser.add_argument("--model", default="starter", help="Alias of the model to ask for")
    parser.add_argument("--max-tokens", type=int, default=64, help="Most tokens a job may generate")
    parser.add_argument("--allow-remote", action="store_true", help="Put load on a host other than this machine")


def _stay_on_this_machine(environment: Any, **_: Any) -> None:
    host = urlsplit(environment.host or JobUser.host).hostname
    if host not in ("127.0.0.1", "localhost", "::1") and not environment.parsed_options.allow_remote:
        print(f"{host} is not this machine; put load on it with --allow-remote", file=sys.stderr)
        environment.process_exit_code = 2
        environment.runner.quit()  # Locust logs an exception of a listener and goes on


events.init_command_line_parser.add_listener(_options)  # type: ignore[no-untyped-call]  # Locust types this not
events.test_start.add_listener(_stay_on_this_machine)  # type: ignore[no-untyped-call]  # as above


class JobUser(HttpUser):
    """What all users share: a job with a key of its own, and how it ends."""

    abstract = True
    host = "http://127.0.0.1:8080"
    wait_time = between(0.05, 0.3)  # s; a service between two jobs

    def body(self, lane: str, *, stream: bool = False) -> dict[str, Any]:
        options = self.environment.parsed_options
        return {
            "model": options.model,
            "prompt": random.choice(PROMPTS),
            "lane": lane,
            "sampling": {"max_tokens": random.randint(1, options.max_tokens)},
            "stream": stream,
        }

    def submit(self, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        """The status of the accepted job. Raises JobLost if it was not accepted."""
        headers["Idempotency-Key"] = str(uuid.uuid4())
        with self.client.post(
            "/v1/jobs", json=body, headers=headers, timeout=HTTP_TIMEOUT_S, catch_response=True
        ) as answer:
            if answer.status_code not in (200, 202):
                answer.failure(f"{answer.status_code} {answer.text[:200]}")
                raise JobLost("not accepted")
            status: dict[str, Any] = answer.json()
            if answer.headers.get("Location") != f"/v1/jobs/{status['id']}":
                answer.failure("Location does not name the job")
            return status

    def poll(self, status: dict[str, Any]) -> dict[str, Any]:
        """Ask for the job until it is final. Raises JobLost after its limit."""
        give_up_s = time.monotonic() + JOB_LIMIT_S
        wait_s = POLL_S[0]
        while status["state"] in PENDING:
            if time.monotonic() > give_up_s:
                raise JobLost(f"still {status['state']} after {JOB_LIMIT_S:g} s")
            time.sleep(wait_s)  # lets other users run: Locust has replaced it
            wait_s = min(2 * wait_s, POLL_S[1])
            status = self.read(status["id"])
        return status

    def read(self, job_id: str) -> dict[str, Any]:
        with self.client.get(
            f"/v1/jobs/{job_id}", name="/v1/jobs/{id}", timeout=HTTP_TIMEOUT_S, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code} {answer.text[:200]}")
                raise JobLost("could not be read")
            status: dict[str, Any] = answer.json()
            return status

    @contextmanager
    def measured(self, lane: str) -> Iterator[None]:
        """A row of its own for the job as a whole."""
        started_s = time.perf_counter()
        try:
            yield
        except JobLost as lost:
            self.fire(f"job {lane}", started_s, lost)
        else:
            self.fire(f"job {lane}", started_s)

    def fire(self, name: str, started_s: float, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="JOB",
            name=name,
            response_time=(time.perf_counter() - started_s) * 1_000,  # Locust counts in milliseconds
            response_length=0,
            exception=error,
            context={},
        )


class JobLost(Exception):
    """This job was not accepted, or did not succeed."""


class PollingService(JobUser):
    """Submits and polls: what most backend services do."""

    weight = 8

    @task
    def generate(self) -> None:
        lane = _lane()
        with self.measured(lane):
            _expect_success(self.poll(self.submit(self.body(lane))))


class WaitingService(JobUser):
    """Waits for the result within the submission, and polls only if that was too short."""

    weight = 1

    @task
    def generate(self) -> None:
        with self.measured("interactive"):
            _expect_success(self.poll(self.submit(self.body("interactive"), Prefer=f"wait={WAIT_S}")))


class StreamingService(JobUser):
    """An editor's back end: shows tokens as they come."""

    weight = 1

    @task
    def generate(self) -> None:
        with self.measured("interactive"):
            started_s = time.perf_counter()
            job_id = self.submit(self.body("interactive", stream=True))["id"]
            self.follow(job_id, started_s)
            _expect_success(self.read(job_id))

    def follow(self, job_id: str, started_s: float) -> None:
        """Until the stream's `end` event. Raises JobLost if it ends without one."""
        with self.client.get(
            f"/v1/jobs/{job_id}/events",
            name="/v1/jobs/{id}/events",
            stream=True,
            timeout=JOB_LIMIT_S,
            catch_response=True,
        ) as answer:
            waiting_for_first = True
            for line in answer.iter_lines():
                if line == b"event: tokens" and waiting_for_first:
                    waiting_for_first = False
                    self.fire("first token", started_s)
                if line == b"event: end":
                    return
            answer.failure("the stream ended without an `end` event")
            raise JobLost("stream broken off")


def _lane() -> str:
    return random.choices(list(LANES), weights=list(LANES.values()))[0]


def _expect_success(status: dict[str, Any]) -> None:
    if status["state"] != "succeeded":
        error = (status.get("result") or {}).get("error") or {}
        raise JobLost(f"{status['state']} {error.get('code', '')}".strip())

"""The routes' description (OpenAPI 3.1), from which /docs is rendered too.

Written by hand around the models' own schemas (openapi_schemas): the handlers take bare requests. A test holds
it against the routes there are, and others hold answers against it. Called by: app, pages.
"""

from functools import cache
from importlib.metadata import version
from typing import Any

from codeyard.producer.gateway.anthropic import described as anthropic
from codeyard.producer.gateway.batches import described as batches
from codeyard.producer.gateway.openai import described as openai
from codeyard.producer.gateway.openapi_schemas import (
    DONE,
    EVENT_STREAM,
    EVENTS,
    EXAMPLES,
    JOB_ID,
    MODEL,
    PROBLEM,
    QUEUED,
    READY,
    SUBMISSION,
    schemas,
)
from codeyard.producer.gateway.problems import KINDS
from codeyard.producer.gateway.requests import MAX_RECENT
from codeyard.shared.access.keys import Scope

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key (`cy_...`) or a JSON Web Token."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same, in another header."},
}
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]  # one of the two
CALLER_PROBLEMS = ("unauthorized", "forbidden", "auth-unavailable", "store-unavailable")  # whoever must say who it is


@cache
def describe() -> dict[str, Any]:
    """The document. Shared: do not change it."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "codeyard",
            "version": version("codeyard"),
            "description": "Durable code-generation jobs: submit with an idempotency key, poll or stream by id.",
        },
        "paths": {
            "/v1/jobs": {"post": _submit(), "get": _recent()},
            "/v1/jobs/{job_id}": {"get": _status(), "delete": _cancel()},
            "/v1/jobs/{job_id}/events": {"get": _events()},
            **openai.paths(),
            **anthropic.paths(),
            **batches.paths(),
            **_admin(),
            "/healthz": {
                "get": _operation("health", "Is the process alive?", {"200": _json("Yes.", {"status": "ok"})})
            },
            "/readyz": {
                "get": _operation(
                    "readiness",
                    "Do broker and store answer?",
                    {"200": _json("Both do; with their versions.", READY), **_problems("not-ready")},
                )
            },
            "/metrics": {
                "get": _operation(
                    "metrics",
                    "Prometheus metrics",
                    {"200": _text("text/plain", "docs/metrics.md"), **_problems(*CALLER_PROBLEMS)},
                    description="Open to all unless the gateway's settings say otherwise; then scope `admin`.",
                    security=[{}, *SECURITY],
                )
            },
            "/openapi.json": {"get": _operation("openapi", "This document", {"200": _json("OpenAPI 3.1.")})},
            "/docs": {"get": _operation("docs", "This document as a page", {"200": _text("text/html", "The page.")})},
            "/": {"get": _operation("landing", "Where to go", {"200": _text("text/html", "A page of links.")})},
        },
        "components": {"schemas": schemas(), "securitySchemes": SECURITY_SCHEMES},
    }


def _submit() -> dict[str, Any]:
    limits = {
        f"x-ratelimit-{what}-{of}": {"schema": {"type": "string"}, "description": meaning}
        for what, meaning in (
            ("limit", "What the tenant may use at once; only if it has this limit."),
            ("remaining", "What is left of it now."),
            ("reset", "Until all of it is there again, e.g. 6m0s."),
        )
        for of in ("requests", "tokens")
    }
    location = {"Location": {"schema": {"type": "string"}, "description": "Where to poll."}, **limits}
    return _for_callers(
        Scope.SUBMIT,
        "submitJob",
        "Submit a job",
        {
            "202": _json(
                "Accepted: the broker has it on disk.",
                {**QUEUED, "attached": False, "estimated_start_s": 1.25},
                "Submitted",
                location,
            ),
            "200": _json(
                "Final: it was attached to and had ended, or it ended within the wait.",
                {**DONE, "attached": True},
                "Submitted",
                location,
            ),
            **_problems(
                "malformed-json",
                "invalid-header",
                "unknown-model",
                "body-timeout",
                "idempotency-conflict",
                "too-large",
                "storage-full",
                "unsupported-media-type",
                "invalid-job",
                "queue-full",
                "deadline-too-soon",
                "rate-limited",
                "quota-exceeded",
                "broker-unavailable",
                "model-unavailable",
                *CALLER_PROBLEMS,
            ),
        },
        description="Sending the same key and body again attaches to the job that is there and, once it is final, "
        "returns its outcome, byte for byte. So a submission without an answer can simply be sent again.",
        parameters=[
            _header(
                "Idempotency-Key",
                "Your name for the job, 1 to 200 printable ASCII characters, kept exactly as sent.",
                "fibonacci-1",
            ),
            _prefer(),
            _header("traceparent", "W3C trace context; travels with the job to the worker.", None),
        ],
        requestBody={
            "required": True,
            "content": {"application/json": {"schema": _ref("SubmitBody"), "example": SUBMISSION}},
        },
    )


def _recent() -> dict[str, Any]:
    return _for_callers(
        Scope.READ,
        "recentJobs",
        "The newest jobs",
        {
            "200": _json("Newest first; approximate, for people.", {"jobs": [DONE]}, "RecentJobs"),
            **_problems("invalid-parameter", *CALLER_PROBLEMS),
        },
        parameters=[_query("limit", f"How many, 1 to {MAX_RECENT}.", 20)],
    )


def _status() -> dict[str, Any]:
    return _for_callers(
        Scope.READ,
        "getJob",
        "Status and result",
        {
            "200": _json("What is known now; `result` is there once the state is final.", DONE, "JobStatus"),
            **_problems("job-not-found", *CALLER_PROBLEMS),
        },
        parameters=[_job_id(), _prefer()],
    )


def _cancel() -> dict[str, Any]:
    return _for_callers(
        Scope.CANCEL,
        "cancelJob",
        "Cancel",
        {
            "200": _json(
                "`cancelled`: final now. `requested`: a worker has it and stops within about a second. "
                "`already_final`: it had ended; its outcome stays. Asking twice is no error.",
                {"id": JOB_ID, "outcome": "cancelled"},
                "Cancelled",
            ),
            **_problems("job-not-found", *CALLER_PROBLEMS),
        },
        parameters=[_job_id()],
    )


def _events() -> dict[str, Any]:
    return _for_callers(
        Scope.READ,
        "followJob",
        "Follow a job as server-sent events",
        {
            "200": {
                "description": "`tokens`: append `text`. `restarted`: drop the text so far. `end`: the job is final. "
                "Comments in between keep proxies from cutting a silent stream.",
                "content": {"text/event-stream": {"schema": EVENT_STREAM, "example": EVENTS}},
            },
            "204": {"description": "Nothing comes after that event; an EventSource stops asking."},
            **_problems("invalid-header", "invalid-parameter", "job-not-found", *CALLER_PROBLEMS),
        },
        description="The SSE id is the event's sequence number, from 1, without gap or repeat, also when the job "
        "moved to another worker in between. Come back with `Last-Event-ID` to get the rest. `data` is an `Event`.",
        parameters=[
            _job_id(),
            _header("Last-Event-ID", "The last id you saw; wins over `after`.", "2"),
            _query("after", "The same, for callers that cannot set headers.", 0),
        ],
    )


# Pieces --------------------------------------------------------------------------------------------


def _admin() -> dict[str, Any]:
    one = {"200": _json("The model, its workers and its rollout.", MODEL)}
    body = {
        "rollout": {"location": {"type": "string"}, "percent": {"type": "integer", "minimum": 1, "maximum": 100}},
        "rollback": {"reason": {"type": "string", "maxLength": 500}},
    }
    alias = {
        "name": "alias",
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
        "description": "Of a model.",
    }

    def operation(name: str, summary: str, responses: dict[str, Any], *kinds: str, **more: Any) -> dict[str, Any]:
        problems = _problems(*kinds, *CALLER_PROBLEMS)
        return _for_callers(Scope.ADMIN, name, summary, {**responses, **problems}, **more)

    def changing(name: str, what: str, summary: str) -> dict[str, Any]:
        content = {
            "application/json": {"schema": {"type": "object", "properties": body[what]}, "example": EXAMPLES[what]}
        }
        kinds = ("malformed-json", "unknown-model", "rollout-refused", "too-large", "invalid-job")
        return operation(name, summary, one, *kinds, parameters=[alias], requestBody={"content": content})

    path = "/v1/admin/models"
    return {
        path: {"get": operation("models", "Every model", {"200": _json("All of them.", {"models": [MODEL]})})},
        f"{path}/{{alias}}": {"get": operation("model", "One model", one, "unknown-model", parameters=[alias])},
        f"{path}/{{alias}}/rollout": {
            "post": changing("rollout", "rollout", "Begin a rollout, or give the one under way another share")
        },
        f"{path}/{{alias}}/rollback": {
            "post": changing("rollback", "rollback", "All new jobs to the revision before, at once")
        },
    }


def _operation(name: str, summary: str, responses: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, **more, "responses": responses}


def _for_callers(scope: Scope, name: str, summary: str, responses: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An operation that needs credentials with this scope."""
    description = f"{more.pop('description', '')} Scope `{scope.value}`.".strip()
    return _operation(name, summary, responses, description=description, security=SECURITY, **more)


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(
    description: str, example: Any = None, schema: str | None = None, headers: dict[str, Any] | None = None
) -> dict[str, Any]:
    content = {"schema": _ref(schema) if schema else {"type": "object"}}
    if example is not None:
        content["example"] = example
    answer: dict[str, Any] = {"description": description, "content": {"application/json": content}}
    return {**answer, "headers": headers} if headers else answer


def _text(media_type: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


def _problems(*kinds: str) -> dict[str, Any]:
    """By status; one status may stand for several kinds."""
    answers = {}
    for status in sorted({KINDS[kind].status for kind in kinds}):
        content: dict[str, Any] = {"schema": _ref("Problem")}
        if status == PROBLEM["status"]:
            content["example"] = PROBLEM
        answers[str(status)] = {
            "description": ", ".join(f"`{kind}`" for kind in kinds if KINDS[kind].status == status),
            "content": {"application/problem+json": content},
        }
    return answers


def _parameter(where: str, name: str, description: str, schema: dict[str, Any], example: Any) -> dict[str, Any]:
    parameter = {"name": name, "in": where, "description": description, "schema": schema}
    return parameter if example is None else {**parameter, "example": example}


def _header(name: str, description: str, example: str | None) -> dict[str, Any]:
    return _parameter("header", name, description, {"type": "string"}, example)


def _prefer() -> dict[str, Any]:
    text = "`wait=N`: hold the answer until the job is final, at most N seconds (and the gateway's own limit)."
    return _header("Prefer", text, "wait=10")


def _query(name: str, description: str, example: int) -> dict[str, Any]:
    return _parameter("query", name, description, {"type": "integer"}, example)


def _job_id() -> dict[str, Any]:
    path = _parameter("path", "job_id", "The request id.", {"type": "string", "format": "uuid"}, JOB_ID)
    return {**path, "required": True}

"""The API's description, and a reference page made of it that needs nothing from elsewhere.

Written by hand rather than derived from annotations: the routes parse their bodies themselves, so that
errors name fields in one way. A test holds it against the routes.
"""

import html
import json
from functools import cache
from typing import Any

from codeyard.shared.job import DEFAULT_TIMEOUT_S, Lane, Sampling
from codeyard.shared.record import Event, JobStatus

EXAMPLE = {
    "model": "starter",
    "prompt": 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""',
    "lane": "interactive",
    "sampling": {"max_tokens": 64, "temperature": 0.3},
    "stream": True,
}


@cache
def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    status = _ref("JobStatus")
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "maxLength": 200},
        "description": "Your name for the job. The same key with the same body attaches to the job there.",
    }
    prefer = {
        "name": "Prefer",
        "in": "header",
        "schema": {"type": "string", "examples": ["wait=10"]},
        "description": "`wait=N`: answer with the result if the job is final within N seconds.",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "codeyard",
            "version": "1",
            "description": "Durable code-generation jobs: submit, then poll or stream by id.",
        },
        "paths": {
            "/v1/jobs": {
                "post": {
                    "summary": "Submit a job",
                    "parameters": [key, prefer],
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": _submission(), "example": EXAMPLE}},
                    },
                    "responses": {
                        "202": _answer("Accepted: at the broker, confirmed. `Location` names the job.", status),
                        "200": _answer("Final already: attached to a finished job, or within the wait.", status),
                        **_problems(400, 404, 409, 413, 415, 422, 429, 503),
                    },
                },
                "get": {
                    "summary": "The newest jobs",
                    "parameters": [_query("limit", "how many, 1 to 1000")],
                    "responses": {"200": _answer("Newest first.", {"type": "object"}), **_problems(400, 422, 503)},
                },
            },
            "/v1/jobs/{job_id}": {
                "get": {
                    "summary": "Status and result",
                    "parameters": [_job_id()],
                    "responses": {"200": _answer("What is known now.", status), **_problems(404, 503)},
                },
                "delete": {
                    "summary": "Cancel",
                    "parameters": [_job_id()],
                    "responses": {
                        "200": _answer("`outcome`: cancelled, requested or already_final.", {"type": "object"}),
                        **_problems(404, 503),
                    },
                },
            },
            "/v1/jobs/{job_id}/events": {
                "get": {
                    "summary": "Follow a job as server-sent events",
                    "description": "Events `tokens`, `restarted` and `end`; the SSE id is the sequence number, "
                    "from 1 without gap. Resume with `Last-Event-ID`.",
                    "parameters": [_job_id(), _query("after", "resume after this sequence number")],
                    "responses": {
                        "200": {
                            "description": "The stream.",
                            "content": {"text/event-stream": {"schema": _ref("Event")}},
                        },
                        "204": {"description": "Nothing after that event: the job is final."},
                        **_problems(400, 404, 422, 503),
                    },
                }
            },
            "/healthz": {"get": {"summary": "The process lives", "responses": {"200": {"description": "ok"}}}},
            "/readyz": {
                "get": {
                    "summary": "Broker and store answer",
                    "responses": {"200": {"description": "with their versions"}, **_problems(503)},
                }
            },
            "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": {"description": "text"}}}},
        },
        "components": {"schemas": _schemas()},
    }


@cache
def reference_page() -> str:
    """One HTML page: what it is, how to try it, every route."""
    document = describe()
    routes = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answers = ", ".join(operation["responses"])
            text = operation.get("description", "")
            routes.append(
                f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code></td>"
                f"<td>{html.escape(operation['summary'])}. {html.escape(text)}</td><td>{answers}</td></tr>"
            )
    rows = "".join(_row(name, text) for name, text in _field_texts())
    example = html.escape(json.dumps(EXAMPLE, indent=2))
    return PAGE.format(routes="\n".join(routes), rows=rows, example=example)


def _field_texts() -> list[tuple[str, str]]:
    properties = _submission()["properties"]
    return [(name, schema["description"]) for name, schema in properties.items()]


def _row(name: str, text: str) -> str:
    return f"<tr><td><code>{name}</code></td><td>{html.escape(text)}</td></tr>"


def _submission() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "prompt"],
        "properties": {
            "model": {"type": "string", "description": "Alias of a model that a worker serves."},
            "prompt": {
                "oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}],
                "description": "Text, or token ids of the model's vocabulary.",
            },
            "lane": {
                "enum": [str(lane) for lane in Lane],
                "default": "standard",
                "description": "Priority class: interactive, standard or bulk.",
            },
            "sampling": {**_ref("Sampling"), "description": f"How to generate: {', '.join(Sampling.model_fields)}."},
            "stream": {
                "type": "boolean",
                "default": False,
                "description": "Publish tokens as they come; without it they arrive in one piece.",
            },
            "timeout_s": {
                "type": "number",
                "default": DEFAULT_TIMEOUT_S,
                "description": "Deadline in seconds from now; past it the job expires.",
            },
            "metadata": {"type": "object", "description": "Yours, at most 8 KiB, kept with the job."},
        },
    }


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for model in (Sampling, JobStatus, Event):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    schemas["Problem"] = {
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "field": {"type": "string"},
            "job_id": {"type": "string"},
            "maybe_accepted": {"type": "boolean"},
        },
    }
    return schemas


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _problems(*codes: int) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": _ref("Problem")}}
    return {str(code): {"description": "A problem document (RFC 9457).", "content": content} for code in codes}


def _job_id() -> dict[str, Any]:
    return {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}}


def _query(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "integer"}, "description": text}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>codeyard</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }}
 h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2rem }} code, pre {{ font: 14px/1.45 ui-monospace, monospace }}
 pre {{ background: #f3f5f8; padding: 1rem; border-radius: 6px; overflow-x: auto }}
 table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; vertical-align: top;
 padding: .4rem .6rem; border-bottom: 1px solid #dde3ea }} a {{ color: #0b5fb0 }}
</style></head><body>
<h1>codeyard</h1><p>Durable code-generation jobs: submit, then poll or stream by id.
<a href="/openapi.json">OpenAPI document</a> · <a href="/readyz">ready?</a> · <a href="/metrics">metrics</a></p>
<h2>Submit</h2>
<pre>curl -i localhost:8080/v1/jobs -H 'Idempotency-Key: fib-1' -H 'Content-Type: application/json' -d '{example}'</pre>
<table><tr><th>field</th><th></th></tr>{rows}</table>
<h2>Routes</h2>
<table><tr><th></th><th>path</th><th></th><th>answers</th></tr>{routes}</table>
</body></html>
"""

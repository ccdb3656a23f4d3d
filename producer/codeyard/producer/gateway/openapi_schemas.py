"""What goes over the wire, as OpenAPI shows it: the schema of each document, and an example of each.

The schemas are the models' own, with a meaning beside each field that needs one. Called by: openapi, tests.
"""

from typing import Any

from pydantic import BaseModel

from codeyard.producer.gateway.problems import KINDS
from codeyard.producer.gateway.requests import SubmitBody
from codeyard.shared.limits.rules import Verdict
from codeyard.shared.record import Event, JobStatus
from codeyard.shared.store.port import CancelVerdict

JOB_ID = "0f4a7c9e-5b1d-5c39-9f0e-2f6a5d0f5e9a"
SUBMISSION = {
    "model": "starter",
    "prompt": 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "lane": "interactive",
    "sampling": {"max_tokens": 64, "temperature": 0.2},
    "stream": True,
}
QUEUED = {
    "id": JOB_ID,
    "state": "queued",
    "lane": "interactive",
    "model": "starter",
    "revision": "starter-3f9a1c",
    "tenant": "default",
    "key": "fibonacci-1",
    "attempt": 0,
    "created_at": 1795226400.25,
    "deadline_at": 1795312800.25,
    "cancel_requested": False,
    "last_seq": 0,
}
DONE = {
    **QUEUED,
    "state": "succeeded",
    "attempt": 1,
    "started_at": 1795226400.31,
    "finished_at": 1795226400.94,
    "last_seq": 12,
    "result": {
        "v": 1,
        "state": "succeeded",
        "text": "    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 21, "completion_tokens": 34},
        "engine": "torch 2.13.0",
        "batch_size": 4,
        "first_token_s": 0.05,
        "generate_s": 0.61,
    },
}
EVENTS = (
    "retry: 1000\n\n"
    'id: 1\nevent: tokens\ndata: {"seq":1,"kind":"tokens","text":"    if n","token_ids":[301,77]}\n\n'
    'id: 2\nevent: tokens\ndata: {"seq":2,"kind":"tokens","text":" < 2:","token_ids":[40,9]}\n\n'
    'id: 3\nevent: end\ndata: {"seq":3,"kind":"end","state":"succeeded"}\n\n'
)
EVENT_STREAM = {
    "type": ["string", "object"],
    "description": "Text; tools that take it apart see an object with `id`, `event` and `data` for each event.",
}
PROBLEM = {
    "type": "/docs#invalid-job",
    "title": "Invalid job",
    "status": 422,
    "detail": "Input should be less than or equal to 2",
    "field": "sampling.temperature",
    "errors": [{"field": "sampling.temperature", "detail": "Input should be less than or equal to 2"}],
}
MODEL = {
    "alias": "coder",
    "revision": "coder-3f9a1c20",
    "workers": [{"worker": "gpu-1:17:9f0e5d0f", "revision": "coder-3f9a1c20", "tier": "awake", "serving": True}],
    "rollout": {
        "phase": "prepare",
        "old": "coder-3f9a1c20",
        "new": None,
        "location": "/models/coder-v2",
        "percent": 10,
        "reason": "",
        "ready": [],
        "waits_for": ["gpu-1:17:9f0e5d0f"],
    },
}
EXAMPLES = {"rollout": {"location": "/models/coder-v2", "percent": 10}, "rollback": {"reason": "worse answers"}}
READY = {"status": "ready", "broker": "rabbitmq 4.0.5", "store": "redis 8.0.2"}


def schemas() -> dict[str, Any]:
    """Every component, by its name."""
    found: dict[str, Any] = {}
    for model in (SubmitBody, JobStatus, Event):
        found |= _schema(model)
    for name, meanings in _MEANINGS.items():
        for field, meaning in meanings.items():
            of = found[name]["properties"][field]
            of["description"] = meaning
            of.pop("title", None)
    status = found["JobStatus"]
    status["required"] = [name for name in status["required"] if name not in _OMITTED_WHEN_UNSET]
    found["Submitted"] = {
        "title": "Submitted",
        "description": "A JobStatus, whether the job was there before, and when a new one will start.",
        "type": "object",
        "properties": {
            **status["properties"],
            "attached": {"type": "boolean"},
            "estimated_start_s": {
                "type": "number",
                "minimum": 0,
                "description": "Seconds until a worker will begin it, as measured lately; left out if not known.",
            },
        },
        "required": [*status["required"], "attached"],
    }
    found["RecentJobs"] = {
        "title": "RecentJobs",
        "type": "object",
        "properties": {"jobs": {"type": "array", "items": {"$ref": "#/components/schemas/JobStatus"}}},
        "required": ["jobs"],
    }
    outcomes = [verdict.value for verdict in CancelVerdict if verdict is not CancelVerdict.MISSING]
    found["Cancelled"] = {
        "title": "Cancelled",
        "type": "object",
        "properties": {"id": {"type": "string"}, "outcome": {"enum": outcomes}},
        "required": ["id", "outcome"],
    }
    found["Problem"] = _problem_schema()
    return found


_MEANINGS = {
    "JobStatus": {
        "id": "The request id.",
        "state": "The last four are final.",
        "revision": "What the alias pointed to when the job was accepted; it runs on that.",
        "key": "The idempotency key; the id, if the caller gave none.",
        "attempt": "Which try this is; handed back without running does not count.",
        "created_at": "Seconds since the epoch, by the store's clock, as all times here.",
        "started_at": "When the last worker took it.",
        "deadline_at": "Not final by then, it expires.",
        "cancel_requested": "A worker has it and will stop.",
        "last_seq": "Sequence number of its newest event.",
        "asked_model": "What you named, where `model` stood in for it.",
        "callback": "Where the delivery to its `callback_url` is.",
        "result": "Once it is final.",
    },
    "Result": {
        "text": "What was generated: the `tokens` events since the last `restarted`, joined.",
        "finish_reason": "`stop`, `length`, `tool_calls` or `abort`.",
        "stop": "The stop string that ended it, where one did.",
        "engine": "Which engine made it, and its version.",
        "batch_size": "Jobs in the engine when this one started, itself included.",
        "first_token_s": "Seconds from the engine's taking it to its first token.",
        "generate_s": "Seconds from the engine's taking it to its last token.",
    },
    "Event": {"token_ids": "Of the model's vocabulary.", "state": "Of an `end` event."},
}
_OMITTED_WHEN_UNSET = {"started_at", "finished_at", "result"}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema and those it refers to, each under its own name."""
    mode: Any = "validation" if model is SubmitBody else "serialization"
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode=mode)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _problem_schema() -> dict[str, Any]:
    text, error = {"type": "string"}, {"type": "object", "required": ["field", "detail"]}
    return {
        "title": "Problem",
        "description": "RFC 9457. Its `type` is a link into this page.",
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"enum": [f"/docs#{kind}" for kind in KINDS]},
            "title": text,
            "status": {"type": "integer"},
            "detail": {**text, "description": "What is wrong with this request."},
            "field": {**text, "description": "The body field, header or parameter to mend."},
            "errors": {
                "type": "array",
                "description": "All fields that are wrong.",
                "items": {**error, "properties": {"field": text, "detail": text}},
            },
            "job_id": {**text, "description": "The job it is about."},
            "limit": {
                "enum": [verdict.value for verdict in Verdict if verdict is not Verdict.GRANTED],
                "description": "What was used up.",
            },
            "maybe_accepted": {"type": "boolean", "description": "The job may be queued all the same: send it again."},
            "incident": {**text, "description": "The log has the cause under this number."},
        },
    }

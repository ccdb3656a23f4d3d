"""The routes of Anthropic's API as OpenAPI describes them; the parameters are those of the table.
Called by: gateway.openapi."""

from collections.abc import Mapping, Sequence
from typing import Any

from codeyard.producer.gateway.anthropic.errors import ENDINGS, STATUS_OF, TYPES
from codeyard.producer.gateway.anthropic.parameters import COMPLETE, MESSAGES, Parameter
from codeyard.producer.gateway.openapi_schemas import EVENT_STREAM
from codeyard.producer.gateway.problems import KINDS

REFUSALS = (
    *("malformed-json", "invalid-header", "unauthorized", "forbidden", "unknown-model", "body-timeout"),
    *("idempotency-conflict", "too-large", "storage-full", "unsupported-media-type", "invalid-job", "queue-full"),
    *("deadline-too-soon", "rate-limited", "quota-exceeded", "broker-unavailable", "store-unavailable"),
    *("auth-unavailable", "model-unavailable", "not-ready"),
)
MESSAGE = {
    "id": "msg_0f4a7c9e-5b1d-5c39-9f0e-2f6a5d0f5e9a",
    "type": "message",
    "role": "assistant",
    "model": "starter",
    "content": [{"type": "text", "text": "def add(a, b):\n    return a + b\n"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 12, "output_tokens": 14},
}
COMPLETION = {
    "type": "completion",
    "id": "compl_0f4a7c9e-5b1d-5c39-9f0e-2f6a5d0f5e9a",
    "completion": " def add(a, b):\n    return a + b\n",
    "stop_reason": "stop_sequence",
    "stop": None,
    "model": "starter",
}
TURNS = [{"role": "user", "content": "Write add(a, b) in Python."}]
ASKED = {"model": "starter", "max_tokens": 256, "messages": TURNS}
FRAMES = 'event: ping\ndata: {"type":"ping"}\n\n'
ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"enum": sorted(set(TYPES.values()))}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
        "request_id": {"type": ["string", "null"]},
    },
    "required": ["type", "error", "request_id"],
}


def paths() -> dict[str, Any]:
    key = _header("Idempotency-Key", "Your name for the job: the same request under it gets the same answer.")
    lane = _header("x-codeyard-lane", "interactive (the default), standard or bulk; wins over `service_tier`.")
    return {
        "/v1/messages": {
            "post": _operation(
                "createMessage",
                "Anthropic: a message",
                _answers("The message. With `stream`, as Anthropic's events.", MESSAGE, stream=True),
                _body(MESSAGES, ("model", "max_tokens", "messages"), ASKED),
                [key, lane],
            )
        },
        "/v1/messages/count_tokens": {
            "post": _operation(
                "countMessageTokens",
                "Anthropic: the tokens of a message",
                _answers("Counted by the model's own template and tokenizer.", {"input_tokens": 12}),
                _body(MESSAGES, ("model", "messages"), {"model": "starter", "messages": TURNS}),
                [lane],
            )
        },
        "/v1/complete": {
            "post": _operation(
                "complete",
                "Anthropic: the old text form",
                _answers("The completion. With `stream`, in pieces.", COMPLETION, stream=True),
                _body(
                    COMPLETE,
                    ("model", "prompt", "max_tokens_to_sample"),
                    {
                        "model": "starter",
                        "max_tokens_to_sample": 256,
                        "prompt": "\n\nHuman: Write add(a, b) in Python.\n\nAssistant:",
                    },
                ),
                [key, lane],
            )
        },
    }


def _operation(
    name: str, summary: str, responses: Mapping[str, Any], body: Mapping[str, Any], parameters: Sequence[Any]
) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "description": "docs/anthropic.md is the reference. Scope `submit`.",
        "security": [{"bearer": []}, {"apiKey": []}],
        "parameters": list(parameters),
        "requestBody": body,
        "responses": responses,
    }


def _body(table: Sequence[Parameter], required: Sequence[str], example: Mapping[str, Any]) -> dict[str, Any]:
    properties = {parameter.name: {"description": parameter.note} for parameter in table if parameter.fate != "refused"}
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def _answers(description: str, example: Mapping[str, Any], *, stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}, "example": example}}
    if stream:
        content["text/event-stream"] = {"schema": EVENT_STREAM, "example": FRAMES}
    kinds: dict[int, list[str]] = {500: []}
    for kind in REFUSALS:
        kinds.setdefault(STATUS_OF.get(kind, KINDS[kind].status), []).append(kind)
    for code, status in ENDINGS.items():
        kinds.setdefault(status, []).append(code)
    errors = {
        str(status): {
            "description": f"`{TYPES[status]}`: {', '.join(kinds[status]) or 'the job failed'}",
            "content": {"application/json": {"schema": ERROR}},
        }
        for status in sorted(kinds)
    }
    return {"200": {"description": description, "content": content}, **errors}


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}

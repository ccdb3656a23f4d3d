"""The routes of OpenAI's API as OpenAPI describes them; the parameters are those of the table.
Called by: gateway.openapi."""

from collections.abc import Mapping, Sequence
from typing import Any

from codeyard.producer.gateway.openai.errors import CALLERS_FAULT, CODES
from codeyard.producer.gateway.openai.parameters import ROWS, Api, Use
from codeyard.producer.gateway.problems import KINDS

CALLER = ("unauthorized", "forbidden", "auth-unavailable", "store-unavailable")
SUBMIT = (
    *CALLER,
    *("malformed-json", "invalid-header", "unknown-model", "body-timeout", "idempotency-conflict", "too-large"),
    *("unsupported-media-type", "invalid-job", "queue-full", "deadline-too-soon", "rate-limited", "quota-exceeded"),
    *("broker-unavailable", "model-unavailable", "storage-full"),
)
ENDINGS = {
    400: tuple(CALLERS_FAULT.values()),
    500: ("engine_error and other codes of a failed job",),
    503: ("job_expired", "job_cancelled", "gateway_stopping"),
    504: ("answer_timeout",),
}  # of jobs that were accepted
ID = "0f4a7c9e-5b1d-5c39-9f0e-2f6a5d0f5e9a"
USAGE = {"prompt_tokens": 12, "completion_tokens": 14, "total_tokens": 26}
TEXT = "def add(a, b):\n    return a + b\n"
HEADING = {"created": 1795226400, "model": "starter", "system_fingerprint": "starter-3f9a1c", "service_tier": "default"}
CHAT = {
    "id": f"chatcmpl-{ID}",
    "object": "chat.completion",
    **HEADING,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}
COMPLETION = {
    "id": f"cmpl-{ID}",
    "object": "text_completion",
    **HEADING,
    "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
    "usage": USAGE,
}
CHUNKS = (
    f'data: {{"id":"chatcmpl-{ID}","object":"chat.completion.chunk","choices":[{{"index":0,'
    '"delta":{"content":"def add"},"logprobs":null,"finish_reason":null}]}\n\n'
    "data: [DONE]\n\n"
)
RESPONSE = {
    "id": f"resp_{ID}",
    "object": "response",
    "created_at": 1795226400,
    "status": "completed",
    "background": False,
    "model": "starter",
    "output": [
        {
            "id": f"msg_{ID}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}],
        }
    ],
    "usage": {"input_tokens": 12, "output_tokens": 14, "total_tokens": 26},
}
EVENTS = (
    "event: response.output_text.delta\n"
    f'data: {{"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_{ID}","output_index":0,'
    '"content_index":0,"delta":"def add","logprobs":[]}\n\n'
)
MODEL = {"id": "starter", "object": "model", "created": 0, "owned_by": "codeyard", "max_model_len": 2048}
TURNS = [{"role": "user", "content": "Write add(a, b) in Python."}]
STRING = {"type": "string"}
NULLABLE = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": NULLABLE,
                "code": NULLABLE,
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def paths() -> dict[str, Any]:
    return {
        "/v1/chat/completions": {
            "post": _generates(
                "createChatCompletion",
                "OpenAI: a chat completion",
                _body(Api.CHAT, ("model", "messages"), {"model": "starter", "messages": TURNS}),
                {"application/json": CHAT, "text/event-stream": CHUNKS},
            )
        },
        "/v1/completions": {
            "post": _generates(
                "createCompletion",
                "OpenAI: a completion",
                _body(
                    Api.COMPLETIONS, ("model", "prompt"), {"model": "starter", "prompt": "def add(", "max_tokens": 64}
                ),
                {"application/json": COMPLETION, "text/event-stream": CHUNKS},
            )
        },
        "/v1/models": {
            "get": _operation(
                "listModels",
                "OpenAI: the models that workers serve",
                "read",
                {"application/json": {"object": "list", "data": [MODEL]}},
                CALLER,
            )
        },
        "/v1/models/{model}": {
            "get": _operation(
                "retrieveModel",
                "OpenAI: one model",
                "read",
                {"application/json": MODEL},
                (*CALLER, "unknown-model"),
                parameters=[path_parameter("model", "Its alias.")],
            )
        },
        **_responses(),
    }


def _responses() -> dict[str, Any]:
    by_id = path_parameter("response_id", "`resp_` and the job's id.")
    whole = {"application/json": RESPONSE}
    follow = [
        query("stream", "Follow it as server-sent events.", {"type": "boolean"}),
        query("starting_after", "Only events with a higher `sequence_number`.", {"type": "integer"}),
    ]
    return {
        "/v1/responses": {
            "post": _generates(
                "createResponse",
                "OpenAI: a response",
                _body(Api.RESPONSES, ("model", "input"), {"model": "starter", "input": TURNS[0]["content"]}),
                {**whole, "text/event-stream": EVENTS},
            )
        },
        "/v1/responses/{response_id}": {
            "get": _operation(
                "retrieveResponse",
                "OpenAI: a response as it is, or followed",
                "read",
                {**whole, "text/event-stream": EVENTS},
                (*CALLER, "job-not-found", "invalid-parameter"),
                parameters=[by_id, *follow],
            )
        },
        "/v1/responses/{response_id}/cancel": {
            "post": _operation(
                "cancelResponse",
                "OpenAI: cancel a response",
                "cancel",
                whole,
                (*CALLER, "job-not-found"),
                parameters=[by_id],
            )
        },
    }


# Pieces --------------------------------------------------------------------------------------------


def path_parameter(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": description}


def query(name: str, description: str, schema: Mapping[str, str]) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _generates(
    name: str, summary: str, body: Mapping[str, Any], examples: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    about = "Your name for the request: the same request under it gets the same answer."
    key = {"name": "Idempotency-Key", "in": "header", "description": about, "schema": {"type": "string"}}
    return _operation(name, summary, "submit", examples, SUBMIT, ENDINGS, parameters=[key], requestBody=body, **more)


def _operation(
    name: str,
    summary: str,
    scope: str,
    examples: Mapping[str, Any],
    kinds: Sequence[str],
    endings: Mapping[int, Sequence[str]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    content = {
        media: {"schema": {"type": "object" if media == "application/json" else "string"}, "example": example}
        for media, example in examples.items()
    }
    answers = {"200": {"description": "As OpenAI answers.", "content": content}, **_refusals(kinds, endings or {})}
    return {
        "operationId": name,
        "summary": summary,
        "description": f"docs/openai.md is the reference. Scope `{scope}`.",
        "security": [{"bearer": []}, {"apiKey": []}],
        **more,
        "responses": answers,
    }


def _refusals(kinds: Sequence[str], endings: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    codes: dict[int, list[str]] = {status: list(listed) for status, listed in endings.items()}
    for kind in kinds:
        status = 400 if KINDS[kind].status == 422 else KINDS[kind].status
        codes.setdefault(status, []).append(CODES.get(kind, kind.replace("-", "_")))
    return {
        str(status): {
            "description": ", ".join(f"`{code}`" for code in dict.fromkeys(codes[status])),
            "content": {"application/json": {"schema": ERROR}},
        }
        for status in sorted(codes)
    }


def _body(api: Api, required: Sequence[str], example: Mapping[str, Any]) -> dict[str, Any]:
    properties = {
        row.name: {"description": f"`sampling.{row.becomes}`" if row.use is Use.SAMPLING else row.becomes}
        for row in ROWS[api].values()
        if row.use is not Use.REFUSED
    }
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}

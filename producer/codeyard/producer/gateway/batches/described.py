"""The routes of files and batches as OpenAPI describes them. Called by: gateway.openapi."""

from collections.abc import Mapping, Sequence
from typing import Any

from codeyard.producer.gateway.anthropic.described import ERROR as ANTHROPIC_ERROR
from codeyard.producer.gateway.openai.described import ERROR as OPENAI_ERROR
from codeyard.producer.gateway.openai.described import path_parameter, query

UUID = "0198c2f1-7c3a-7e21-9d54-2f6a5d0f5e9a"
FILE = {
    "id": f"file-{UUID}",
    "object": "file",
    "bytes": 1_048_576,
    "created_at": 1795226400,
    "expires_at": 1797818400,
    "filename": "input.jsonl",
    "purpose": "batch",
    "status": "processed",
}
BATCH = {
    "id": f"batch_{UUID}",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "input_file_id": f"file-{UUID}",
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": f"file-{UUID}-output",
    "error_file_id": None,
    "created_at": 1795226400,
    "request_counts": {"total": 1_000, "completed": 421, "failed": 0},
}
MESSAGE_BATCH = {
    "id": f"msgbatch_{UUID}",
    "type": "message_batch",
    "processing_status": "in_progress",
    "request_counts": {"processing": 579, "succeeded": 421, "errored": 0, "canceled": 0, "expired": 0},
    "created_at": "2026-11-21T08:00:00Z",
    "expires_at": "2026-11-22T08:00:00Z",
    "ended_at": None,
    "results_url": f"/v1/messages/batches/msgbatch_{UUID}/results",
}
ASKED = {"input_file_id": f"file-{UUID}", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
REQUEST = {"model": "starter", "max_tokens": 256, "messages": [{"role": "user", "content": "Write add(a, b)."}]}
UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
        "expires_after[seconds]": {"type": "integer", "minimum": 3_600, "maximum": 2_592_000},
    },
}
SENT = {"file": "requests.jsonl", "purpose": "batch"}
LINES = "One JSON object in each line; of those that have ended, while others run."
REFUSED = {
    400: "what was asked cannot be understood; the body names the field",
    401: "no valid credentials",
    403: "not with these credentials",
    404: "it was never made here, or it has ended",
    408: "the body did not arrive",
    409: "the Idempotency-Key was used for another batch",
    410: "its bytes have ended",
    413: "too large, or the tenant's quota is full",
    415: "another media type is expected",
    503: "the store does not answer, or the gateway stops",
}


def paths() -> dict[str, Any]:
    file_id, batch_id = (
        path_parameter(name, "As it was made here; another tenant's is 404.") for name in ("file_id", "batch_id")
    )
    limit = query("limit", "So many at most.", {"type": "integer"})
    after = query("after", "Those made before the one with this id.", {"type": "string"})
    purpose = query("purpose", "There are files of purpose `batch` only.", {"type": "string"})
    more = {"has_more": False}
    about = "Your name for the batch: the same request under it is the batch that is there."
    key = {"name": "Idempotency-Key", "in": "header", "description": about, "schema": {"type": "string"}}
    upload = {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD, "example": SENT}}}
    files = {
        "/v1/files": {
            "post": _openai("createFile", "OpenAI: upload a file", FILE, "submit", requestBody=upload),
            "get": _openai(
                "listFiles",
                "OpenAI: the newest files",
                {"object": "list", "data": [FILE], **more},
                parameters=[after, limit, purpose],
            ),
        },
        "/v1/files/{file_id}": {
            "get": _openai("retrieveFile", "OpenAI: a file", FILE, parameters=[file_id]),
            "delete": _openai(
                "deleteFile",
                "OpenAI: delete a file",
                {"id": FILE["id"], "object": "file", "deleted": True},
                "submit",
                parameters=[file_id],
            ),
        },
        "/v1/files/{file_id}/content": {
            "get": _openai("downloadFile", "OpenAI: a file's bytes", None, parameters=[file_id])
        },
    }
    batches = {
        "/v1/batches": {
            "post": _openai(
                "createBatch", "OpenAI: a batch", BATCH, "submit", requestBody=_body(ASKED), parameters=[key]
            ),
            "get": _openai(
                "listBatches",
                "OpenAI: the newest batches",
                {"object": "list", "data": [BATCH], **more},
                parameters=[after, limit],
            ),
        },
        "/v1/batches/{batch_id}": {
            "get": _openai("retrieveBatch", "OpenAI: how far a batch is", BATCH, parameters=[batch_id])
        },
        "/v1/batches/{batch_id}/cancel": {
            "post": _openai("cancelBatch", "OpenAI: cancel a batch", BATCH, "cancel", parameters=[batch_id])
        },
    }
    after_id = query("after_id", "Those made before the one with this id.", {"type": "string"})
    inline = _body({"requests": [{"custom_id": "item-1", "params": REQUEST}]})
    messages = {
        "/v1/messages/batches": {
            "post": _anthropic(
                "createMessageBatch",
                "Anthropic: a message batch",
                MESSAGE_BATCH,
                "submit",
                requestBody=inline,
                parameters=[key],
            ),
            "get": _anthropic(
                "listMessageBatches",
                "Anthropic: the newest message batches",
                {"data": [MESSAGE_BATCH], **more},
                parameters=[after_id, limit],
            ),
        },
        "/v1/messages/batches/{batch_id}": {
            "get": _anthropic(
                "retrieveMessageBatch", "Anthropic: how far a message batch is", MESSAGE_BATCH, parameters=[batch_id]
            ),
            "delete": _anthropic(
                "deleteMessageBatch",
                "Anthropic: delete a message batch that has ended",
                {"id": MESSAGE_BATCH["id"], "type": "message_batch_deleted"},
                "cancel",
                parameters=[batch_id],
            ),
        },
        "/v1/messages/batches/{batch_id}/results": {
            "get": _anthropic("messageBatchResults", "Anthropic: the results", None, parameters=[batch_id])
        },
        "/v1/messages/batches/{batch_id}/cancel": {
            "post": _anthropic(
                "cancelMessageBatch",
                "Anthropic: cancel a message batch",
                MESSAGE_BATCH,
                "cancel",
                parameters=[batch_id],
            )
        },
    }
    return {**files, **batches, **messages}


def _openai(name: str, summary: str, example: Any, scope: str = "read", **more: Any) -> dict[str, Any]:
    return _operation(name, summary, example, scope, OPENAI_ERROR, **more)


def _anthropic(name: str, summary: str, example: Any, scope: str = "read", **more: Any) -> dict[str, Any]:
    return _operation(name, summary, example, scope, ANTHROPIC_ERROR, **more)


def _operation(
    name: str, summary: str, example: Any, scope: str, error: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Without an example the answer is lines."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}, "example": example}}
    if example is None:
        media: Sequence[str] = ("application/jsonl", "application/x-jsonl", "application/octet-stream")
        content = {one: {"schema": {"type": "string"}} for one in media}
    refusals = {
        str(status): {"description": said, "content": {"application/json": {"schema": error}}}
        for status, said in REFUSED.items()
    }
    return {
        "operationId": name,
        "summary": summary,
        "description": f"docs/batches.md is the reference. Scope `{scope}`.",
        "security": [{"bearer": []}, {"apiKey": []}],
        "responses": {"200": {"description": "It." if example else LINES, "content": content}, **refusals},
        **more,
    }


def _body(example: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": sorted(example)}
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}

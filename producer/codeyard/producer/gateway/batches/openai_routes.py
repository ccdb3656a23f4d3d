"""OpenAI's batches, as its SDK uses them.

    POST /v1/batches               of an uploaded file: `input_file_id`, `endpoint`, `completion_window` "24h"
    GET  /v1/batches               the newest, in pages: `after`, `limit`
    GET  /v1/batches/{id}          how far it is
    POST /v1/batches/{id}/cancel   submits nothing more, cancels what is under way

The results are the files `output_file_id` and `error_file_id`, to be read while the batch runs: they grow.
Called by: batches.surfaces.
"""

import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request, Response

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.batches.items import is_text
from codeyard.producer.gateway.batches.openai_items import READERS
from codeyard.producer.gateway.batches.reading import Batches, Seen, new_batch_id
from codeyard.producer.gateway.batches.record import KINDS, WINDOW_S, BatchRecord, Outcome, Phase
from codeyard.producer.gateway.batches.results import results
from codeyard.producer.gateway.files.record import PREFIX
from codeyard.producer.gateway.files.routes import read as read_file
from codeyard.producer.gateway.files.sink import hold_all
from codeyard.producer.gateway.openai.calls import as_json
from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.surface import Kit, Route
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope

MAX_METADATA = 16  # pairs, OpenAI's bounds
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512  # characters
MARGIN_S = 600.0

OUTPUT, ERRORS = "output", "errors"  # ends of the ids of a batch's files

STATUS = {
    Phase.WAITING: "validating",
    Phase.RUNNING: "in_progress",
    Phase.FINALIZING: "finalizing",
    Phase.COMPLETED: "completed",
    Phase.FAILED: "failed",
    Phase.EXPIRED: "expired",
    Phase.CANCELLED: "cancelled",
}

_FILE_ID = re.compile(rf"{PREFIX}(?P<of>[0-9a-f-]{{36}})-(?P<part>{OUTPUT}|{ERRORS})")


class OpenAiBatches:
    def __init__(self, shelves: Shelves, kit: Kit) -> None:
        self._shelves = shelves
        self._kit = kit
        self._batches = Batches(shelves, "openai")

    def routes(self) -> list[Route]:
        return [
            Route("/v1/batches", "POST", Scope.SUBMIT, self.create),
            Route("/v1/batches", "GET", Scope.READ, self.every),
            Route("/v1/batches/{batch_id}", "GET", Scope.READ, self.one),
            Route("/v1/batches/{batch_id}/cancel", "POST", Scope.CANCEL, self.cancel),
        ]

    async def create(self, request: Request, jobs: TenantJobs) -> Response:
        settings = self._kit.settings
        key = requests.idempotency_key(request.headers)
        asked = _asked(await requests.read_body(request, jobs.body_bytes(settings.max_body_bytes)))
        file = await read_file(self._shelves, jobs.tenant, asked["input_file_id"])
        if not 0 < file.num_lines <= settings.max_batch_items:
            reason = f"the file has {file.num_lines} lines; a batch has 1 to {settings.max_batch_items}"
            raise Refused("invalid-job", reason, field="input_file_id")
        batch = BatchRecord(
            id=new_batch_id("openai"),
            api="openai",
            endpoint=asked["endpoint"],
            input_file_id=file.id,
            chunks=file.chunks,
            num_items=file.num_lines,
            metadata=asked.get("metadata"),
            created_at=time.time(),
        )
        ttl_s = kept_s(self._kit)
        await hold_all(self._shelves.blobs, jobs.tenant, file.chunks, holder=batch.id, ttl_s=ttl_s)
        same = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return as_json(view(await self._batches.create(jobs.tenant, batch, ttl_s=ttl_s, key=key, digest=same)))

    async def every(self, request: Request, jobs: TenantJobs) -> Response:
        limit = requests.whole_number(request, "limit", default=20, least=1, most=100)
        before = request.query_params.get("after")
        found = await self._batches.newest(jobs.tenant, before=before, limit=limit + 1)
        page = [view(one) for one in found[:limit]]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return as_json({"object": "list", "data": page, **ends, "has_more": len(found) > limit})

    async def one(self, request: Request, jobs: TenantJobs) -> Response:
        return as_json(view(await self._batches.read(jobs.tenant, request.path_params["batch_id"])))

    async def cancel(self, request: Request, jobs: TenantJobs) -> Response:
        return as_json(view(await self._batches.cancel(jobs.tenant, request.path_params["batch_id"])))


class ResultFiles:
    """A batch's files of results, for the routes of files."""

    def __init__(self, shelves: Shelves, kit: Kit) -> None:
        self._shelves = shelves
        self._kit = kit
        self._batches = Batches(shelves, "openai")

    async def view(self, tenant: str, file_id: str) -> Mapping[str, Any] | None:
        found = await self._found(tenant, file_id)
        if found is None:
            return None
        batch, part = found
        return {
            "id": file_id,
            "object": "file",
            "bytes": batch.output_bytes if part == OUTPUT else batch.error_bytes,
            "created_at": int(batch.created_at),
            "filename": f"{batch.id}_{part}.jsonl",
            "purpose": "batch_output",
            "status": "processed",
            "status_details": None,
        }

    async def content(self, tenant: str, file_id: str) -> AsyncIterator[bytes] | None:
        found = await self._found(tenant, file_id)
        return self._lines(tenant, *found) if found is not None else None

    async def _found(self, tenant: str, file_id: str) -> tuple[BatchRecord, str] | None:
        """Raises Refused for the files of a batch that is not there."""
        parts = _FILE_ID.fullmatch(file_id)
        if parts is None:
            return None
        seen = await self._batches.read(tenant, f"{KINDS['openai']}_{parts['of']}")
        return seen.batch, parts["part"]

    async def _lines(self, tenant: str, batch: BatchRecord, part: str) -> AsyncIterator[bytes]:
        store, most = self._kit.store, self._kit.settings.max_body_bytes
        async for result in results(store, self._shelves.blobs, tenant, batch, most_line_bytes=most):
            if (result.outcome is Outcome.SUCCEEDED) == (part == OUTPUT):
                yield result.text + b"\n"


def view(seen: Seen) -> dict[str, Any]:
    """OpenAI's object."""
    batch = seen.batch
    counts, ended = batch.counts, batch.ended_at and int(batch.ended_at)
    failed = counts.ended - counts.succeeded
    files = batch.id.removeprefix(f"{KINDS['openai']}_")
    begun = batch.phase not in (Phase.WAITING, Phase.FAILED)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": _errors(batch),
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": "cancelling" if seen.cancelling else STATUS[batch.phase],
        "output_file_id": f"{PREFIX}{files}-{OUTPUT}" if begun else None,
        "error_file_id": f"{PREFIX}{files}-{ERRORS}" if begun and failed else None,
        "created_at": int(batch.created_at),
        "in_progress_at": batch.started_at and int(batch.started_at),
        "expires_at": int(batch.created_at + WINDOW_S),
        "finalizing_at": batch.finalizing_at and int(batch.finalizing_at),
        "completed_at": ended if batch.phase is Phase.COMPLETED else None,
        "failed_at": ended if batch.phase is Phase.FAILED else None,
        "expired_at": ended if batch.phase is Phase.EXPIRED else None,
        "cancelling_at": seen.cancelling_at,
        "cancelled_at": ended if batch.phase is Phase.CANCELLED else None,
        "request_counts": {"total": batch.num_items, "completed": counts.succeeded, "failed": failed},
        "metadata": batch.metadata,
    }


def kept_s(kit: Kit) -> float:
    """How long a batch is kept: as long as the records of its jobs."""
    timing = kit.store.timing
    return WINDOW_S + timing.longest_run_s + timing.retention_s + MARGIN_S


def _errors(batch: BatchRecord) -> dict[str, Any] | None:
    if batch.problem is None:
        return None
    said = {"code": batch.problem.code, "message": batch.problem.message, "line": None, "param": "input_file_id"}
    return {"object": "list", "data": [said]}


def _asked(body: bytes) -> dict[str, Any]:
    """Raises Refused."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("malformed-json", str(error)[:200]) from None
    if not isinstance(asked, dict):
        raise Refused("malformed-json", "the body must be an object")
    if not isinstance(asked.get("input_file_id"), str):
        raise Refused("invalid-job", "the id of an uploaded file", field="input_file_id")
    if asked.get("endpoint") not in list(READERS):  # compared, not looked up: it may be of any kind
        raise Refused("invalid-job", f"one of {', '.join(READERS)}", field="endpoint")
    if asked.get("completion_window") != "24h":
        raise Refused("invalid-job", "only 24h is offered", field="completion_window")
    metadata = asked.get("metadata")
    if metadata is not None and not _fits(metadata):
        reason = (
            f"at most {MAX_METADATA} pairs of texts, of at most {MAX_METADATA_KEY} and {MAX_METADATA_VALUE} characters"
        )
        raise Refused("invalid-job", reason, field="metadata")
    if unknown := sorted(asked.keys() - {"input_file_id", "endpoint", "completion_window", "metadata"}):
        raise Refused("invalid-job", "not offered", field=unknown[0][:100])
    return asked


def _fits(metadata: Any) -> bool:
    return (
        isinstance(metadata, dict)
        and is_text(json.dumps(metadata, ensure_ascii=False))
        and len(metadata) <= MAX_METADATA
        and all(len(key) <= MAX_METADATA_KEY for key in metadata)
        and all(isinstance(value, str) and len(value) <= MAX_METADATA_VALUE for value in metadata.values())
    )

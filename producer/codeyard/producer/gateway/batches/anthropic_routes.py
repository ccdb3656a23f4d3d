"""Anthropic's message batches, as its SDK uses them.

    POST /v1/messages/batches               `{"requests": [{"custom_id", "params"}]}`, 1 to 50,000 of them
    GET  /v1/messages/batches               the newest, in pages: `after_id`, `limit`
    GET  /v1/messages/batches/{id}          how far it is
    GET  /v1/messages/batches/{id}/results  a line for each request that has ended, also while the others run
    POST /v1/messages/batches/{id}/cancel   submits nothing more, cancels what is under way
    DELETE /v1/messages/batches/{id}        of one that has ended: its results go with it

Called by: batches.surfaces.
"""

import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.batches.anthropic_items import ENDPOINT, checked
from codeyard.producer.gateway.batches.incoming import receive
from codeyard.producer.gateway.batches.openai_routes import kept_s
from codeyard.producer.gateway.batches.reading import Batches, Seen, new_batch_id
from codeyard.producer.gateway.batches.record import WINDOW_S, BatchRecord
from codeyard.producer.gateway.batches.results import results
from codeyard.producer.gateway.files.sink import Sink
from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.surface import Kit, Route
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope

PATH = "/v1/messages/batches"
MAX_PAGE = 1_000


class AnthropicBatches:
    def __init__(self, shelves: Shelves, kit: Kit) -> None:
        self._shelves = shelves
        self._kit = kit
        self._batches = Batches(shelves, "anthropic")

    def routes(self) -> list[Route]:
        return [
            Route(PATH, "POST", Scope.SUBMIT, self.create),
            Route(PATH, "GET", Scope.READ, self.every),
            Route(f"{PATH}/{{batch_id}}", "GET", Scope.READ, self.one),
            Route(f"{PATH}/{{batch_id}}", "DELETE", Scope.CANCEL, self.delete),
            Route(f"{PATH}/{{batch_id}}/results", "GET", Scope.READ, self.results),
            Route(f"{PATH}/{{batch_id}}/cancel", "POST", Scope.CANCEL, self.cancel),
        ]

    async def create(self, request: Request, jobs: TenantJobs) -> Response:
        settings, batch_id = self._kit.settings, new_batch_id("anthropic")
        sink = Sink(self._shelves.blobs, jobs.tenant, batch_id)
        ttl_s, key = kept_s(self._kit), requests.idempotency_key(request.headers)
        try:
            num_items = await receive(
                request,
                sink,
                checked,
                most_bytes=jobs.body_bytes(settings.max_file_bytes),
                most_item_bytes=settings.max_body_bytes,
                most_items=settings.max_batch_items,
            )
            chunks = await sink.keep(ttl_s)
        except BaseException:
            await sink.drop()
            raise
        batch = BatchRecord(
            id=batch_id,
            api="anthropic",
            endpoint=ENDPOINT,
            chunks=chunks,
            num_items=num_items,
            created_at=time.time(),
        )
        same = hashlib.sha256("".join(chunks).encode()).hexdigest()
        seen = await self._batches.create(jobs.tenant, batch, ttl_s=ttl_s, key=key, digest=same)
        return _json(view(seen))

    async def every(self, request: Request, jobs: TenantJobs) -> Response:
        limit = requests.whole_number(request, "limit", default=20, least=1, most=MAX_PAGE)
        if "before_id" in request.query_params:
            raise Refused(
                "invalid-parameter", "not offered: the newest come first, and after_id goes on", field="before_id"
            )
        before = request.query_params.get("after_id")
        found = await self._batches.newest(jobs.tenant, before=before, limit=limit + 1)
        page = [view(one) for one in found[:limit]]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return _json({"data": page, "has_more": len(found) > limit, "first_id": first, "last_id": last})

    async def one(self, request: Request, jobs: TenantJobs) -> Response:
        return _json(view(await self._batches.read(jobs.tenant, request.path_params["batch_id"])))

    async def cancel(self, request: Request, jobs: TenantJobs) -> Response:
        return _json(view(await self._batches.cancel(jobs.tenant, request.path_params["batch_id"])))

    async def delete(self, request: Request, jobs: TenantJobs) -> Response:
        batch_id: str = request.path_params["batch_id"]
        await self._batches.delete(jobs.tenant, batch_id)
        return _json({"id": batch_id, "type": "message_batch_deleted"})

    async def results(self, request: Request, jobs: TenantJobs) -> Response:
        seen = await self._batches.read(jobs.tenant, request.path_params["batch_id"])
        return StreamingResponse(self._lines(jobs.tenant, seen.batch), media_type="application/x-jsonl")

    async def _lines(self, tenant: str, batch: BatchRecord) -> AsyncIterator[bytes]:
        store, most = self._kit.store, self._kit.settings.max_body_bytes
        async for result in results(store, self._shelves.blobs, tenant, batch, most_line_bytes=most):
            yield result.text + b"\n"


def view(seen: Seen) -> dict[str, Any]:
    """Anthropic's object. `results_url` is there from the beginning, and relative: it is asked of the gateway that
    answered, by the name its caller knows."""
    batch, counts, over = seen.batch, seen.batch.counts, seen.batch.phase.ended
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": "ended" if over else "canceling" if seen.cancelling else "in_progress",
        "request_counts": {
            "processing": 0 if over else batch.num_items - counts.ended,
            "succeeded": counts.succeeded,
            "errored": counts.errored,
            "canceled": counts.cancelled,
            "expired": counts.expired,
        },
        "created_at": _moment(batch.created_at),
        "expires_at": _moment(batch.created_at + WINDOW_S),
        "ended_at": _moment(batch.ended_at) if batch.ended_at is not None else None,
        "cancel_initiated_at": _moment(seen.cancelling_at) if seen.cancelling_at is not None else None,
        "archived_at": None,
        "results_url": f"{PATH}/{batch.id}/results",
    }


def _moment(at: float) -> str:
    """RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _json(document: Mapping[str, Any]) -> Response:
    return Response(json.dumps(document, separators=(",", ":")), media_type="application/json")

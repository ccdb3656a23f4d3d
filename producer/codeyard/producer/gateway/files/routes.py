"""OpenAI's files, as its SDK uses them: what batches read, and what comes out of them.

    POST   /v1/files                 upload (multipart: `file`, `purpose=batch`, `expires_after[seconds]`)
    GET    /v1/files                 the newest, in pages: `after`, `limit`, `purpose`
    GET    /v1/files/{id}            one
    GET    /v1/files/{id}/content    its bytes
    DELETE /v1/files/{id}            gives its room back at once, unless a batch or another file needs the same bytes

The results of a batch are files that no bytes lie behind: they are made when they are read (batches.results), so
they can be read while the batch runs. Called by: batches.surfaces.
"""

import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from codeyard.producer.gateway.files import upload
from codeyard.producer.gateway.files.record import KIND, FileRecord, is_file_id, name_of, new_file_id
from codeyard.producer.gateway.files.sink import Sink
from codeyard.producer.gateway.openai.calls import as_json
from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.requests import whole_number
from codeyard.producer.gateway.shelves import Shelves
from codeyard.producer.gateway.surface import Route
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope
from codeyard.shared.blobs import whole
from codeyard.shared.settings import GatewaySettings

PURPOSE = "batch"
SHORTEST_S, LONGEST_S = 3_600, 2_592_000  # of `expires_after`, OpenAI's bounds
MAX_PAGE = 10_000
DEFAULT_PAGE = 100


class Made(Protocol):
    """Files that are made when they are read."""

    async def view(self, tenant: str, file_id: str) -> Mapping[str, Any] | None:
        """As OpenAI shows it; None: there is no such file."""

    async def content(self, tenant: str, file_id: str) -> AsyncIterator[bytes] | None: ...


class Files:
    def __init__(self, shelves: Shelves, settings: GatewaySettings, made: Made) -> None:
        self._shelves = shelves
        self._settings = settings
        self._made = made

    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", "POST", Scope.SUBMIT, self.create),
            Route("/v1/files", "GET", Scope.READ, self.every),
            Route("/v1/files/{file_id}", "GET", Scope.READ, self.one),
            Route("/v1/files/{file_id}", "DELETE", Scope.SUBMIT, self.delete),
            Route("/v1/files/{file_id}/content", "GET", Scope.READ, self.content),
        ]

    async def create(self, request: Request, jobs: TenantJobs) -> Response:
        settings, file_id = self._settings, new_file_id()
        sink = Sink(self._shelves.blobs, jobs.tenant, file_id)
        try:
            most_bytes = jobs.body_bytes(settings.max_file_bytes)
            sent = await upload.receive(request, sink, most_bytes=most_bytes, most_line_bytes=settings.max_body_bytes)
            ttl_s = _checked(sent.fields, settings.file_ttl_s)
            chunks = await sink.keep(ttl_s)
        except BaseException:
            await sink.drop()
            raise
        now = int(time.time())
        record = FileRecord(
            id=file_id,
            filename=sent.filename or "file",
            purpose=PURPOSE,
            size_bytes=sink.size_bytes,
            num_lines=sent.num_lines,
            created_at=now,
            expires_at=now + int(ttl_s),
            chunks=chunks,
        )
        await self._shelves.documents.create(name_of(jobs.tenant, file_id), record.encode(), ttl_s=ttl_s)
        return as_json(record.view())

    async def every(self, request: Request, jobs: TenantJobs) -> Response:
        limit = min(whole_number(request, "limit", default=DEFAULT_PAGE, least=1, most=MAX_PAGE), 1_000)
        purpose, after = request.query_params.get("purpose", PURPOSE), request.query_params.get("after")
        if request.query_params.get("order", "desc") != "desc":
            raise Refused("invalid-parameter", "only desc: the newest come first", field="order")
        records: list[FileRecord] = []
        if purpose == PURPOSE:
            found = await self._shelves.documents.newest(KIND, jobs.tenant, before=after, limit=limit + 1)
            records = [FileRecord.decode(one.body) for one in found]
        page = records[:limit]
        listed: dict[str, Any] = {"object": "list", "data": [one.view() for one in page]}
        ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {}
        return as_json({**listed, **ends, "has_more": len(records) > limit})

    async def one(self, request: Request, jobs: TenantJobs) -> Response:
        file_id: str = request.path_params["file_id"]
        made = await self._made.view(jobs.tenant, file_id)
        return as_json(made if made is not None else (await read(self._shelves, jobs.tenant, file_id)).view())

    async def content(self, request: Request, jobs: TenantJobs) -> Response:
        file_id: str = request.path_params["file_id"]
        made = await self._made.content(jobs.tenant, file_id)
        if made is not None:
            return StreamingResponse(made, media_type="application/jsonl")
        record = await read(self._shelves, jobs.tenant, file_id)
        pieces = whole.read(self._shelves.blobs, jobs.tenant, record.chunks)
        headers = {"Content-Length": str(record.size_bytes)}
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    async def delete(self, request: Request, jobs: TenantJobs) -> Response:
        file_id: str = request.path_params["file_id"]
        if await self._made.view(jobs.tenant, file_id) is not None:
            raise Refused("invalid-parameter", "the results of a batch end with it", field="file_id")
        record = await read(self._shelves, jobs.tenant, file_id)
        await self._shelves.documents.delete(name_of(jobs.tenant, file_id))
        await self._shelves.blobs.release(jobs.tenant, file_id, record.chunks)
        return as_json({"id": file_id, "object": "file", "deleted": True})


async def read(shelves: Shelves, tenant: str, file_id: str) -> FileRecord:
    """An uploaded file. Raises Refused."""
    found = await shelves.documents.read(name_of(tenant, file_id)) if is_file_id(file_id) else None
    if found is None:
        raise Refused("no-such-document", f"there is no file {file_id[:100]}, or it has ended", field="file_id")
    return FileRecord.decode(found.body)


def _checked(fields: Mapping[str, str], default_s: float) -> float:
    """How long to keep the file, in seconds. Raises Refused."""
    if (purpose := fields.get("purpose")) != PURPOSE:
        reason = "missing" if purpose is None else f"only {PURPOSE!r} is offered"
        raise Refused("invalid-job", reason, field="purpose")
    given = fields.get("expires_after[seconds]")
    if given is None:
        return default_s
    anchored = fields.get("expires_after[anchor]", "created_at") == "created_at"
    if not anchored or not re.fullmatch(r"\d{1,7}", given) or not SHORTEST_S <= int(given) <= LONGEST_S:
        reason = f"anchor created_at, and a whole number of seconds from {SHORTEST_S} to {LONGEST_S}"
        raise Refused("invalid-job", reason, field="expires_after")
    return float(given)

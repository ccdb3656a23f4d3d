"""The routes for those who run the fleet's models, scope `admin`. What `codeyard models` does, over HTTP.

    GET  /v1/admin/models                    every alias: revision, workers, rollout
    GET  /v1/admin/models/{alias}            one
    POST /v1/admin/models/{alias}/rollout    {"location", "percent"}: begin; {"percent"}: another share
    POST /v1/admin/models/{alias}/rollback   {"reason"}: all new jobs to the old revision, at once

Called by: gateway.app.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.surface import Route
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope
from codeyard.shared.alias import Alias
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import UnknownModel
from codeyard.shared.model_view import model_view
from codeyard.shared.notice import fleet
from codeyard.shared.rollout import begin, change, promote, roll_back
from codeyard.shared.store.port import Store

Body = TypeVar("Body", bound=BaseModel)

MAX_BODY_BYTES = 8_192


class RolloutBody(BaseModel):
    """`location` begins a rollout; without it the one under way takes another share of the new jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: Annotated[str, Field(min_length=1, max_length=1_000)] | None = None
    percent: Annotated[int, Field(ge=1, le=100)] = 100


class RollbackBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Annotated[str, Field(max_length=500)] = "on request"


class ModelsAdmin:
    """Handlers; the app has checked who is calling. Raise UnknownModel, RolloutRefused, StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        return [
            Route("/v1/admin/models", "GET", Scope.ADMIN, self.models),
            Route("/v1/admin/models/{alias}", "GET", Scope.ADMIN, self.model),
            Route("/v1/admin/models/{alias}/rollout", "POST", Scope.ADMIN, self.rollout),
            Route("/v1/admin/models/{alias}/rollback", "POST", Scope.ADMIN, self.rollback),
        ]

    async def models(self, request: Request, _: TenantJobs) -> Response:
        aliases, notices = await self._store.aliases(), await fleet(self._store)
        return _json({"models": [model_view(alias, notices) for _, alias in sorted(aliases.items())]})

    async def model(self, request: Request, _: TenantJobs) -> Response:
        name = request.path_params["alias"]
        alias = (await self._store.aliases()).get(name)
        if alias is None:
            raise UnknownModel(name)
        return _json(model_view(alias, await fleet(self._store)))

    async def rollout(self, request: Request, _: TenantJobs) -> Response:
        body = await _read(request, RolloutBody)
        if body.location is None:
            return await self._change(request, partial(promote, percent=body.percent))
        rollout_id, now = new_nonce(), time.time()
        return await self._change(
            request, partial(begin, location=body.location, rollout_id=rollout_id, percent=body.percent, now=now)
        )

    async def rollback(self, request: Request, _: TenantJobs) -> Response:
        body = await _read(request, RollbackBody)
        return await self._change(request, partial(roll_back, reason=body.reason))

    async def _change(self, request: Request, decide: Callable[[Alias], Alias]) -> Response:
        alias = await change(self._store, request.path_params["alias"], decide)
        return _json(model_view(alias, await fleet(self._store)))


async def _read(request: Request, kind: type[Body]) -> Body:
    """Raises Refused."""
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise Refused("too-large", f"a body of more than {MAX_BODY_BYTES} bytes")
    try:
        return kind.model_validate_json(raw or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        kind_of_it = "malformed-json" if first["type"] == "json_invalid" else "invalid-job"
        raise Refused(kind_of_it, first["msg"], field=".".join(map(str, first["loc"])) or None) from None


def _json(document: Any) -> Response:
    return Response(json.dumps(document, separators=(",", ":")), media_type="application/json")

"""The routes of OpenAI's completions and models. A thin shell: `convert` reads and answers, `chunks` tells.

    POST /v1/chat/completions   a chat completion, whole or as a stream
    POST /v1/completions        a completion of text or token ids
    GET  /v1/models             the aliases that workers serve
    GET  /v1/models/{model}     one of them

Each choice is a job, and outlives the call: who hangs up can send the same request again under its
`Idempotency-Key`, to any gateway, and gets the same answer. Called by: openai.surface.
"""

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response

from codeyard.producer.gateway.anthropic import models as anthropic
from codeyard.producer.gateway.merged import Merged, without_taken_back
from codeyard.producer.gateway.openai.calls import as_json, early_error, finals, submitted
from codeyard.producer.gateway.openai.chunks import STOPPING, frame, told
from codeyard.producer.gateway.openai.convert import Asked, completion_of, read_chat, read_completion
from codeyard.producer.gateway.openai.errors import ApiError
from codeyard.producer.gateway.surface import Kit, Route
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope
from codeyard.shared.alias import Alias
from codeyard.shared.errors import UnknownModel


class Completions:
    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", "POST", Scope.SUBMIT, self.chat),
            Route("/v1/completions", "POST", Scope.SUBMIT, self.text),
        ]

    async def chat(self, request: Request, jobs: TenantJobs) -> Response:
        return await self._answered(request, jobs, read_chat)

    async def text(self, request: Request, jobs: TenantJobs) -> Response:
        return await self._answered(request, jobs, read_completion)

    async def _answered(self, request: Request, jobs: TenantJobs, read: Callable[[bytes], Asked]) -> Response:
        async def reading(body: bytes) -> Asked:
            return read(body)

        call = await submitted(self._kit, request, jobs, reading)
        if not call.asked.stream:
            statuses = await finals(self._kit, request, jobs, call)
            if isinstance(statuses, ApiError):
                return statuses.response(call.headers)
            return as_json(completion_of(call.asked, statuses), call.headers)
        events = Merged([without_taken_back(jobs.stream(one.id), one.last_seq) for one in call.statuses])
        try:
            error = await early_error(self._kit, request, jobs, call, events)
        except BaseException:
            await events.aclose()
            raise
        if error is not None:
            await events.aclose()
            return error.response(call.headers)
        frames = told(call.asked, call.statuses, events, jobs.status)
        answer = self._kit.event_stream(frames, resumable=False, farewell=frame(STOPPING.body()))
        answer.headers.update(call.headers)
        return answer


class Models:
    def __init__(self, kit: Kit) -> None:
        self._store = kit.store

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", "GET", Scope.READ, self.every),
            Route("/v1/models/{model}", "GET", Scope.READ, self.one),
        ]

    async def every(self, request: Request, _: TenantJobs) -> Response:
        by_name = await self._store.aliases()
        aliases = [by_name[name] for name in sorted(by_name)]
        if anthropic.wants_anthropics(request.headers):
            return as_json(anthropic.listed(aliases))
        return as_json({"object": "list", "data": [model_of(alias) for alias in aliases]})

    async def one(self, request: Request, _: TenantJobs) -> Response:
        name: str = request.path_params["model"]
        alias = (await self._store.aliases()).get(name)
        if alias is None:
            raise UnknownModel(name[:200])
        return as_json(anthropic.model_of(alias) if anthropic.wants_anthropics(request.headers) else model_of(alias))


def model_of(alias: Alias) -> dict[str, Any]:
    """`created`: when its newest rollout began, 0 where there was none. `max_model_len` is vLLM's name for the
    context length."""
    created = int(alias.rollout.started_at) if alias.rollout is not None else 0
    model = {"id": alias.name, "object": "model", "created": created, "owned_by": "codeyard"}
    return model if alias.context_tokens is None else {**model, "max_model_len": alias.context_tokens}

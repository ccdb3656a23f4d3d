"""The models there are, as Anthropic lists them. Both APIs have `GET /v1/models`: callers that send the header
`anthropic-version`, as its SDKs do, get this form. Called by: gateway.openai.routes."""

import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers

from codeyard.shared.alias import Alias


def wants_anthropics(headers: Headers) -> bool:
    return "anthropic-version" in headers


def listed(aliases: Sequence[Alias]) -> dict[str, Any]:
    """All of them on one page."""
    models = [model_of(alias) for alias in aliases]
    ids = [model["id"] for model in models] or [None]
    return {"data": models, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}


def model_of(alias: Alias) -> dict[str, Any]:
    """`created_at`: when its newest rollout began, the epoch where there was none."""
    created_s = alias.rollout.started_at if alias.rollout is not None else 0.0
    return {
        "type": "model",
        "id": alias.name,
        "display_name": alias.name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created_s)),
        "lifecycle": "active",
        "max_input_tokens": alias.context_tokens,
    }

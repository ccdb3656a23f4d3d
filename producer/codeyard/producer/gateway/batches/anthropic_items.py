"""Anthropic's batch requests: `{"custom_id", "params"}`, and its lines of results."""

import json
import re
from collections.abc import Sequence
from typing import Any

from codeyard.producer.gateway.anthropic.convert import message_of, read_message
from codeyard.producer.gateway.anthropic.errors import Failed, body_of, failed_as, failed_by, request_id_of
from codeyard.producer.gateway.batches.items import Bad, Item, encoded, outcome_of
from codeyard.producer.gateway.batches.record import Outcome, Refusal
from codeyard.producer.gateway.openai.convert import Wanted
from codeyard.producer.gateway.problems import Refused
from codeyard.shared.record import JobStatus, State

ENDPOINT = "/v1/messages"
INVALID, NOT_FOUND = 400, 404  # statuses, whose types the errors have

_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # Anthropic's


class AnthropicItems:
    def read(self, raw: bytes, line: int) -> Item | Bad:
        """Whether there are ids and params was seen to when the batch was made (`checked`)."""
        request = json.loads(raw)
        custom_id: str = request["custom_id"]
        try:
            asked = read_message(request["params"])
        except Refused as error:
            return Bad(line, custom_id, Refusal(code="invalid_request", message=failed_by(error).error["message"]))
        if asked.stream:
            return Bad(line, custom_id, Refusal(code="invalid_request", message="stream: a batch does not stream"))
        wanted = (Wanted(asked.prompt, asked.sampling),)
        return Item(line, custom_id, asked.model, wanted, asked, dict(asked.metadata or {}))

    def answer(self, item: Item, statuses: Sequence[JobStatus]) -> bytes:
        [status] = statuses
        outcome = outcome_of([status.state])
        if outcome is Outcome.SUCCEEDED:
            return _result(item.custom_id, {"type": "succeeded", "message": message_of(item.asked, status)})
        if outcome is Outcome.ERRORED or status.state is State.FAILED:
            error = body_of(failed_as(status), request_id_of(status.id))
            return _result(item.custom_id, {"type": "errored", "error": error})
        return self.drop(item, outcome)

    def refuse(self, one: Item | Bad, refusal: Refusal) -> bytes:
        number = NOT_FOUND if refusal.code == "model_not_found" else INVALID
        error = body_of(Failed.of(number, refusal.message))
        return _result(one.custom_id or "", {"type": "errored", "error": error})

    def drop(self, item: Item, outcome: Outcome) -> bytes:
        return _result(item.custom_id, {"type": "canceled" if outcome is Outcome.CANCELLED else "expired"})


def checked(request: Any, place: int) -> bytes:
    """A request as the line it is kept as. Raises Refused; ValueError for what is no text."""
    custom_id = request.get("custom_id") if isinstance(request, dict) else None
    if not isinstance(custom_id, str) or not _CUSTOM_ID.fullmatch(custom_id):
        reason = "1 to 64 letters, digits, underscores and hyphens"
        raise Refused("invalid-job", reason, field=f"requests.{place}.custom_id")
    params = request.get("params")
    if not isinstance(params, dict):
        raise Refused("invalid-job", "an object, as /v1/messages takes it", field=f"requests.{place}.params")
    return encoded({"custom_id": custom_id, "params": params}, strictly=True)


def _result(custom_id: str, result: dict[str, Any]) -> bytes:
    return encoded({"custom_id": custom_id, "result": result})

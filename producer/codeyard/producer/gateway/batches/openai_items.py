"""OpenAI's batch lines: `{"custom_id", "method": "POST", "url", "body"}`, and its lines of output and errors."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from codeyard.producer.gateway.batches.items import Bad, Item, encoded, outcome_of
from codeyard.producer.gateway.batches.record import Outcome, Refusal
from codeyard.producer.gateway.openai.convert import Asked, completion_of, read_chat, read_completion
from codeyard.producer.gateway.openai.errors import of_error, of_job
from codeyard.producer.gateway.problems import Refused
from codeyard.shared.record import JobStatus

READERS: dict[str, Callable[[Mapping[str, Any]], Asked]] = {
    "/v1/chat/completions": read_chat,
    "/v1/completions": read_completion,
}
MAX_CUSTOM_ID = 512  # characters

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half a character

DROPPED = {
    Outcome.EXPIRED: ("batch_expired", "the request was not executed before the completion window was over"),
    Outcome.CANCELLED: ("batch_cancelled", "the batch was cancelled before the request was executed"),
}


class OpenAiItems:
    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def read(self, raw: bytes, line: int) -> Item | Bad:
        try:
            request = json.loads(raw)
            if _HALF.search(raw):
                json.dumps(request, ensure_ascii=False).encode()  # halves that are alone are no text
        except (ValueError, RecursionError):
            return Bad(line, None, Refusal(code="invalid_json_line", message="this line is not JSON in UTF-8"))
        custom_id = request.get("custom_id") if isinstance(request, dict) else None
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
            reason = f"a line needs a custom_id: text of 1 to {MAX_CUSTOM_ID} characters"
            return Bad(line, None, Refusal(code="missing_required_parameter", message=reason, param="custom_id"))
        if request.get("method") != "POST":
            return Bad(line, custom_id, Refusal(code="invalid_method", message="the method is POST", param="method"))
        if request.get("url") != self._endpoint:
            reason = f"the url is the batch's endpoint, {self._endpoint}"
            return Bad(line, custom_id, Refusal(code="invalid_url", message=reason, param="url"))
        body = request.get("body")
        if not isinstance(body, dict):
            reason = "an object, as the endpoint takes it"
            return Bad(line, custom_id, Refusal(code="missing_required_parameter", message=reason, param="body"))
        try:
            asked = READERS[self._endpoint](body)
        except Refused as error:
            said = of_error(error)
            param = f"body.{said.param}" if said.param else "body"
            return Bad(line, custom_id, Refusal(code=said.code or "invalid_value", message=said.message, param=param))
        if asked.stream:
            reason = "a batch does not stream"
            return Bad(line, custom_id, Refusal(code="invalid_value", message=reason, param="body.stream"))
        return Item(line, custom_id, asked.model, asked.jobs, asked, dict(asked.metadata))

    def answer(self, item: Item, statuses: Sequence[JobStatus]) -> bytes:
        first = statuses[0]
        if outcome_of([status.state for status in statuses]) is Outcome.SUCCEEDED:
            return _line(item, first.id, 200, completion_of(item.asked, statuses))
        said = next(error for status in statuses if (error := of_job(status)) is not None)
        return _line(item, first.id, said.status, said.body())

    def refuse(self, one: Item | Bad, refusal: Refusal) -> bytes:
        error = {"code": refusal.code, "message": refusal.message, "param": refusal.param, "line": one.line}
        request = {"id": f"batch_req_line_{one.line}", "custom_id": one.custom_id}
        return encoded({**request, "response": None, "error": error})

    def drop(self, item: Item, outcome: Outcome) -> bytes:
        code, message = DROPPED[outcome]
        return self.refuse(item, Refusal(code=code, message=message))


def _line(item: Item, request_id: str, status: int, body: Mapping[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": request_id, "body": body}
    request = {"id": f"batch_req_{request_id}", "custom_id": item.custom_id}
    return encoded({**request, "response": response, "error": None})

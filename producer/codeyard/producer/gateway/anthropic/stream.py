"""A job's events as Anthropic's stream of server-sent events.

    message_start  ( content_block_start  content_block_delta...  content_block_stop )...  message_delta  message_stop

A block is text, or the call of a tool whose arguments come as pieces of JSON. `ping` is the beat. Whatever ends
the answer early is an `error` event, and nothing after it: a job that failed, a store or gateway that went
away, and a job that had to begin again after its text was shown (the same request with its `Idempotency-Key`
then gets the new text). `message_start` estimates the tokens of the prompt; `message_delta` has them counted.
Called by: handlers.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from codeyard.producer.gateway.anthropic.convert import Asked, ending_of, head_of, tool_use, usage_of
from codeyard.producer.gateway.anthropic.errors import Failed, body_of, failed_as, failed_by, request_id_of
from codeyard.producer.gateway.merged import Merged
from codeyard.producer.gateway.problems import kind_of
from codeyard.shared.chat import ToolCallDelta
from codeyard.shared.errors import FleetError
from codeyard.shared.job import estimate_tokens
from codeyard.shared.record import Event, EventKind, JobStatus, State, Usage

BEGAN_AGAIN = "the job had to begin again, with another text; send the request again to get that"
LEAVING = "the gateway is stopping and the job goes on; send the request again, with the same Idempotency-Key"


def frame(event: dict[str, Any]) -> str:
    """One event on the wire, under its own type."""
    return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"


PING = frame({"type": "ping"})


def error_frame(failed: Failed, request_id: str | None = None) -> str:
    return frame(body_of(failed, request_id))


def farewell(request_id: str) -> str:
    """The last frame of a stream that the gateway ends."""
    return error_frame(Failed.of(529, LEAVING), request_id)


class Teller(Protocol):
    """Puts one job's answer into the words of an API, as it comes."""

    def begin(self) -> Iterator[str]: ...

    def tokens(self, event: Event) -> Iterator[str]: ...

    def end(self, status: JobStatus) -> Iterator[str]:
        """Of a job that succeeded."""


async def told(
    teller: Teller, events: Merged, accepted: JobStatus, final: Callable[[], Awaitable[JobStatus]]
) -> AsyncGenerator[str, None]:
    """The frames of a stream. `events` are those of one job, without what was taken back before it was asked for;
    `accepted`: that job; `final` reads it at its end."""
    request_id = request_id_of(accepted.id)
    anything = False
    for text in teller.begin():
        yield text
    try:
        async with aclosing(events):
            async for _, event in events:
                if event.kind is EventKind.END:
                    status = await final()
                    if status.state is not State.SUCCEEDED:
                        yield error_frame(failed_as(status), request_id)
                        return
                    for text in teller.end(status):
                        yield text
                    return
                if event.kind is EventKind.RESTARTED and anything:
                    yield error_frame(Failed.of(500, BEGAN_AGAIN), request_id)
                    return
                for text in teller.tokens(event):
                    anything = True
                    yield text
    except FleetError as error:
        if kind_of(error) == "internal-error":
            raise
        yield error_frame(failed_by(error), request_id)


class MessageTeller:
    """Of `POST /v1/messages`."""

    def __init__(self, asked: Asked, accepted: JobStatus) -> None:
        self._asked = asked
        self._accepted = accepted
        self._num_blocks = 0
        self._open: int | None = None  # index of the block that grows
        self._open_is_text = False
        self._calls: dict[int, int] = {}  # block by index of its call

    def begin(self) -> Iterator[str]:
        usage = Usage(prompt_tokens=estimate_tokens(self._asked.prompt))
        message = {
            **head_of(self._accepted.id, self._accepted.model),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(usage, self._accepted.lane),
        }
        yield frame({"type": "message_start", "message": message})
        yield PING

    def tokens(self, event: Event) -> Iterator[str]:
        if text := event.text if event.content is None else event.content:
            if not self._open_is_text:
                yield from self._begin_block({"type": "text", "text": ""}, is_text=True)
            yield self._delta(self._open, {"type": "text_delta", "text": text})
        for piece in event.tool_calls:
            yield from self._called(piece)

    def end(self, status: JobStatus) -> Iterator[str]:
        result = status.result
        assert result is not None
        for index, call in enumerate(result.tool_calls):
            if index not in self._calls:  # of a job whose events did not tell them
                yield from self._called(ToolCallDelta(index=index, **call.model_dump()))
        yield from self._close()
        usage = usage_of(result.usage, status.lane)
        del usage["service_tier"]  # not part of this event
        yield frame({"type": "message_delta", "delta": ending_of(self._asked, result), "usage": usage})
        yield frame({"type": "message_stop"})

    def _called(self, piece: ToolCallDelta) -> Iterator[str]:
        if piece.index not in self._calls:
            self._calls[piece.index] = self._num_blocks
            yield from self._begin_block(tool_use(piece.id or f"call_{piece.index}", piece.name or ""), is_text=False)
        if piece.arguments:
            yield self._delta(self._calls[piece.index], {"type": "input_json_delta", "partial_json": piece.arguments})

    def _begin_block(self, block: dict[str, Any], *, is_text: bool) -> Iterator[str]:
        yield from self._close()
        self._open, self._open_is_text = self._num_blocks, is_text
        self._num_blocks += 1
        yield frame({"type": "content_block_start", "index": self._open, "content_block": block})

    def _close(self) -> Iterator[str]:
        if self._open is not None:
            yield frame({"type": "content_block_stop", "index": self._open})
        self._open, self._open_is_text = None, False

    @staticmethod
    def _delta(index: int | None, delta: dict[str, Any]) -> str:
        return frame({"type": "content_block_delta", "index": index, "delta": delta})

"""The events of jobs as the chunks of an OpenAI stream: `data: {...}`, at its end `data: [DONE]`.

Text that was sent cannot be taken back in this protocol. So generation that begins again behind it ends the
stream in an error event, as does whatever else goes wrong once the stream is under way; the same request under the
same `Idempotency-Key` then gets all of it from the beginning. Called by: routes.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from codeyard.producer.gateway.merged import Merged
from codeyard.producer.gateway.openai import convert
from codeyard.producer.gateway.openai.convert import Asked, finish_reason, heading, result_of
from codeyard.producer.gateway.openai.errors import SERVER, ApiError, of_error, of_job
from codeyard.producer.gateway.openai.parameters import Api
from codeyard.producer.gateway.problems import kind_of
from codeyard.shared.chat import ToolCallDelta
from codeyard.shared.errors import FleetError
from codeyard.shared.job import JobId
from codeyard.shared.record import Event, EventKind, JobStatus

DONE = "data: [DONE]\n\n"
CHUNKS = {Api.CHAT: "chat.completion.chunk", Api.COMPLETIONS: "text_completion"}
AGAIN = "send the same request again, with the same Idempotency-Key, to get all of it"

RESTARTED = ApiError(
    500, f"a worker was lost and the text had to be generated anew; {AGAIN}", SERVER, "generation_restarted"
)
STOPPING = ApiError(503, f"the gateway is stopping and the job goes on; {AGAIN}", SERVER, "gateway_stopping")


def frame(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"


async def told(
    asked: Asked, accepted: Sequence[JobStatus], events: Merged, final: Callable[[JobId], Awaitable[JobStatus]]
) -> AsyncGenerator[str, None]:
    """The frames of a stream. `final` gives the status of a job that has ended."""
    chunks = Chunks(asked, accepted[0])
    begun: set[int] = set()  # choices of which something was told
    ended: dict[int, JobStatus] = {}
    async with aclosing(events):
        try:
            for place in range(len(accepted)):
                for chunk in chunks.begin(place):
                    yield frame(chunk)
            async for place, event in events:
                if event.kind is EventKind.TOKENS:
                    for chunk in chunks.tokens(place, event):
                        begun.add(place)
                        yield frame(chunk)
                elif event.kind is EventKind.RESTARTED and place in begun:
                    yield frame(RESTARTED.body())
                    return
                elif event.kind is EventKind.END:
                    ended[place] = await final(accepted[place].id)
                    if (error := of_job(ended[place])) is not None:
                        yield frame(error.body())
                        return
                    yield frame(chunks.end(place, ended[place]))
            if asked.include_usage:
                yield frame(chunks.usage([ended[place] for place in range(len(accepted))]))
            yield DONE
        except FleetError as error:
            if kind_of(error) == "internal-error":
                raise
            yield frame(of_error(error).body())


class Chunks:
    """What each event is in OpenAI's words. Knows how much text of each choice was told."""

    def __init__(self, asked: Asked, first: JobStatus) -> None:
        self._asked = asked
        self._heading = heading(asked, first, CHUNKS[asked.api])
        self._offsets: dict[int, int] = {}  # characters, by choice

    def begin(self, place: int) -> Iterator[dict[str, Any]]:
        if self._asked.api is Api.CHAT:
            yield self._choice(place, {"role": "assistant", "content": "", "refusal": None})

    def tokens(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        """None, where the text of a token is not whole yet."""
        if self._asked.api is Api.COMPLETIONS:
            offset = self._offsets.get(place, 0)
            self._offsets[place] = offset + len(event.text)
            if event.text or event.logprobs:
                logprobs = convert.text_logprobs(event.logprobs, offset) if event.logprobs else None
                yield self._choice(place, event.text, logprobs)
            return
        text = event.text if event.content is None else event.content
        delta: dict[str, Any] = {"content": text} if text else {}
        if event.tool_calls:
            delta["tool_calls"] = list(tool_deltas(event.tool_calls))
        if delta or event.logprobs:
            yield self._choice(place, delta, convert.chat_logprobs(event.logprobs) if event.logprobs else None)

    def end(self, place: int, status: JobStatus) -> dict[str, Any]:
        nothing = {} if self._asked.api is Api.CHAT else ""
        return self._choice(place, nothing, finish=finish_reason(result_of(status)))

    def usage(self, statuses: Sequence[JobStatus]) -> dict[str, Any]:
        return {**self._heading, "choices": [], "usage": convert.usage(self._asked, statuses)}

    def _choice(self, place: int, said: Any, logprobs: Any = None, *, finish: str | None = None) -> dict[str, Any]:
        field = "delta" if self._asked.api is Api.CHAT else "text"
        choice = {"index": place, field: said, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._heading, "choices": [choice], **usage}


def tool_deltas(calls: Iterable[ToolCallDelta]) -> Iterator[dict[str, Any]]:
    for call in calls:
        function = {} if call.name is None else {"name": call.name}
        named = {} if call.id is None else {"id": call.id, "type": "function"}
        yield {"index": call.index, **named, "function": {**function, "arguments": call.arguments}}

"""The events of a job as the events of a response, numbered so that a reader can come back.

Numbers are a function of the job's stored events alone: whoever reads them again, from any gateway, gets the same
events under the same numbers. Text that was told cannot be taken back, so where generation began again an `error`
event stands, and behind it the response begins anew under further numbers: a reader that comes back after the error,
or without saying where, gets that; one that had not come to the error gets the error.
Called by: response_routes.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from codeyard.producer.gateway.merged import Merged
from codeyard.producer.gateway.openai.convert import token_logprob
from codeyard.producer.gateway.openai.responses import call_item, message_item, response_of, text_part
from codeyard.shared.chat import ToolCallDelta
from codeyard.shared.record import Event, EventKind, Record

RESTARTED = "a worker was lost and the text had to be generated anew; read the response again from its beginning"
ENDINGS = {"completed": "response.completed", "incomplete": "response.incomplete"}  # else response.failed

Said = dict[str, Any]


def frame(event: Said) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"


async def told(
    record: Record, events: Merged, final: Callable[[], Awaitable[Record]], *, starting_after: int | None = None
) -> AsyncGenerator[str, None]:
    """The frames of a stream. `record`: as it is when the reader comes; `final` gives it once the job has ended.
    `events`: of this one job, from the first."""
    fold = Fold(record)
    held = fold.begin()  # of what was there when the reader came, until it is known what counts
    past = record.last_seq > 0
    async with aclosing(events):
        if not past:
            for said in _after(held, starting_after):
                yield frame(said)
        async for _, event in events:
            past = past and event.seq <= record.last_seq
            if event.kind is EventKind.TOKENS:
                new = fold.tokens(event)
            elif event.kind is EventKind.END:
                new = fold.end(await final())
            elif not fold.has_spoken:
                new = []
            else:
                error, new = fold.restart()
                missed = starting_after is not None and starting_after < error["sequence_number"]
                if missed or not past:
                    yield frame(error)
                    return
                held = []
            if past:
                held += new
                new = held if event.seq == record.last_seq else []
            for said in _after(new, starting_after):
                yield frame(said)


def _after(events: list[Said], number: int | None) -> list[Said]:
    return [said for said in events if number is None or said["sequence_number"] > number]


@dataclass(slots=True)
class _Item:
    """One of the output, as it grows."""

    place: int
    item: Said
    text: str = ""
    logprobs: list[Said] = field(default_factory=list)


class Fold:
    """From one job event to the next: what a reader is told of each."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._id = record.id
        self._background = response_of(record)["background"]
        self._number = 0
        self._begin_anew()

    @property
    def has_spoken(self) -> bool:
        """Whether it has told of anything that was generated."""
        return self._spoken

    def begin(self) -> list[Said]:
        status = "queued" if self._background else "in_progress"
        said = [self._lifecycle("response.created", status)]
        return [*said, self._lifecycle("response.queued", status)] if self._background else said

    def tokens(self, event: Event) -> list[Said]:
        said = self._begun()
        text = event.text if event.content is None else event.content
        if text or event.logprobs:
            said += self._wrote(text, [token_logprob(token) for token in event.logprobs])
        for call in event.tool_calls:
            said += self._called(call)
        return said

    def restart(self) -> tuple[Said, list[Said]]:
        """The error, and the beginning anew behind it."""
        error = self._say("error", code="generation_restarted", message=RESTARTED, param=None)
        self._begin_anew()
        return error, self.begin()

    def end(self, record: Record) -> list[Said]:
        said = self._begun()
        response = response_of(record)
        if response["status"] in ENDINGS:
            if self._message is None and not self._calls:
                said += self._wrote("", [])
            for item in self._items:
                said += self._closed(item, response["status"])
            response["output"] = [item.item for item in self._items]
        return [*said, self._say(ENDINGS.get(response["status"], "response.failed"), response=response)]

    # -------------------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        self._spoken = False
        self._running = False
        self._items: list[_Item] = []
        self._message: _Item | None = None
        self._calls: dict[int, _Item] = {}

    def _say(self, kind: str, **more: Any) -> Said:
        said = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return said

    def _lifecycle(self, kind: str, status: str) -> Said:
        return self._say(kind, response=response_of(self._record, status=status, output=[]))

    def _begun(self) -> list[Said]:
        if self._running:
            return []
        self._running = True
        return [self._lifecycle("response.in_progress", "in_progress")]

    def _opened(self, item: Said) -> tuple[_Item, Said]:
        opened = _Item(len(self._items), item)
        self._items.append(opened)
        return opened, self._say("response.output_item.added", output_index=opened.place, item=item)

    def _wrote(self, text: str, logprobs: list[Said]) -> list[Said]:
        self._spoken = True
        said = []
        if (item := self._message) is None:
            item, added = self._opened(message_item(self._id, "", [], "in_progress"))
            self._message = item
            said = [added, self._say("response.content_part.added", **self._part(item), part=text_part("", []))]
        item.text += text
        item.logprobs += logprobs
        if text or logprobs:
            said.append(self._say("response.output_text.delta", **self._part(item), delta=text, logprobs=logprobs))
        return said

    def _called(self, call: ToolCallDelta) -> list[Said]:
        self._spoken = True
        said = []
        if (item := self._calls.get(call.index)) is None:
            begun = call_item(self._id, call.index, call.id or "", call.name or "", "", "in_progress")
            item, added = self._opened(begun)
            self._calls[call.index] = item
            said = [added]
        item.text += call.arguments
        if call.arguments:
            kind = "response.function_call_arguments.delta"
            said.append(self._say(kind, item_id=item.item["id"], output_index=item.place, delta=call.arguments))
        return said

    def _closed(self, item: _Item, status: str) -> list[Said]:
        if item is self._message:
            item.item = message_item(self._id, item.text, item.logprobs, status)
            part = text_part(item.text, item.logprobs)
            said = [
                self._say("response.output_text.done", **self._part(item), text=item.text, logprobs=item.logprobs),
                self._say("response.content_part.done", **self._part(item), part=part),
            ]
        else:
            item.item = {**item.item, "arguments": item.text, "status": status}
            at = {"item_id": item.item["id"], "output_index": item.place, "name": item.item["name"]}
            said = [self._say("response.function_call_arguments.done", **at, arguments=item.text)]
        return [*said, self._say("response.output_item.done", output_index=item.place, item=item.item)]

    @staticmethod
    def _part(item: _Item) -> dict[str, Any]:
        return {"item_id": item.item["id"], "output_index": item.place, "content_index": 0}

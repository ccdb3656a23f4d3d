"""Anthropic's old text form, `POST /v1/complete`: a conversation written as one text.

    ...the system's words...

    Human: ...

    Assistant: ...

`read_completion` takes it apart into a chat, which the model's own template renders; an Assistant's last turn
that is not empty is continued. `completion_of` and `CompletionTeller` answer in the old form, whole or in pieces.
Called by: handlers.
"""

import re
from collections.abc import Iterator
from typing import Any

from codeyard.producer.gateway.anthropic.body import CompleteBody, decode, refused
from codeyard.producer.gateway.anthropic.convert import Asked, chat_of, metadata_of, sampling_of
from codeyard.producer.gateway.anthropic.parameters import COMPLETE
from codeyard.producer.gateway.anthropic.stream import PING, frame
from codeyard.shared.chat import Chat, Message
from codeyard.shared.job import JobId
from codeyard.shared.record import Event, JobStatus, Result

COMPLETION_ID = "compl_"  # before the job's id
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def read_completion(body: bytes) -> Asked:
    """Raises Refused."""
    read = decode(CompleteBody, COMPLETE, body)
    stop = (HUMAN, *(one for one in read.stop_sequences or () if one != HUMAN))
    return Asked(
        model=read.model,
        prompt=chat_from(read.prompt),
        sampling=sampling_of(read, COMPLETE, stop=stop),
        stream=bool(read.stream),
        metadata=metadata_of(read.metadata.user_id if read.metadata else None),
    )


def chat_from(prompt: str) -> Chat:
    """Raises Refused. One blank after each colon belongs to the form."""
    before, *rest = _TURN.split(prompt)
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if not turns or turns[-1][0] != "Assistant" or not any(name == "Human" for name, _ in turns):
        raise refused("prompt", 'a text of turns after "\\n\\nHuman:" that ends with a turn after "\\n\\nAssistant:"')
    said = [Message(role=ROLES[name], content=text.removeprefix(" ")) for name, text in turns]
    if not said[-1].content:
        said.pop()
    system = [Message(role="system", content=before.strip())] if before.strip() else []
    return chat_of(messages=(*system, *said))


def text_of(chat: Chat) -> str:
    """The other way: the old form of a chat without tools."""
    parts = []
    for message in chat.messages:
        if message.role == "system":
            parts.append(message.content or "")
        else:
            parts.append(f"{HUMAN if message.role == 'user' else ASSISTANT} {message.content}")
    return "".join(parts) + ("" if chat.messages[-1].role == "assistant" else ASSISTANT)


def completion_of(status: JobStatus) -> dict[str, Any]:
    """`status` is that of a job that succeeded."""
    result = status.result
    assert result is not None
    return {**_piece(status.id, status.model, result.text), **_ending(result)}


class CompletionTeller:
    """In pieces, each of them new text; the last has the reason why it ended."""

    def __init__(self, accepted: JobStatus) -> None:
        self._id, self._model = accepted.id, accepted.model

    def begin(self) -> Iterator[str]:
        yield PING

    def tokens(self, event: Event) -> Iterator[str]:
        if event.text:
            yield frame(_piece(self._id, self._model, event.text))

    def end(self, status: JobStatus) -> Iterator[str]:
        assert status.result is not None
        yield frame({**_piece(self._id, self._model, ""), **_ending(status.result)})


def _piece(job_id: JobId, model: str, text: str) -> dict[str, Any]:
    return {
        "type": "completion",
        "id": COMPLETION_ID + job_id,
        "completion": text,
        "stop_reason": None,
        "stop": None,
        "model": model,
    }


def _ending(result: Result) -> dict[str, Any]:
    return {"stop_reason": "max_tokens" if result.finish_reason == "length" else "stop_sequence", "stop": result.stop}

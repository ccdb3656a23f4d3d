"""Calls as Hermes and Qwen2.5 models write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Every decision depends on the text up to some character alone, never on where the pieces end, so any cutting
of a text gives the same content and calls. What only looks like a call is content. Arguments are handed on as
they come; blanks around calls are dropped.
Called by: the engines, through `hermes_calls` or `tool_calls.Calls`.
"""

import json
import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from codeyard.shared.chat import Chat
from codeyard.shared.errors import JobRejected
from codeyard.worker.engines.completion import may_begin
from codeyard.worker.engines.json_object import JsonObject
from codeyard.worker.engines.port import EngineJob
from codeyard.worker.engines.tool_calls import Calls, Piece, Read

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = r"[a-zA-Z0-9_.:/-]{1,128}"
HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*"({NAME})"\s*,\s*"arguments"\s*:\s*(?=\{{)')


def hermes_calls(job: EngineJob, engine: str) -> Calls | None:
    """For an engine without structured outputs. None if the job offers no tools. Raises JobRejected if it demands
    a call."""
    chat = job.prompt
    if not isinstance(chat, Chat) or not chat.offers_tools:
        return None
    if chat.tool_choice != "auto":
        raise JobRejected("unsupported", f"the {engine} engine cannot force a call of a tool; the vllm engine can")
    return Calls(job, HermesReader(), parallel=chat.parallel_tool_calls)


def hides_calls(tokenizer: Any) -> bool:
    """Whether its text without special tokens has lost the tags: in some models they are special, in some not."""
    added = getattr(tokenizer, "added_tokens_decoder", {})  # Mistral's own tokenizers have none
    return any(token.special for token in added.values() if token.content in (OPEN, CLOSE))


class _In(Enum):
    CONTENT = auto()
    HEAD = auto()  # after the opening tag, before the arguments
    ARGUMENTS = auto()
    TAIL = auto()  # after the arguments, before the closing tag


class HermesReader:
    """Of one text."""

    def __init__(self) -> None:
        self._in = _In.CONTENT
        self._buffer = ""  # not decided yet
        self._blank = ""  # dropped if a call follows
        self._index = -1  # of the newest call
        self._after_call = False  # nothing was said since
        self._arguments = JsonObject()
        self._content = ""
        self._pieces: list[Piece] = []

    def read(self, text: str, token_ids: Sequence[int] = (), *, ended: bool = False) -> Read:
        self._buffer += text
        while self._step():
            pass
        if ended:
            self._end()
        read = Read(self._content, tuple(self._pieces))
        self._content, self._pieces = "", []
        return read

    def _step(self) -> bool:
        """Decide what the buffer begins with. False if that takes more text."""
        match self._in:
            case _In.CONTENT:
                return self._read_content()
            case _In.HEAD:
                return self._read_head()
            case _In.ARGUMENTS:
                return self._read_arguments()
            case _In.TAIL:
                return self._read_tail()

    def _read_content(self) -> bool:
        at = self._buffer.find(OPEN)
        if at < 0:
            kept = may_begin(self._buffer, (OPEN,))
            self._say(self._take(len(self._buffer) - kept))
            return False
        self._say(self._take(at))
        self._take(len(OPEN))
        self._in = _In.HEAD
        return True

    def _read_head(self) -> bool:
        start = self._buffer.lstrip()
        if start and not start.startswith("{"):
            return self._was_no_call()
        if head := HEAD.match(self._buffer):
            self._begin(head[1])
            self._take(head.end())
            self._arguments = JsonObject()
            self._in = _In.ARGUMENTS
            return True
        close = self._buffer.find(CLOSE)
        return close >= 0 and self._read_whole(close)

    def _read_whole(self, end: int) -> bool:
        """A call in another order, or without arguments; all of it is there."""
        call = _call(self._buffer[:end])
        if call is None:
            return self._was_no_call()
        self._begin(*call)
        self._take(end)
        self._in = _In.TAIL
        return True

    def _read_arguments(self) -> bool:
        taken = self._arguments.take(self._buffer)
        if taken:
            self._pieces.append(Piece(self._index, arguments=self._take(taken)))
        if not self._arguments.ended:
            return False
        self._in = _In.TAIL
        return True

    def _read_tail(self) -> bool:
        """Up to the closing tag, or to the next call where that was forgotten."""
        found = [(at, tag) for tag in (CLOSE, OPEN) if (at := self._buffer.find(tag)) >= 0]
        if not found:
            self._take(len(self._buffer) - may_begin(self._buffer, (CLOSE, OPEN)))
            return False
        at, tag = min(found)
        self._take(at + (len(tag) if tag == CLOSE else 0))
        self._in = _In.CONTENT
        return True

    def _end(self) -> None:
        while self._in is _In.HEAD:  # a call without its closing tag, or none; then the rest may hold another
            self._read_whole(len(self._buffer))
            while self._step():
                pass
        if self._in is _In.CONTENT:
            self._say(self._take(len(self._buffer)))
            if not self._after_call:
                self._content += self._blank

    def _was_no_call(self) -> bool:
        self._say(OPEN)
        self._in = _In.CONTENT
        return True

    def _begin(self, name: str, arguments: str = "") -> None:
        self._index += 1
        self._blank, self._after_call = "", True
        self._pieces.append(Piece(self._index, name, arguments))

    def _say(self, text: str) -> None:
        text = self._blank + text
        said = text.rstrip()
        self._blank = text[len(said) :]
        self._content += said
        self._after_call = self._after_call and not said

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken


def _call(body: str) -> tuple[str, str] | None:
    """(name, arguments) of a whole body; None if it is no call."""
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not re.fullmatch(NAME, str(said.get("name") or "")):
        return None
    arguments = said.get("arguments") or {}
    if isinstance(arguments, str):
        return said["name"], arguments
    return (said["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None

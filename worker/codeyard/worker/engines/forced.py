"""Calls that were demanded: the schema that makes a model write nothing else, and what it wrote under it.

As vLLM's own server does it: one named tool is its arguments alone, any of several a list of
`{"name": ..., "parameters": {...}}`. Under such a schema none of the text is content.
Called by: the engines with structured outputs.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from codeyard.shared.chat import Chat, NamedTool, Tool
from codeyard.worker.engines.hermes import NAME
from codeyard.worker.engines.json_object import JsonObject
from codeyard.worker.engines.tool_calls import CallReader, Piece, Read

HEAD = re.compile(rf'[\[,}}\s]*\{{\s*"name"\s*:\s*"({NAME})"\s*,\s*"parameters"\s*:\s*(?=\{{)')


def forced_schema(chat: Chat) -> dict[str, Any] | None:
    """JSON schema of the whole answer; None where the model may choose not to call."""
    choice = chat.tool_choice
    if isinstance(choice, NamedTool):
        return _parameters(next(tool for tool in chat.tools if tool.name == choice.name))
    if choice != "required":
        return None
    calls = []
    definitions: dict[str, Any] = {}
    for tool in chat.tools:
        parameters = dict(_parameters(tool))
        definitions |= parameters.pop("$defs", {})
        properties = {"name": {"type": "string", "enum": [tool.name]}, "parameters": parameters}
        calls.append({"type": "object", "properties": properties, "required": ["name", "parameters"]})
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}}
    if not chat.parallel_tool_calls:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def forced_reader(chat: Chat) -> CallReader | None:
    """For an answer under `forced_schema`; None where that is."""
    if isinstance(chat.tool_choice, NamedTool):
        return _Named(chat.tool_choice.name)
    return _Listed() if chat.tool_choice == "required" else None


class _Named:
    """All of the text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def read(self, text: str, token_ids: Sequence[int], *, ended: bool) -> Read:
        if not text:
            return Read()
        name, self._name = self._name, None
        return Read(pieces=(Piece(0, name, text),))


class _Listed:
    """The text is a list of calls."""

    def __init__(self) -> None:
        self._buffer = ""
        self._index = -1
        self._arguments: JsonObject | None = None

    def read(self, text: str, token_ids: Sequence[int], *, ended: bool) -> Read:
        self._buffer += text
        pieces: list[Piece] = []
        while self._buffer:
            if self._arguments is None:
                if not (head := HEAD.match(self._buffer)):
                    break
                self._index += 1
                pieces.append(Piece(self._index, head[1]))
                self._buffer, self._arguments = self._buffer[head.end() :], JsonObject()
            taken = self._arguments.take(self._buffer)
            pieces.append(Piece(self._index, arguments=self._buffer[:taken]))
            self._buffer = self._buffer[taken:]
            if self._arguments.ended:
                self._arguments = None
        if ended and self._index < 0:
            pieces += _whole(self._buffer)
        return Read(pieces=tuple(pieces))


def _whole(text: str) -> list[Piece]:
    """Of a list whose calls name their fields in another order."""
    try:
        calls = json.loads(text)
        return [
            Piece(index, call["name"], json.dumps(call["parameters"], ensure_ascii=False))
            for index, call in enumerate(calls)
            if re.fullmatch(NAME, call["name"])
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.parameters or {"type": "object", "properties": {}}

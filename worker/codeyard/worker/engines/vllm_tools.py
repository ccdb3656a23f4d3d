"""Calls of tools in the vLLM engine: vLLM's parser for the model where the operator named one, else Hermes.

What of the answer is forced by a schema is read as what it is, whatever the parser. Works with the tool
parsers of vLLM 0.25.1 and 0.32, as its own server calls them.
Called by: vllm_engine.
"""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from codeyard.shared.chat import Chat
from codeyard.shared.errors import EngineUnavailable
from codeyard.worker.engines.chat import tools_of
from codeyard.worker.engines.forced import forced_reader
from codeyard.worker.engines.hermes import HermesReader, hides_calls
from codeyard.worker.engines.port import EngineJob
from codeyard.worker.engines.tool_calls import CallReader, Calls, Piece, Read
from codeyard.worker.engines.vllm_load import ENVIRONMENT

log = logging.getLogger(__name__)

SETTING = "CODEYARD_ENGINE_TOOL_CALL_PARSER"
NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_.:/-]")
NAME_CHARS = 128


class VllmTools:
    """How the calls of one model are read. `parser` is vLLM's name for it."""

    def __init__(self, tokenizer: Any, parser: str | None) -> None:
        self._tokenizer = tokenizer
        self._hides_calls = hides_calls(tokenizer)
        self._parser = None if parser is None else parser_class(parser)

    def of(self, job: EngineJob) -> "tuple[Calls | None, bool]":
        """(what reads the job's calls, whether it needs the special tokens in the text)."""
        chat = job.prompt
        if not isinstance(chat, Chat) or not chat.offers_tools:
            return None, False
        reader, special = self._reader(chat)
        return Calls(job, reader, parallel=chat.parallel_tool_calls), special

    def _reader(self, chat: Chat) -> tuple[CallReader, bool]:
        if (forced := forced_reader(chat)) is not None:
            return forced, False
        if self._parser is None:
            return HermesReader(), self._hides_calls
        request = _request(chat)
        parser = self._parser(self._tokenizer, request.tools)
        request = parser.adjust_request(request)
        return ParserReader(parser, request), not request.skip_special_tokens


class ParserReader:
    """One of vLLM's tool parsers on one text. One that raises is not asked again: the rest is content, with what it
    held back if it had found no call."""

    def __init__(self, parser: Any, request: Any) -> None:
        self._parser = parser
        self._request = request
        self._text = ""
        self._token_ids: list[int] = []
        self._content = ""  # given so far
        self._known: set[int] = set()  # indices of calls that have a name
        self._broken = False

    def read(self, text: str, token_ids: Sequence[int], *, ended: bool) -> Read:
        if self._broken:
            return Read(text)
        first = not self._token_ids
        before, ids_before = self._text, list(self._token_ids)
        self._text += text
        self._token_ids.extend(token_ids)
        try:
            if first and ended:
                return self._whole()
            said = [self._step(before, text, ids_before, token_ids)]
            if ended:
                said.append(self._rest(said[0]))
        except Exception as error:
            # Somebody else's parser on whatever a model wrote: the reader gets the text as it is.
            log.warning("tool_parser_failed", extra={"parser": type(self._parser).__name__, "error": str(error)})
            self._broken = True
            no_call = not self._known and self._text.startswith(self._content)
            return Read(self._text[len(self._content) :] if no_call else text)
        content = "".join(one.content or "" for one in said if one is not None)
        self._content += content
        pieces = [self._piece(call) for one in said if one is not None for call in one.tool_calls or ()]
        return Read(content, tuple(piece for piece in pieces if piece is not None))

    def _whole(self) -> Read:
        found = self._parser.extract_tool_calls(self._text, request=self._request)
        if not found.tools_called:
            return Read(self._text if found.content is None else found.content)
        pieces = (
            Piece(index, _name(call.function.name), call.function.arguments or "")
            for index, call in enumerate(found.tool_calls)
        )
        return Read(found.content or "", tuple(pieces))

    def _step(self, before: str, text: str, ids_before: list[int], ids: Sequence[int]) -> Any:
        return self._parser.extract_tool_calls_streaming(
            before, self._text, text, ids_before, self._token_ids, list(ids), self._request
        )

    def _rest(self, last: Any) -> Any:
        """What it held back, as vLLM's own server asks for it; changes `last`."""
        if last is not None and last.tool_calls and (call := last.tool_calls[-1]).function is not None:
            call.function.arguments = (call.function.arguments or "") + self._parser.get_remaining_unstreamed_args()
        if getattr(self._parser, "engine_based_streaming", False) and hasattr(self._parser, "finish_streaming"):
            return self._parser.finish_streaming()
        return None

    def _piece(self, call: Any) -> Piece | None:
        """None for arguments of a call that was never named."""
        name = call.function.name if call.function is not None else None
        arguments = (call.function.arguments if call.function is not None else None) or ""
        if call.index in self._known:
            return Piece(call.index, None, arguments)
        if not name:
            return None
        self._known.add(call.index)
        return Piece(call.index, _name(name), arguments)


def parser_class(name: str) -> Any:
    """Imports vLLM. Raises EngineUnavailable for a name that it does not have."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from vllm.tool_parsers import ToolParserManager

    try:
        return ToolParserManager.get_tool_parser(name)
    except KeyError:
        known = ", ".join(ToolParserManager.list_registered())
        raise EngineUnavailable(f"{SETTING}: this vllm has no tool parser {name!r}; it has {known}") from None


def _request(chat: Chat) -> Any:
    """What parsers look at: the tools. Which messages there were is none of their business."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(
        model="", messages=[{"role": "user", "content": ""}], tools=tools_of(chat), tool_choice="auto"
    )


def _name(said: str) -> str:
    """What a caller can take as a function's name, whatever the model wrote."""
    return NOT_IN_NAMES.sub("_", said)[:NAME_CHARS] or "_"

"""What of a generated text is for the reader and what calls of tools, as it comes.

A `CallReader` knows how a model writes calls: `hermes` for most, `vllm_tools` for what vLLM has a parser for,
`forced` where a call was demanded. `Calls` puts one beside a job's deltas. Text and token ids stay as they
are: content and calls are a second view of them.
Called by: the engines.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from codeyard.shared.chat import ToolCallDelta
from codeyard.shared.job import JobId
from codeyard.worker.engines.port import Delta, EngineJob


@dataclass(frozen=True, slots=True)
class Piece:
    """Of a call. The first of each index has the name; `arguments` joined are the JSON the model wrote."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Read:
    content: str = ""
    pieces: tuple[Piece, ...] = ()


class CallReader(Protocol):
    """Of one job's text."""

    def read(self, text: str, token_ids: Sequence[int], *, ended: bool) -> Read:
        """What is new with this text. With `ended` also what was held back."""


class Calls:
    """One job's deltas with the calls in them. Without `parallel` the first call is the only one. What an earlier
    run told is read and not told again."""

    def __init__(self, job: EngineJob, reader: CallReader, *, parallel: bool) -> None:
        self._job_id = job.id
        self._reader = reader
        self._parallel = parallel
        self._any = bool(reader.read(job.prefix_text, job.prefix_token_ids, ended=False).pieces)
        self._all_told = bool(job.prefix_token_ids)  # nothing came since

    def of(self, delta: Delta) -> Delta:
        ended = delta.finish_reason is not None
        if self._all_told and not delta.token_ids and delta.finish_reason in ("stop", "length"):
            ended = False  # complete before it was taken over: what was held back came with the last token
        read = self._reader.read(delta.text, delta.token_ids, ended=ended)
        self._all_told = False
        calls = tuple(self._call(piece) for piece in read.pieces if self._parallel or not piece.index)
        self._any = self._any or bool(calls)
        stopped = delta.finish_reason == "stop" and self._any
        reason = "tool_calls" if stopped else delta.finish_reason
        return replace(delta, content=read.content, tool_calls=calls, finish_reason=reason)

    def _call(self, piece: Piece) -> ToolCallDelta:
        new = call_id(self._job_id, piece.index) if piece.name is not None else None
        return ToolCallDelta(index=piece.index, id=new, name=piece.name, arguments=piece.arguments)


def call_id(job_id: JobId, index: int) -> str:
    """The same whenever the job is generated, by whichever worker."""
    return "call_" + hashlib.sha256(f"{job_id}:{index}".encode()).hexdigest()[:24]

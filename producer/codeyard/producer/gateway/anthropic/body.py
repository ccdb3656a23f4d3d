"""Anthropic's request bodies, as far as they can be answered here.

Promise: whatever comes, `decode` gives a checked body or raises `Refused`, naming the field as the caller wrote
it. What a block or a tool carries beside the fields here (`cache_control`, `citations`, ...) is ignored;
parameters of the body itself are not: `parameters` has what becomes of each. Called by: convert, legacy.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from codeyard.producer.gateway.anthropic.parameters import Parameter, fates
from codeyard.producer.gateway.problems import Refused
from codeyard.shared.chat import CallId, FunctionName
from codeyard.shared.job import Name

B = TypeVar("B", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class TextBlock(_Part):
    type: Literal["text"]
    text: str


class ToolUseBlock(_Part):
    type: Literal["tool_use"]
    id: CallId
    name: FunctionName
    input: dict[str, Any]


class ToolResultBlock(_Part):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: str | tuple[TextBlock, ...] | None = None
    is_error: bool | None = None


class ThinkingBlock(_Part):
    """Of an earlier answer of another model. Left out: no model reads another's."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]
BLOCK_TYPES = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class Turn(_Part):
    role: Literal["user", "assistant", "system"]
    content: str | tuple[Block, ...]


class ToolBody(_Part):
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolChoice(_Part):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(_Part):
    user_id: str | None = None


class Schema(_Part):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Part):
    model_config = ConfigDict(frozen=True, extra="forbid")

    effort: str | None = None
    format: Schema | None = None


class Thinking(_Part):
    type: str


class Edit(_Part):
    type: str


class ContextManagement(_Part):
    edits: tuple[Edit, ...] | None = None


class _Body(_Part):
    """Parameters of the table that are mapped are fields; `decode` looks at the others."""

    model_config = ConfigDict(frozen=True, extra="allow")


class _Conversation(_Body):
    model: Name
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=10_000)]
    system: str | tuple[TextBlock, ...] | None = None
    tools: tuple[ToolBody, ...] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: Schema | None = None
    thinking: Thinking | None = None
    context_management: ContextManagement | None = None


class _Sampled(_Body):
    """Ranges are those of `Sampling`, checked there."""

    stop_sequences: tuple[str, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    metadata: Metadata | None = None


class MessageBody(_Conversation, _Sampled):
    max_tokens: Annotated[int, Field(ge=1)]
    service_tier: Literal["auto", "standard_only"] | None = None


class CountBody(MessageBody):
    """The same, to be counted: how to generate is ignored."""

    max_tokens: int | None = None  # type: ignore[assignment]  # not asked for, and not looked at


class CompleteBody(_Sampled):
    model: Name
    prompt: Annotated[str, Field(min_length=1)]
    max_tokens_to_sample: Annotated[int, Field(ge=1)]


def decode(kind: type[B], table: Sequence[Parameter], body: bytes | Mapping[str, Any]) -> B:
    """What was read already, as an item of a batch, is written again: one reading, one set of rules. Raises Refused."""
    try:
        read = kind.model_validate_json(body if isinstance(body, bytes) else json.dumps(body), strict=True)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False)) from None
    if read.model_extra:
        _check_others(read.model_extra, fates(table))
    return read


def refused(field: str, reason: str) -> Refused:
    return Refused("invalid-job", reason, field=field)


def refusal(errors: Sequence[ErrorDetails]) -> Refused:
    """Of the first thing that is wrong. A content may be text or blocks, and pydantic reports on both: what is
    wrong inside the blocks says more."""
    if errors[0]["type"] == "json_invalid":
        return Refused("malformed-json", errors[0]["msg"])
    error = next((error for error in errors if error["loc"][-1:] != ("str",)), errors[0])
    return refused(_where(error["loc"]), _reason(error))


def _where(loc: Sequence[int | str]) -> str:
    """A field's path as the caller wrote it, without pydantic's names for the branches of a union."""
    parts = [
        str(part)
        for before, part in zip(("", *loc), loc, strict=False)
        if isinstance(part, int)
        or not ("[" in part or part == "str" or (isinstance(before, int) and part in BLOCK_TYPES))
    ]
    return ".".join(parts)[:200] or "body"


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "union_tag_invalid":
        return _no_such_block(error["ctx"]["tag"])
    if error["type"] == "literal_error" and error["loc"][-1] == "type" and isinstance(error["loc"][-2], int):
        return _no_such_block(error["input"])
    return error["msg"]


def _no_such_block(kind: object) -> str:
    return (
        f"blocks of type {str(kind)[:60]!r} cannot be read here: models of this gateway read text, and results as text"
    )


def _check_others(given: Mapping[str, Any], known: Mapping[str, Parameter]) -> None:
    for name, value in given.items():
        parameter = known.get(name)
        if parameter is None:
            raise refused(name[:200], "there is no such parameter")
        if parameter.fate == "refused" and value is not None:
            raise refused(name, f"not supported: {parameter.note}")

"""Anthropic's requests as jobs, and jobs as Anthropic's messages. Plain functions of plain values.

    read_message(body)         -> Asked    what to submit       raises Refused
    message_of(asked, status)  -> dict     the message that a job which succeeded stands for

Contents are joined to text where they were blocks: with a line break where they were apart (a system, a user's
turn, a result), with nothing between where they are one text cut in pieces (an assistant's turn). Turns of one
role in a row become one, as with Anthropic. What failed is `errors.failure_of`'s.
Called by: handlers, stream, the batches API.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from codeyard.producer.gateway.anthropic.body import (
    CountBody,
    MessageBody,
    TextBlock,
    ThinkingBlock,
    ToolBody,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    decode,
    refused,
)
from codeyard.producer.gateway.anthropic.parameters import MESSAGES, Parameter, sampled
from codeyard.shared.chat import Chat, Message, NamedTool, Tool, ToolCall
from codeyard.shared.job import JobId, Lane, OutputFormat, Sampling
from codeyard.shared.record import JobStatus, Result, Usage

MESSAGE_ID = "msg_"  # before the job's id
ERROR = "Error: "  # before the result of a tool that failed: a chat has no other place for that
LANES = {"auto": Lane.INTERACTIVE, "standard_only": Lane.STANDARD}
TIERS = {Lane.INTERACTIVE: "priority", Lane.STANDARD: "standard", Lane.BULK: "batch"}
CLEARS_THINKING = "clear_thinking"  # the edits whose name begins so have nothing to do here
UNREADABLE = "INVALID_JSON"  # key that Anthropic's documentation gives arguments which are no JSON object


@dataclass(frozen=True, slots=True)
class Asked:
    """What to submit, and how to answer."""

    model: str
    prompt: Chat
    sampling: Sampling
    lane: Lane = Lane.INTERACTIVE
    stream: bool = False
    metadata: Mapping[str, Any] | None = None


def read_message(body: bytes | Mapping[str, Any]) -> Asked:
    """Of `POST /v1/messages`, or of an item's `params` in a batch. Raises Refused."""
    read = decode(MessageBody, MESSAGES, body)
    return Asked(
        model=read.model,
        prompt=_chat(read),
        sampling=sampling_of(read, MESSAGES, output_format=_output_format(read)),
        lane=LANES[read.service_tier or "auto"],
        stream=bool(read.stream),
        metadata=metadata_of(read.metadata.user_id if read.metadata else None),
    )


def read_count(body: bytes | Mapping[str, Any]) -> Asked:
    """Of `POST /v1/messages/count_tokens`: a job that generates nothing. Raises Refused."""
    read = decode(CountBody, MESSAGES, body)
    return Asked(model=read.model, prompt=_chat(read), sampling=Sampling(max_tokens=0))


def message_of(asked: Asked, status: JobStatus) -> dict[str, Any]:
    """`status` is that of a job that succeeded."""
    result = status.result
    assert result is not None
    return {
        **head_of(status.id, status.model),
        "content": blocks_of(result),
        **ending_of(asked, result),
        "usage": usage_of(result.usage, status.lane),
    }


def head_of(job_id: JobId, model: str) -> dict[str, Any]:
    return {"id": MESSAGE_ID + job_id, "type": "message", "role": "assistant", "model": model}


def blocks_of(result: Result) -> list[dict[str, Any]]:
    text = result.text if result.content is None else result.content
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    blocks += ({**tool_use(call.id, call.name), "input": _input(call.arguments)} for call in result.tool_calls)
    return blocks


def tool_use(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": {}}


def ending_of(asked: Asked, result: Result) -> dict[str, Any]:
    """Why it ended: the same in a message and at the end of a stream."""
    reason = _stop_reason(asked, result)
    stop = result.stop if reason == "stop_sequence" else None
    return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None}


def _stop_reason(asked: Asked, result: Result) -> str:
    if result.tool_calls:
        return "tool_use"
    if result.finish_reason == "length":
        whole = result.usage.completion_tokens >= asked.sampling.max_tokens
        return "max_tokens" if whole else "model_context_window_exceeded"
    return "end_turn" if result.stop is None else "stop_sequence"


def usage_of(usage: Usage, lane: Lane) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "service_tier": TIERS[lane],
    }


def _input(arguments: str) -> dict[str, Any]:
    """A model may write anything; Anthropic's clients need an object."""
    try:
        read = json.loads(arguments)
    except ValueError:
        read = None
    return read if isinstance(read, dict) else {UNREADABLE: arguments}


# Requests ------------------------------------------------------------------------------------------


def sampling_of(read: Any, table: Sequence[Parameter], **more: Any) -> Sampling:
    """The parameters that the table maps to `sampling`; `more` wins. Raises Refused, naming the parameter."""
    names = sampled(table)
    given = {field: value for field, name in names.items() if (value := getattr(read, name)) is not None}
    try:
        return Sampling(**{**given, **{field: value for field, value in more.items() if value is not None}})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = names.get(str(first["loc"][0]), "body")
        raise refused(".".join([field, *map(str, first["loc"][1:])]), first["msg"]) from None


def metadata_of(user_id: str | None) -> dict[str, Any]:
    return {"user_id": user_id} if user_id is not None else {}


def chat_of(**fields: Any) -> Chat:
    """Raises Refused. What the body's own types check is not wrong again here."""
    try:
        return Chat(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise refused(".".join(map(str, first["loc"])) or "tools", first["msg"].removeprefix("Value error, ")) from None


def _chat(read: MessageBody) -> Chat:
    if read.thinking is not None and read.thinking.type not in ("disabled", "adaptive"):
        raise refused("thinking", "no model here thinks apart from its answer; leave it out, or disable it")
    if read.context_management is not None:
        for n, edit in enumerate(read.context_management.edits or ()):
            if not edit.type.startswith(CLEARS_THINKING):
                raise refused(f"context_management.edits.{n}", "the conversation is used as it is sent")
    messages = [Message(role="system", content=_text(read.system))] if read.system else []
    for n, turn in enumerate(read.messages):
        for message in _messages(turn, f"messages.{n}"):
            if messages and _goes_on(messages[-1], message):
                messages[-1] = _joined(messages[-1], message)
            else:
                messages.append(message)
    return chat_of(
        messages=tuple(messages),
        tools=tuple(_tool(tool, f"tools.{n}") for n, tool in enumerate(read.tools or ())),
        tool_choice=_choice(read.tool_choice),
        parallel_tool_calls=not (read.tool_choice and read.tool_choice.disable_parallel_tool_use),
    )


def _messages(turn: Turn, where: str) -> Iterable[Message]:
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    if turn.role == "assistant":
        return [_answer(turn.content, where)]
    return _said(turn, where)


def _answer(blocks: Sequence[Any], where: str) -> Message:
    texts: list[str] = []
    calls: list[ToolCall] = []
    for n, block in enumerate(blocks):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolUseBlock():
                calls.append(
                    ToolCall(id=block.id, name=block.name, arguments=_arguments(block, f"{where}.content.{n}"))
                )
            case ThinkingBlock():
                pass
            case _:
                raise refused(f"{where}.content.{n}", "a tool_result belongs to a user's turn")
    return Message(role="assistant", content="".join(texts) if texts or not calls else None, tool_calls=tuple(calls))


def _said(turn: Turn, where: str) -> Iterable[Message]:
    """The results of tools are messages of their own, in the order they came."""
    messages: list[Message] = []
    texts: list[str] = []
    for n, block in enumerate(turn.content):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolResultBlock() if turn.role == "user":
                if texts:
                    messages.append(Message(role=turn.role, content="\n".join(texts)))
                    texts = []
                messages.append(Message(role="tool", content=_result(block), tool_call_id=block.tool_use_id))
            case ThinkingBlock():
                pass
            case _:
                reason = f"a {getattr(block, 'type', 'block')} does not belong to a turn of role {turn.role}"
                raise refused(f"{where}.content.{n}", reason)
    if texts or not messages:
        messages.append(Message(role=turn.role, content="\n".join(texts)))
    return messages


def _goes_on(last: Message, message: Message) -> bool:
    return last.role == message.role and message.role in ("user", "assistant")


def _joined(last: Message, message: Message) -> Message:
    contents = [content for content in (last.content, message.content) if content is not None]
    between = "\n" if last.role == "user" else ""
    content = between.join(contents) if contents else None
    return Message(role=last.role, content=content, tool_calls=last.tool_calls + message.tool_calls)


def _result(block: ToolResultBlock) -> str:
    return (ERROR if block.is_error else "") + _text(block.content or "")


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _arguments(block: ToolUseBlock, where: str) -> str:
    try:
        return json.dumps(block.input, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise refused(f"{where}.input", "a number in it is too large for JSON") from None


def _tool(tool: ToolBody, where: str) -> Tool:
    if tool.type not in (None, "custom"):
        reason = f"{tool.type[:60]!r} is a tool of Anthropic's; give tools of your own, with an input_schema"
        raise refused(f"{where}.type", reason)
    if tool.input_schema is None:
        raise refused(f"{where}.input_schema", "Field required")
    if tool.strict:
        raise refused(f"{where}.strict", "not supported: arguments are what the model writes")
    if tool.defer_loading:
        raise refused(f"{where}.defer_loading", "not supported: there is no tool search; give the tools to use")
    return Tool(name=tool.name, description=tool.description, parameters=tool.input_schema)


def _choice(choice: ToolChoice | None) -> str | NamedTool:
    match choice:
        case None | ToolChoice(type="auto"):
            return "auto"
        case ToolChoice(type="any"):
            return "required"
        case ToolChoice(type="none"):
            return "none"
    if choice.name is None:
        raise refused("tool_choice.name", "Field required")
    return NamedTool(name=choice.name)


def _output_format(read: MessageBody) -> OutputFormat | None:
    schema = read.output_config.format if read.output_config else None
    schema = schema or read.output_format
    return OutputFormat(type="json_schema", json_schema=schema.json_schema) if schema else None

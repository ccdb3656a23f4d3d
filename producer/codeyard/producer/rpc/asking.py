"""A submission as a message and back.

`message_of` is what a client sends. `fields_of` gives the fields of a message by the names they have over HTTP,
those that were left out left out; who receives them checks them as it checks a body. Promise: both raise only
InvalidJob, naming the field. Called by: rpc.client (message_of), rpc.server (fields_of).
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from pydantic import ValidationError

from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.submission import Submission
from codeyard.shared.chat import Chat, Message, NamedTool
from codeyard.shared.errors import InvalidJob
from codeyard.shared.job import Lane, Sampling

LANES: dict[Lane, pb.Lane] = {lane: getattr(pb, f"LANE_{lane.name}") for lane in Lane}
ROLES: dict[str, pb.Role] = {
    name: getattr(pb, f"ROLE_{name.upper()}") for name in ("system", "user", "assistant", "tool")
}
TOOL_MODES: dict[str, pb.ToolChoice] = {
    mode: getattr(pb, f"TOOL_CHOICE_{mode.upper()}") for mode in ("auto", "none", "required")
}

_NUMBERS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


# Sent ----------------------------------------------------------------------------------------------


def message_of(asked: Submission) -> pb.Submission:
    """Tenant, trace and job id stay behind: the first is the credential's, the others are not the message's."""
    try:
        sampling = asked.sampling if isinstance(asked.sampling, Sampling) else Sampling(**asked.sampling)
        message = pb.Submission(
            model=asked.model,
            lane=LANES[Lane(asked.lane)],
            key=asked.idempotency_key,
            sampling=_sampling_message(sampling),
            stream=asked.stream,
            timeout_s=asked.timeout_s,
            metadata_json=_json_text(asked.metadata) if asked.metadata else "",
            share=asked.share,
            callback_url=asked.callback_url,
        )
        if isinstance(asked.prompt, Chat):
            message.chat.CopyFrom(_chat_message(asked.prompt))
        elif isinstance(asked.prompt, str):
            message.text = asked.prompt
        else:
            message.token_ids.ids.extend(asked.prompt)
            message.token_ids.SetInParent()  # also of no ids, which is the other side's to refuse
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidJob(first["msg"], field=".".join(["sampling", *map(str, first["loc"])])) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidJob(f"this cannot be sent: {error}", field="body") from None
    return message


def _sampling_message(sampling: Sampling) -> pb.Sampling:
    message = pb.Sampling(stop=sampling.stop, **{name: getattr(sampling, name) for name in _NUMBERS})
    if (wanted := sampling.output_format) is not None:
        if wanted.json_schema is not None:
            message.output_format.json_schema_json = _json_text(wanted.json_schema)
        elif wanted.regex is not None:
            message.output_format.regex = wanted.regex
        else:
            message.output_format.choice.choices.extend(wanted.choice or ())
    return message


def _chat_message(chat: Chat) -> pb.Chat:
    message = pb.Chat(
        messages=[_turn_message(turn) for turn in chat.messages],
        tools=[
            pb.Tool(name=tool.name, description=tool.description, parameters_json=_json_text(tool.parameters))
            for tool in chat.tools
        ],
        parallel_tool_calls=chat.parallel_tool_calls,
    )
    if isinstance(chat.tool_choice, NamedTool):
        message.tool_name = chat.tool_choice.name
    else:
        message.tool_mode = TOOL_MODES[chat.tool_choice]
    return message


def _turn_message(turn: Message) -> pb.Message:
    return pb.Message(
        role=ROLES[turn.role],
        content=turn.content,
        tool_calls=[pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in turn.tool_calls],
        tool_call_id=turn.tool_call_id,
        name=turn.name,
    )


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


# Received ------------------------------------------------------------------------------------------


def fields_of(message: pb.Submission) -> dict[str, Any]:
    """The key is not among them: over HTTP it is a header."""
    fields: dict[str, Any] = {"model": message.model, "prompt": _prompt(message), "stream": message.stream}
    if message.lane != pb.LANE_UNSPECIFIED:
        fields["lane"] = _named(LANES, message.lane, "lane").value
    if message.HasField("sampling"):
        fields["sampling"] = _sampling(message.sampling)
    if message.HasField("timeout_s"):
        fields["timeout_s"] = message.timeout_s
    if message.share:
        fields["share"] = True
    if message.HasField("callback_url"):
        fields["callback_url"] = message.callback_url
    if message.metadata_json:
        fields["metadata"] = _json_object(message.metadata_json, "metadata_json")
    return fields


def _prompt(message: pb.Submission) -> Any:
    given = message.WhichOneof("prompt")
    if given == "text":
        return message.text
    if given == "token_ids":
        return tuple(message.token_ids.ids)
    if given == "chat":
        return _chat(message.chat)
    raise InvalidJob("text, token_ids or chat", field="prompt")


def _sampling(message: pb.Sampling) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(message, name) for name in _NUMBERS if message.HasField(name)}
    if message.stop:
        fields["stop"] = tuple(message.stop)
    if message.HasField("output_format"):
        fields["output_format"] = _output_format(message.output_format)
    return fields


def _output_format(message: pb.OutputFormat) -> dict[str, Any]:
    given = message.WhichOneof("format")
    if given == "json_schema_json":
        schema = _json_object(message.json_schema_json, "sampling.output_format.json_schema_json")
        return {"type": "json_schema", "json_schema": schema}
    if given == "regex":
        return {"type": "regex", "regex": message.regex}
    if given == "choice":
        return {"type": "choice", "choice": tuple(message.choice.choices)}
    raise InvalidJob("json_schema_json, regex or choice", field="sampling.output_format")


def _chat(message: pb.Chat) -> Chat:
    """Checked here: of a prompt that may be three things, nobody could say later which of its parts is wrong."""
    fields: dict[str, Any] = {
        "messages": tuple(_turn(turn, f"prompt.messages.{n}") for n, turn in enumerate(message.messages)),
        "tools": tuple(_tool(tool, f"prompt.tools.{n}.parameters_json") for n, tool in enumerate(message.tools)),
    }
    if message.WhichOneof("tool_choice") == "tool_name":
        fields["tool_choice"] = {"name": message.tool_name}
    else:
        fields["tool_choice"] = _named(TOOL_MODES, message.tool_mode, "prompt.tool_mode")
    if message.HasField("parallel_tool_calls"):
        fields["parallel_tool_calls"] = message.parallel_tool_calls
    try:
        return Chat.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidJob(first["msg"], field=".".join(["prompt", *map(str, first["loc"])])) from None


def _turn(message: pb.Message, where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": _named(ROLES, message.role, f"{where}.role")}
    for name in ("content", "tool_call_id", "name"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    fields["tool_calls"] = tuple(
        {"id": call.id, "name": call.name, "arguments": call.arguments} for call in message.tool_calls
    )
    return fields


def _tool(message: pb.Tool, where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": message.name}
    if message.HasField("description"):
        fields["description"] = message.description
    if message.parameters_json:
        fields["parameters"] = _json_object(message.parameters_json, where)
    return fields


def _named(names: Mapping[Any, int], number: int, field: str) -> Any:
    """Enums of proto3 are open: a number may come that has no name here."""
    for name, known in names.items():
        if known == number:
            return name
    raise InvalidJob("no value that is known here", field=field)


def _json_object(text: str, field: str) -> dict[str, Any]:
    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidJob(f"not JSON: {error}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidJob("a JSON object", field=field)
    return value

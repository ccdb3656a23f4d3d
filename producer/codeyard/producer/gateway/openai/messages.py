"""Conversations, tools and output formats: from OpenAI's words into ours.

Text is all a model here reads: content parts of type text are joined by line breaks, other parts are refused.
Promise: whatever comes, these raise only `Refused`, naming the parameter. Called by: convert, responses.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from codeyard.producer.gateway.openai.parameters import invalid, missing
from codeyard.shared.chat import Chat, Message, NamedTool, Tool
from codeyard.shared.job import OutputFormat

M = TypeVar("M", bound=BaseModel)

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
PASSED_OVER = {"refusal", "annotations"}  # an SDK's own objects, sent back, carry them


def chat_of(body: Mapping[str, Any]) -> Chat:
    """Of a chat completion's parameters."""
    given = _list("messages", body["messages"] if "messages" in body else _absent("messages"))
    messages = [_message(one, "messages", number) for number, one in enumerate(given)]
    return chat(messages, body, lambda tool: tool.get("function"))


def chat(messages: Sequence[Message], body: Mapping[str, Any], function_of: Any) -> Chat:
    """`function_of` finds the function's description in a tool (and in a `tool_choice`)."""
    tools = [_tool(one, number, function_of) for number, one in enumerate(_list("tools", body.get("tools", [])))]
    fields: dict[str, Any] = {"messages": tuple(messages), "tools": tuple(tools)}
    if "tool_choice" in body:
        fields["tool_choice"] = _tool_choice(body["tool_choice"], function_of)
    if "parallel_tool_calls" in body:
        fields["parallel_tool_calls"] = body["parallel_tool_calls"]
    try:
        return Chat.model_validate(fields, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = first["loc"] or (("tool_choice",) if "tool_choice" in first["msg"] else ("tools",))
        raise invalid(str(where[0]), first["msg"]) from None


def content_of(given: Any, name: str, *where: int | str) -> str:
    """Text, or parts of it. Raises Refused for any other part."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise invalid(name, "text, or a list of parts", *where)
    texts = []
    for number, part in enumerate(given):
        kind = part.get("type") if isinstance(part, Mapping) else None
        field = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if field is None:
            raise invalid(name, f"the models here read text only, not {str(kind)[:40]!r}", *where, number, "type")
        if not isinstance(part.get(field), str):
            raise invalid(name, "text is missing", *where, number, field)
        texts.append(part[field])
    return "\n".join(texts)


def message_of(fields: Mapping[str, Any], name: str, number: int) -> Message:
    return _checked(Message, fields, name, number)


def format_of(given: Any, name: str) -> OutputFormat | None:
    """Of `response_format`, or of `text.format`, whose schema lies one level higher."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return OutputFormat(type="json_schema", json_schema={})
    if kind != "json_schema":
        raise invalid(name, "one of text, json_object, json_schema", "type")
    inside = given.get("json_schema", given)
    if not isinstance(inside, Mapping) or not isinstance(inside.get("schema"), dict):
        raise invalid(
            name, "a JSON schema is missing", *(("json_schema", "schema") if "json_schema" in given else ("schema",))
        )
    return OutputFormat(type="json_schema", json_schema=_schema(inside["schema"], name, "schema"))


# Pieces --------------------------------------------------------------------------------------------


def _message(given: Any, name: str, number: int) -> Message:
    if not isinstance(given, Mapping):
        raise invalid(name, "an object", number)
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(name, f"one of {', '.join(ROLES)}", number, "role")
    fields: dict[str, Any] = {"role": ROLES[role]}
    for field, value in given.items():
        if value is None or field == "role" or field in PASSED_OVER:
            continue
        if field == "content":
            fields["content"] = content_of(value, name, number, "content")
        elif field == "tool_calls":
            calls = _list(name, value, number, "tool_calls")
            fields["tool_calls"] = tuple(_call(one, name, number, "tool_calls", n) for n, one in enumerate(calls))
        elif field in ("name", "tool_call_id"):
            fields[field] = value
        else:
            raise invalid(name, "not offered", number, field[:100])
    if "content" not in fields and isinstance(given.get("refusal"), str):
        fields["content"] = given["refusal"]
    return message_of(fields, name, number)


def _call(given: Any, name: str, *where: int | str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        raise invalid(name, "a call of type function", *where)
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise invalid(name, "an object", *where, "function")
    call = {"id": given.get("id"), "name": function.get("name")}
    return call if function.get("arguments") is None else {**call, "arguments": function["arguments"]}


def _tool(given: Any, number: int, function_of: Any) -> Tool:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind != "function":
        raise invalid("tools", f"only tools of type function are offered, not {str(kind)[:40]!r}", number, "type")
    function = function_of(given)
    if not isinstance(function, Mapping):
        raise invalid("tools", "an object", number, "function")
    inside = () if function is given else ("function",)
    fields = {
        field: function[field] for field in ("name", "description", "parameters") if function.get(field) is not None
    }
    if "parameters" in fields:
        fields["parameters"] = _schema(fields["parameters"], "tools", number, *inside, "parameters")
    return _checked(Tool, fields, "tools", number, *inside)


def _tool_choice(given: Any, function_of: Any) -> str | NamedTool:
    if isinstance(given, str) and given in ("auto", "none", "required"):
        return given
    function = function_of(given) if isinstance(given, Mapping) and given.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise invalid("tool_choice", "auto, none, required, or one function by its name")
    return _checked(NamedTool, {"name": name}, "tool_choice")


def _schema(given: Any, name: str, *where: int | str) -> dict[str, Any]:
    """A number too large for a float was read as infinity, which is not JSON."""
    if not isinstance(given, dict):
        raise invalid(name, "a JSON schema, an object", *where)
    try:
        json.dumps(given, allow_nan=False)
    except ValueError:
        raise invalid(name, "a number is too large", *where) from None
    return given


def _checked(kind: type[M], fields: Mapping[str, Any], name: str, *where: int | str) -> M:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise invalid(name, first["msg"], *where, *first["loc"]) from None


def _list(name: str, given: Any, *where: int | str) -> list[Any]:
    if not isinstance(given, list):
        raise invalid(name, "a list", *where)
    return given


def _absent(name: str) -> Any:
    raise missing(name)

"""Between OpenAI's responses and our jobs. Pure: no server is asked, nothing is submitted.

A response is one job, and its object is made of the job's record alone: the answer to POST, to GET, and inside
events, from any gateway. What the record has no field for lies in the job's metadata under `openai`.
Called by: response_routes, response_events.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from codeyard.producer.gateway.openai.convert import (
    DEFAULT_MAX_TOKENS,
    PREFIXES,
    TIERS,
    Asked,
    Wanted,
    flag,
    lane_of,
    message,
    metadata_of,
    model_of,
    stream_options,
    token_logprob,
)
from codeyard.producer.gateway.openai.errors import job_code
from codeyard.producer.gateway.openai.messages import chat, content_of, format_of, message_of
from codeyard.producer.gateway.openai.parameters import Api, invalid, missing, read_body, sampling_of
from codeyard.shared.chat import Chat, Message, NamedTool, Tool
from codeyard.shared.job import OutputFormat
from codeyard.shared.record import Record, Result, State

MARK = "openai"  # in a job's metadata; a caller's own may not be called that
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = {LOGPROBS, "reasoning.encrypted_content"}  # the second: there is none, so it is all included

STATUSES = {
    State.RESERVED: "queued",
    State.QUEUED: "queued",
    State.RUNNING: "in_progress",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.EXPIRED: "failed",
    State.CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class AskedResponse:
    """`previous`: the response that this one goes on from; its conversation is not in `asked` yet."""

    asked: Asked
    previous: str | None


def read_response(body: bytes | Mapping[str, Any]) -> AskedResponse:
    """Raises Refused."""
    used = read_body(Api.RESPONSES, body)
    model, metadata = model_of(used), metadata_of(used)
    stream_options(used)
    background, previous = flag(used, "background"), _text(used, "previous_response_id")
    instructions = _text(used, "instructions")
    begin = [Message(role="system", content=instructions)] if instructions is not None else []
    prompt = chat([*begin, *_input(used)], used, lambda tool: tool)
    output_format, format_name = _format(used)
    more = {"max_tokens": DEFAULT_MAX_TOKENS[Api.RESPONSES], "output_format": output_format, **_logprobs(used)}
    mark: dict[str, Any] = {"api": Api.RESPONSES.value}
    for name, value in (
        ("background", background),
        ("instructions", bool(begin)),
        ("previous", previous),
        ("format", format_name),
    ):
        mark |= {name: value} if value else {}
    if MARK in metadata:
        raise invalid("metadata", "this name is taken", MARK)
    asked = Asked(
        api=Api.RESPONSES,
        model=model,
        jobs=(Wanted(prompt, sampling_of(Api.RESPONSES, used, **more)),),
        lane=lane_of(used),
        stream=flag(used, "stream"),
        background=background,
        metadata={**metadata, MARK: mark},
    )
    return AskedResponse(asked, previous)


def continued(asked: Asked, before: Record) -> Asked:
    """The same with the conversation of an earlier response before its input, and that one's answer; its
    instructions are not taken over. Raises Refused."""
    said = before.result
    if before.state is not State.SUCCEEDED or said is None:
        raise invalid("previous_response_id", f"that response has no answer; it is {STATUSES[before.state]}")
    if not isinstance(before.job.prompt, Chat):
        raise invalid("previous_response_id", "that response cannot be gone on from; send its conversation as input")
    [wanted] = asked.jobs
    assert isinstance(wanted.prompt, Chat)
    own = _instructions(asked.metadata, wanted.prompt)
    earlier = before.job.prompt.messages[1:] if _mark(before).get("instructions") else before.job.prompt.messages
    answer = Message(role="assistant", content=message(said)["content"], tool_calls=said.tool_calls)
    following = wanted.prompt.messages[len(own) :]
    whole = wanted.prompt.model_copy(update={"messages": (*own, *earlier, answer, *following)})
    return replace(asked, jobs=(replace(wanted, prompt=whole),))


def response_of(
    record: Record, *, status: str | None = None, output: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """OpenAI's object. `status` and `output` are given for moments of a stream that the record is past."""
    job, mark, result = record.job, _mark(record), record.result
    prompt = job.prompt if isinstance(job.prompt, Chat) else None  # it may be lost where long ones are kept
    ended = result if status is None else None
    own = _instructions(job.metadata, prompt)
    failed = job_code(record.state, ended) if ended is not None else None
    incomplete = ended is not None and failed is None and ended.finish_reason == "length"
    return {
        "id": PREFIXES[Api.RESPONSES] + record.id,
        "object": "response",
        "created_at": int(record.created_at),
        "completed_at": int(record.finished_at) if ended is not None and failed is None else None,
        "status": status or ("incomplete" if incomplete else STATUSES[record.state]),
        "background": bool(mark.get("background")),
        "error": {"code": failed[0], "message": failed[1]} if failed is not None else None,
        "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
        "instructions": own[0].content if own else None,
        "max_output_tokens": job.sampling.max_tokens,
        "model": job.model,
        "output": output if output is not None else _output(record, ended),
        "parallel_tool_calls": prompt.parallel_tool_calls if prompt else True,
        "previous_response_id": mark.get("previous"),
        "reasoning": {"effort": None, "summary": None},
        "service_tier": TIERS[job.lane],
        "store": True,
        "temperature": job.sampling.temperature,
        "text": {"format": _format_view(job.sampling.output_format, mark.get("format"))},
        "tool_choice": _choice_view(prompt),
        "tools": [_tool_view(tool) for tool in prompt.tools] if prompt else [],
        "top_logprobs": job.sampling.logprobs or 0,
        "top_p": job.sampling.top_p,
        "truncation": "disabled",
        "usage": _usage(ended) if ended is not None else None,
        "metadata": {name: value for name, value in job.metadata.items() if name != MARK},
    }


def message_item(job_id: str, text: str, logprobs: list[dict[str, Any]], status: str) -> dict[str, Any]:
    """`status`: in_progress, without content yet, completed or incomplete."""
    content = [] if status == "in_progress" else [text_part(text, logprobs)]
    return {"id": f"msg_{job_id}", "type": "message", "role": "assistant", "status": status, "content": content}


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def call_item(job_id: str, number: int, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    about = {"id": f"fc_{job_id}_{number}", "type": "function_call", "status": status}
    return {**about, "call_id": call_id, "name": name, "arguments": arguments}


# Answering -----------------------------------------------------------------------------------------


def _output(record: Record, result: Result | None) -> list[dict[str, Any]]:
    if result is None or record.state is not State.SUCCEEDED:
        return []
    said = message(result)
    status = "incomplete" if result.finish_reason == "length" else "completed"
    items = []
    if said["content"] is not None:
        logprobs = [token_logprob(token) for token in result.logprobs]
        items.append(message_item(record.id, said["content"], logprobs, status))
    for number, call in enumerate(result.tool_calls):
        items.append(call_item(record.id, number, call.id, call.name, call.arguments, status))
    return items


def _usage(result: Result) -> dict[str, Any]:
    used = result.usage
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }


def _mark(record: Record) -> Mapping[str, Any]:
    mark = record.job.metadata.get(MARK)
    return mark if isinstance(mark, dict) else {}


def _instructions(metadata: Mapping[str, Any], prompt: Chat | None) -> tuple[Message, ...]:
    mark = metadata.get(MARK)
    return prompt.messages[:1] if prompt and isinstance(mark, dict) and mark.get("instructions") else ()


def _format_view(given: OutputFormat | None, name: str | None) -> dict[str, Any]:
    if given is None:
        return {"type": "text"}
    if not given.json_schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "name": name or "schema", "schema": given.json_schema, "strict": True}


def _tool_view(tool: Tool) -> dict[str, Any]:
    return {"type": "function", **tool.model_dump(), "strict": False}


def _choice_view(prompt: Chat | None) -> Any:
    choice = prompt.tool_choice if prompt else "auto"
    return {"type": "function", "name": choice.name} if isinstance(choice, NamedTool) else choice


# Reading -------------------------------------------------------------------------------------------


def _input(used: Mapping[str, Any]) -> list[Message]:
    """Function calls that follow each other, and a message before them, are one turn of the assistant."""
    if "input" not in used:
        raise missing("input")
    given = used["input"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise invalid("input", "text, or a list of items")
    turns: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        fields = _item(item, number)
        if "tool_calls" in fields and turns and turns[-1]["role"] == "assistant":
            turns[-1]["tool_calls"] = (*turns[-1].get("tool_calls", ()), *fields["tool_calls"])
        else:
            turns.append(fields)
    return [message_of(fields, "input", number) for number, fields in enumerate(turns)]


def _item(item: Any, number: int) -> dict[str, Any]:
    kind = item.get("type", "message") if isinstance(item, Mapping) else None
    if kind == "message":
        role = {"developer": "system"}.get(item.get("role"), item.get("role"))
        if role not in ("user", "system", "assistant"):
            raise invalid("input", "one of user, assistant, system, developer", number, "role")
        return {"role": role, "content": content_of(item.get("content"), "input", number, "content")}
    if kind == "function_call":
        call = {"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": (call,)}
    if kind == "function_call_output":
        output = content_of(item.get("output"), "input", number, "output")
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    raise invalid("input", f"items of type {str(kind)[:40]!r} are not offered", number, "type")


def _format(used: Mapping[str, Any]) -> tuple[OutputFormat | None, str | None]:
    """And its name, where it has one."""
    text = used.get("text", {})
    if not isinstance(text, Mapping):
        raise invalid("text", "an object")
    for name, value in text.items():
        if name != "format" and not (name == "verbosity" and value in (None, "medium")):
            raise invalid("text", "not offered", name[:100])
    given = text.get("format")
    if given is None:
        return None, None
    read = format_of(given, "text.format")
    name = given.get("name")
    return read, name[:64] if isinstance(name, str) else None


def _logprobs(used: Mapping[str, Any]) -> dict[str, Any]:
    include = used.get("include", [])
    if not isinstance(include, list):
        raise invalid("include", "a list")
    for number, one in enumerate(include):
        if not isinstance(one, str) or one not in INCLUDABLE:
            raise invalid("include", f"one of {', '.join(sorted(INCLUDABLE))}", number)
    wanted = LOGPROBS in include or bool(used.get("top_logprobs"))
    return {"logprobs": used.get("top_logprobs", 0)} if wanted else {}


def _text(used: Mapping[str, Any], name: str) -> str | None:
    value = used.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(name, "a string")
    return value

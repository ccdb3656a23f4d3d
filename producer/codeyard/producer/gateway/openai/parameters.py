"""Which parameters of OpenAI's API are taken, and what each becomes: the one table.

A parameter that is not in the table, or is refused, ends in an error that names it, unless it has a value that
means "not used": what cannot be done is never passed over in silence. docs/openai.md holds the same rows (a test
compares them). Called by: convert, responses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from codeyard.producer.gateway.problems import Refused
from codeyard.shared.job import Sampling


class Api(StrEnum):
    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"


class Use(StrEnum):
    SAMPLING = "sampling"  # is a field of the job's sampling
    READ = "read"  # has a meaning of its own, see `becomes`
    IGNORED = "ignored"  # taken, and changes nothing: it asks for nothing that would show in the answer
    REFUSED = "refused"  # an error, unless its value means "not used"


@dataclass(frozen=True, slots=True)
class Parameter:
    """`becomes`: in words, for the reference; of a sampling parameter the field. `unused`: values beside null that
    mean "not used"; of a sampling parameter they leave the engine's default."""

    name: str
    apis: tuple[Api, ...]
    use: Use
    becomes: str
    unused: tuple[Any, ...] = ()
    read: Callable[[Any], Any] = lambda value: value


CHAT, COMPLETIONS, RESPONSES = (Api.CHAT,), (Api.COMPLETIONS,), (Api.RESPONSES,)
BOTH = (*CHAT, *COMPLETIONS)
ALL = tuple(Api)


def _stop(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _sampling(
    name: str, apis: tuple[Api, ...], field: str, *unused: Any, read: Callable[[Any], Any] = lambda value: value
) -> Parameter:
    return Parameter(name, apis, Use.SAMPLING, field, unused, read)


def _read(name: str, apis: tuple[Api, ...], becomes: str) -> Parameter:
    return Parameter(name, apis, Use.READ, becomes)


def _ignored(name: str, apis: tuple[Api, ...], why: str) -> Parameter:
    return Parameter(name, apis, Use.IGNORED, why)


def _refused(name: str, apis: tuple[Api, ...], *unused: Any, why: str = "not offered") -> Parameter:
    return Parameter(name, apis, Use.REFUSED, why, unused)


TABLE: tuple[Parameter, ...] = (
    # What to generate
    _read("model", ALL, "the alias of a model that a worker serves"),
    _read("messages", CHAT, "a conversation; the model's own chat template renders it"),
    _read("prompt", COMPLETIONS, "text, token ids, or a list of either: a choice for each"),
    _read("input", RESPONSES, "text, or messages, function calls and their outputs: a conversation"),
    _read("instructions", RESPONSES, "a system message before the input"),
    _read("previous_response_id", RESPONSES, "the conversation of that response and its answer come before the input"),
    _read("tools", (*CHAT, *RESPONSES), "the conversation's tools, of type `function`"),
    _read("tool_choice", (*CHAT, *RESPONSES), "`auto`, `none`, `required`, or one function"),
    _read("parallel_tool_calls", (*CHAT, *RESPONSES), "whether the model may call several at once"),
    _read("response_format", CHAT, "`text`, `json_object` or `json_schema`: the output format"),
    _read("text", RESPONSES, "its `format`: the output format; its `verbosity` only `medium`"),
    # How
    _sampling("max_completion_tokens", CHAT, "max_tokens"),
    _sampling("max_tokens", BOTH, "max_tokens"),
    _sampling("max_output_tokens", RESPONSES, "max_tokens"),
    _sampling("temperature", ALL, "temperature"),
    _sampling("top_p", ALL, "top_p"),
    _sampling("top_k", ALL, "top_k", -1, 0),
    _sampling("min_p", ALL, "min_p"),
    _sampling("repetition_penalty", ALL, "repetition_penalty"),
    _sampling("presence_penalty", BOTH, "presence_penalty"),
    _sampling("frequency_penalty", BOTH, "frequency_penalty"),
    _sampling("seed", ALL, "seed"),
    _sampling("stop", ALL, "stop", [], read=_stop),
    _read("n", BOTH, "so many jobs for each prompt; the k-th has the seed + k"),
    _read("logprobs", BOTH, "log probabilities of the tokens; of completions also how many of the likeliest"),
    _read("top_logprobs", (*CHAT, *RESPONSES), "so many of the likeliest tokens at each place"),
    _read("include", RESPONSES, "`message.output_text.logprobs`; there is no reasoning to include"),
    # How it travels
    _read("stream", ALL, "server-sent events as it is generated"),
    _read("stream_options", ALL, "`include_usage`: a last chunk with the usage"),
    _read("service_tier", ALL, "the lane: `priority` interactive, `auto` and `default` standard, `flex` bulk"),
    _read("background", RESPONSES, "answer at once; poll, follow or cancel the response by its id"),
    _read("metadata", ALL, "kept with the job"),
    _ignored("user", ALL, "the tenant comes from the credentials"),
    _ignored("safety_identifier", ALL, "the tenant comes from the credentials"),
    _ignored("store", ALL, "every job is kept until its record ends"),
    _ignored("prompt_cache_key", ALL, "engines find common beginnings by themselves"),
    # What is not offered
    _refused("logit_bias", BOTH, {}),
    _refused("audio", CHAT),
    _refused("modalities", CHAT, ["text"]),
    _refused("prediction", CHAT),
    _refused("web_search_options", CHAT),
    _refused("functions", CHAT, [], why="replaced by `tools`"),
    _refused("function_call", CHAT, "none", why="replaced by `tool_choice`"),
    _refused("reasoning_effort", CHAT, "none"),
    _refused("verbosity", CHAT, "medium"),
    _refused("echo", BOTH, False),
    _refused("suffix", COMPLETIONS, ""),
    _refused("best_of", COMPLETIONS, 1),
    _refused("moderation", (*CHAT, *RESPONSES)),
    _refused("prompt_cache_options", (*CHAT, *RESPONSES)),
    _refused("prompt_cache_retention", (*CHAT, *RESPONSES), "in_memory"),
    _refused("reasoning", RESPONSES, {}, {"effort": None, "summary": None}, {"effort": "none"}),
    _refused("conversation", RESPONSES),
    _refused("background_options", RESPONSES, {}, {"completion_window": "soonest"}),
    _refused("image", RESPONSES),
    _refused("access_programs", RESPONSES),
    _refused("prompt", RESPONSES),
    _refused("context_management", RESPONSES, []),
    _refused("max_tool_calls", RESPONSES),
    _refused("truncation", RESPONSES, "disabled"),
    # vLLM's, where they mean nothing
    _refused("min_tokens", BOTH, 0),
    _refused("ignore_eos", BOTH, False),
    _refused("use_beam_search", BOTH, False),
    _refused("skip_special_tokens", BOTH, True),
    _refused("stop_token_ids", BOTH, []),
)

ROWS: Mapping[Api, Mapping[str, Parameter]] = {api: {row.name: row for row in TABLE if api in row.apis} for api in Api}


def read_body(api: Api, body: bytes | Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are used, by name; those that are null or unused are left out. Raises Refused."""
    given = _object(body)
    used: dict[str, Any] = {}
    for name, value in given.items():
        row = ROWS[api].get(name)
        if row is None:
            raise Refused(
                "invalid-job", f"Unknown parameter: '{name[:100]}'.", field=name[:100], code="unknown_parameter"
            )
        if value is None or any(_same(value, unused) for unused in row.unused):
            continue
        if row.use is Use.REFUSED:
            detail = f"Unsupported parameter: '{name}' ({row.becomes}); leave it out."
            raise Refused("invalid-job", detail, field=name, code="unsupported_parameter")
        if row.use is not Use.IGNORED:
            used[name] = value
    return used


def sampling_of(api: Api, body: Mapping[str, Any], **more: Any) -> Sampling:
    """From the parameters that are used; `more` are fields that parameters of their own led to. Raises Refused."""
    fields, names = dict(more), {}
    for name, row in ROWS[api].items():
        if row.use is Use.SAMPLING and name in body and row.becomes not in names:
            names[row.becomes] = name
            fields[row.becomes] = row.read(body[name])
    try:
        return Sampling.model_validate(fields, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field, *where = first["loc"] or ("sampling",)
        raise invalid(names.get(str(field), str(field)), first["msg"], *where) from None


def invalid(name: str, reason: str, *where: int | str) -> Refused:
    """`where` inside the parameter, e.g. 2, "content"."""
    param = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    detail = f"Invalid value for '{param}': {reason.removeprefix('Value error, ')}."
    return Refused("invalid-job", detail, field=param, code="invalid_value")


def missing(name: str) -> Refused:
    detail = f"Missing required parameter: '{name}'."
    return Refused("invalid-job", detail, field=name, code="missing_required_parameter")


def _object(body: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        try:
            body = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise Refused("malformed-json", f"The body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(body, Mapping):
        raise Refused("malformed-json", "The body must be a JSON object.")
    return body


def _same(value: Any, unused: Any) -> bool:
    """Equal, and of one type: in Python 0 == False."""
    return type(value) is type(unused) and bool(value == unused)

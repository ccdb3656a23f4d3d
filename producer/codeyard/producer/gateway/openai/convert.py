"""Between OpenAI's completions and our jobs. Pure: no server is asked, nothing is submitted.

    read_chat(body) -> Asked                 body: bytes or the parsed object, of /v1/chat/completions
    read_completion(body) -> Asked           the same of /v1/completions
    key_of(key, place) -> str                the idempotency key of an Asked's job at that place
    completion_of(asked, statuses) -> dict   OpenAI's object, once every job has succeeded
    errors.of_job(status) -> ApiError        if one did not; errors.of_error(error) for what `read_*` raise

The parameters are in the table of `parameters`. `read_*` raise only Refused. Called by: routes, batches.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from codeyard.producer.gateway.openai.messages import chat_of, format_of
from codeyard.producer.gateway.openai.parameters import Api, invalid, missing, read_body, sampling_of
from codeyard.shared.chat import Chat, TokenLogprob
from codeyard.shared.job import Lane, Sampling
from codeyard.shared.record import JobStatus, Result, Usage

DEFAULT_MAX_TOKENS = {Api.CHAT: 4_096, Api.COMPLETIONS: 16, Api.RESPONSES: 4_096}
"""Of an answer whose caller set none: for completions OpenAI's own; for the others, which OpenAI leaves to the
model, long enough for a file of code. Engines cut it to what the context leaves."""

MAX_CHOICES = 128  # jobs of one request, OpenAI's bound for `n`
PREFIXES = {Api.CHAT: "chatcmpl-", Api.COMPLETIONS: "cmpl-", Api.RESPONSES: "resp_"}  # of ids; then the first job's
OBJECTS = {Api.CHAT: "chat.completion", Api.COMPLETIONS: "text_completion"}

LANES = {
    "priority": Lane.INTERACTIVE,
    "auto": Lane.STANDARD,
    "default": Lane.STANDARD,
    "flex": Lane.BULK,
}  # by service tier
TIERS = {Lane.INTERACTIVE: "priority", Lane.STANDARD: "default", Lane.BULK: "flex"}  # as answers say it

NO_CHANCE = -9_999.0  # what OpenAI shows for a token of probability zero: JSON has no infinity

_LONGEST_KEY = 190  # of 200 characters; the rest is for the place
_BETWEEN = "\u00b7"  # no key that comes in a header holds it, so a derived one is nobody's own


@dataclass(frozen=True, slots=True)
class Wanted:
    """One job to submit: one choice."""

    prompt: str | tuple[int, ...] | Chat
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, read. The choices of a prompt are side by side in `jobs`, `num_choices` for each."""

    api: Api
    model: str
    jobs: tuple[Wanted, ...]
    num_choices: int = 1
    lane: Lane = Lane.STANDARD
    stream: bool = False
    background: bool = False  # answered at once and perhaps followed later: its text is published as it comes
    include_usage: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def logprobs(self) -> bool:
        return self.jobs[0].sampling.logprobs is not None


def read_chat(body: bytes | Mapping[str, Any]) -> Asked:
    """Raises Refused."""
    used = read_body(Api.CHAT, body)
    prompt = chat_of(used)
    more: dict[str, Any] = {}
    if "response_format" in used:
        more["output_format"] = format_of(used["response_format"], "response_format")
    if flag(used, "logprobs"):
        more["logprobs"] = used.get("top_logprobs", 0)
    elif used.get("top_logprobs"):
        raise invalid("top_logprobs", "only with logprobs")
    return _asked(Api.CHAT, used, [prompt], **more)


def read_completion(body: bytes | Mapping[str, Any]) -> Asked:
    """Raises Refused."""
    used = read_body(Api.COMPLETIONS, body)
    if "prompt" not in used:
        raise missing("prompt")
    more = {"logprobs": used["logprobs"]} if "logprobs" in used else {}
    return _asked(Api.COMPLETIONS, used, _prompts(used["prompt"]), **more)


def key_of(key: str, place: int) -> str:
    """The caller's own key for the first job, and one derived from it for each further choice."""
    if place == 0:
        return key
    short = key if len(key) <= _LONGEST_KEY else hashlib.sha256(key.encode()).hexdigest()
    return f"{short}{_BETWEEN}{place}"


def completion_of(asked: Asked, statuses: Sequence[JobStatus]) -> dict[str, Any]:
    """A chat completion or a completion. `statuses`: of the jobs in their order, all succeeded."""
    choices = []
    for place, status in enumerate(statuses):
        result = result_of(status)
        if asked.api is Api.CHAT:
            choice: dict[str, Any] = {"index": place, "message": message(result)}
            logprobs = chat_logprobs(result.logprobs) if asked.logprobs else None
        else:
            choice = {"index": place, "text": result.text}
            logprobs = text_logprobs(result.logprobs) if asked.logprobs else None
        choices.append({**choice, "logprobs": logprobs, "finish_reason": finish_reason(result)})
    return {**heading(asked, statuses[0], OBJECTS[asked.api]), "choices": choices, "usage": usage(asked, statuses)}


# Also of streams and responses ---------------------------------------------------------------------


def heading(asked: Asked, first: JobStatus, kind: str) -> dict[str, Any]:
    """What every object about these jobs begins with: the same from every gateway, at every time."""
    return {
        "id": PREFIXES[asked.api] + first.id,
        "object": kind,
        "created": int(first.created_at),
        "model": first.model,
        "system_fingerprint": first.revision,
        "service_tier": TIERS[first.lane],
    }


def result_of(status: JobStatus) -> Result:
    assert status.result is not None, "of a job that is not final"
    return status.result


def message(result: Result) -> dict[str, Any]:
    """The assistant's, as a chat completion holds it."""
    text = result.text if result.content is None else result.content
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in result.tool_calls
    ]
    content = None if calls and not text else text
    said: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    return {**said, "tool_calls": calls} if calls else said


def finish_reason(result: Result) -> str:
    if result.tool_calls and result.finish_reason != "length":
        return "tool_calls"
    return "length" if result.finish_reason == "length" else "stop"


def usage(asked: Asked, statuses: Sequence[JobStatus]) -> dict[str, int]:
    """A prompt counts once, however many choices it has."""
    prompt = sum(_used(status).prompt_tokens for status in statuses[:: asked.num_choices])
    completion = sum(_used(status).completion_tokens for status in statuses)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _used(status: JobStatus) -> Usage:
    return result_of(status).usage


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    return {"content": [token_logprob(token) for token in tokens], "refusal": None}


def token_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_logprob(token), "top_logprobs": [_logprob(one) for one in token.top]}


def text_logprobs(tokens: Iterable[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """`offset`: characters of the text before these tokens."""
    listed, offsets = list(tokens), []
    for token in listed:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in listed],
        "token_logprobs": [max(token.logprob, NO_CHANCE) for token in listed],
        "top_logprobs": [{one.text: max(one.logprob, NO_CHANCE) for one in token.top} for token in listed],
        "text_offset": offsets,
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": max(token.logprob, NO_CHANCE),
        "bytes": list(token.text.encode(errors="replace")),
    }


# Reading -------------------------------------------------------------------------------------------


def lane_of(used: Mapping[str, Any]) -> Lane:
    tier = used.get("service_tier", "auto")
    if not isinstance(tier, str) or tier not in LANES:
        raise invalid("service_tier", f"one of {', '.join(LANES)}")
    return LANES[tier]


def flag(used: Mapping[str, Any], name: str) -> bool:
    value = used.get(name, False)
    if not isinstance(value, bool):
        raise invalid(name, "true or false")
    return value


def whole(used: Mapping[str, Any], name: str, *, default: int, least: int, most: int) -> int:
    value = used.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise invalid(name, f"a whole number from {least} to {most}")
    return value


def model_of(used: Mapping[str, Any]) -> str:
    if "model" not in used:
        raise missing("model")
    if not isinstance(used["model"], str):
        raise invalid("model", "a string")
    return used["model"]


def metadata_of(used: Mapping[str, Any]) -> dict[str, str]:
    given = used.get("metadata", {})
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise invalid("metadata", "an object whose values are strings")
    return given


def stream_options(used: Mapping[str, Any], *names: str) -> Mapping[str, bool]:
    """Those `names` that are on; others may only be off."""
    options = used.get("stream_options", {})
    if not isinstance(options, dict) or not all(value is None or isinstance(value, bool) for value in options.values()):
        raise invalid("stream_options", "an object of options that are true or false")
    for name in options:
        if options[name] and name not in names:
            raise invalid("stream_options", "not offered", name[:100])
    return options


def _asked(api: Api, used: Mapping[str, Any], prompts: Sequence[str | tuple[int, ...] | Chat], **more: Any) -> Asked:
    model = model_of(used)
    num_choices = whole(used, "n", default=1, least=1, most=MAX_CHOICES)
    if len(prompts) * num_choices > MAX_CHOICES:
        raise invalid("n", f"at most {MAX_CHOICES} choices over all prompts")
    sampling = sampling_of(api, used, **{"max_tokens": DEFAULT_MAX_TOKENS[api], **more})
    return Asked(
        api=api,
        model=model,
        jobs=tuple(Wanted(prompt, _choice(sampling, n)) for prompt in prompts for n in range(num_choices)),
        num_choices=num_choices,
        lane=lane_of(used),
        stream=flag(used, "stream"),
        include_usage=stream_options(used, "include_usage").get("include_usage") is True,
        metadata=metadata_of(used),
    )


def _choice(sampling: Sampling, n: int) -> Sampling:
    """With a seed, choices of one prompt would all be the same."""
    if sampling.seed is None or n == 0:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + n) % 2**63})


def _prompts(given: Any) -> list[str | tuple[int, ...]]:
    """One, or a list of them; each is text or token ids."""
    several = given if isinstance(given, list) and not _is_ids(given) else [given]
    if not several:
        raise invalid("prompt", "empty")
    return [_prompt(one, *(() if several is not given else (n,))) for n, one in enumerate(several)]


def _prompt(given: Any, *where: int) -> str | tuple[int, ...]:
    if not isinstance(given, str) and not _is_ids(given):
        raise invalid("prompt", "text, or a list of token ids", *where)
    if not given:
        raise invalid("prompt", "empty", *where)
    return given if isinstance(given, str) else tuple(given)


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(one) is int for one in given)  # a bool is no id

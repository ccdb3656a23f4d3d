"""What becomes of each parameter of Anthropic's requests: the one table.

`body` takes the names that map from here, and refuses the rest in the words below; `convert` copies what
becomes a part of `sampling`. docs/anthropic.md shows the same rows, and a test compares them with the
parameters that the official SDK knows. Called by: body, convert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fate = Literal["mapped", "ignored", "refused"]
"""mapped: becomes a part of the job. ignored: accepted, changes nothing. refused: an error that says why."""

SAMPLING = "sampling."  # how a field of `Sampling` is written in `becomes`


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    fate: Fate
    becomes: str  # field of the job; of those that are not mapped, nothing
    note: str  # for the page, and for whoever is refused


def _mapped(name: str, becomes: str, note: str = "") -> Parameter:
    return Parameter(name, "mapped", becomes, note)


def _ignored(name: str, note: str) -> Parameter:
    return Parameter(name, "ignored", "", note)


def _refused(name: str, note: str) -> Parameter:
    return Parameter(name, "refused", "", note)


MESSAGES: Sequence[Parameter] = (
    _mapped("model", "model", "alias of a model that a worker serves"),
    _mapped("max_tokens", "sampling.max_tokens", "required, from 1; a smaller context ends the answer earlier"),
    _mapped("messages", "prompt.messages", "text, tool_use and tool_result blocks; turns of one role in a row are one"),
    _mapped("system", "prompt.messages", "the first message, of role system"),
    _mapped("tools", "prompt.tools", "tools of your own; input_schema becomes parameters"),
    _mapped("tool_choice", "prompt.tool_choice", "any becomes required; disable_parallel_tool_use is kept"),
    _mapped("stop_sequences", "sampling.stop", "up to 16"),
    _mapped("temperature", "sampling.temperature"),
    _mapped("top_p", "sampling.top_p"),
    _mapped("top_k", "sampling.top_k"),
    _mapped("stream", "stream"),
    _mapped("metadata", "metadata", "user_id is kept with the job"),
    _mapped("service_tier", "lane", "auto: interactive; standard_only: standard"),
    _mapped("output_config", "sampling.output_format", "format: a JSON schema for the answer; effort is ignored"),
    _mapped("output_format", "sampling.output_format", "the older name of output_config.format"),
    _mapped("thinking", "", "disabled and adaptive are accepted; enabled is refused: no model here thinks apart"),
    _mapped("context_management", "", "clearing of thinking is accepted, as none is kept; other edits are refused"),
    _ignored("cache_control", "also on blocks and tools: the engine caches prefixes by itself"),
    _ignored("diagnostics", "about Anthropic's prompt cache"),
    _ignored("speed", "a fleet has one speed; lanes say who goes first"),
    _refused("container", "no code runs here"),
    _refused("mcp_servers", "the gateway calls no other servers; connect to them yourself and pass their tools"),
    _refused("inference_geo", "where a job runs is chosen by the model it names"),
    _refused("compaction", "the conversation is used as it is sent"),
    _refused("thread", "the gateway keeps no conversations; send the whole one"),
    _refused("fallbacks", "name the model to use"),
    _refused("fallback_credit_token", "there is no billing here"),
    _refused("billing_policy", "there is no billing here"),
    _refused("user_profile_id", "there are no user profiles here"),
    _refused("workspace_id", "the tenant comes from the credentials"),
)

COMPLETE: Sequence[Parameter] = (
    _mapped("model", "model", "alias of a model that a worker serves"),
    _mapped("prompt", "prompt.messages", "turns after Human: and Assistant:; what stands before them is the system's"),
    _mapped("max_tokens_to_sample", "sampling.max_tokens", "required, from 1"),
    _mapped("stop_sequences", "sampling.stop", "up to 15, beside the next Human turn, which always ends an answer"),
    _mapped("temperature", "sampling.temperature"),
    _mapped("top_p", "sampling.top_p"),
    _mapped("top_k", "sampling.top_k"),
    _mapped("stream", "stream"),
    _mapped("metadata", "metadata", "user_id is kept with the job"),
)


def fates(table: Sequence[Parameter]) -> Mapping[str, Parameter]:
    return {parameter.name: parameter for parameter in table}


def sampled(table: Sequence[Parameter]) -> Mapping[str, str]:
    """Parameter by the field of `Sampling` that it becomes as it is."""
    return {
        parameter.becomes.removeprefix(SAMPLING): parameter.name
        for parameter in table
        if parameter.becomes.startswith(SAMPLING) and not parameter.becomes.endswith("output_format")
    }

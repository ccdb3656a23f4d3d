"""A conversation as a prompt, and what a model answers to one: text and calls of tools.

The worker renders a `Chat` with the chat template of the model that answers it, so callers need to know no
template and gateways hold no tokenizer. Contents are text: what other APIs send as blocks is joined at the edge.
Names are those of OpenAI's chat API, the one that chat templates are written for. Part of the wire contract
(docs/wire-contract.md). Called by: job (a prompt), record (results and events), gateway, engines.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.:/-]+$")]
CallId = Annotated[str, Field(min_length=1, max_length=200)]


class _Closed(BaseModel):
    """Unknown fields are refused: they would change what is generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCall(_Closed):
    """A model's wish to have a function called. `arguments` is the JSON it wrote, not checked against a schema."""

    id: CallId
    name: FunctionName
    arguments: str = "{}"


class Message(_Closed):
    """One turn. `tool_calls` belong to an assistant, `tool_call_id` to the tool's answer."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: CallId | None = None
    name: Annotated[str, Field(max_length=200)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to an assistant's message")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a tool's message, and only that, has a tool_call_id")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message without content")
        return self


class Tool(_Closed):
    """A function the model may ask to have called. `parameters`: JSON schema of its arguments, an object."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class NamedTool(_Closed):
    """A `tool_choice` that leaves none: this function is called."""

    name: FunctionName


class Chat(_Closed):
    """A conversation to go on with. An assistant's message as the last one is continued, not answered.

    `tool_choice`: "auto" leaves it to the model, "required" and a `NamedTool` force a call (engines with
    structured outputs only), "none" hides the tools.
    """

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=10_000)]
    tools: Annotated[tuple[Tool, ...], Field(max_length=512)] = ()
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _choice_is_there(self) -> Self:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools of one name")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice asks for a call and there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.name!r}, which is not among the tools")
        return self

    @property
    def num_chars(self) -> int:
        """Of everything the template will write, roughly."""
        return len(self.model_dump_json(exclude_defaults=True))

    @property
    def offers_tools(self) -> bool:
        """Whether the answer may hold calls, and is read for them."""
        return bool(self.tools) and self.tool_choice != "none"


class ToolCallDelta(BaseModel):
    """A piece of a call as it is generated. Of each `index` the first piece has `id` and `name`; the
    `arguments` of all, joined, are the call's."""

    model_config = ConfigDict(frozen=True, extra="allow")

    index: Annotated[int, Field(ge=0)]
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class TokenLogprob(BaseModel):
    """How likely a token was: natural logarithm of its probability. `top`: the likeliest in its place, best
    first, as many as were asked for; they have no `top` of their own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    token_id: int
    text: str
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()

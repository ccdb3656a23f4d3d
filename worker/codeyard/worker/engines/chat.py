"""A prompt as the token ids a model reads; a conversation through the model's own chat template.

Called by: the engines that have a tokenizer, with transformers' or one that has its methods. Templates are
Jinja in transformers' sandbox: they come with the weights, or from the operator.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from codeyard.shared.chat import Chat, Message, Tool
from codeyard.shared.errors import EngineUnavailable, JobRejected
from codeyard.shared.job import Prompt

SETTING = "CODEYARD_ENGINE_CHAT_TEMPLATE"
SAID_CHARS = 300  # of a template's own complaint
MISTRAL_ID_CHARS = 9  # of a call's id, which Mistral's models write and read


def template_text(setting: str | None) -> str | None:
    """The template that the setting names or is. Raises EngineUnavailable for a file that cannot be read."""
    if setting is None or "{%" in setting or "{{" in setting:
        return setting
    try:
        return Path(setting).expanduser().read_text()
    except (OSError, ValueError) as error:
        raise EngineUnavailable(f"{SETTING}: neither a Jinja template nor a file that can be read: {error}") from None


def prompt_ids(tokenizer: Any, prompt: Prompt, *, template: str | None) -> list[int]:
    """Args: template: instead of the tokenizer's own.

    Raises JobRejected for a conversation that the model has no template for, or whose template refuses it.
    """
    if isinstance(prompt, tuple):
        return list(prompt)
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    last = prompt.messages[-1]
    if last.role == "assistant" and last.tool_calls:
        raise JobRejected("invalid_prompt", "the last message calls tools, and their answers are not there")
    if not hasattr(tokenizer, "chat_template"):
        return _encoded(tokenizer, prompt, template)
    # Special tokens are written by the template, where the model expects any.
    return list(tokenizer.encode(_rendered(tokenizer, prompt, template), add_special_tokens=False))


def _encoded(tokenizer: Any, chat: Chat, template: str | None) -> list[int]:
    """By a tokenizer that has no templates and knows its model's conversations: Mistral's, in vLLM."""
    if template is not None:
        raise JobRejected("unsupported", f"this model's tokenizer renders conversations itself: leave {SETTING} out")
    goes_on = chat.messages[-1].role == "assistant"
    messages = messages_of(chat)
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["id"] = call["id"][-MISTRAL_ID_CHARS:]
        if "tool_call_id" in message:
            message["tool_call_id"] = message["tool_call_id"][-MISTRAL_ID_CHARS:]
    try:
        ids = tokenizer.apply_chat_template(
            messages, tools_of(chat), add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    except Exception as error:
        # Its own library's errors, of many classes; all mean that it does not take this conversation.
        said = str(error)[:SAID_CHARS]
        raise JobRejected("invalid_prompt", f"the model's tokenizer refuses the conversation: {said}") from None
    return list(ids)


def _rendered(tokenizer: Any, chat: Chat, template: str | None) -> str:
    if template is None and tokenizer.chat_template is None:
        raise JobRejected(
            "no_chat_template",
            f"this model comes without a chat template: set {SETTING} to one, or send the prompt as text",
        )
    goes_on = chat.messages[-1].role == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages_of(chat),
            tools=tools_of(chat),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
    except TemplateError as error:
        said = str(error)[:SAID_CHARS]
        raise JobRejected("invalid_prompt", f"the model's chat template refuses the conversation: {said}") from None
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        # What a template that was not written for such a conversation runs into; its text may quote it.
        what = "be continued" if goes_on else "be rendered"
        text = f"the conversation cannot {what} by the model's chat template ({type(error).__name__})"
        raise JobRejected("invalid_prompt", text) from None
    return str(text)


def messages_of(chat: Chat) -> list[dict[str, Any]]:
    """As templates expect them: no content is empty content, arguments are objects where they are JSON."""
    names = {call.id: call.name for message in chat.messages for call in message.tool_calls}
    return [_message(message, names) for message in chat.messages]


def tools_of(chat: Chat) -> list[dict[str, Any]] | None:
    return [_tool(tool) for tool in chat.tools] if chat.offers_tools else None


def _message(message: Message, names: dict[str, str]) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    name = message.name or names.get(message.tool_call_id or "")
    if name is not None:
        said["name"] = name
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _object(call.arguments)}}
            for call in message.tool_calls
        ]
    return said


def _tool(tool: Tool) -> dict[str, Any]:
    about = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **about, "parameters": tool.parameters}}


def _object(arguments: str) -> Any:
    """Parsed, or as they are: a model may have written anything, and its words stay in the conversation."""
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments

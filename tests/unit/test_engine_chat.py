"""A conversation becomes what its model's template makes of it, or is refused with a reason and the way out."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from codeyard.shared.chat import Chat, Message, Tool, ToolCall
from codeyard.shared.errors import EngineUnavailable, JobRejected
from codeyard.worker.engines.chat import messages_of, prompt_ids, template_text, tools_of
from codeyard.worker.engines.models import starter_directory

pytestmark = pytest.mark.torch

CHATML = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.path }}){% endfor %}"
    "</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ message.content }}{% endfor %}"
)
LOOK = Tool(name="look", description="Read a file", parameters={"type": "object", "properties": {"path": {}}})
USER = Message(role="user", content="what is in a.py?")
CALL = Message(role="assistant", tool_calls=(ToolCall(id="c1", name="look", arguments='{"path": "a.py"}'),))
ANSWER = Message(role="tool", tool_call_id="c1", content="x = 1")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(starter_directory(), local_files_only=True)


def read(tokenizer: Any, chat: Chat, template: str | None = CHATML) -> str:
    """What the model reads."""
    return str(tokenizer.decode(prompt_ids(tokenizer, chat, template=template)))


def test_a_conversation_is_written_turn_by_turn_and_ends_where_the_model_answers(tokenizer: Any) -> None:
    """The template decides; the tools are named in it, calls and their answers as well."""
    said = read(tokenizer, Chat(messages=(USER, CALL, ANSWER), tools=(LOOK,)))
    tools, *turns = said.splitlines()
    assert '"function": {"name": "look", "description": "Read a file", "parameters": ' in tools
    assert turns == ["<user>what is in a.py?</>", "<assistant>look(a.py)</>", "<tool>x = 1</>", "<assistant>"]


def test_an_assistants_last_words_are_continued(tokenizer: Any) -> None:
    """Not closed and answered: how a caller puts words into the model's mouth."""
    begun = Message(role="assistant", content="It holds")
    assert read(tokenizer, Chat(messages=(USER, begun))) == "<user>what is in a.py?</>\n<assistant>It holds"


def test_hidden_tools_are_not_told(tokenizer: Any) -> None:
    """`tool_choice` none: the model must not hear of them."""
    assert "look" not in read(tokenizer, Chat(messages=(USER,), tools=(LOOK,), tool_choice="none"))
    assert tools_of(Chat(messages=(USER,), tools=(LOOK,), tool_choice="none")) is None


def test_messages_have_the_form_that_templates_expect() -> None:
    """Arguments are objects where they are JSON, no content is empty, a tool's answer has its tool's name."""
    broken = Message(role="assistant", tool_calls=(ToolCall(id="c2", name="look", arguments='{"path'),))
    user, call, answer, odd = messages_of(Chat(messages=(USER, CALL, ANSWER, broken)))
    assert user == {"role": "user", "content": "what is in a.py?"}
    assert call["content"] == ""
    assert call["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"path": "a.py"}}}
    ]
    assert answer == {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "x = 1"}
    assert odd["tool_calls"][0]["function"]["arguments"] == '{"path'


def test_the_starter_model_chats_out_of_the_box(tokenizer: Any) -> None:
    """As Python, the one thing it knows: turns are docstrings, answers code. Short: it has 256 tokens."""
    system = Message(role="system", content="Be brief.")
    said = read(tokenizer, Chat(messages=(system, USER, CALL, ANSWER), tools=(LOOK,)), template=None)
    assert said == (
        '"""tools: look"""\n\n\n"""system: Be brief."""\n\n\n"""user: what is in a.py?"""\n\n\n'
        '<tool_call>{"name": "look", "arguments": {"path": "a.py"}}</tool_call>\n\n\n"""tool: x = 1"""\n\n\n'
    )
    begun = Message(role="assistant", content="def f(")
    assert read(tokenizer, Chat(messages=(USER, begun)), template=None).endswith("\n\n\ndef f(")


def test_a_model_without_a_template_says_which_setting_gives_it_one(tokenizer: Any) -> None:
    """Base models have none; guessing one would give nonsense that looks like an answer."""
    bare = tokenizer.__class__.from_pretrained(starter_directory(), local_files_only=True)
    bare.chat_template = None
    with pytest.raises(JobRejected, match="CODEYARD_ENGINE_CHAT_TEMPLATE") as caught:
        prompt_ids(bare, Chat(messages=(USER,)), template=None)
    assert caught.value.code == "no_chat_template"
    assert prompt_ids(bare, Chat(messages=(USER,)), template=CHATML)


@pytest.mark.parametrize(
    "messages,template,said",
    [
        ((USER, USER), ALTERNATING, "roles must alternate"),
        ((USER, CALL), CHATML, "their answers are not there"),
        ((USER,), "{{ messages[0].content + messages[5].content }}", "chat template"),
        ((USER,), "{{ messages | nothing }}", "nothing"),
        ((USER,), "{{ 1 + 'a' }}", "TypeError"),
        ((USER, Message(role="assistant", content="It")), "{{ messages[0].content }}", "cannot be continued"),
    ],
)
def test_what_the_template_cannot_render_is_refused_for_good(
    tokenizer: Any, messages: tuple[Message, ...], template: str, said: str
) -> None:
    """Trying again cannot help, and the person who reads it must know what to change."""
    with pytest.raises(JobRejected, match=said) as caught:
        prompt_ids(tokenizer, Chat(messages=messages), template=template)
    assert caught.value.code == "invalid_prompt"


def test_text_and_token_ids_pass_by_the_template(tokenizer: Any) -> None:
    """They are prompts as they are."""
    assert prompt_ids(tokenizer, (5, 6), template=CHATML) == [5, 6]
    assert tokenizer.decode(prompt_ids(tokenizer, "def f():", template=CHATML)) == "def f():"


def test_the_setting_is_a_template_or_a_file_with_one(tmp_path: Path) -> None:
    """A path that leads nowhere must not become a prompt."""
    file = tmp_path / "template.jinja"
    file.write_text(CHATML)
    assert template_text(str(file)) == template_text(CHATML) == CHATML
    assert template_text(None) is None
    with pytest.raises(EngineUnavailable, match="CODEYARD_ENGINE_CHAT_TEMPLATE"):
        template_text(str(tmp_path / "nowhere.jinja"))

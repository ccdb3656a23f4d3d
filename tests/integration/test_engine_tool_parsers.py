"""vLLM's own tool parsers beside a job's deltas, on text as models of several families write it; no engine runs."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from codeyard.shared.chat import Chat, Message, Tool, ToolCall
from codeyard.shared.errors import EngineUnavailable, JobRejected
from codeyard.shared.job import Lane, Sampling
from codeyard.worker.engines.chat import prompt_ids
from codeyard.worker.engines.models import starter_directory
from codeyard.worker.engines.port import Delta, EngineJob
from codeyard.worker.engines.tool_calls import call_id
from codeyard.worker.engines.vllm_tools import ParserReader, VllmTools
from codeyard.worker.held import Said

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("default"),  # vLLM's and torch's own
]

ARGUMENTS = {"path": "src/a b.py", "lines": [1, 2], "deep": True}
LOOK = Tool(
    name="look",
    parameters={
        "type": "object",
        "properties": {"path": {"type": "string"}, "lines": {"type": "array"}, "deep": {"type": "boolean"}},
    },
)
WAIT = Tool(name="wait")
SAID = json.dumps(ARGUMENTS)

# parser -> (text, content)
WRITTEN = {
    None: (f'I look.\n<tool_call>\n{{"name": "look", "arguments": {SAID}}}\n</tool_call>', "I look."),
    "hermes": (f'I look.\n<tool_call>\n{{"name": "look", "arguments": {SAID}}}\n</tool_call>', "I look."),
    "llama3_json": (f'{{"name": "look", "parameters": {SAID}}}', ""),
    "pythonic": ('[look(path="src/a b.py", lines=[1, 2], deep=True)]', ""),
    "qwen3_coder": (
        "I look.\n<tool_call>\n<function=look>\n<parameter=path>\nsrc/a b.py\n</parameter>\n<parameter=lines>\n[1, 2]\n"
        "</parameter>\n<parameter=deep>\ntrue\n</parameter>\n</function>\n</tool_call>",
        "I look.",
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The starter's, with the marks that those models have as tokens of their own."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(starter_directory(), local_files_only=True)
    marks = ["<|python_tag|>", "<tool_call>", "</tool_call>"]
    own.add_special_tokens({"additional_special_tokens": marks})
    return own


def job_of(*tools: Tool, **changes: Any) -> EngineJob:
    chat = Chat(messages=(Message(role="user", content="look"),), tools=tools, **changes)
    return EngineJob("job", chat, Sampling(), Lane.STANDARD, stream=True)


def read(tools: VllmTools, asked: EngineJob, deltas: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[Said, str | None]:
    """What was said, and the finish reason."""
    calls, _ = tools.of(asked)
    assert calls is not None
    said, reason = Said(), None
    for number, (text, ids) in enumerate(deltas, 1):
        delta = calls.of(Delta(text, ids, "stop" if number == len(deltas) else None))
        said.add(delta)
        reason = delta.finish_reason
    return said, reason


def pieces_of(tokenizer: Any, text: str, chance: random.Random) -> list[tuple[str, tuple[int, ...]]]:
    """As an engine gives it: whole tokens, one to five at a time, and an end without text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = []
    while ids:
        some, ids = ids[: (size := chance.randint(1, 5))], ids[size:]
        pieces.append((tokenizer.decode(some, skip_special_tokens=False), tuple(some)))
    return [*pieces, ("", (0,))]


@pytest.mark.parametrize("parser", WRITTEN)
def test_a_call_is_found_in_whole_and_in_streamed_text(tokenizer: Any, parser: str | None) -> None:
    """The same call, whatever the model's own form of it; ours is the form of vLLM's Hermes parser."""
    text, content = WRITTEN[parser]
    tools, asked = VllmTools(tokenizer, parser), job_of(LOOK, WAIT)
    whole = tuple(tokenizer.encode(text, add_special_tokens=False))
    answers = [read(tools, asked, [(text, whole)])]
    answers += [read(tools, asked, pieces_of(tokenizer, text, random.Random(seed))) for seed in range(5)]

    for said, reason in answers:
        assert [(call.id, call.name) for call in said.tool_calls] == [(call_id("job", 0), "look")]
        assert json.loads(said.tool_calls[0].arguments) == ARGUMENTS
        assert ((said.content or "").strip(), reason) == (content, "tool_calls")


@pytest.mark.parametrize("parser", WRITTEN)
def test_an_answer_without_a_call_is_content(tokenizer: Any, parser: str | None) -> None:
    """Code above all, which a parser could take for something else."""
    text = 'def look(path):\n    return {"name": path}\n'
    tools, asked = VllmTools(tokenizer, parser), job_of(LOOK)
    for deltas in ([(text, (1, 2))], pieces_of(tokenizer, text, random.Random(1))):
        said, reason = read(tools, asked, deltas)
        assert (said.content, said.tool_calls, reason) == (text, (), "stop")


def test_marks_that_are_special_tokens_are_kept_in_the_text(tokenizer: Any) -> None:
    """Without them no parser finds anything; a job without tools does not see them."""
    tools = VllmTools(tokenizer, None)
    assert tools.of(job_of(LOOK))[1]
    assert tools.of(job_of(LOOK, tool_choice="required"))[1] is False
    assert tools.of(job_of(LOOK, tool_choice="none")) == (None, False)
    assert VllmTools(tokenizer, "hermes").of(job_of(LOOK))[1]


def test_a_parser_that_is_not_there_is_named_with_those_that_are(tokenizer: Any) -> None:
    """At start, not when the first call comes."""
    with pytest.raises(EngineUnavailable, match=r"TOOL_CALL_PARSER: .*'telepathy'; it has .*hermes"):
        VllmTools(tokenizer, "telepathy")


def test_a_tokenizer_of_mistrals_own_renders_by_itself(tmp_path: Path) -> None:
    """Codestral and Devstral come with one: no Jinja, ids of calls of nine characters, calls in its own form."""
    mistral_common = pytest.importorskip("mistral_common")
    from vllm.tokenizers.mistral import MistralTokenizer

    shipped = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_241114.model.v7"
    shutil.copy(shipped, tmp_path / "tokenizer.model.v7")
    own = MistralTokenizer.from_pretrained(tmp_path)
    user, long_id = Message(role="user", content="look"), call_id("job", 0)
    call = Message(role="assistant", tool_calls=(ToolCall(id=long_id, name="look", arguments=SAID),))
    answer = Message(role="tool", tool_call_id=long_id, content="x = 1")

    def read_by_model(*messages: Message, tools: tuple[Tool, ...] = ()) -> str:
        ids = prompt_ids(own, Chat(messages=messages, tools=tools), template=None)
        return str(own.decode(ids, skip_special_tokens=False)).replace("\u2581", " ")

    assert read_by_model(user) == "<s>[INST] look[/INST]"
    assert read_by_model(user, Message(role="assistant", content="I")).endswith("[/INST] I")
    talk = read_by_model(user, call, answer, tools=(LOOK,))
    assert long_id[-9:] in talk
    assert long_id not in talk
    assert '"name": "look"' in talk
    with pytest.raises(JobRejected, match="the model's tokenizer refuses the conversation"):
        read_by_model(user, answer)
    with pytest.raises(JobRejected, match="CODEYARD_ENGINE_CHAT_TEMPLATE"):
        prompt_ids(own, Chat(messages=(user,)), template="{{ messages }}")
    assert VllmTools(own, "mistral").of(job_of(LOOK))[0] is not None


class Broken:
    """A parser that waits for a name, then fails."""

    def extract_tool_calls_streaming(self, *texts: Any) -> Any:
        if len(texts[1]) > 3:
            raise KeyError("arguments")

    def extract_tool_calls(self, text: str, *, request: Any) -> Any:
        raise ValueError("no call")


def test_a_parser_that_fails_costs_no_text(caplog: pytest.LogCaptureFixture) -> None:
    """It is somebody else's code on whatever a model wrote; the job goes on."""
    reader = ParserReader(Broken(), None)
    read = [reader.read(text, (1,), ended=False) for text in ("abc", "def", "ghi")]
    assert [one.content for one in read] == ["", "abcdef", "ghi"]
    assert ParserReader(Broken(), None).read("abcdef", (1,), ended=True).content == "abcdef"
    assert [record.message for record in caplog.records] == ["tool_parser_failed"] * 2

"""Conversations on the real engines and the starter model: templates, tools, formats, log probabilities, counts."""

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from support import engines
from support.engines import ids_of, job, run, text_of

from codeyard.shared.chat import Chat, Message, NamedTool, Tool
from codeyard.shared.errors import EngineUnavailable, JobRejected
from codeyard.shared.job import OutputFormat
from codeyard.worker.engines.models import ModelSource, parse_model
from codeyard.worker.engines.port import Delta, Engine
from codeyard.worker.engines.tool_calls import call_id
from codeyard.worker.held import Said

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # vLLM's and torch's own
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's, as it is imported
]

HELLO = (Message(role="user", content="Reverse a string."),)
RENDERED = '"""user: Reverse a string."""\n\n\n'
LOOK = Tool(
    name="look",
    parameters={
        "type": "object",
        "properties": {"deep": {"type": "boolean"}, "where": {"enum": ["here", "there"]}},
        "required": ["deep", "where"],
        "additionalProperties": False,
    },
)
WAIT = Tool(name="wait", parameters={"type": "object", "properties": {}, "additionalProperties": False})


async def _torch() -> Engine:
    from codeyard.worker.engines.torch_engine import TorchEngine

    return await TorchEngine.start(parse_model("starter"), engines.SETTINGS)


async def _vllm() -> Engine:
    pytest.importorskip("vllm")
    from codeyard.worker.engines.vllm_engine import VllmEngine

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}  # else the starter model writes blanks for ever
    settings = engines.SETTINGS.model_copy(update={"engine_args": {"structured_outputs_config": compact}})
    return await VllmEngine.start(parse_model("starter"), settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def torch_engine() -> AsyncIterator[Engine]:
    engine = await _torch()
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm_engine() -> AsyncIterator[Engine]:
    engine = await _vllm()
    yield engine
    await engine.close()


def said(deltas: list[Delta]) -> Said:
    together = Said()
    for delta in deltas:
        together.add(delta)
    return together


class ChatContract:
    """Needs a fixture `engine`. What every engine with a model does with a conversation."""

    async def test_it_is_answered_as_the_template_renders_it(self, engine: Engine) -> None:
        """The same tokens as the text that the template makes of it."""
        chatted, plain = await asyncio.gather(
            run(engine, job("chat", Chat(messages=HELLO))), run(engine, job("plain", RENDERED))
        )
        assert ids_of(chatted) == ids_of(plain)
        assert chatted[-1].prompt_tokens == plain[-1].prompt_tokens
        assert "def" in text_of(chatted)
        assert chatted[-1].content is None

    async def test_its_last_words_are_continued(self, engine: Engine) -> None:
        """An assistant's message at the end is the beginning of the answer."""
        begun = Chat(messages=(*HELLO, Message(role="assistant", content="def reverse(")))
        assert ids_of(await run(engine, job("begun", begun))) == ids_of(
            await run(engine, job("plain", RENDERED + "def reverse("))
        )

    async def test_its_tokens_are_counted_without_an_answer(self, engine: Engine) -> None:
        """Also of one with tools, and one too long to be answered."""
        counted = await run(engine, job("counted", Chat(messages=HELLO, tools=(LOOK,)), max_tokens=0, stream=True))
        long = Chat(messages=(Message(role="user", content="x = 1\n" * 200),))
        answered = await run(engine, job("answered", Chat(messages=HELLO, tools=(LOOK,)), max_tokens=1))
        assert (text_of(counted), ids_of(counted), counted[-1].finish_reason) == ("", (), "length")
        assert counted[-1].prompt_tokens == answered[-1].prompt_tokens > 0
        assert (await run(engine, job("long", long, max_tokens=0)))[-1].prompt_tokens > 256

    async def test_one_that_the_template_refuses_is_rejected(self, engine: Engine) -> None:
        """Before the engine sees it."""
        call = Message.model_validate({"role": "assistant", "tool_calls": [{"id": "c", "name": "look"}]})
        with pytest.raises(JobRejected) as caught:
            await run(engine, job("refused", Chat(messages=(*HELLO, call))))
        assert caught.value.code == "invalid_prompt"

    async def test_text_that_calls_nothing_is_content(self, engine: Engine) -> None:
        """Most answers of a model that may call tools."""
        for stream in (False, True):
            asked = job(f"free {stream}", Chat(messages=HELLO, tools=(LOOK,)), stream=stream)
            answer = said(await run(engine, asked))
            assert (answer.content or "").rstrip() == answer.text.rstrip()
            assert not answer.tool_calls

    async def test_an_answer_that_might_call_goes_on_where_another_worker_was(self, engine: Engine) -> None:
        """Content and text alike, to the character."""
        asked = job("whole", Chat(messages=HELLO, tools=(LOOK,)), stream=True)
        deltas = await run(engine, asked)
        told, whole = said(deltas[:10]), said(deltas)
        rest = await run(engine, replace(asked, prefix_token_ids=tuple(told.token_ids), prefix_text=told.text))
        for delta in rest:
            told.add(delta)
        assert engine.info.resumes_calls
        assert (told.text, told.content, told.token_ids) == (whole.text, whole.content, whole.token_ids)
        assert rest[-1].prompt_tokens == deltas[-1].prompt_tokens

    @pytest.mark.parametrize("stream", [False, True])
    async def test_each_token_has_its_log_probability(self, engine: Engine, stream: bool) -> None:
        """One for one with the token ids; greedy, the likeliest is the one taken."""
        asked = job("odds", max_tokens=12, logprobs=3, stream=stream, stop=("nowhere",))
        answer = said(await run(engine, asked))
        assert [one.token_id for one in answer.logprobs] == answer.token_ids
        assert "".join(one.text for one in answer.logprobs) == answer.text
        for one in answer.logprobs:
            assert [len(one.top), one.top[0].token_id] == [3, one.token_id]
            assert one.top[0].logprob >= one.top[1].logprob >= one.top[2].logprob
            assert sum(math.exp(other.logprob) for other in one.top) <= 1.001

    async def test_no_alternatives_are_given_where_none_were_asked_for(self, engine: Engine) -> None:
        """`logprobs` 0 is the token's own alone; without it there are none at all."""
        own = said(await run(engine, job("own", max_tokens=3, logprobs=0, temperature=1.0, seed=1)))
        none = said(await run(engine, job("none", max_tokens=3)))
        assert [one.top for one in own.logprobs] == [()] * 3
        assert all(one.logprob < 0 for one in own.logprobs)
        assert not none.logprobs


@pytest.mark.torch
class TestTorch(ChatContract):
    @pytest.fixture
    def engine(self, torch_engine: Engine) -> Engine:
        return torch_engine

    @pytest.mark.parametrize(
        "prompt,sampling,what",
        [
            (engines.PROMPT, {"output_format": OutputFormat(type="regex", regex="a")}, "no structured outputs"),
            (Chat(messages=HELLO, tools=(LOOK,), tool_choice="required"), {}, "cannot force a call"),
        ],
    )
    async def test_what_it_cannot_do_it_refuses_and_says_who_can(
        self, engine: Engine, prompt: str | Chat, sampling: dict[str, Any], what: str
    ) -> None:
        """An answer in another form than the one that was asked for would pass for a right one."""
        with pytest.raises(JobRejected, match=f"{what}.*; the vllm engine") as caught:
            await run(engine, job("format", prompt, **sampling))
        assert caught.value.code == "unsupported"

    async def test_the_setting_goes_before_the_models_own_template(self, engine: Engine) -> None:
        """For models that come without one, or with a bad one."""
        from codeyard.worker.engines.torch_engine import TorchEngine

        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        settings = engines.SETTINGS.model_copy(update={"chat_template": template})
        other = await TorchEngine.start(parse_model("starter"), settings)
        [chatted] = await run(other, job("chat", Chat(messages=HELLO)))
        await other.close()
        [plain] = await run(engine, job("plain", "Reverse a string."))
        assert (chatted.token_ids, chatted.prompt_tokens) == (plain.token_ids, plain.prompt_tokens)


@pytest.mark.vllm
class TestVllm(ChatContract):
    @pytest.fixture
    def engine(self, vllm_engine: Engine) -> Engine:
        return vllm_engine

    @pytest.mark.torch
    async def test_both_engines_find_tokens_equally_likely(self, engine: Engine, torch_engine: Engine) -> None:
        """In float32: what one means by a log probability the other means too."""
        mine, theirs = await asyncio.gather(
            *(run(one, job("odds", max_tokens=20, logprobs=2)) for one in (engine, torch_engine))
        )
        pairs = list(zip(said(mine).logprobs, said(theirs).logprobs, strict=True))
        assert [a.token_id for a, _ in pairs] == [b.token_id for _, b in pairs]
        assert all(abs(a.logprob - b.logprob) < 1e-2 for a, b in pairs)
        assert [a.text for a, _ in pairs] == [b.text for _, b in pairs]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_answer_has_the_form_that_was_asked_for(self, engine: Engine, stream: bool) -> None:
        """Of a model that knows nothing of it."""
        forms = [
            OutputFormat(type="json_schema", json_schema=LOOK.parameters),
            OutputFormat(type="json_schema", json_schema={}),
            OutputFormat(type="regex", regex="[ab]{3}-[0-9]{2}"),
            OutputFormat(type="choice", choice=("left", "right")),
        ]
        schema, any_object, regex, choice = await asyncio.gather(
            *(
                run(engine, job(f"form {n}", max_tokens=100, output_format=form, stream=stream))
                for n, form in enumerate(forms)
            )
        )
        assert set(json.loads(text_of(schema))) == {"deep", "where"}
        assert text_of(any_object).lstrip().startswith("{")
        assert text_of(regex)[:2].strip("ab") == ""
        assert len(text_of(regex)) == 6
        assert text_of(choice) in ("left", "right")
        assert schema[-1].finish_reason == regex[-1].finish_reason == "stop"

    async def test_a_form_that_is_none_is_rejected_alone(self, engine: Engine) -> None:
        """Retrying cannot help, and its neighbours must not notice."""
        neighbour = asyncio.create_task(run(engine, job("beside")))
        for form in (
            OutputFormat(type="json_schema", json_schema={"type": "no such type"}),
            OutputFormat(type="regex", regex="(("),
        ):
            with pytest.raises(JobRejected) as caught:
                await run(engine, job("bad", output_format=form))
            assert caught.value.code == "unsupported"
        assert len((await neighbour)[-1].token_ids) == 24

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("choice", ["required", NamedTool(name="look")])
    async def test_a_call_that_is_demanded_is_made(self, engine: Engine, choice: Any, stream: bool) -> None:
        """By any model: the schema leaves it nothing else to write."""
        tools = (LOOK,) if choice == "required" else (WAIT, LOOK)
        chat = Chat(messages=HELLO, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        deltas = await run(engine, job("demanded", chat, max_tokens=100, stream=stream))
        answer = said(deltas)
        [call] = answer.tool_calls
        assert (call.id, call.name) == (call_id("demanded", 0), "look")
        assert set(json.loads(call.arguments)) == {"deep", "where"}
        assert (answer.content, deltas[-1].finish_reason) == ("", "tool_calls")
        assert answer.text  # as it was written: usage and continuation count on it

    @pytest.mark.parametrize("parser", [None, "hermes"])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_call_in_the_text_is_found(
        self, engine: Any, stream: bool, parser: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By our reader and by vLLM's. The starter model cannot call tools; a grammar makes it write as if it could."""
        from codeyard.worker.engines.vllm_tools import VllmTools

        monkeypatch.setattr(engine, "_tools", VllmTools(engine._tokenizer, parser))
        form = OutputFormat(type="regex", regex=r'x <tool_call>\n\{"name": "wait", "arguments": \{\}\}\n</tool_call>')
        chat = Chat(messages=HELLO, tools=(LOOK, WAIT))
        deltas = await run(engine, job("found", chat, max_tokens=60, output_format=form, stream=stream))
        answer = said(deltas)
        assert [(call.id, call.name, call.arguments) for call in answer.tool_calls] == [
            (call_id("found", 0), "wait", "{}")
        ]
        assert ((answer.content or "").strip(), deltas[-1].finish_reason) == ("x", "tool_calls")
        assert len(deltas) > 1 or not stream


@pytest.mark.vllm
async def test_a_parser_that_vllm_does_not_have_is_named_at_start() -> None:
    """With those it has, and before anything is loaded."""
    pytest.importorskip("vllm")
    from codeyard.worker.engines.vllm_engine import VllmEngine

    settings = engines.SETTINGS.model_copy(update={"tool_call_parser": "telepathy"})
    with pytest.raises(EngineUnavailable, match=r"TOOL_CALL_PARSER.*'telepathy'; it has .*hermes"):
        await VllmEngine.start(ModelSource("x", "nowhere", "x-1"), settings)

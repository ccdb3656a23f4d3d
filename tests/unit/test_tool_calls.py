"""What of a text is content and what calls: the same for any cutting, and no character of content lost."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeyard.shared.chat import Chat, Message, NamedTool, Tool
from codeyard.shared.job import Lane, Sampling
from codeyard.worker.engines.forced import forced_reader, forced_schema
from codeyard.worker.engines.hermes import HermesReader
from codeyard.worker.engines.port import Delta, EngineJob
from codeyard.worker.engines.tool_calls import CallReader, Calls, call_id
from codeyard.worker.held import Said

LOOK = '{"name": "look", "arguments": {"path": "a}\\"<b>.py"}}'
ARGUMENTS = '{"path": "a}\\"<b>.py"}'

JOB = EngineJob("job", "x", Sampling(), Lane.STANDARD, stream=True)

Seen = tuple[str, list[tuple[str, str]]]  # content, (name, arguments) of each call


def seen(reader: CallReader, pieces: list[str]) -> Seen:
    """As somebody sees it who joins a job's events."""
    calls, said = Calls(JOB, reader, parallel=True), Said()
    for piece in pieces:
        said.add(calls.of(Delta(piece, (1,))))
    said.add(calls.of(Delta("", (), "stop", prompt_tokens=1)))
    return said.content or "", [(call.name, call.arguments) for call in said.tool_calls]


@pytest.mark.parametrize(
    "text,content,calls",
    [
        ("x = 1\n", "x = 1\n", []),
        (f"<tool_call>{LOOK}</tool_call>", "", [("look", ARGUMENTS)]),
        (f"<tool_call>\n{LOOK}\n</tool_call>\n", "", [("look", ARGUMENTS)]),
        (f"Let me see.\n\n<tool_call>{LOOK}</tool_call>", "Let me see.", [("look", ARGUMENTS)]),
        (f"<tool_call>{LOOK}</tool_call>\n<tool_call>{LOOK}</tool_call>", "", [("look", ARGUMENTS)] * 2),
        (f"<tool_call>{LOOK}</tool_call>\nDone.", "\nDone.", [("look", ARGUMENTS)]),
        (f"<tool_call>{LOOK}\n<tool_call>{LOOK}", "", [("look", ARGUMENTS)] * 2),  # closing tags forgotten
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f"}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": [1, {"b"', "", [("f", '{"a": [1, {"b"')]),  # cut by max_tokens
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', "", [("f", '{"a": 1')]),
        ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', None, []),
        ('<tool_call>{"name": "two words", "arguments": {}}</tool_call>', None, []),
        ("Write <tool_call> and then </tool_call>.", None, []),
        ("<tool_call>{nothing", None, []),
        ("a <tool_c", None, []),
        (f"<tool_call>{{x <tool_call>{LOOK}</tool_call>", "<tool_call>{x", [("look", ARGUMENTS)]),
    ],
)
def test_a_text_is_read_as_its_writer_meant_it(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    """None: all of it is content, since what is no call is something the reader should see."""
    expected = (text if content is None else content, calls)
    assert seen(HermesReader(), [text]) == expected
    assert seen(HermesReader(), list(text)) == expected


words = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "{", "}", '"', "\\", "<", "tool", "_call>", "\n", " ", "x", "\u20ac"),
        *('{"name": "f", "arguments": ', '"name"', ": ", '{"a": "}"}', '{"name": "f"}', LOOK, "</tool", "[", "]"),
    ]
)


@given(st.lists(words, max_size=14).map("".join), st.lists(st.integers(0, 120), max_size=8))
def test_any_cutting_gives_the_same_content_and_calls(text: str, cuts: list[int]) -> None:
    """Engines hand out a character or a page; a stream must say what its result says."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert seen(HermesReader(), pieces) == seen(HermesReader(), [text]) == seen(HermesReader(), list(text))


@given(st.lists(words, max_size=14).map("".join), st.integers(0, 120), st.integers(1, 7))
def test_a_reader_that_takes_over_tells_the_rest(text: str, cut: int, step: int) -> None:
    """Another worker's reader knows what was told from the text alone: it tells what follows, nothing twice."""
    told, rest = Said(), text[cut:]
    first = Calls(JOB, HermesReader(), parallel=True)
    told.add(first.of(Delta(text[:cut], (1,))))
    second = Calls(replace(JOB, prefix_text=text[:cut], prefix_token_ids=(1,)), HermesReader(), parallel=True)
    for at in range(0, len(rest), step):
        told.add(second.of(Delta(rest[at : at + step], (1,))))
    last = second.of(Delta("", (0,), "stop"))
    told.add(last)
    content, calls = seen(HermesReader(), [text])
    assert (told.content, [(call.name, call.arguments) for call in told.tool_calls]) == (content, calls)
    assert last.finish_reason == ("tool_calls" if calls else "stop")


@given(st.lists(words, max_size=14).map("".join))
def test_text_without_a_call_is_content_to_the_last_character(text: str) -> None:
    """A job that offers tools and gets code for an answer must get all of it."""
    content, calls = seen(HermesReader(), list(text))
    if not calls:
        assert content == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=5), json_values, max_size=3)


@given(st.lists(arguments, min_size=1, max_size=3), st.booleans(), st.data())
def test_whatever_the_arguments_are_they_arrive_as_they_were_written(
    given: list[dict[str, Any]], ascii_only: bool, data: st.DataObject
) -> None:
    """Strings with braces, quotes and tags in them among them."""
    written = [json.dumps(one, ensure_ascii=ascii_only) for one in given]
    hermes = "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {one}}}\n</tool_call>' for one in written)
    listed = "[" + ", ".join(f'{{"name": "f", "parameters": {one}}}' for one in written) + "]"
    chat = Chat(messages=(Message(role="user", content="x"),), tools=(Tool(name="f"),), tool_choice="required")
    step = data.draw(st.integers(1, 20))
    for reader, text in ((HermesReader(), hermes), (forced_reader(chat), listed)):
        assert reader is not None
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
        assert seen(reader, pieces) == ("", [("f", one) for one in written])


def chat_of(choice: Any, *, parallel: bool = True) -> Chat:
    nested = {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "$defs": {"place": {"type": "string"}}}
    return Chat(
        messages=(Message(role="user", content="x"),),
        tools=(Tool(name="look", parameters=nested), Tool(name="wait", parameters={})),
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )


def test_a_named_tool_is_asked_for_its_arguments_alone() -> None:
    """And the whole answer becomes them."""
    chat = chat_of(NamedTool(name="look"))
    reader = forced_reader(chat)
    assert reader is not None
    assert forced_schema(chat) == chat.tools[0].parameters
    assert forced_schema(chat_of(NamedTool(name="wait"))) == {"type": "object", "properties": {}}
    assert seen(reader, ['{"at"', ': "x"}']) == ("", [("look", '{"at": "x"}')])


def test_a_required_call_may_be_one_of_any_tool() -> None:
    """Definitions move to the top, where references look for them; the number is the caller's."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = forced_schema(chat_of("required"))
    answer = [{"name": "look", "parameters": {"at": "x"}}, {"name": "wait", "parameters": {}}]
    jsonschema.validate(answer, schema)
    for wrong in ([], [{"name": "other", "parameters": {}}], [{"name": "look", "parameters": {"at": 1}}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    single = forced_schema(chat_of("required", parallel=False))
    assert single is not None
    assert single["maxItems"] == 1


def test_a_free_choice_forces_nothing() -> None:
    """The model decides, and its text is read as it writes it."""
    assert forced_schema(chat_of("auto")) is None
    assert forced_reader(chat_of("auto")) is None


def test_a_list_in_another_order_is_read_at_its_end() -> None:
    """Some grammars let the fields change places."""
    reader = forced_reader(chat_of("required"))
    assert reader is not None
    text = '[{"parameters": {"at": "x"}, "name": "look"}]'
    assert seen(reader, [text[:9], text[9:]]) == ("", [("look", '{"at": "x"}')])
    broken = forced_reader(chat_of("required"))
    assert broken is not None
    assert seen(broken, ['[{"parameters": {"at"']) == ("", [])


def test_calls_are_named_alike_whenever_the_job_is_generated() -> None:
    """A takeover repeats what the reader may have acted on; other jobs and other calls have other names."""
    text = f"<tool_call>{LOOK}</tool_call>" * 2
    first, second = (
        [piece.id for piece in Calls(JOB, HermesReader(), parallel=True).of(Delta(text, (1,))).tool_calls if piece.id]
        for _ in range(2)
    )
    assert first == second == [call_id("job", 0), call_id("job", 1)]
    assert len({*first, call_id("another", 0)}) == 3


def test_one_call_at_a_time_where_that_was_asked_for() -> None:
    """The caller would not know what to do with a second one."""
    calls = Calls(JOB, HermesReader(), parallel=False)
    delta = calls.of(Delta(f"<tool_call>{LOOK}</tool_call>" * 2, (1,), "stop", 3))
    assert {piece.index for piece in delta.tool_calls} == {0}
    assert (delta.finish_reason, delta.prompt_tokens) == ("tool_calls", 3)


@pytest.mark.parametrize(
    "text,reason,said",
    [("x", "stop", "stop"), (LOOK, "stop", "stop"), (f"<tool_call>{LOOK}", "length", "length"), ("x", None, None)],
)
def test_an_ending_without_a_call_or_by_length_stays_what_it_is(text: str, reason: str | None, said: str) -> None:
    """A call that was cut off is not one to act on."""
    assert Calls(JOB, HermesReader(), parallel=True).of(Delta(text, (1,), reason)).finish_reason == said

"""A job whose worker dies at any token is finished by another one, to the character, and counted once."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.store_calls import make_job
from support.takeover import Taken

from codeyard.shared.chat import Chat, Message, Tool
from codeyard.shared.job import Job, Sampling
from codeyard.shared.record import EventKind, State
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.completion import Completion
from codeyard.worker.engines.hermes import hermes_calls
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load, Memory
from codeyard.worker.engines.simulated import SimulatedEngine

END = 0
PROMPT_TOKENS = 4
LOOK = Chat(messages=(Message(role="user", content="look"),), tools=(Tool(name="look"),))
ANSWER = "total = a + b\n\u20ac = '\U0001f600'\nreturn total\n\n\nprint(1)"


class Bytes:
    """A model whose tokens are bytes and whose answer is known; its text is made as every engine makes it."""

    info = EngineInfo("scripted", "scripted", "m", "m-1", 500, max_running=1, continuous=True, resumes_calls=True)

    def __init__(self, answer: str) -> None:
        self._ids = (*answer.encode(), END)

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        prompt = [1] * PROMPT_TOKENS
        completion = Completion(job, prompt, _decode, ends={END}, context_tokens=self.info.context_tokens)
        calls = hermes_calls(job, "scripted")
        left = iter(self._ids[len(job.prefix_token_ids) :])
        while (delta := completion.delta()) is None or delta.finish_reason is None:
            if delta is not None:
                yield delta if calls is None else calls.of(delta)
            completion.push((next(left),))
        yield delta if calls is None else calls.of(delta)

    async def abort(self, job_id: str) -> None: ...

    def load(self) -> Load:
        return Load(running=0, waiting=0)

    def pids(self) -> tuple[int, ...]:
        return ()

    async def memory(self) -> Memory:
        return Memory(device_bytes=0, host_bytes=0)

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def close(self, *, force: bool = False) -> None: ...


def _decode(ids: list[int]) -> str:
    return bytes(token for token in ids if token != END).decode(errors="replace")


def job_of(**changes: Any) -> Job:
    sampling = Sampling(**{"max_tokens": 300, **changes.pop("sampling", {})})
    return make_job().model_copy(update={"stream": True, "sampling": sampling, **changes})


@pytest.mark.parametrize("flush", [1, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"max_tokens": 17},
        {"stop": ("\n\n",)},
        {"stop": ("\n\n\n", "return x", "print(")},
        {"stop": ("'\U0001f600'",)},
        {"stop": ("never said",)},
    ],
    ids=str,
)
async def test_killed_at_every_token_it_says_what_an_undisturbed_one_says(sampling: dict[str, Any], flush: int) -> None:
    """Stop strings hold text back, characters wait for their bytes, events come late: none of it may show."""
    engine, job = Bytes(ANSWER), job_of(sampling=sampling)
    undisturbed = Taken(job)
    expected = (await undisturbed.run(engine)).result
    assert expected.state is State.SUCCEEDED

    for kill in range(1, undisturbed.num_deltas):
        taken = Taken(job, flush=flush)
        attempt = await taken.run(engine, [kill])

        assert attempt.error is None
        assert _lasting(attempt.result) == _lasting(expected)
        assert taken.seen.text == expected.text
        assert [event.seq for event in taken.events] == list(range(1, len(taken.events) + 1))
        assert all(event.kind is EventKind.TOKENS for event in taken.events)
        assert taken.num_ids - expected.usage.completion_tokens < flush  # generated again: what was not yet written


CALLING = (
    'I look.\n\n<tool_call>\n{"name": "look", "arguments": {"at": "\u20ac</tool_call>"}}\n</tool_call>\n'
    '<tool_call>{"arguments": {}, "name": "look"}</tool_call>\n<tool_call> that was all'
)


async def test_killed_at_every_token_of_its_calls_it_makes_the_same_ones() -> None:
    """What agents stream nearly always: no call twice, none lost, none with other arguments or another id."""
    engine, job = Bytes(CALLING), job_of(prompt=LOOK)
    undisturbed = Taken(job)
    expected = (await undisturbed.run(engine)).result
    assert [call.arguments for call in expected.tool_calls] == ['{"at": "\u20ac</tool_call>"}', "{}"]
    assert (expected.content, expected.finish_reason) == ("I look.\n<tool_call> that was all", "tool_calls")

    for kill in range(1, undisturbed.num_deltas):
        taken = Taken(job)
        result = (await taken.run(engine, [kill])).result

        assert _lasting(result) == _lasting(expected)
        seen = taken.seen
        assert (seen.text, seen.content, seen.tool_calls) == (result.text, result.content, result.tool_calls)
        assert all(event.kind is EventKind.TOKENS for event in taken.events)


answers = st.text(alphabet="ab\n\u20ac\U0001f600", max_size=40)
stops = st.lists(st.text(alphabet="ab\n\u20ac", min_size=1, max_size=3), max_size=3).map(tuple)


@given(answers, stops, st.lists(st.integers(1, 60), max_size=4), st.integers(1, 4))
async def test_whatever_the_answer_the_stops_and_the_kills(
    answer: str, stop: tuple[str, ...], kills: list[int], flush: int
) -> None:
    """Several workers may die on one job."""
    engine, job = Bytes(answer), job_of(sampling={"stop": stop})
    expected = (await Taken(job).run(engine)).result
    taken = Taken(job, flush=flush)

    attempt = await taken.run(engine, kills)

    assert _lasting(attempt.result) == _lasting(expected)
    assert taken.seen.text == expected.text


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"logprobs": 2}},
        {"prompt": LOOK.model_copy(update={"tool_choice": "required"})},
    ],
    ids=["logprobs", "a demanded call"],
)
async def test_what_cannot_go_on_starts_over_and_says_so(changes: dict[str, Any]) -> None:
    """The reader drops what it saw; what it then sees is the result, odds and calls included."""
    engine = SimulatedEngine(ModelSource("m", "nowhere", "m-1"), EngineSettings(time_scale=1e-6))
    job = job_of(**changes)
    undisturbed = Taken(job)
    expected = (await undisturbed.run(engine)).result

    for kill in (1, undisturbed.num_deltas // 2, undisturbed.num_deltas - 1):
        taken = Taken(job)
        result = (await taken.run(engine, [kill])).result

        assert _lasting(result) == _lasting(expected)
        assert (taken.seen.text, taken.seen.content, taken.seen.tool_calls, tuple(taken.seen.logprobs)) == (
            *(result.text, result.content, result.tool_calls, result.logprobs),
        )
        kinds = [event.kind for event in taken.events]
        assert kinds.count(EventKind.RESTARTED) == 1
    await engine.close()
    assert expected.logprobs or expected.tool_calls


@pytest.mark.parametrize(
    "answer,changes",
    [("ab" * 100, {"sampling": {"max_tokens": 6}}), (CALLING, {"prompt": LOOK}), ("x = 1 \n", {"prompt": LOOK})],
    ids=["text", "calls", "blanks"],
)
async def test_a_job_complete_when_it_is_taken_over_is_only_counted(answer: str, changes: dict[str, Any]) -> None:
    """Its owner died between the last token and the commit. Nothing is told twice, and the ending is the same."""
    engine, job = Bytes(answer), job_of(**changes)
    first = Taken(job)
    expected = (await first.run(engine)).result
    assert expected.usage.prompt_tokens == PROMPT_TOKENS
    last_seq = first.events[-1].seq

    again = Taken(job)
    again.events = first.events
    result = (await again.run(engine)).result

    assert _lasting(result) == _lasting(expected)
    assert again.events[-1].seq == last_seq  # nothing was added


def _lasting(result: Any) -> dict[str, Any]:
    """What does not depend on when it was made."""
    dumped: dict[str, Any] = result.model_dump(exclude={"first_token_s", "generate_s", "batch_size"})
    return dumped

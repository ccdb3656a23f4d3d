"""Workers die under the real model, and others go on where they were: greedy output in float32, one job at a time."""

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from support import engines
from support.store_calls import make_job
from support.takeover import Taken

from codeyard.shared.chat import Chat, Message, Tool
from codeyard.shared.job import Job, Sampling
from codeyard.shared.record import EventKind, State
from codeyard.worker.engines.models import parse_model
from codeyard.worker.engines.port import Engine
from codeyard.worker.engines.torch_engine import TorchEngine

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.asyncio(loop_scope="module")]

PROMPTS: dict[str, Any] = {
    "text": engines.PROMPT,
    "long": "import os\n\n\ndef walk(path):\n    " + "x = path\n    " * 20,
    "chat": Chat(messages=(Message(role="user", content="Reverse a string."),)),
    "tools": Chat(messages=(Message(role="user", content="Reverse a string."),), tools=(Tool(name="look"),)),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    loaded = await TorchEngine.start(parse_model("starter"), engines.SETTINGS)
    yield loaded
    await loaded.close()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sampling", [{}, {"stop": ("):", "self.x")}, {"repetition_penalty": 1.3}], ids=str)
async def test_taken_over_at_random_points_it_equals_an_undisturbed_run(
    engine: Engine, prompt: str, sampling: dict[str, Any]
) -> None:
    """The same tokens, the same text to the character, and each token counted once however many workers died."""
    chance = random.Random(f"{prompt} {sampling}")
    job = job_of(PROMPTS[prompt], sampling)
    undisturbed = Taken(job)
    expected = (await undisturbed.run(engine)).result
    assert expected.state is State.SUCCEEDED

    for _ in range(6):
        flush = chance.randint(1, 5)
        kills = [chance.randint(1, max(1, undisturbed.num_deltas // 2)) for _ in range(chance.randint(1, 3))]
        taken = Taken(job, flush=flush)
        attempt = await taken.run(engine, kills)

        assert attempt.error is None
        assert taken.seen.token_ids == undisturbed.seen.token_ids
        assert taken.seen.text == attempt.result.text == expected.text
        assert taken.seen.content == attempt.result.content == expected.content
        assert attempt.result.usage == expected.usage
        assert attempt.result.finish_reason == expected.finish_reason
        assert {event.kind for event in taken.events} == {EventKind.TOKENS}
        assert taken.num_ids - expected.usage.completion_tokens < flush * len(kills)  # generated again


async def test_a_seeded_job_starts_over_and_gives_the_same(engine: Engine) -> None:
    """Its generator cannot be wound forward, so its readers see it twice, the second time to the end."""
    job = job_of(engines.PROMPT, {"seed": 3, "temperature": 0.8})
    expected = (await Taken(job).run(engine)).result
    taken = Taken(job)

    result = (await taken.run(engine, [10])).result

    assert (result.text, result.usage) == (expected.text, expected.usage)
    assert taken.seen.text == expected.text
    assert [event.kind for event in taken.events].count(EventKind.RESTARTED) == 1


def job_of(prompt: Any, sampling: dict[str, Any]) -> Job:
    asked = Sampling(**{"max_tokens": 60, **sampling})
    changes = {"prompt": prompt, "sampling": asked, "stream": True, "revision": "m-1"}
    return make_job().model_copy(update=changes)

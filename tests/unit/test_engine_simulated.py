"""The simulated engine: answers that can be checked, times of a GPU, faults on demand."""

import asyncio
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from codeyard.shared.chat import Chat, Message, NamedTool, Tool, ToolCall
from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected, SettingsError
from codeyard.shared.job import Lane, OutputFormat, Prompt, Sampling
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Adapter, Delta, EngineJob, Memory
from codeyard.worker.engines.simulated import EXIT_STATUS, Fault, SimulatedEngine, simulated_completion
from codeyard.worker.engines.tool_calls import call_id
from codeyard.worker.held import TokenLog
from codeyard.worker.simulation.latency import load_table

SOURCE = ModelSource("any", "nowhere", "any-1")
FAST = 1e-6


def engine(*, time_scale: float = FAST, max_running: int = 8, **changes: Any) -> SimulatedEngine:
    fault = changes.pop("fault", None)
    settings = EngineSettings(time_scale=time_scale, max_running=max_running, **changes)
    return SimulatedEngine(SOURCE, settings, fault=fault)


def job(name: str, prompt: Prompt = "def f", *, stream: bool = False, **changes: Any) -> EngineJob:
    prefix, lane = changes.pop("prefix", ()), changes.pop("lane", Lane.STANDARD)
    adapter = changes.pop("adapter", None)
    return EngineJob(name, prompt, Sampling(**{"max_tokens": 300, **changes}), lane, stream, prefix, adapter)


def deltas_of(one: SimulatedEngine, asked: EngineJob) -> AsyncGenerator[Delta, None]:
    return one.generate(asked)


async def run(one: SimulatedEngine, asked: EngineJob) -> list[Delta]:
    async with aclosing(deltas_of(one, asked)) as deltas:
        return [delta async for delta in deltas]


def answer(deltas: list[Delta]) -> tuple[str, tuple[int, ...], str | None]:
    ids = tuple(token for delta in deltas for token in delta.token_ids)
    return "".join(delta.text for delta in deltas), ids, deltas[-1].finish_reason


def hang(asked: EngineJob) -> Fault | None:
    return "hang" if asked.id.startswith("hang") else None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens,stop", [(300, ()), (10, ()), (300, (" return",))])
async def test_the_answer_is_the_one_a_drill_computes(stream: bool, max_tokens: int, stop: tuple[str, ...]) -> None:
    """A drill tells a wrong result from a right one by its prompt alone."""
    one = engine()
    prompts = [f"prompt {n}" for n in range(40)]  # five times the slots
    got = await asyncio.gather(
        *(run(one, job(prompt, prompt, stream=stream, max_tokens=max_tokens, stop=stop)) for prompt in prompts)
    )
    await one.close()
    assert [answer(deltas) for deltas in got] == [simulated_completion(p, max_tokens, stop=stop) for p in prompts]
    assert not any(stop and stop[0] in answer(deltas)[0] for deltas in got)


async def test_a_continued_job_ends_as_an_undisturbed_one() -> None:
    """Takeovers are what drills are about."""
    text, ids, reason = simulated_completion("def f", 300)
    one = engine()
    rest = await run(one, job("rest", prefix=ids[:7], stream=True))
    assert ids[:7] + answer(rest)[1] == ids
    assert text.endswith(answer(rest)[0])
    assert answer(rest)[2] == reason
    assert answer(await run(one, job("done", prefix=ids)))[1:] == ((), reason)
    await one.close()


async def test_it_takes_the_time_of_the_table() -> None:
    """Loads measured on it are to be those of the GPU. The job's last step may not come early."""
    table = load_table()
    num_tokens = len(simulated_completion("def f", 300)[1])
    expected_s = num_tokens * table.decode_s[1] * 0.1
    one = engine(time_scale=0.1)
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    await run(one, job("timed"))
    took_s = loop.time() - started_s
    await one.close()
    assert took_s >= expected_s * 0.95
    assert one.load().steps == num_tokens


async def test_over_its_slots_the_urgent_lane_is_next() -> None:
    """As vLLM does with priorities."""
    one = engine(max_running=1)
    ended: list[str] = []

    async def note(name: str, lane: Lane) -> None:
        await run(one, job(name, lane=lane))
        ended.append(name)

    first = deltas_of(one, job("first", stream=True))
    await anext(first)
    async with asyncio.TaskGroup() as tasks:
        for name, lane in (("bulk", Lane.BULK), ("standard", Lane.STANDARD), ("interactive", Lane.INTERACTIVE)):
            tasks.create_task(note(name, lane))
        while one.load().waiting < 3:
            await anext(first)
        await first.aclose()
    await one.close()
    assert ended == ["interactive", "standard", "bulk"]


async def test_an_aborted_job_ends_with_what_it_had() -> None:
    """Whether it streams, runs or waits."""
    one = engine(max_running=2, time_scale=1e-3)
    streaming = deltas_of(one, job("streaming", stream=True))
    seen = [await anext(streaming)]
    whole = asyncio.create_task(run(one, job("whole")))
    waiting = asyncio.create_task(run(one, job("waiting")))
    while not one.load().waiting:
        seen.append(await anext(streaming))
    seen.append(await anext(streaming))
    for name in ("streaming", "whole", "waiting", "unknown"):
        await one.abort(name)
    seen += [delta async for delta in streaming]
    await one.close()
    ids = simulated_completion("def f", 300)[1]
    for text, had, reason in (answer(seen), answer(await whole), answer(await waiting)):
        assert reason == "abort"
        assert had == ids[: len(had)]
        assert bool(text) == bool(had)
    assert answer(await waiting)[1] == ()


async def test_a_hanging_job_moves_nothing_and_dies_with_the_engine() -> None:
    """How a stalled engine looks: running, and no steps."""
    one = engine(fault=hang)
    hanging = asyncio.create_task(run(one, job("hanging")))
    await run(one, job("healthy"))
    steps = one.load().steps
    assert one.load().running == 1
    await one.close(force=True)
    with pytest.raises(EngineDead):
        await hanging
    with pytest.raises(EngineDead):
        await run(one, job("late"))
    assert one.load().steps == steps
    await one.close()


async def test_a_fault_of_the_engine_takes_every_job_and_one_of_a_job_only_itself() -> None:
    """The two kinds of failure a worker must tell apart."""
    faults: dict[str, Fault] = {"failing": "fail", "deadly": "die", "hanging": "hang"}
    one = engine(fault=lambda asked: faults.get(asked.id))
    neighbour = asyncio.create_task(run(one, job("hanging")))
    with pytest.raises(JobFailed):
        await run(one, job("failing"))
    assert not neighbour.done()
    with pytest.raises(EngineDead):
        await run(one, job("deadly"))
    with pytest.raises(EngineDead):
        await neighbour
    await one.close()


async def test_a_prompt_over_the_context_is_rejected() -> None:
    """As by every engine."""
    one = engine(max_model_len=10)
    with pytest.raises(JobRejected) as caught:
        await run(one, job("long", "x" * 100))
    assert caught.value.code == "prompt_too_long"
    [delta] = await run(one, job("fits", "x" * 8))
    assert len(delta.token_ids) == 7
    await one.close()


async def test_a_prompt_is_counted_without_generating() -> None:
    """As by every engine, one over the context too: its length is what is asked for."""
    one = engine(max_model_len=10)
    assert await run(one, job("counted", "x" * 30, max_tokens=0)) == [Delta("", (), "length", 10)]
    assert one.load().steps == 0
    await one.close()


LOOK, WAIT = Tool(name="look"), Tool(name="wait")
USER = Message(role="user", content="what is there?")
ANSWERED = (
    USER,
    Message(role="assistant", tool_calls=(ToolCall(id="c", name="look"),)),
    Message(role="tool", tool_call_id="c", content="a file"),
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "chat,name",
    [
        (Chat(messages=(USER,), tools=(LOOK, WAIT)), "look"),
        (Chat(messages=ANSWERED, tools=(LOOK, WAIT)), None),
        (Chat(messages=ANSWERED, tools=(WAIT, LOOK), tool_choice="required"), "wait"),
        (Chat(messages=(USER,), tools=(LOOK, WAIT), tool_choice=NamedTool(name="wait")), "wait"),
        (Chat(messages=(USER,), tools=(LOOK, WAIT), tool_choice="none"), None),
        (Chat(messages=(USER,)), None),
    ],
    ids=["auto", "answered", "required", "named", "none", "no tools"],
)
async def test_tools_are_called_as_a_client_needs_it_for_its_tests(chat: Chat, name: str | None, stream: bool) -> None:
    """Once, then it goes on with text: a loop of calls and answers ends, without a model."""
    one, log = engine(), TokenLog(last_seq=0)
    deltas = await run(one, job("chat", chat, stream=stream))
    for delta in deltas:
        log.add(delta)
    await one.close()

    assert [(call.id, call.name, call.arguments) for call in log.said.tool_calls] == (
        [(call_id("chat", 0), name, "{}")] if name else []
    )
    assert answer(deltas) == simulated_completion(chat, 300)
    assert deltas[-1].finish_reason == ("tool_calls" if name else "stop")
    assert log.said.content == ("" if name else log.text if chat.offers_tools else None)


@pytest.mark.parametrize("stream", [False, True])
async def test_each_token_is_certain(stream: bool) -> None:
    """Log probabilities of an engine that has none: there is nothing it could have said instead."""
    one = engine()
    deltas = await run(one, job("odds", stream=stream, logprobs=5))
    await one.close()
    odds = [each for delta in deltas for each in delta.logprobs]
    assert tuple(each.token_id for each in odds) == answer(deltas)[1]
    assert "".join(each.text for each in odds) == answer(deltas)[0]
    assert {(each.logprob, each.top) for each in odds} == {(0.0, ())}


async def test_a_format_is_refused() -> None:
    """Its answers are fixed."""
    one = engine()
    with pytest.raises(JobRejected, match="simulated engine has no structured outputs") as caught:
        await run(one, job("format", output_format=OutputFormat(type="choice", choice=("a",))))
    await one.close()
    assert caught.value.code == "unsupported"


def table_with(faults: dict[str, str], directory: Path) -> Path:
    shipped = Path(sys.modules["codeyard.worker.simulation.latency"].__file__ or "").parents[1] / "data"
    table = json.loads((shipped / "vllm-h200-qwen2.5-7b.json").read_text())
    path = directory / "table.json"
    path.write_text(json.dumps({**table, "faults": faults}))
    return path


async def test_a_latency_table_may_name_faults(tmp_path: Path) -> None:
    """So that a drill reaches them in a worker that is another process."""
    one = engine(latency_table=table_with({"!fail": "fail"}, tmp_path))
    with pytest.raises(JobFailed):
        await run(one, job("failing", "!fail please"))
    assert await run(one, job("healthy", "please"))
    await one.close()


async def test_an_unknown_fault_stops_the_start(tmp_path: Path) -> None:
    """A drill that breaks nothing would prove nothing."""
    with pytest.raises(SettingsError, match="explode"):
        engine(latency_table=table_with({"!": "explode"}, tmp_path))


def test_a_poison_job_ends_the_process(tmp_path: Path) -> None:
    """It must be the whole process, with no chance to clean up."""
    path = table_with({"!exit": "exit"}, tmp_path)
    program = f"""
import asyncio
from pathlib import Path
from codeyard.shared.job import Lane, OutputFormat, Prompt, Sampling
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import EngineJob
from codeyard.worker.engines.simulated import SimulatedEngine
async def main():
    one = SimulatedEngine(ModelSource("a", "b", "c"), EngineSettings(latency_table=Path({str(path)!r})))
    async for _ in one.generate(EngineJob("j", "!exit now", Sampling(), Lane.BULK, False)):
        pass
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == EXIT_STATUS


async def test_it_says_what_it_is() -> None:
    """No result of it may pass for one of a model."""
    one = engine()
    assert one.info.name == "simulated"
    assert one.info.version.startswith("simulated (no model")
    await one.close()


async def test_each_adapter_gives_an_answer_of_its_own() -> None:
    """A result of another adapter, or of none, must show."""
    one = engine()
    adapters = [None, *(Adapter(name, f"/adapters/{name}") for name in ("sql", "docs"))]
    got = await asyncio.gather(
        *(run(one, job(f"{n}", f"prompt {n}", adapter=adapter)) for n in range(10) for adapter in adapters)
    )
    names = [adapter.name if adapter else None for adapter in adapters]
    expected = [simulated_completion(f"prompt {n}", 300, adapter=name) for n in range(10) for name in names]
    assert [answer(deltas) for deltas in got] == expected
    assert len({text for text, _, _ in expected}) == 30
    await one.close()


async def test_it_takes_as_long_to_load_and_to_wake_as_it_is_told() -> None:
    """What a model cache and a rollout are tried with: 30 s from disk, 2 s from sleep, a thousand times faster."""
    settings = EngineSettings(simulated_load_s=30, simulated_wake_s=2, simulated_bytes=7, time_scale=1e-3)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    one = await SimulatedEngine.start(SOURCE, settings)
    loaded_s = loop.time()
    assert loaded_s - began_s >= 0.03
    assert await one.memory() == Memory(device_bytes=7, host_bytes=0)
    await one.sleep()
    assert await one.memory() == Memory(device_bytes=0, host_bytes=7)
    slept_s = loop.time()
    await one.wake()
    assert loop.time() - slept_s >= 0.002
    assert await one.memory() == Memory(device_bytes=7, host_bytes=0)
    assert answer(await run(one, job("awake"))) == simulated_completion("def f", 300)
    await one.close()


async def test_a_sleeping_engine_runs_nothing() -> None:
    """Its weights are elsewhere; whoever gave it a job forgot to wake it."""
    one = engine()
    assert one.info.can_sleep
    await one.sleep()
    with pytest.raises(JobFailed, match="sleeps"):
        await run(one, job("early"))
    await one.wake()
    assert await run(one, job("later"))
    await one.close()


async def test_a_model_can_be_one_that_does_not_load() -> None:
    """Rollouts and caches meet those."""
    with pytest.raises(EngineUnavailable, match="/models/fails"):
        await SimulatedEngine.start(ModelSource("any", "/models/fails", "any-2"), EngineSettings())


@pytest.mark.parametrize("fault", [None, "die"])
async def test_a_closed_engine_is_let_go(fault: Fault | None) -> None:
    """By its task, its jobs, and the errors they ended with, without waiting for the garbage collector."""
    one = engine(time_scale=1e-3, fault=lambda asked: fault)
    watched = weakref.ref(one)
    gc.disable()
    try:
        running = asyncio.create_task(run(one, job("running", stream=True)))
        await asyncio.sleep(0)
        await one.close()
        with pytest.raises(EngineDead):
            await running
        with pytest.raises(EngineDead):
            await run(one, job("late"))
        del one, running
        await asyncio.sleep(0)
        assert watched() is None
    finally:
        gc.enable()

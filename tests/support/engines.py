"""What every engine with a model must do, tried on the starter model. Test modules subclass `EngineContract`."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from codeyard.shared.chat import Chat
from codeyard.shared.errors import EngineDead, JobFailed, JobRejected
from codeyard.shared.job import Lane, Sampling
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines import children
from codeyard.worker.engines.models import starter_directory
from codeyard.worker.engines.port import Adapter, Delta, Engine, EngineJob

SETTINGS = EngineSettings(max_running=16, enforce_eager=True, dtype="float32")
PROMPT = "class A:\n    def __init__(self"  # goes on and on when asked greedily
PROMPT_TOKENS = 9
PATIENCE_S = 60.0


def job(name: str, prompt: str | tuple[int, ...] | Chat = PROMPT, *, stream: bool = False, **changes: Any) -> EngineJob:
    prefix = changes.pop("prefix", ())
    lane = changes.pop("lane", Lane.STANDARD)
    adapter = changes.pop("adapter", None)
    return EngineJob(name, prompt, Sampling(**{"max_tokens": 24, **changes}), lane, stream, prefix, adapter)


async def run(engine: Engine, one: EngineJob) -> list[Delta]:
    async with asyncio.timeout(PATIENCE_S), aclosing(deltas_of(engine, one)) as deltas:
        return [delta async for delta in deltas]


def deltas_of(engine: Engine, one: EngineJob) -> AsyncGenerator[Delta, None]:
    return cast("AsyncGenerator[Delta, None]", engine.generate(one))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Delta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


def processes() -> set[int]:
    """Those below this one that are not zombies."""
    return {pid for pid in children.descendants([os.getpid()]) if _state(pid) != "Z"}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def write_adapter(folder: Path, name: str, *, seed: int, rank: int = 4) -> Adapter:
    """Random weights that change what the starter model says, as peft would have saved them."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((starter_directory() / "config.json").read_text())
    width = config["hidden_size"]
    outputs = {"q_proj": width, "v_proj": config["num_key_value_heads"] * config["head_dim"]}
    chance = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, num_out in outputs.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=chance) / width**0.5
            weights[f"{key}.lora_B.weight"] = torch.randn(num_out, rank, generator=chance)
    folder = folder / name
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**described, "target_modules": list(outputs)}))
    return Adapter(name, str(folder))


async def started(engine: Engine, one: EngineJob) -> tuple[AsyncGenerator[Delta, None], Delta]:
    """A streaming job that is known to be in the engine, and its first delta."""
    deltas = deltas_of(engine, one)
    async with asyncio.timeout(PATIENCE_S):
        return deltas, await anext(deltas)


class EngineContract:
    """Needs a fixture `engine`, shared by the module."""

    async def test_a_job_completes_with_its_usage(self, engine: Engine) -> None:
        """The simplest promise, and what a result is made of."""
        [delta] = await run(engine, job("plain"))
        assert delta.text
        assert (len(delta.token_ids), delta.finish_reason, delta.prompt_tokens) == (24, "length", PROMPT_TOKENS)

    async def test_a_stream_is_the_result_in_pieces(self, engine: Engine) -> None:
        """Readers of the stream and readers of the result must not see two answers."""
        whole, pieces = await asyncio.gather(
            run(engine, job("whole")), run(engine, job("pieces", stream=True, lane=Lane.INTERACTIVE))
        )
        assert len(pieces) > 3
        assert text_of(pieces) == text_of(whole)
        assert ids_of(pieces) == ids_of(whole)

    async def test_a_continued_job_says_what_an_undisturbed_one_says(self, engine: Engine) -> None:
        """A worker dies in the middle of a stream and another one takes over."""
        whole = await run(engine, job("undisturbed"))
        prefix = ids_of(whole)[:10]
        rest = await run(engine, job("continued", prefix=prefix, stream=True))
        assert prefix + ids_of(rest) == ids_of(whole)
        assert text_of(whole).endswith(text_of(rest))
        assert rest[-1].prompt_tokens == PROMPT_TOKENS

    async def test_a_job_that_was_complete_ends_at_once(self, engine: Engine) -> None:
        """Its owner died before the commit: nothing may be added."""
        whole = await run(engine, job("complete"))
        assert await run(engine, job("again", prefix=ids_of(whole))) == [Delta("", (), "length", PROMPT_TOKENS)]

    async def test_a_prompt_is_counted_without_generating(self, engine: Engine) -> None:
        """Of `max_tokens` 0, also a prompt that the model could not answer: its length is what is asked for."""
        counted = await run(engine, job("counted", max_tokens=0))
        long = await run(engine, job("long", tuple(range(5, 405)), max_tokens=0, stream=True))
        assert counted == [Delta("", (), "length", PROMPT_TOKENS)]
        assert long == [Delta("", (), "length", 400)]
        assert engine.load().waiting == 0

    async def test_a_stop_string_ends_it(self, engine: Engine) -> None:
        """And is not part of the text, streamed or not."""
        whole = text_of(await run(engine, job("whole", max_tokens=40)))
        for stream in (False, True):
            deltas = await run(engine, job(f"stop {stream}", max_tokens=40, stop=("xyz", "self.name"), stream=stream))
            assert text_of(deltas) == whole[: whole.index("self.name")]
            assert deltas[-1].finish_reason == "stop"

    async def test_an_aborted_job_ends_and_its_neighbour_does_not(self, engine: Engine) -> None:
        """Cancelling is one job's matter."""
        neighbour = asyncio.create_task(run(engine, job("neighbour", max_tokens=100)))
        deltas, _ = await started(engine, job("aborted", max_tokens=200, stream=True))
        async with aclosing(deltas):
            await engine.abort("aborted")
            rest = [delta async for delta in deltas]
        assert rest[-1].finish_reason == "abort"
        assert len((await neighbour)[-1].token_ids) == 100
        await engine.abort("unknown")

    async def test_a_closed_iterator_frees_its_slot(self, engine: Engine) -> None:
        """A worker that lost the job stops listening; the engine must not go on for nobody."""
        deltas, _ = await started(engine, job("left", max_tokens=200, stream=True))
        await deltas.aclose()
        assert await run(engine, job("left"))  # the same id may come again at once
        assert engine.load().waiting == 0

    async def test_sixteen_jobs_share_the_engine(self, engine: Engine) -> None:
        """Of different lengths, lanes and settings: each gets what it asked for."""
        asked = [
            job(f"many {n}", PROMPT[: 10 + n], max_tokens=1 + n, temperature=0.1 * n, lane=list(Lane)[n % 3], top_k=40)
            for n in range(16)
        ]
        before = engine.load().steps
        answers = await asyncio.gather(*(run(engine, one) for one in asked))
        for one, deltas in zip(asked, answers, strict=True):
            assert len(ids_of(deltas)) == one.sampling.max_tokens or deltas[-1].finish_reason == "stop"
        assert engine.load().steps > before

    async def test_a_seed_repeats_itself_among_any_neighbours(self, engine: Engine) -> None:
        """What a seed promises."""
        seeded: dict[str, Any] = {"seed": 7, "temperature": 1.0, "top_p": 0.9}
        alone = await run(engine, job("seeded", **seeded))
        among, *_ = await asyncio.gather(
            run(engine, job("seeded again", **seeded)), *(run(engine, job(f"n{n}", temperature=1.0)) for n in range(5))
        )
        assert ids_of(among) == ids_of(alone)

    @pytest.mark.parametrize(
        "prompt,code",
        [("x = 1\n" * 200, "prompt_too_long"), ((5, 999_999), "invalid_prompt")],
        ids=["too long", "foreign token"],
    )
    async def test_what_can_never_run_is_rejected_alone(
        self, engine: Engine, prompt: str | tuple[int, ...], code: str
    ) -> None:
        """Retrying cannot help, and its neighbours must not notice."""
        neighbour = asyncio.create_task(run(engine, job("beside")))
        with pytest.raises(JobRejected) as caught:
            await run(engine, job("bad", prompt))
        assert caught.value.code == code
        assert len((await neighbour)[-1].token_ids) == 24

    async def test_the_answer_ends_with_the_context(self, engine: Engine) -> None:
        """More was asked for than the model has room for."""
        [delta] = await run(engine, job("long", max_tokens=10_000, temperature=1.0, seed=3, stop=()))
        assert delta.finish_reason in ("length", "stop")
        assert delta.prompt_tokens + len(delta.token_ids) <= engine.info.context_tokens


async def assert_close_ends_everything(engine: Engine, before: set[int], *, force: bool) -> None:
    """Close while a job runs: its iterator ends with EngineDead, no process is left, later jobs are refused."""
    deltas, _ = await started(engine, job("running", max_tokens=200, stream=True))
    async with asyncio.timeout(10):
        await engine.close(force=force)
    with pytest.raises(EngineDead):
        async with asyncio.timeout(10):
            _ = [delta async for delta in deltas]
    assert not left(before)
    with pytest.raises(EngineDead):
        await run(engine, job("late"))
    await engine.close(force=True)  # repeatable


async def assert_hang_is_closed_by_force(engine: Engine, pids: set[int], before: set[int]) -> None:
    """Every process of the engine stops: nothing moves, and force ends it all the same."""
    deltas, _ = await started(engine, job("hung", max_tokens=200, stream=True))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(10):
        await engine.close(force=True)
    with pytest.raises(EngineDead):
        async with asyncio.timeout(10):
            _ = [delta async for delta in deltas]
    assert not left(before)


async def assert_crash_is_engine_dead(engine: Engine, pids: set[int]) -> None:
    """kill -9 below the engine: the worker lives and is told."""
    deltas, _ = await started(engine, job("crashed", max_tokens=200, stream=True))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises((EngineDead, JobFailed)) as caught:
        async with asyncio.timeout(30):
            _ = [delta async for delta in deltas]
    assert isinstance(caught.value, EngineDead)


def left(before: set[int]) -> dict[int, str]:
    """Processes that came and did not go, with their command lines; Python's own tracker aside."""
    found = {}
    for pid in processes() - before:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if "resource_tracker" not in command:
            found[pid] = command
    return found


async def ended(handle: int) -> None:
    """Until the process of this pidfd has ended."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(handle, readable.set)
    async with asyncio.timeout(20):
        await readable.wait()
    loop.remove_reader(handle)

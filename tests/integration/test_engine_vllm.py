"""The vLLM engine on the starter model, on a CPU: the contract of engines, its processes, what is called of vLLM."""

import asyncio
import inspect
import os
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support import engines
from support.engines import EngineContract, job, run

from codeyard.shared.errors import EngineUnavailable
from codeyard.shared.job import Lane
from codeyard.worker.engines.models import ModelSource, parse_model
from codeyard.worker.engines.port import Engine
from codeyard.worker.engines.vllm_engine import VllmEngine

vllm = pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),  # a start takes 20 s on two idle cores
    pytest.mark.filterwarnings("default"),  # vLLM's and torch's own
]


@pytest.fixture(scope="module", autouse=True)
def _little_memory() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    loaded = await VllmEngine.start(parse_model("starter"), engines.SETTINGS)
    yield loaded
    await loaded.close()


class TestContract(EngineContract):
    """The one of all engines."""


async def test_an_urgent_job_overtakes_those_that_wait(engine: Engine) -> None:
    """Lanes mean nothing if vLLM's own queue is first come, first served."""
    slots = engine.info.max_running
    ended: list[str] = []

    async def note(name: str, lane: Lane) -> None:
        await run(engine, job(name, max_tokens=60, lane=lane, temperature=1.0))
        ended.append(name)

    async with asyncio.TaskGroup() as tasks:
        for n in range(3 * slots):
            tasks.create_task(note(f"bulk {n}", Lane.BULK))
        deltas, _ = await engines.started(engine, job("sign of life", stream=True, lane=Lane.INTERACTIVE))
        tasks.create_task(note("urgent", Lane.INTERACTIVE))
        await deltas.aclose()
    assert ended.index("urgent") < 2 * slots


async def test_the_load_tells_of_the_kv_cache(engine: Engine) -> None:
    """The policy stops admitting when it is nearly full."""
    deltas, _ = await engines.started(engine, job("cached", max_tokens=100, stream=True))
    await anext(deltas)
    load = engine.load()
    await deltas.aclose()
    assert load.running == 1
    assert load.kv_cache_used is not None
    assert 0 < load.kv_cache_used < 1


async def test_a_broken_model_says_what_is_wrong(tmp_path: object) -> None:
    """At start, in words for a person, and without a process left."""
    before = engines.processes()
    with pytest.raises(EngineUnavailable, match="vllm cannot load"):
        await VllmEngine.start(ModelSource("x", str(tmp_path), "x-1"), engines.SETTINGS)
    assert not engines.left(before)


@pytest.mark.long
@pytest.mark.parametrize("force", [False, True])
async def test_close_ends_what_runs_and_leaves_no_process(force: bool) -> None:
    """An engine that is closed is gone: memory, processes, waiting readers."""
    before = engines.processes()
    await engines.assert_close_ends_everything(await _start(), before, force=force)


async def test_a_hung_engine_core_is_closed_by_force() -> None:
    """It holds the GPU, and asking it to go is asking nobody."""
    before = engines.processes()
    loaded = await _start()
    await engines.assert_hang_is_closed_by_force(loaded, engines.processes() - before, before)


async def test_a_crash_of_the_engine_core_is_an_engine_death() -> None:
    """The worker starts another engine and offers every job again."""
    before = engines.processes()
    loaded = await _start()
    core = [pid for pid, command in engines.left(before).items() if "EngineCore" in command]
    await engines.assert_crash_is_engine_dead(loaded, set(core))
    await loaded.close(force=True)
    assert not engines.left(before)


async def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    """Ctrl-C while a model loads."""
    before = engines.processes()
    starting = asyncio.create_task(_start())
    while not any("spawn_main" in command for command in engines.left(before).values()):
        await asyncio.wait([starting], timeout=0.1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not engines.left(before)


PARENT = """
import asyncio, sys
sys.path[:0] = {path!r}
from support import engines
from codeyard.worker.engines.models import parse_model
from codeyard.worker.engines.vllm_engine import VllmEngine
async def main():
    engine = await VllmEngine.start(parse_model("starter"), engines.SETTINGS)
    await engines.started(engine, engines.job("forever", max_tokens=200, stream=True))
    print("running", *engines.left(set()), flush=True)
    await asyncio.Event().wait()
if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_the_engine_core_dies_with_a_worker_killed_by_kill_9(tmp_path: object) -> None:
    """vLLM does not see to it: it would hold the GPU until somebody notices."""
    script = os.path.join(str(tmp_path), "parent.py")
    with open(script, "w") as file:  # noqa: ASYNC230 - a few bytes
        file.write(PARENT.format(path=sys.path))
    parent = await asyncio.create_subprocess_exec(sys.executable, script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    words: list[bytes] = []
    while words[:1] != [b"running"]:  # vLLM may have something to say before
        line = await parent.stdout.readline()
        assert line, "the parent ended"
        words = line.split()
    handles = [os.pidfd_open(int(word)) for word in words[1:]]
    parent.kill()
    await parent.wait()
    assert len(handles) >= 2  # the EngineCore and what watches over it
    for handle in handles:
        await engines.ended(handle)
        os.close(handle)


def names_of(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]  # any callable of vLLM


async def test_what_is_called_of_vllm_is_there() -> None:
    """A new version that renames something must fail here, with its name, and not at three in the morning."""
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.loggers import StatLoggerBase
    from vllm.v1.metrics.stats import SchedulerStats

    assert {"prompt", "sampling_params", "request_id", "priority"} <= names_of(AsyncLLM.generate)
    assert {"engine_args", "stat_loggers"} <= names_of(AsyncLLM.from_engine_args)
    assert "request_id" in names_of(AsyncLLM.abort)
    assert "timeout" in names_of(AsyncLLM.shutdown)
    assert callable(AsyncLLM.get_tokenizer)
    assert isinstance(AsyncLLM.errored, property)
    assert "e" in names_of(OutputProcessor.propagate_error)
    assert callable(ModelConfig.get_vocab_size)
    assert callable(ModelConfig.try_get_generation_config)
    assert {
        *("model", "max_num_seqs", "scheduling_policy", "dtype", "max_model_len", "gpu_memory_utilization"),
        *("tensor_parallel_size", "quantization", "enforce_eager", "enable_prefix_caching", "use_tqdm_on_load"),
    } <= names_of(AsyncEngineArgs)
    assert {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("seed", "max_tokens", "detokenize", "output_kind"),
    } <= names_of(SamplingParams)
    assert RequestOutputKind.DELTA != RequestOutputKind.FINAL_ONLY
    assert {"scheduler_stats", "iteration_stats"} <= names_of(StatLoggerBase.record)
    assert {"num_waiting_reqs", "kv_cache_usage"} <= names_of(SchedulerStats)
    assert issubclass(EngineDeadError, Exception)
    assert issubclass(VLLMClientError, Exception)


async def _start() -> VllmEngine:
    return await VllmEngine.start(parse_model("starter"), engines.SETTINGS)

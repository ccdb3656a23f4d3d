"""The vLLM engine on the starter model, on a CPU: the contract of engines, its processes, what is called of vLLM."""

import asyncio
import inspect
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Any, get_args

import pytest
import pytest_asyncio
from support import engines
from support.engines import EngineContract, job, run

from codeyard.shared import engine_args
from codeyard.shared.errors import EngineUnavailable, JobFailed
from codeyard.shared.job import Lane
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource, parse_model
from codeyard.worker.engines.port import Adapter, Engine
from codeyard.worker.engines.vllm_engine import VllmEngine
from codeyard.worker.engines.vllm_load import arguments_of

vllm = pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),  # a start takes 20 s on two idle cores
    pytest.mark.filterwarnings("default"),  # vLLM's and torch's own
    pytest.mark.filterwarnings("ignore:Unclosed context <zmq:ResourceWarning"),  # vLLM's, of a start that failed
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


async def test_what_it_holds_is_measured_in_its_processes(engine: Engine) -> None:
    """On a CPU its device is the host: weights and KV cache, 1 GiB unless told otherwise."""
    memory = await engine.memory()
    assert set(engine.pids()) <= engines.processes()
    assert len(engine.pids()) >= 2  # the EngineCore and its worker
    assert 2**30 < memory.host_bytes == memory.device_bytes < 8 * 2**30


async def test_on_a_cpu_it_does_not_sleep_and_says_so(engine: Engine) -> None:
    """vLLM's CPU worker only writes a warning, and keeps its memory."""
    assert not engine.info.can_sleep
    with pytest.raises(EngineUnavailable, match="vllm cannot sleep on cpu"):
        await engine.sleep()
    await engine.wake()
    assert await run(engine, job("awake"))


async def test_without_adapters_it_refuses_the_job_and_says_how(engine: Engine) -> None:
    """It must not answer with the model alone."""
    with pytest.raises(JobFailed, match="CODEYARD_ENGINE_ENABLE_LORA"):
        await run(engine, job("adapted", adapter=Adapter("sql", "/adapters/sql")))


async def test_a_broken_model_says_what_is_wrong(tmp_path: object) -> None:
    """At start, in words for a person, and without a process left."""
    before = engines.processes()
    with pytest.raises(EngineUnavailable, match="vllm cannot load"):
        await VllmEngine.start(ModelSource("x", str(tmp_path), "x-1"), engines.SETTINGS)
    assert not engines.left(before)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"engine_args": {"block_size": "wide"}}, "block_size"),
        ({"quantization": "3bit"}, "3bit"),
        ({"load_format": "telepathy"}, "telepathy"),
        ({"load_format": "tensorizer"}, "needs tensorizer"),
    ],
)
async def test_a_value_that_vllm_refuses_is_named(changes: dict[str, Any], said: str) -> None:
    """Names are checked when the settings are read, values only by vLLM."""
    before = engines.processes()
    with pytest.raises(EngineUnavailable, match=said):
        await VllmEngine.start(parse_model("starter"), engines.SETTINGS.model_copy(update=changes))
    assert not engines.left(before)


async def test_an_engine_is_started_as_the_settings_say(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them vLLM's own words, and a model's KV cache, which the environment of all models must not undo."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    caplog.set_level("INFO")
    own = {"kv_cache_memory_bytes": 2**28, "load_format": "dummy"}
    vllms = {"enable_chunked_prefill": True, "max_num_batched_tokens": 96, "seed": 5}
    loaded = await VllmEngine.start(
        parse_model("starter"), engines.SETTINGS.model_copy(update={**own, "engine_args": vllms})
    )
    config = loaded._llm.vllm_config
    assert config.cache_config.kv_cache_memory_bytes == 2**28
    assert config.load_config.load_format == "dummy"
    assert (config.scheduler_config.max_num_batched_tokens, config.model_config.seed) == (96, 5)
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7"
    [told] = [record for record in caplog.records if record.message == "engine_cannot_sleep"]
    assert "no sleep mode on cpu" in vars(told)["reason"]

    long = await run(loaded, job("long prompt", tuple(range(5, 205)), max_tokens=4))  # more than a step's tokens

    assert long[-1].prompt_tokens == 200
    await loaded.close()


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
    return set(names_of_in_order(function))


def names_of_in_order(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]  # any callable of vLLM


async def test_what_is_called_of_vllm_is_there() -> None:
    """A new version that renames something must fail here, with its name, and not at three in the morning."""
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.envs import environment_variables
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.model_loader import LoadFormats
    from vllm.outputs import CompletionOutput
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
    from vllm.tool_parsers import ToolParser, ToolParserManager
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import BackgroundResources
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.loggers import StatLoggerBase
    from vllm.v1.metrics.stats import SchedulerStats

    assert {"prompt", "sampling_params", "request_id", "lora_request", "priority"} <= names_of(AsyncLLM.generate)
    assert {"level", "mode"} <= names_of(AsyncLLM.sleep)
    assert callable(AsyncLLM.wake_up)
    assert "lora_request" in names_of(AsyncLLM.add_lora)
    assert "lora_id" in names_of(AsyncLLM.remove_lora)
    assert {"lora_name", "lora_int_id", "lora_path"} <= set(LoRARequest.__struct_fields__)
    assert "ctx" in names_of(BackgroundResources)
    assert {"VLLM_RPC_BASE_PATH", "VLLM_CPU_KVCACHE_SPACE"} <= set(environment_variables)
    assert {"auto", "dummy", "safetensors", "runai_streamer"} <= set(get_args(LoadFormats))
    assert callable(current_platform.is_sleep_mode_available)
    assert {"engine_args", "stat_loggers"} <= names_of(AsyncLLM.from_engine_args)
    assert "request_id" in names_of(AsyncLLM.abort)
    assert "timeout" in names_of(AsyncLLM.shutdown)
    assert callable(AsyncLLM.get_tokenizer)
    assert isinstance(AsyncLLM.errored, property)
    assert "e" in names_of(OutputProcessor.propagate_error)
    assert callable(ModelConfig.get_vocab_size)
    assert callable(ModelConfig.try_get_generation_config)
    every = EngineSettings(enable_lora=True)
    ours = arguments_of(parse_model("starter"), every, cpu=True, sleeps=False)
    assert set(ours) <= names_of(AsyncEngineArgs)
    assert {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("seed", "max_tokens", "detokenize", "output_kind", "logprobs", "structured_outputs"),
    } <= names_of(SamplingParams)
    assert {"json", "json_object", "regex", "choice"} <= names_of(StructuredOutputsParams)
    assert {"token_ids", "logprobs", "finish_reason"} <= names_of(CompletionOutput)
    assert {"name"} <= names_of(ToolParserManager.get_tool_parser)
    assert {"hermes", "llama3_json", "mistral"} <= set(ToolParserManager.list_registered())
    assert {"tokenizer", "tools"} <= names_of(ToolParser)
    assert {"model_output", "request"} <= names_of(ToolParser.extract_tool_calls)
    assert names_of_in_order(ToolParser.extract_tool_calls_streaming) == [
        *("self", "previous_text", "current_text", "delta_text"),
        *("previous_token_ids", "current_token_ids", "delta_token_ids", "request"),
    ]
    assert callable(ToolParser.adjust_request)
    assert callable(ToolParser.get_remaining_unstreamed_args)
    assert {"messages", "tools", "tool_choice", "skip_special_tokens"} <= set(ChatCompletionRequest.model_fields)
    assert RequestOutputKind.DELTA != RequestOutputKind.FINAL_ONLY
    assert {"scheduler_stats", "iteration_stats"} <= names_of(StatLoggerBase.record)
    assert {"num_waiting_reqs", "kv_cache_usage"} <= names_of(SchedulerStats)
    assert issubclass(EngineDeadError, Exception)
    client_error = getattr(vllm.exceptions, "VLLMClientError", ValueError)  # 0.25.1 has no such class
    assert issubclass(VLLMValidationError, client_error)


async def test_the_names_of_engine_arguments_are_those_of_this_vllm() -> None:
    """Read without importing it; and the list for machines without vLLM is not older than the tests."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = {field.name for field in fields(AsyncEngineArgs) if not field.name.startswith("_")}
    assert engine_args.installed() == names
    assert names == engine_args.PINNED or vllm.__version__ != "0.32.0"
    assert set(engine_args.ELSEWHERE) <= names


async def test_its_processes_wait_for_each_other_by_the_function_that_is_replaced() -> None:
    """A vLLM that waits in another way would spin again, and nothing else would show it."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    assert "sched_yield" in SpinCondition.wait.__code__.co_names


async def _start() -> VllmEngine:
    return await VllmEngine.start(parse_model("starter"), engines.SETTINGS)

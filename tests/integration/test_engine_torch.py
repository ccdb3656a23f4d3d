"""The torch engine on the starter model: the contract of engines, and what its child process may suffer."""

import asyncio
import gc
import importlib.util
import os
import queue
import signal
import sys
import weakref
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from support import engines
from support.engines import EngineContract, ids_of, job, run, text_of

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed
from codeyard.worker.engines.models import ModelSource, parse_model
from codeyard.worker.engines.port import Adapter, Engine
from codeyard.worker.engines.torch_engine import TorchEngine

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    loaded = await TorchEngine.start(parse_model("starter"), engines.SETTINGS)
    yield loaded
    await loaded.close()


class TestContract(EngineContract):
    """The one of all engines."""


async def test_a_batch_says_what_each_job_says_alone(engine: Engine) -> None:
    """Left padding must not reach the answer: in float32, greedy, the same tokens."""
    prompts = ["x", engines.PROMPT, "import os\n\n\ndef walk(path):", "class A:\n    def __init__(self" * 4]
    alone = [ids_of(await run(engine, job("alone", prompt))) for prompt in prompts]
    together = await asyncio.gather(*(run(engine, job(f"t{n}", prompt)) for n, prompt in enumerate(prompts)))
    assert [ids_of(deltas) for deltas in together] == alone


async def test_jobs_submitted_together_run_in_one_batch(engine: Engine) -> None:
    """A closed batch of one would make fifteen others wait for its slowest member."""
    before = engine.load().steps
    await asyncio.gather(*(run(engine, job(f"b{n}", max_tokens=10)) for n in range(16)))
    assert engine.load().steps - before <= 12  # ten steps, and one report before the first


async def test_a_job_aborted_in_the_queue_never_runs(engine: Engine) -> None:
    """It waits behind a closed batch; cancelling it must not take that long to mean anything."""
    deltas, _ = await engines.started(engine, job("first", max_tokens=100, stream=True))
    waiting = asyncio.create_task(run(engine, job("second")))
    while not engine.load().waiting:
        await anext(deltas)
    await engine.abort("second")
    [delta] = await waiting
    await deltas.aclose()
    assert (delta.token_ids, delta.finish_reason) == ((), "abort")


async def test_what_it_holds_is_measured_in_its_child(engine: Engine) -> None:
    """Beside the 13 MB of weights, all of torch."""
    memory = await engine.memory()
    assert set(engine.pids()) <= engines.processes()
    assert 10**8 < memory.host_bytes == memory.device_bytes < 2 * 10**9


async def test_it_neither_sleeps_nor_takes_adapters_and_says_so(engine: Engine) -> None:
    """An answer of the model alone would pass for the adapter's."""
    assert not engine.info.can_sleep
    with pytest.raises(EngineUnavailable, match="no sleep mode"):
        await engine.sleep()
    with pytest.raises(JobFailed, match="no LoRA adapters, such as sql"):
        await run(engine, job("adapted", adapter=Adapter("sql", "/adapters/sql")))
    with pytest.raises(EngineUnavailable, match="vllm does"):
        await TorchEngine.start(parse_model("starter"), engines.SETTINGS.model_copy(update={"enable_lora": True}))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
async def test_a_quantised_model_writes_code_too(engine: Engine, quantization: str) -> None:
    """Through bitsandbytes, which has kernels for CPUs: nearly what the whole weights say, in half the memory."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    settings = engines.SETTINGS.model_copy(update={"quantization": quantization})
    quantised = await TorchEngine.start(parse_model("starter"), settings)
    assert quantization in quantised.info.version

    whole = text_of(await run(engine, job("whole")))
    answers = await asyncio.gather(*(run(quantised, job(f"q{n}")) for n in range(4)))

    [said] = {text_of(deltas) for deltas in answers}
    assert whole.startswith(", name: str")
    assert said.startswith(", name: str")
    await quantised.close()


async def test_dummy_weights_have_the_shape_and_nothing_else(engine: Engine) -> None:
    """To try a large architecture's memory and speed without its weights."""
    settings = engines.SETTINGS.model_copy(update={"load_format": "dummy"})
    dummy = await TorchEngine.start(parse_model("starter"), settings)
    assert dummy.info.context_tokens == engine.info.context_tokens
    assert text_of(await run(dummy, job("dummy"))) != text_of(await run(engine, job("real")))
    await dummy.close()


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"quantization": "3bit"}, "the torch engine takes 8bit, 4bit, bitsandbytes"),
        ({"load_format": "tensorizer"}, "the torch engine reads auto, safetensors, dummy"),
        ({"load_format": "dummy", "quantization": "4bit"}, "dummy weights cannot be quantised"),
    ],
)
async def test_what_it_cannot_load_says_what_it_can(changes: dict[str, str], said: str) -> None:
    """The same settings may be meant for vLLM."""
    with pytest.raises(EngineUnavailable, match=said):
        await TorchEngine.start(parse_model("starter"), engines.SETTINGS.model_copy(update=changes))


async def test_quantisation_without_its_library_or_device_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few install it before they need it; and it has nothing for some accelerators."""
    from codeyard.worker.engines import torch_load

    def load(device: str) -> None:
        location = parse_model("starter").location
        torch_load.load_model(
            location, device=torch.device(device), dtype="auto", load_format="auto", quantization="4bit"
        )

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(supported_torch_devices={"cpu", "cuda"}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="bitsandbytes has nothing for mps, only for cpu, cuda"):
        load("mps")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes and accelerate: pip install 'codeyard\[quantization\]'"):
        load("cpu")


async def test_a_closed_engine_is_let_go_without_the_garbage_collector() -> None:
    """A task, a queue or an error that held it would hold its pipes and answers."""
    gc.disable()
    try:
        loaded = await _start()
        running = asyncio.create_task(run(loaded, job("running", max_tokens=200, stream=True)))
        await run(loaded, job("done"))
        watched = weakref.ref(loaded)
        await loaded.close()
        with pytest.raises(EngineDead):
            await running
        with pytest.raises(EngineDead):
            await run(loaded, job("late"))
        del loaded, running
        await asyncio.sleep(0)
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("force", [False, True])
async def test_close_ends_what_runs_and_leaves_no_process(force: bool) -> None:
    """An engine that is closed is gone: memory, processes, waiting readers."""
    before = engines.processes()
    await engines.assert_close_ends_everything(await _start(), before, force=force)


async def test_a_hung_child_is_closed_by_force() -> None:
    """A batch that never ends must not end the worker."""
    before = engines.processes()
    loaded = await _start()
    await engines.assert_hang_is_closed_by_force(loaded, engines.processes() - before, before)


async def test_a_crash_of_the_child_is_an_engine_death() -> None:
    """Out of memory, a bad driver: the worker starts another engine."""
    before = engines.processes()
    loaded = await _start()
    await engines.assert_crash_is_engine_dead(loaded, engines.processes() - before)
    await loaded.close(force=True)


async def test_a_broken_model_says_what_is_wrong(tmp_path: Any) -> None:
    """At start, in words for a person, and without a process left."""
    before = engines.processes()
    (tmp_path / "config.json").write_text('{"model_type": "no such architecture"}')
    with pytest.raises(EngineUnavailable, match="no such architecture"):
        await TorchEngine.start(ModelSource("x", str(tmp_path), "x-1"), engines.SETTINGS)
    assert not engines.left(before)


PARENT = """
import asyncio, sys
sys.path[:0] = {path!r}
from support import engines
from codeyard.worker.engines.models import parse_model
from codeyard.worker.engines.torch_engine import TorchEngine
async def main():
    engine = await TorchEngine.start(parse_model("starter"), engines.SETTINGS)
    await engines.started(engine, engines.job("forever", max_tokens=200, stream=True))
    print("running", *engines.processes(), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_the_child_dies_with_a_worker_killed_by_kill_9() -> None:
    """Nobody would ever find it again, and it holds the GPU."""
    command = [sys.executable, "-c", PARENT.format(path=sys.path)]
    parent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(word) for word in (await parent.stdout.readline()).split()[1:]]
    handles = [os.pidfd_open(pid) for pid in pids]
    os.kill(pids[0], signal.SIGSTOP)  # it could not even read that its stdin has ended
    parent.kill()
    await parent.wait()
    assert handles
    for handle in handles:
        await engines.ended(handle)
        os.close(handle)


async def test_one_job_that_breaks_the_batch_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours' tokens were made in the same pass; they get their whole answers."""
    from codeyard.worker.engines.torch_batch import Row, TorchModel
    from codeyard.worker.engines.torch_host import Host

    source = parse_model("starter")
    model = TorchModel(source.location, device="cpu", dtype="float32", max_model_len=None)
    healthy = model.run

    def breaks_at_seven(rows: Sequence[Row], on_step: Any) -> None:
        if any(row.prompt_ids == [7] for row in rows):
            raise RuntimeError("shapes do not match")
        healthy(rows, on_step)

    monkeypatch.setattr(model, "run", breaks_at_seven)  # stands for a kernel that cannot take it
    sent: list[dict[str, Any]] = []
    host = Host(model, sent.append, max_running=8)
    frames = [
        {"serial": n, "prompt": [n], "sampling": {"max_tokens": 3}, "stream": False, "prefix": []} for n in (5, 7, 9)
    ]
    host.inbox.put({"op": "generate", "jobs": frames})
    host.serve_batch()

    ended = {delta["serial"]: delta["finish_reason"] for frame in sent for delta in frame.get("deltas", [])}
    assert ended == {5: "length", 9: "length"}
    [refused] = [frame for frame in sent if frame["op"] == "refused"]
    assert (refused["serial"], refused["error"]) == (7, "failed")
    assert "shapes do not match" in refused["message"]
    with pytest.raises(queue.Empty):
        host.inbox.get_nowait()


async def _start() -> TorchEngine:
    return await TorchEngine.start(parse_model("starter"), engines.SETTINGS)

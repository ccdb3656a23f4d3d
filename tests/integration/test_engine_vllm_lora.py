"""LoRA adapters on real vLLM, on a CPU: many on one engine, none of them mixed up, one bad one harms nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
from support import engines
from support.engines import ids_of, job, run, text_of, write_adapter

from codeyard.shared.errors import EngineDead, JobFailed
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import parse_model
from codeyard.worker.engines.port import Adapter
from codeyard.worker.engines.vllm_engine import VllmEngine

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),  # a start takes 20 s on two idle cores
    pytest.mark.filterwarnings("default"),  # vLLM's and torch's own
]

NUM_ADAPTERS = 20
KEPT = 6  # loaded at a time
SETTINGS = EngineSettings(
    max_running=16, dtype="float32", enable_lora=True, max_loras=2, max_cpu_loras=KEPT, max_lora_rank=8
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder, f"adapter-{n}", seed=n) for n in range(NUM_ADAPTERS)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    loaded = await VllmEngine.start(parse_model("starter"), SETTINGS)
    yield loaded
    await loaded.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def base(engine: VllmEngine) -> str:
    """What the model says by itself, before any adapter was loaded."""
    assert not engine.adapters
    return text_of(await run(engine, job("base")))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(engine: VllmEngine, base: str, adapters: list[Adapter]) -> list[str]:
    """What each adapter says with the engine to itself."""
    return [text_of(await run(engine, job(f"alone {one.name}", adapter=one))) for one in adapters]


async def test_each_of_twenty_adapters_changes_the_answer(engine: VllmEngine, base: str, alone: list[str]) -> None:
    """One that does not is not applied. They come and go: fewer are kept loaded."""
    assert len({base, *alone}) == NUM_ADAPTERS + 1
    assert len(engine.adapters) == KEPT


async def test_jobs_of_many_adapters_at_once_are_not_mixed(
    engine: VllmEngine, base: str, alone: list[str], adapters: list[Adapter]
) -> None:
    """Customers' adapters share steps of one engine, with jobs of the model itself between them, which vLLM on a
    CPU would run with whatever lies in its last slot."""
    asked = [(n, stream) for n in range(-1, NUM_ADAPTERS) for stream in (False, True)] + [(-1, False)] * 8
    answers = await asyncio.gather(
        *(
            run(engine, job(f"{n} {index}", stream=stream, adapter=adapters[n] if n >= 0 else None))
            for index, (n, stream) in enumerate(asked)
        )
    )
    said = [text_of(deltas) for deltas in answers]
    assert said == [alone[n] if n >= 0 else base for n, _ in asked]
    assert len(engine.adapters) <= KEPT


async def test_a_job_taken_over_goes_on_with_its_adapter(
    engine: VllmEngine, alone: list[str], adapters: list[Adapter]
) -> None:
    """The rest of its answer must be its own adapter's too."""
    whole = await run(engine, job("undisturbed", adapter=adapters[3]))
    prefix = ids_of(whole)[:9]
    rest = await run(engine, job("continued", prefix=prefix, adapter=adapters[3]))
    assert prefix + ids_of(rest) == ids_of(whole)


async def test_a_bad_adapter_fails_its_own_jobs_alone(
    engine: VllmEngine, base: str, alone: list[str], adapters: list[Adapter], tmp_path: Path
) -> None:
    """Found by a step of the engine it would be the engine's end, and of every job in it."""
    large = write_adapter(tmp_path, "large", seed=1, rank=16)
    garbled = write_adapter(tmp_path, "garbled", seed=1)
    (Path(garbled.path) / "adapter_model.safetensors").write_bytes(b"not weights at all")
    missing = Adapter("missing", str(tmp_path / "nowhere"))
    bad = [run(engine, job(f"bad {one.name}", adapter=one)) for one in (large, garbled, missing)]
    good = [run(engine, job("good 4", adapter=adapters[4])), run(engine, job("good base"))]

    refused = await asyncio.gather(*bad, return_exceptions=True)
    answers = await asyncio.gather(*good)

    assert [type(error) for error in refused] == [JobFailed] * 3
    assert "CODEYARD_ENGINE_MAX_LORA_RANK" in str(refused[0])
    assert "garbled" in str(refused[1])
    assert [text_of(deltas) for deltas in answers] == [alone[4], base]


async def test_a_job_that_waits_for_a_place_can_be_aborted(engine: VllmEngine, adapters: list[Adapter]) -> None:
    """Nobody wants it any more when its turn comes."""
    running = [
        engines.deltas_of(engine, job(f"r{n}", max_tokens=200, stream=True, adapter=adapters[n])) for n in range(KEPT)
    ]
    for deltas in running:
        await anext(deltas)
    waiting = asyncio.create_task(run(engine, job("waits", adapter=adapters[KEPT])))
    while not engine.load().waiting:
        await anext(running[0])
    await engine.abort("waits")
    for deltas in running:
        await deltas.aclose()
    [delta] = await waiting
    assert (delta.token_ids, delta.finish_reason) == ((), "abort")


async def test_closing_ends_jobs_that_wait_for_a_place(adapters: list[Adapter]) -> None:
    """They are offered to another engine like those that run."""
    one_place = SETTINGS.model_copy(update={"max_loras": 1, "max_cpu_loras": 1, "enforce_eager": True})
    engine = await VllmEngine.start(parse_model("starter"), one_place)
    deltas, _ = await engines.started(engine, job("holds", max_tokens=200, stream=True, adapter=adapters[0]))
    waiting = asyncio.create_task(run(engine, job("waits", adapter=adapters[1])))
    async with aclosing(deltas):
        while not engine.load().waiting:
            await anext(deltas)
        await engine.close()
        with pytest.raises(EngineDead):
            await waiting

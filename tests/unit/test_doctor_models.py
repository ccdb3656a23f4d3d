"""Model directories in every state a download, a copy or a typing error leaves them in; and host memory for them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.doctor import healthy, model, only, place, worst

from codeyard.cli.checks.check import Finding, Status
from codeyard.cli.checks.memory import cache_bytes, check_memory, memory_findings, needed_bytes, shared_findings
from codeyard.cli.checks.models import Weights, check_models
from codeyard.shared.settings import Settings
from codeyard.worker.engines.models import starter_directory
from codeyard.worker.machine_memory import HostMemory

GIB = 2**30


def safetensors(num_bytes: int, *, cut: int = 0) -> bytes:
    """A file with one tensor of that size, less `cut` bytes at its end."""
    entry = {"t": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}, "__metadata__": {}}
    header = json.dumps(entry).encode()
    return (struct.pack("<Q", len(header)) + header + bytes(num_bytes))[: -cut or None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole small model."""
    made = model(tmp_path / "coder")
    (made / "model.safetensors").write_bytes(safetensors(1_000))
    return made


async def models(argument: object, **groups: Any) -> list[Finding]:
    return await check_models(place(worker={"engine": "vllm", "model": str(argument)}, **groups))


async def test_the_packaged_model_and_a_whole_one_are_healthy(folder: Path) -> None:
    """With size, place and revision: what one asks for when answers look wrong."""
    assert healthy(await models("starter"))
    [finding] = await models(f"coder={folder}")
    assert finding.status is Status.OK
    assert str(folder) in finding.text
    assert "revision coder-" in finding.text


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _with(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}})
BROKEN = {
    "no config": (_without("config.json"), "no config.json", "as `hf download` makes it"),
    "no weights": (_without("model.safetensors"), "no weights", "as `hf download` makes it"),
    "no tokenizer": (_without("tokenizer.json"), "no tokenizer", "download the whole model"),
    "bad config": (_with("config.json", b"{..."), "config.json cannot be read", "download the model again"),
    "pointer": (
        _with("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14\n"),
        "only a pointer of git-lfs",
        "lfs pull",
    ),
    "cut": (_with("model.safetensors", safetensors(1_000, cut=400)), "the download broke off", "download it again"),
    "beginning": (_with("model.safetensors", safetensors(1_000)[:5]), "the beginning of one", "download it again"),
    "garbage": (_with("model.safetensors", bytes(5_000)), "no safetensors file", "download it again"),
    "parts": (_with("model.safetensors.index.json", INDEX.encode()), "2 of 3 weight files are missing", "download"),
}


@pytest.mark.parametrize("spoil,said,way_out", BROKEN.values(), ids=BROKEN.keys())
async def test_each_way_a_model_can_be_broken_is_told(
    folder: Path, spoil: Callable[[Path], object], said: str, way_out: str
) -> None:
    """An engine finds it after minutes, in a traceback of its own."""
    spoil(folder)
    finding = worst(await models(f"coder={folder}"))
    assert finding.status is Status.FAIL
    assert said in finding.text
    assert way_out in finding.way_out


async def test_a_wrong_path_gets_the_right_one(folder: Path) -> None:
    """Beside it, in it, or the file instead of its folder."""
    assert f"did you mean {folder}?" in worst(await models(f"coder={folder.parent}/codr")).way_out
    assert "holds coder" in worst(await models(f"coder={folder.parent}/elsewhere-entirely")).way_out
    assert str(folder) in worst(await models(f"coder={folder.parent}")).way_out
    assert str(folder) in worst(await models(f"coder={folder / 'model.safetensors'}")).way_out


async def test_an_id_that_was_not_fetched_says_how_to_fetch_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And that a directory would be written otherwise."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    finding = worst(await models("coder=org/coder-7b"))
    assert "hf download org/coder-7b" in finding.way_out
    assert "./org/coder-7b" in finding.way_out


async def test_weights_that_cannot_be_read_are_told(folder: Path) -> None:
    """Another user's, or, which holds for root as well, a link that leads nowhere."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    finding = worst(await models(f"coder={folder}"))
    assert "cannot read the model" in finding.text


async def test_one_bad_model_does_not_hide_the_others(folder: Path) -> None:
    """A worker serves several."""
    findings = await models(f"starter, coder={folder}, lost=/nowhere")
    assert len(only(findings, Status.OK)) == 2
    assert len(only(findings, Status.FAIL)) == 1


async def test_adapters_and_context_are_looked_at_too(folder: Path) -> None:
    """What `models` in the settings file says, and what the model was made for."""
    missing = worst(await models(f"coder={folder}", models={"coder": {"adapters": {"sql": "/nowhere"}}}))
    assert "adapter coder@sql" in missing.text
    too_long = worst(await models(f"coder={folder}", engine={"max_model_len": 100_000}))
    assert too_long.status is Status.WARN
    assert "at most 2048" in too_long.way_out


async def test_a_malformed_model_argument_says_what_was_expected() -> None:
    """It is typed by hand."""
    assert "ALIAS=DIRECTORY_OR_ID" in worst(await models("a b=/x")).text


async def test_the_simulated_engine_needs_no_models() -> None:
    """Whatever name it is given."""
    there = place(worker={"engine": "simulated", "model": "big=/nowhere"})
    assert healthy([*await check_models(there), *await check_memory(there)])


# Memory --------------------------------------------------------------------------------------------

CODER = [Weights("coder", 10 * GIB)]
TWO = [*CODER, Weights("small", 2 * GIB)]


def settings(**worker: object) -> Settings:
    return Settings(worker={"engine": "vllm", **worker})


def test_on_a_cpu_weights_cache_and_process_lie_in_host_memory() -> None:
    """12 GiB of weights with their overhead, 4 of cache, 1 of libraries."""
    assert needed_bytes(CODER, settings(), on_gpu=False, kv_bytes=4 * GIB) == 17 * GIB
    assert needed_bytes(CODER, settings(), on_gpu=False, kv_bytes=0) == 13 * GIB


@pytest.mark.parametrize(
    "engine,vllm_here,environment,own,expected",
    [
        ("vllm", True, {}, None, 4 * GIB),
        ("auto", True, {"VLLM_CPU_KVCACHE_SPACE": "7"}, None, 7 * GIB),
        ("auto", True, {}, 2 * GIB, 2 * GIB),
        ("auto", False, {}, None, 0),
        ("torch", True, {}, None, 0),
    ],
)
def test_only_vllm_takes_its_cache_at_start(
    engine: str, vllm_here: bool, environment: dict[str, str], own: int | None, expected: int
) -> None:
    """By its own variable, or by ours."""
    there = place(environment, worker={"engine": engine}, engine={"kv_cache_memory_bytes": own})
    assert cache_bytes(there, vllm_here=vllm_here) == expected


def test_on_a_gpu_only_the_processes_and_the_sleepers_do() -> None:
    """Models asleep wait in host memory."""
    asleep = settings(host_budget_bytes=30 * GIB)
    assert needed_bytes(TWO, asleep, on_gpu=True, kv_bytes=4 * GIB) == 32 * GIB


def test_with_a_budget_not_all_models_are_held_but_the_largest_must_fit() -> None:
    """The cache puts one away for the other."""
    every = needed_bytes(TWO, settings(), on_gpu=False, kv_bytes=0)
    assert every == int(14.4 * GIB) + 2 * GIB
    budget = settings(device_budget_bytes=1 * GIB)
    assert needed_bytes(TWO, budget, on_gpu=False, kv_bytes=0) == 13 * GIB


@pytest.mark.parametrize(
    "host,worker,status,said",
    [
        (HostMemory(64 * GIB, 60 * GIB), {}, Status.OK, "coder needs about 17.0 GiB"),
        (HostMemory(64 * GIB, 5 * GIB), {}, Status.WARN, "5.0 GiB are free now"),
        (HostMemory(20 * GIB, 20 * GIB), {}, Status.WARN, "makes room at 90% of its limit of 18.0 GiB"),
        (HostMemory(64 * GIB, 60 * GIB), {"memory_limit": "18GiB"}, Status.WARN, "its window stays narrow"),
        (HostMemory(16 * GIB, 16 * GIB), {}, Status.FAIL, "of this machine"),
        (HostMemory(16 * GIB, 16 * GIB, "/sys/fs/cgroup"), {}, Status.FAIL, "of /sys/fs/cgroup"),
    ],
)
def test_memory_is_enough_tight_or_too_little(
    host: HostMemory, worker: dict[str, object], status: Status, said: str
) -> None:
    """Before the load, not by the kernel in the middle of it."""
    [finding] = memory_findings(host, CODER, settings(**worker), on_gpu=False, kv_bytes=4 * GIB)
    assert finding.status is status
    assert said in finding.text


def test_little_shared_memory_is_told_for_several_gpus() -> None:
    """Docker's 64 MiB end an engine over several GPUs with a bus error."""
    several = Settings(engine={"tensor_parallel_size": 2})
    assert "--shm-size" in worst(list(shared_findings(64 * 2**20, several))).way_out
    assert not list(shared_findings(8 * GIB, several))
    assert not list(shared_findings(64 * 2**20, Settings()))


async def test_this_machine_can_hold_the_packaged_model() -> None:
    """The tests run it."""
    assert starter_directory().is_dir()
    assert not only(await check_memory(place()), Status.FAIL)

"""Engine arguments named as vLLM names them: what is unknown, or said elsewhere, is refused at start."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codeyard.shared import engine_args
from codeyard.shared.errors import SettingsError
from codeyard.shared.settings import EngineSettings, load


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """What is installed is read once for the life of a process."""
    engine_args.installed.cache_clear()
    yield
    engine_args.installed.cache_clear()


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def another_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows two arguments."""
    (tmp_path / "engine").mkdir()
    source = (
        "class EngineArgs:\n    model: str\n    brand_new: int = 1\n    _private: int = 0\nclass Other:\n    x: int\n"
    )
    (tmp_path / "engine" / "arg_utils.py").write_text(source)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)


def message(given: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        load(overrides={"engine": {"engine_args": given}})
    return str(caught.value)


@pytest.mark.usefixtures("without_vllm")
def test_what_vllm_takes_is_passed_on_as_it_is() -> None:
    """Parallelism, offloading, prefill: in vLLM's own words, without a second vocabulary to learn."""
    given = {"cpu_offload_gb": 2, "enable_chunked_prefill": True, "speculative_config": {"method": "ngram"}}
    assert load(overrides={"engine": {"engine_args": given}}).engine.engine_args == given


def test_they_can_be_set_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have nothing else."""
    monkeypatch.setenv("CODEYARD_ENGINE_ENGINE_ARGS", json.dumps({"pipeline_parallel_size": 2}))
    assert load().engine.engine_args == {"pipeline_parallel_size": 2}


@pytest.mark.usefixtures("without_vllm")
@pytest.mark.parametrize(
    "given,said",
    [
        ("cpu_offlod_gb", "did you mean cpu_offload_gb"),
        ("quantisation", "did you mean quantization"),
        ("nothing_like_it", "https://docs.vllm.ai"),
        ("dtype", "use CODEYARD_ENGINE_DTYPE"),
        ("quantization", "use CODEYARD_ENGINE_QUANTIZATION"),
        ("max_num_seqs", "use CODEYARD_ENGINE_MAX_RUNNING"),
        ("model", "CODEYARD_WORKER_MODEL"),
        ("disable_log_stats", "window"),
    ],
)
def test_a_name_that_cannot_be_used_says_what_to_write_instead(given: str, said: str) -> None:
    """A typo that is passed over would show as a model out of memory, hours later."""
    text = message({given: 1})
    assert text.startswith("CODEYARD_ENGINE_ENGINE_ARGS")
    assert said in text


def test_one_models_arguments_are_checked_too() -> None:
    """They are read when that model loads, which may be long after the start."""
    with pytest.raises(SettingsError, match=r"CODEYARD_MODELS: coder\.engine.*did you mean block_size"):
        load(overrides={"models": {"coder": {"engine": {"engine_args": {"blok_size": 1}}}}})


@pytest.mark.usefixtures("another_vllm")
def test_the_installed_vllm_decides_before_the_pinned_list() -> None:
    """A newer one has names that this project has not heard of, and may have dropped others."""
    assert EngineSettings(engine_args={"brand_new": 2}).engine_args == {"brand_new": 2}
    for name in ("cpu_offload_gb", "_private", "x"):
        with pytest.raises(ValueError, match="vLLM has no such engine argument"):
            EngineSettings(engine_args={name: 2})


def test_a_model_with_adapters_loads_them_without_another_word() -> None:
    """Nobody who lists adapters means to have them refused."""
    settings = load(overrides={"models": {"coder": {"adapters": {"sql": "/adapters/sql"}}, "plain": {}}})
    assert settings.engine_of("coder").enable_lora
    assert not settings.engine_of("plain").enable_lora


def test_more_adapters_in_a_step_than_are_kept_loaded_make_no_sense() -> None:
    """vLLM says so too, but only after the model has loaded."""
    with pytest.raises(ValueError, match=r"max_cpu_loras \(2\) is less than max_loras \(4\)"):
        EngineSettings(max_cpu_loras=2)

"""Which engine is taken, and what a person is told when none can be."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from codeyard.shared.errors import EngineUnavailable
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines import select
from codeyard.worker.engines.models import ModelSource, parse_model
from codeyard.worker.engines.port import Engine

SETTINGS = EngineSettings()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Change it to say which engine libraries there are."""
    names: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
    return names


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engines that were tried; each refuses."""
    tried: list[str] = []

    async def refuse(name: str, source: ModelSource, settings: EngineSettings) -> Engine:
        tried.append(name)
        raise EngineUnavailable(f"{name} finds no device")

    monkeypatch.setattr(select, "_start", refuse)
    return tried


async def test_auto_takes_vllm_then_torch_and_never_the_simulated_one(installed: set[str], attempts: list[str]) -> None:
    """vLLM built for a GPU that is not there must not keep torch from serving."""
    installed |= {"vllm", "torch", "transformers"}
    with pytest.raises(EngineUnavailable, match=r"vllm finds no device; torch finds no device"):
        await select.start_engine("auto", parse_model("starter"), SETTINGS)
    assert attempts == ["vllm", "torch"]


async def test_without_any_engine_it_says_what_to_install(installed: set[str], attempts: list[str]) -> None:
    """The first thing a new user may see."""
    installed |= {"torch"}  # alone it is no engine
    with pytest.raises(EngineUnavailable, match=r"pip install 'codeyard\[vllm\]'.*codeyard\[torch\]"):
        await select.start_engine("auto", parse_model("starter"), SETTINGS)
    with pytest.raises(EngineUnavailable, match=r"pip install 'codeyard\[torch\]'"):
        await select.start_engine("torch", parse_model("starter"), SETTINGS)
    assert attempts == []


async def test_an_engine_with_a_model_needs_its_weights_and_the_simulated_one_does_not(attempts: list[str]) -> None:
    """Simulating a large model must not need a download."""
    source = ModelSource("big", "org/big", "big-1")
    with pytest.raises(EngineUnavailable, match="hf download org/big"):
        await select.start_engine("torch", source, SETTINGS)
    engine = await select.start_engine("simulated", source, SETTINGS)
    assert engine.info.revision == "big-1"
    await engine.close()


def test_no_engine_library_is_imported_before_one_is_started(tmp_path: Path) -> None:
    """`codeyard --help` must not take seconds, nor need them installed."""
    program = """
import sys
import codeyard.worker.engines.select, codeyard.worker.engines.torch_engine, codeyard.worker.engines.vllm_engine
import codeyard.worker.engines.simulated, codeyard.worker.engines.torch_host
print(sorted({"torch", "transformers", "vllm", "tokenizers", "numpy"} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"

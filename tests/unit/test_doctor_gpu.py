"""What nvidia-smi says on machines that are not at hand, and what follows for the models."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from support.doctor import healthy, model, nvidia_smi, only, place, worst

from codeyard.cli.checks.check import Finding, Status
from codeyard.cli.checks.gpu import Gpu, check_gpu, look_for_gpus, parse_gpus, without_program

MIB = 2**20
H200 = "0, GPU-6d3a9f0e-1c5b-4f57-9e0a-5a2f9a6f1b11, NVIDIA H200, 580.159.03, 143771, 143156\n"
L40S = (
    "0, GPU-1b9e2f5c-63aa-0a83-4f0e-2d0c8b7f9e01, NVIDIA L40S, 575.51.03, 46068, 45596\n"
    "1, GPU-5c1d7e8a-0b6f-3c2d-8a9e-7f6e5d4c3b02, NVIDIA L40S, 575.51.03, 46068, 812\n"
)
TOLD = {
    "450": "0, GPU-aa, Tesla V100-SXM2-16GB, 450.51.06, 16160, 16158\n",
    "535": "0, GPU-bb, NVIDIA GeForce GTX 1050 Ti, 535.129.03, 4096, 4034\n",
    "580": H200,
    "616, a laptop's": "0, GPU-cc, NVIDIA GeForce RTX 5070 Laptop GPU, 616.92,  8151, 7940\n",
    "shared with the host": "0, GPU-dd, NVIDIA GB10, 580.95.05, [N/A], [N/A]\n",
    "not supported": "0, GPU-ee, NVIDIA Thor, 580.00, [Not Supported], [Not Supported]\n",
    "a warning before": "Warning: persistence mode is disabled on device 0.\n" + H200,
}


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD.keys())
def test_every_driver_is_understood(told: str) -> None:
    """Its words changed over the years; this form of it, less."""
    [gpu] = parse_gpus(told)
    assert gpu.name
    assert int(gpu.driver.split(".")[0]) >= 450
    assert (gpu.total_bytes is None) == ("[N" in told)


def test_sizes_are_mebibytes() -> None:
    """An H200 has 140 GiB."""
    assert list(parse_gpus(H200)) == [
        Gpu(0, "GPU-6d3a9f0e-1c5b-4f57-9e0a-5a2f9a6f1b11", "NVIDIA H200", "580.159.03", 143_771 * MIB, 143_156 * MIB)
    ]


async def gpu(environment: dict[str, str], model: Path | None = None, **groups: Any) -> list[Finding]:
    worker = {"engine": "vllm", "model": f"coder={model}" if model else "starter", **groups.pop("worker", {})}
    return await check_gpu(place(environment, worker=worker, **groups))


async def test_a_gpu_with_room_is_healthy_and_named(tmp_path: Path) -> None:
    """Name, driver and memory in one line, as one would ask for them."""
    findings = await gpu(nvidia_smi(tmp_path / "bin", H200))
    assert healthy(findings)
    assert findings[0].text == "GPU 0: NVIDIA H200, driver 580.159.03, 139.8 GiB of 140.4 GiB free"


COMPLAINTS = {
    "not loaded": (
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
        "NVIDIA driver is installed and running.\n",
        9,
        "modprobe nvidia",
    ),
    "updated": (
        "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 590.44\n",
        18,
        "restart the machine",
    ),
    "none": ("No devices were found\n", 6, "dmesg"),
    "taken from the container": ("Failed to initialize NVML: Unknown Error\n", 255, "restart the container"),
    "not ours": ("Failed to initialize NVML: Insufficient Permissions\n", 4, "/dev/nvidia"),
    "new words": ("Something nobody has seen yet\n", 3, "run it by hand"),
}


@pytest.mark.parametrize("said,status,way_out", COMPLAINTS.values(), ids=COMPLAINTS.keys())
async def test_each_complaint_of_nvidia_smi_has_its_way_out(
    tmp_path: Path, said: str, status: int, way_out: str
) -> None:
    """Its own words are shown too: people search for them."""
    finding = worst(await gpu(nvidia_smi(tmp_path / "bin", said, status=status)))
    assert finding.status is Status.FAIL
    assert way_out in finding.way_out
    begins = ("NVIDIA-SMI has failed because it ", "Failed to initialize NVML: ")
    words = said.splitlines()[0].removeprefix(begins[0]).removeprefix(begins[1])
    assert words.partition(".")[0] in finding.text


async def test_a_driver_that_hangs_is_given_up_and_said(tmp_path: Path) -> None:
    """nvidia-smi of a wedged driver never ends."""
    gpus = await look_for_gpus(nvidia_smi(tmp_path / "bin", "", hangs=True), within_s=0.2)
    assert "no answer within 0.2 s" in gpus.trouble


@pytest.mark.parametrize(
    "files,said",
    [
        ({}, ""),
        ({"sys/bus/pci/devices/0000:65:00.0": ("0x10de", "0x030200")}, "no driver"),
        ({"sys/bus/pci/devices/0000:65:00.1": ("0x10de", "0x040300")}, ""),  # its sound device
        ({"sys/bus/pci/devices/0000:00:02.0": ("0x8086", "0x030000")}, ""),  # another maker's
        ({"proc/driver/nvidia/version": ("NVRM version: 580", "")}, "nvidia-smi is not here"),
    ],
)
def test_hardware_without_a_driver_is_seen_on_the_bus(
    tmp_path: Path, files: dict[str, tuple[str, str]], said: str
) -> None:
    """Nothing else tells a CPU machine from a GPU machine whose driver was forgotten."""
    for name, (first, second) in files.items():
        path = tmp_path / name
        if second:
            path.mkdir(parents=True)
            (path / "vendor").write_text(f"{first}\n")
            (path / "class").write_text(f"{second}\n")
        else:
            path.parent.mkdir(parents=True)
            path.write_text(first)
    assert said in without_program(tmp_path).trouble
    assert bool(said) == bool(without_program(tmp_path).trouble)


async def test_hidden_gpus_do_not_count(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES, left over from yesterday."""
    environment = nvidia_smi(tmp_path / "bin", L40S)
    assert "hides every GPU" in worst(await gpu({**environment, "CUDA_VISIBLE_DEVICES": ""})).text
    one = await gpu({**environment, "CUDA_VISIBLE_DEVICES": "0"})
    assert [finding.text[:6] for finding in one] == ["GPU 0:"]


async def test_weights_that_do_not_fit_fail_and_more_gpus_are_a_way_out(tmp_path: Path) -> None:
    """70 GiB on a card of 45: told before a load of minutes."""
    environment = nvidia_smi(tmp_path / "bin", L40S.replace("812", "45596"))
    large = model(tmp_path / "coder-70b", gib=70)
    finding = worst(await gpu(environment, large))
    assert finding.status is Status.FAIL
    assert "coder: about 77.0 GiB of weights" in finding.text
    assert "CODEYARD_ENGINE_TENSOR_PARALLEL_SIZE" in finding.way_out

    assert healthy(await gpu(environment, large, engine={"tensor_parallel_size": 2}))
    assert "a process sees 2 GPUs" in worst(await gpu(environment, large, engine={"tensor_parallel_size": 4})).text
    # Quantised on the way it may fit: not known, so not refused.
    assert worst(await gpu(environment, large, engine={"quantization": "bitsandbytes"})).status is Status.WARN


@contextmanager
def running(program: str, word: str) -> Iterator[int]:
    """A Python under that name and with that word in its command line; its process id."""
    command = [program, "-c", "print(flush=True); input()", word]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has become what it was started as
        yield process.pid
        process.communicate(b"\n")


async def test_a_gpu_that_others_use_is_short_and_who_they_are_is_said(tmp_path: Path) -> None:
    """vLLM wants nine tenths of it free when it starts."""
    small = model(tmp_path / "coder-1b", gib=2)
    with running(sys.executable, "--password=secret") as pid:
        environment = nvidia_smi(tmp_path / "bin", L40S, apps=f"{pid}\n")
        full = worst(await gpu(environment, small))
        environment = nvidia_smi(tmp_path / "bin", L40S.replace(" 812", " 20000"), apps=f"{pid}\n")
        busy = worst(await gpu(environment, small))
    assert full.status is Status.FAIL  # not even the weights
    assert f"held by {Path(sys.executable).name} -c" in full.text
    assert f"(pid {pid})" in full.text
    assert "secret" not in full.text
    assert busy.status is Status.WARN
    assert "vLLM takes 40.5 GiB at start" in busy.text
    assert "CODEYARD_ENGINE_GPU_MEMORY_UTILIZATION" in busy.way_out


async def test_our_own_worker_on_the_gpu_is_no_trouble(tmp_path: Path) -> None:
    """A doctor beside a worker that runs."""
    small = model(tmp_path / "coder-1b", gib=2)
    (tmp_path / "codeyard").symlink_to(sys.executable)
    with running(str(tmp_path / "codeyard"), "worker") as pid:
        findings = await gpu(nvidia_smi(tmp_path / "bin", L40S, apps=f"{pid}\n"), small)
    assert healthy(findings)
    assert "a worker of codeyard runs here" in findings[-1].text


async def test_a_device_limit_below_what_vllm_takes_is_told(tmp_path: Path) -> None:
    """The worker would make room for ever."""
    environment = nvidia_smi(tmp_path / "bin", H200)
    finding = worst(await gpu(environment, worker={"device_memory_limit": 0.9}))
    assert "its window stays narrow" in finding.text
    assert healthy(await gpu(environment, worker={"device_memory_limit": 1.0}))


@pytest.mark.parametrize("groups", [{"worker": {"engine": "simulated"}}, {"engine": {"device": "cpu"}}])
async def test_a_worker_that_uses_no_gpu_is_not_asked_for_one(tmp_path: Path, groups: dict[str, Any]) -> None:
    """Even where nvidia-smi is broken."""
    environment = nvidia_smi(tmp_path / "bin", "No devices were found\n", status=6)
    assert only(await check_gpu(place(environment, **groups)), Status.SKIPPED)


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists() or bool(which("nvidia-smi")), reason="this machine has a GPU")
async def test_a_machine_without_a_gpu_runs_models_on_the_cpu() -> None:
    """No failure: a laptop, a CI machine."""
    assert [finding.status for finding in await check_gpu(place())] == [Status.SKIPPED]

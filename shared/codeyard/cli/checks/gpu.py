"""Which GPUs there are, by NVIDIA's own program; and whether the models fit into what is free on them.

Called by: cli.doctor, checks.install.
"""

import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codeyard.cli.checks.check import Finding, Place, Said, aside, ask_program, fail, gib, ok, skipped, warn
from codeyard.cli.checks.models import Weights, weights_of
from codeyard.cli.checks.processes import Process, process
from codeyard.shared.settings import Settings
from codeyard.worker.machine_memory import bytes_of, visible
from codeyard.worker.memory_watch import SHRINK_AT

MIB = 2**20
NVIDIA = "0x10de"  # PCI vendor
DISPLAY_CLASSES = ("0x0300", "0x0302")  # PCI: VGA, 3D controller
FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.free")
QUERY = ("--query-gpu=" + ",".join(FIELDS), "--format=csv,noheader,nounits")
APPS = ("--query-compute-apps=pid", "--format=csv,noheader,nounits")
OVERHEAD = 1.1  # of the weights: what an engine needs beside them before it holds a single token


@dataclass(frozen=True, slots=True)
class Gpu:
    """As nvidia-smi tells it. Bytes are None where it does not know (memory shared with the host)."""

    index: int
    uuid: str
    name: str
    driver: str
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpus:
    """`usable` are those of `found` that CUDA shows a process. `trouble`: there seems to be one that does not work."""

    found: tuple[Gpu, ...] = ()
    usable: tuple[Gpu, ...] = ()
    trouble: str = ""
    way_out: str = ""


# nvidia-smi's last word when it fails -> what it means, and what to do.
COMPLAINTS = (
    ("Driver/library version mismatch", "the driver was updated while the old one runs", "restart the machine"),
    (
        "couldn't communicate with the NVIDIA driver",
        "the NVIDIA driver is not loaded",
        "sudo modprobe nvidia, or install the driver for this kernel (dkms status)",
    ),
    (
        "No devices were found",
        "the driver runs and finds no GPU",
        "see dmesg | grep -i nvrm: it may have fallen off the bus",
    ),
    ("Insufficient Permissions", "this user may not use the GPU", "run in the group that /dev/nvidia* belongs to"),
    ("Unknown Error", "the container has lost its GPU", "restart the container; systemd reloads take devices away"),
)


def wants_gpu(settings: Settings) -> bool:
    """Whether a GPU would be used if there is one."""
    return settings.worker.engine != "simulated" and not settings.engine.device.startswith(("cpu", "mps"))


async def check_gpu(place: Place) -> list[Finding]:
    settings = place.settings
    if settings.worker.engine == "simulated":
        return [skipped("the simulated engine needs none")]
    if not wants_gpu(settings):
        return [skipped(f"CODEYARD_ENGINE_DEVICE is {settings.engine.device}")]
    gpus = await look_for_gpus(place.environment, within_s=place.answer_s * 2)
    if gpus.trouble:
        return [fail(gpus.trouble, gpus.way_out)]
    if not gpus.found:
        return [skipped("there is no NVIDIA GPU: models run on the CPU")]
    if not gpus.usable:
        return [fail("CUDA_VISIBLE_DEVICES hides every GPU", "unset it, or name one of nvidia-smi -L")]
    held_by = await _holders(place)
    shown = [ok(f"GPU {gpu.index}: {gpu.name}, driver {gpu.driver}, {_memory(gpu)}") for gpu in gpus.usable]
    return [*shown, *memory_findings(gpus.usable, weights_of(settings), settings, held_by)]


async def _holders(place: Place) -> list[Process]:
    """Who computes on the GPUs now. In a container the driver's process ids may be nobody's here."""
    program = shutil.which("nvidia-smi", path=place.environment.get("PATH"))
    said = await ask_program([program, *APPS], place.environment, within_s=place.answer_s * 2) if program else None
    words = said.out.split() if said is not None and said.status == 0 else []
    return await aside(lambda: [one for one in map(process, map(int, filter(str.isdecimal, words))) if one.command])


async def look_for_gpus(environment: Mapping[str, str], *, within_s: float, root: Path = Path("/")) -> Gpus:
    """Ask nvidia-smi; without it, look for the hardware."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return without_program(root)
    said = await ask_program([program, *QUERY], environment, within_s=within_s)
    return gpus_told(said, environment, within_s=within_s)


def without_program(root: Path) -> Gpus:
    """The PCI bus shows a GPU that nobody drives; /proc a driver whose tools are not here, as in a container."""
    if (root / "proc/driver/nvidia/version").exists():
        return Gpus(
            trouble="the NVIDIA driver runs, but nvidia-smi is not here",
            way_out="start the container with --gpus all (NVIDIA Container Toolkit), or put nvidia-smi on the PATH",
        )
    if any(_is_nvidia_gpu(device) for device in (root / "sys/bus/pci/devices").glob("*")):
        return Gpus(
            trouble="there is an NVIDIA GPU and no driver for it", way_out="install NVIDIA's driver, then restart"
        )
    return Gpus()


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor = (device / "vendor").read_text().strip()
        return vendor == NVIDIA and (device / "class").read_text().startswith(DISPLAY_CLASSES)
    except OSError:
        return False


def gpus_told(said: Said | None, environment: Mapping[str, str], *, within_s: float) -> Gpus:
    """From nvidia-smi's answer; None: it gave none."""
    if said is None:
        return Gpus(
            trouble=f"nvidia-smi gave no answer within {within_s:g} s: the driver hangs",
            way_out="see dmesg | grep -i nvrm; a GPU reset or a restart of the machine helps",
        )
    found = tuple(parse_gpus(said.out))
    if said.status == 0 and found:
        shown = visible([gpu.uuid for gpu in found], environment)
        return Gpus(found, tuple(found[place] for place in shown))
    words = f"{said.out}\n{said.err}"
    for complaint, meaning, way_out in COMPLAINTS:
        if complaint in words:
            return Gpus(trouble=f"{meaning} (nvidia-smi: {complaint})", way_out=way_out)
    return Gpus(trouble=f"nvidia-smi failed: {said.last_line or f'status {said.status}'}", way_out="run it by hand")


def parse_gpus(out: str) -> Iterator[Gpu]:
    """The lines of QUERY's answer; others, as warnings of its own, are passed over."""
    for row in csv.reader(out.splitlines(), skipinitialspace=True):
        if len(row) == len(FIELDS) and row[0].isdecimal():
            index, uuid, name, driver, total, free = row
            yield Gpu(int(index), uuid, name, driver, _mib(total), _mib(free))


def _mib(text: str) -> int | None:
    """`81559`, or `[N/A]`, `[Not Supported]`, `[Unknown Error]`."""
    return int(text) * MIB if text.isdecimal() else None


def _memory(gpu: Gpu) -> str:
    if gpu.total_bytes is None or gpu.free_bytes is None:
        return "memory shared with the host"
    return f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"


# Memory --------------------------------------------------------------------------------------------


def memory_findings(
    gpus: Sequence[Gpu], weights: Sequence[Weights], settings: Settings, held_by: Sequence[Process] = ()
) -> Iterator[Finding]:
    """Do the weights fit, and is as much free as vLLM takes at start? Worst case: the GPUs with the least of it."""
    sizes = [(gpu.total_bytes, gpu.free_bytes) for gpu in gpus if gpu.total_bytes and gpu.free_bytes is not None]
    if not sizes:
        return
    total, free = min(one[0] for one in sizes if one[0]), min(one[1] for one in sizes if one[1] is not None)
    for model in weights:
        yield from _model_findings(model, settings, _Room(total, free, len(gpus), held_by))
    limit = settings.worker.device_memory_limit
    taken = settings.engine.gpu_memory_utilization * total
    if limit is not None and settings.worker.engine != "torch" and bytes_of(limit, total) * SHRINK_AT < taken:
        yield warn(
            f"the worker makes room at {SHRINK_AT:.0%} of CODEYARD_WORKER_DEVICE_MEMORY_LIMIT "
            f"({gib(bytes_of(limit, total))}), and vLLM alone takes {gib(taken)}: its window stays narrow",
            "unset the limit, or lower CODEYARD_ENGINE_GPU_MEMORY_UTILIZATION",
        )


@dataclass(frozen=True, slots=True)
class _Room:
    """Of the GPU that has the least, and how many there are."""

    total: int
    free: int
    num_gpus: int
    held_by: Sequence[Process]


def _model_findings(model: Weights, settings: Settings, gpu: _Room) -> Iterator[Finding]:
    engine = settings.engine_of(model.alias)
    parts = engine.tensor_parallel_size
    if parts > gpu.num_gpus:
        yield fail(
            f"{model.alias}: CODEYARD_ENGINE_TENSOR_PARALLEL_SIZE is {parts}, and a process sees {gpu.num_gpus} GPUs",
            f"set it to {gpu.num_gpus}, or give the worker more GPUs",
        )
        return
    need = int(model.num_bytes * OVERHEAD) // parts
    torch = settings.worker.engine == "torch"
    room = gpu.total if torch else int(engine.gpu_memory_utilization * gpu.total)  # torch takes what it needs
    each = " on each GPU" if parts > 1 else ""
    if need > room:
        # Quantised while it is loaded, it is smaller than on disk.
        said = warn if engine.quantization else fail
        yield said(
            f"{model.alias}: about {gib(need)} of weights{each}, and the engine may use {gib(room)}",
            "a quantised or smaller model, CODEYARD_ENGINE_TENSOR_PARALLEL_SIZE over more GPUs, or a larger GPU",
        )
    elif gpu.free < (need if torch else room):
        text = f"{model.alias}: {gib(gpu.free)} are free{each}, the weights are about {gib(need)}"
        if not torch:
            text += f", and vLLM takes {gib(room)} at start"
        who = f"; held by {', '.join(map(str, gpu.held_by))}" if gpu.held_by else ""
        if any(one.ours for one in gpu.held_by):
            yield ok(f"{text}{who}: a worker of codeyard runs here")
            return
        said = fail if need > gpu.free else warn
        yield said(f"{text}{who}", "end what else uses the GPU, or lower CODEYARD_ENGINE_GPU_MEMORY_UTILIZATION")

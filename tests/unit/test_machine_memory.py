"""What the kernel says about memory, read from its files as the several versions write them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from codeyard.worker.machine_memory import DeviceMemory, HostMemory, bytes_of, device_memory, host_memory, visible

MIB = 2**20
MEMINFO = "MemTotal:       16384000 kB\nMemFree:          123456 kB\nMemAvailable:    8192000 kB\n"
MACHINE = HostMemory(16_384_000 * 1_024, 8_192_000 * 1_024)
NO_LIMIT_V1 = "9223372036854771712\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group_v2(folder: str, limit: str, used_mib: int, cache_mib: int = 0, high: str = "max") -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used_mib * MIB}\n",
        f"{folder}/memory.stat": f"anon 5\nfile 7\ninactive_file {cache_mib * MIB}\nactive_file 3\n",
    }


def group_v1(folder: str, limit: str, used_mib: int, cache_mib: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used_mib * MIB}\n",
        f"{folder}/memory.stat": f"cache 5\ninactive_file 1\ntotal_inactive_file {cache_mib * MIB}\n",
    }


MOUNT_V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = (
    "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def test_a_machine_without_control_groups_is_its_own_limit(tmp_path: Path) -> None:
    """A laptop."""
    assert host_memory(tree(tmp_path, {})) == MACHINE


def test_a_container_is_limited_by_its_group_and_its_idle_page_cache_is_free(tmp_path: Path) -> None:
    """Version 2 with a namespace, as Docker and Kubernetes make them: the container sees itself at the root."""
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": MOUNT_V2}
    root = tree(tmp_path, files | group_v2("sys/fs/cgroup", str(1_000 * MIB), 700, cache_mib=200))
    assert host_memory(root) == HostMemory(1_000 * MIB, 500 * MIB, "/sys/fs/cgroup")


def test_every_group_around_counts_and_the_tightest_one_holds(tmp_path: Path) -> None:
    """A pod's limit kills a container that has none of its own; a full slice leaves nothing to a roomy service."""
    files = {"proc/self/cgroup": "0::/kubepods/pod1/worker\n", "proc/self/mountinfo": MOUNT_V2}
    files |= group_v2("sys/fs/cgroup/kubepods/pod1/worker", "max", 300)
    files |= group_v2("sys/fs/cgroup/kubepods/pod1", str(2_000 * MIB), 500)
    files |= group_v2("sys/fs/cgroup/kubepods", str(9_000 * MIB), 8_950)
    assert host_memory(tree(tmp_path, files)) == HostMemory(2_000 * MIB, 50 * MIB, "/sys/fs/cgroup/kubepods/pod1")


def test_a_group_that_is_throttled_counts_as_limited_there(tmp_path: Path) -> None:
    """systemd's MemoryHigh: nobody is killed, but the worker would hardly run."""
    files = {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": MOUNT_V2}
    files |= group_v2("sys/fs/cgroup/a", str(4_000 * MIB), 100, high=str(1_000 * MIB))
    assert host_memory(tree(tmp_path, files)).total_bytes == 1_000 * MIB


@pytest.mark.parametrize(
    "top,folder", [("/", "sys/fs/cgroup/memory/docker/abc"), ("/docker/abc", "sys/fs/cgroup/memory")]
)
def test_version_1_is_read_with_and_without_its_whole_tree_mounted(tmp_path: Path, top: str, folder: str) -> None:
    """Docker mounts only the container's part of the tree, and still says the whole path."""
    files = {"proc/self/cgroup": "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n"}
    files |= {"proc/self/mountinfo": MOUNT_V1.format(top)} | group_v1(folder, str(800 * MIB), 600, cache_mib=100)
    assert host_memory(tree(tmp_path, files)) == HostMemory(800 * MIB, 300 * MIB, f"/{folder}")


def test_version_1_without_a_limit_is_no_limit(tmp_path: Path) -> None:
    """It writes the largest number of pages there is."""
    files = {"proc/self/cgroup": "4:memory:/a\n", "proc/self/mountinfo": MOUNT_V1.format("/")}
    files |= group_v1("sys/fs/cgroup/memory/a", NO_LIMIT_V1, 600)
    assert host_memory(tree(tmp_path, files)) == MACHINE


def test_this_machine_is_read_as_it_is() -> None:
    """Whatever this kernel has: figures that can be true."""
    found = host_memory()
    assert 0 < found.available_bytes <= found.total_bytes < 2**60


@pytest.mark.parametrize("limit,expected", [(0.5, 500), (1, 1_000), (300, 300), (5_000, 1_000)])
def test_a_limit_is_a_share_or_bytes_and_never_more_than_there_is(limit: float, expected: int) -> None:
    """A limit above the machine's memory would be none."""
    assert bytes_of(limit, 1_000) == expected


UUIDS = ["GPU-aa11", "GPU-bb22", "GPU-cc33"]


@pytest.mark.parametrize(
    "named,expected",
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("GPU-bb", [1]),
        ("1,7,0", [1]),
        ("NoDevFiles", []),
    ],
)
def test_only_the_gpus_that_cuda_would_show_count(named: str | None, expected: list[int]) -> None:
    """Another worker's full GPU says nothing about ours. What follows a name that is none is not visible either."""
    assert visible(UUIDS, {} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == expected


class NVMLError(Exception):
    """As the library's."""


class Nvml(SimpleNamespace):
    """NVIDIA's library as far as it is called here: `memory` is (used, total) by GPU."""

    NVMLError = NVMLError

    def __init__(self, memory: list[tuple[int, int]], *, driver: bool = True) -> None:
        super().__init__(memory=memory, driver=driver, open=0)

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.memory)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, index: int) -> str:
        return UUIDS[index]

    def nvmlDeviceGetMemoryInfo(self, index: int) -> SimpleNamespace:
        used, total = self.memory[index]
        if not total:
            raise NVMLError("Not Supported")
        return SimpleNamespace(used=used, total=total)


@pytest.mark.parametrize(
    "nvml,named,expected",
    [
        (Nvml([(10, 100), (40, 50), (90, 1_000)]), None, DeviceMemory(40, 50)),
        (Nvml([(10, 100), (40, 50)]), "0", DeviceMemory(10, 100)),
        (Nvml([]), None, None),
        (Nvml([], driver=False), None, None),
        (Nvml([(0, 0)]), None, None),
    ],
    ids=["fullest", "visible", "no gpu", "no driver", "shares the host's"],
)
def test_the_fullest_visible_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch, nvml: Nvml, named: str | None, expected: DeviceMemory | None
) -> None:
    """The first GPU that is full ends the worker, however empty the others are."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    nvml.__spec__ = SimpleNamespace(name="pynvml")
    assert device_memory({} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == expected
    assert nvml.open == 0

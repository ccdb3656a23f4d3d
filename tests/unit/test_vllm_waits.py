"""How vLLM's processes wait for each other on a CPU."""

import sys
import time
from importlib.metadata import entry_points
from types import ModuleType

import pytest

from codeyard.worker.engines.vllm_waits import NAP, NAP_S, register

BROADCAST = "vllm.distributed.device_communicators.shm_broadcast"


@pytest.fixture
def broadcast(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for vLLM's module, with packages around it."""
    parts = BROADCAST.split(".")
    modules = [ModuleType(".".join(parts[: n + 1])) for n in range(len(parts))]
    for module, inner in zip(modules, [*modules[1:], None], strict=True):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if inner is not None:
            setattr(module, inner.__name__.rpartition(".")[2], inner)
    modules[-1].sched_yield = _never  # type: ignore[attr-defined]
    return modules[-1]


def _never() -> None:
    raise AssertionError("it yields in a loop")


def test_it_naps_where_the_worker_asked_for_it(broadcast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of yields held up every other process on its core."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setenv(NAP, NAP_S)

    register()
    broadcast.sched_yield()

    assert naps == [float(NAP_S)]


def test_other_users_of_vllm_in_this_environment_keep_its_way(
    broadcast: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM loads the plugin wherever codeyard is installed beside it."""
    monkeypatch.delenv(NAP, raising=False)

    register()

    assert broadcast.sched_yield is _never


def test_a_vllm_that_waits_otherwise_is_left_alone(broadcast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer one may have nothing to replace; that is no reason not to start."""
    monkeypatch.setenv(NAP, NAP_S)
    del broadcast.sched_yield

    register()

    assert not hasattr(broadcast, "sched_yield")


def test_vllm_finds_it() -> None:
    """In an environment where codeyard was installed anew since: `pip install -e .`."""
    [ours] = [one for one in entry_points(group="vllm.general_plugins") if one.name == "codeyard"]

    assert ours.load() is register

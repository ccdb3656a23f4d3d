"""In which order files of tests are handed to the processes that run them (`--dist loadfile`), and which go together.

Unit tests first: they say soonest what broke, and before anything heavy is imported. A long file that begins last
runs alone, while every other process is through, so of the rest the long ones begin first. Files that look at one
costly fixture of the session share a process: in two it would be made twice. Called by: conftest.
"""

from typing import Any

from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

LONGEST = (  # about the longest first, so that one that computes runs beside one that waits
    "tests/integration/test_engine_memory_returns.py",
    "tests/integration/test_rollouts.py",
    "tests/fault/test_recovery.py",
    "tests/integration/test_engine_vllm.py",
    "tests/integration/test_openai_responses.py",
    "tests/integration/test_batches_kill.py",
    "tests/acceptance/test_demo.py",
    "tests/fault/test_resume.py",
    "tests/simulation/test_schedules.py",
    "tests/integration/test_worker_processes.py",
    "tests/fault/test_drill_command.py",
    "tests/integration/test_engine_vllm_lora.py",
    "tests/simulation/test_mutations.py",
    "tests/integration/test_openai_vllm.py",
)
TOGETHER = {"tests/simulation/test_coverage.py": "tests/simulation/test_schedules.py"}  # 2,000 schedules, once
FOLDERS = ("fault", "acceptance", "integration", "contract", "simulation")  # by how long a test takes there
FIRST = "unit"


def scope_of(nodeid: str) -> str:
    """What is run by one process: a test's file, or the one that it goes with."""
    file = nodeid.split("::", 1)[0]
    return TOGETHER.get(file, file)


def turn_of(scope: str, num_tests: int) -> tuple[int, int, int]:
    """The least is next."""
    folder = scope.split("/")[1]
    if folder == FIRST:
        return -1, 0, -num_tests
    place = LONGEST.index(scope) if scope in LONGEST else len(LONGEST)
    return place, FOLDERS.index(folder) if folder in FOLDERS else 0, -num_tests


class LongestFirst(LoadFileScheduling):  # type: ignore[misc]  # xdist ships no types
    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        following = min(self.workqueue, key=lambda scope: turn_of(scope, len(self.workqueue[scope])))
        self.workqueue.move_to_end(following, last=False)
        super()._assign_work_unit(node)

"""The order in which CI's processes take files: what it names must be there, and what it promises must follow."""

from pathlib import Path

from support.turns import FOLDERS, LONGEST, TOGETHER, scope_of, turn_of

ROOT = Path(__file__).parents[2]


def test_every_file_that_the_order_names_is_there() -> None:
    """One that was renamed would silently begin last."""
    for name in (*LONGEST, *TOGETHER, *TOGETHER.values()):
        assert (ROOT / name).is_file(), name
    for folder in FOLDERS:
        assert any((ROOT / "tests" / folder).glob("test_*.py")), folder


def test_unit_tests_come_first_and_of_the_rest_the_long_files() -> None:
    """Of the same sort the file with more tests comes first."""
    unit, contract, more, fault = (
        f"tests/{name}.py" for name in ("unit/test_a", "contract/test_b", "contract/test_c", "fault/test_d")
    )
    scopes = {unit: 90, contract: 3, more: 40, fault: 1, LONGEST[1]: 1}

    taken = sorted(scopes, key=lambda scope: turn_of(scope, scopes[scope]))

    assert taken == [unit, LONGEST[1], fault, more, contract]


def test_files_that_share_a_costly_fixture_share_a_process() -> None:
    """Two thousand schedules are run once, and looked at by both."""
    coverage, schedules = (f"tests/simulation/test_{name}.py" for name in ("coverage", "schedules"))

    assert scope_of(f"{coverage}::test_x[a::b]") == scope_of(f"{schedules}::test_y") == schedules
    assert scope_of("tests/unit/test_a.py::test_z") == "tests/unit/test_a.py"

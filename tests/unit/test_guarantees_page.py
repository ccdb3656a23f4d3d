"""docs/guarantees.md names a test for each promise, and each test it names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guarantees.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())


def test_the_page_names_many_tests_and_all_of_them_by_path_and_name() -> None:
    """A reference in another form would escape the check below."""
    loose = re.findall(r"`tests/[^`]*`", PAGE.read_text())

    assert len(NAMED) == len(loose) > 25


@pytest.mark.parametrize("path, name", NAMED)
def test_a_test_that_is_to_show_a_promise_exists(path: str, name: str) -> None:
    """A promise without its test is a hope."""
    tree = ast.parse((ROOT / path).read_text())

    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in functions


def test_every_row_of_the_promises_has_a_test() -> None:
    """Read in the page itself, so that a row cannot be added without."""
    promises = PAGE.read_text().partition("## Promise by promise")[2].partition("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "---" not in line][1:]

    assert len(rows) > 20
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row)] == []

"""docs/openai.md says what happens: its examples are run, and answered as printed."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.openai_sdk import Yard, yards

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

TEXT = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()
ADDRESS = "http://localhost:8080"


@pytest.fixture(scope="module", params=["embedded"])
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    with yards(request, tmp_path_factory) as running:
        yield running


def test_the_pages_programs_run_one_after_another(yard: Yard) -> None:
    """As somebody would paste them."""
    program = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.S)).replace(ADDRESS, yard.url)
    assert len(re.findall(r"client\.\w+\.", program)) == 6

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert ran.returncode == 0, ran.stderr
    assert "completed ResponseUsage(" in ran.stdout.splitlines()[-1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example uses curl")
def test_the_pages_request_answers_as_printed(yard: Yard) -> None:
    """Status, headers, and the members of the JSON; ids, times and texts are the model's."""
    [(command, printed)] = re.findall(r"```sh\n(.*?)```\n```http\n(.*?)```", TEXT, re.S)
    ran = subprocess.run(
        ["sh", "-euc", command.replace(ADDRESS, yard.url)], capture_output=True, text=True, timeout=60, check=True
    )

    got, want = ran.stdout.replace("\r\n", "\n"), printed
    assert got.splitlines()[0] == want.splitlines()[0]
    assert set(want.splitlines()[1:2]) <= set(got.splitlines())
    assert _members(json.loads(got.partition("\n\n")[2])) == _members(json.loads(want.partition("\n\n")[2]))


def _members(document: object) -> object:
    """The names in it, in order, however deep."""
    if isinstance(document, dict):
        return [(name, _members(value)) for name, value in document.items()]
    return [_members(value) for value in document] if isinstance(document, list) else None

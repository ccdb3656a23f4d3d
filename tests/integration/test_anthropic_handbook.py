"""docs/anthropic.md says what happens: its examples are run by a shell, and answered as printed."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.gateway import REVISION, GatewayUnderTest, gateway_running, settings_for, working

from codeyard.shared.alias import Alias

PAGE = Path(__file__).parents[2] / "docs" / "anthropic.md"
EXAMPLE = re.compile(r"```sh\n(.*?)```\n```http\n(.*?)```", re.S)


@pytest_asyncio.fixture
async def gateway(tmp_path: Path, namespace: str) -> AsyncIterator[GatewayUnderTest]:
    url = f"sqlite:///{tmp_path / 'yard.db'}"
    async with gateway_running(settings_for(url, url, namespace)) as running:
        await running.store.swap_alias(None, Alias("starter", REVISION))
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples use curl")
async def test_every_example_of_the_page_answers_as_printed(gateway: GatewayUnderTest) -> None:
    """Status, headers, and the members of each document; ids and numbers are the job's."""
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) == 5

    async with working(gateway, "def add(a, b):\n", "    return a + b\n"):
        for commands, printed in examples:
            answered = await _shell(commands.replace("http://localhost:8080", gateway.url))
            _same_shape(answered.replace("\r\n", "\n"), printed)


def _same_shape(answered: str, printed: str) -> None:
    (got_head, got_body), (want_head, want_body) = (text.partition("\n\n")[::2] for text in (answered, printed))
    got_status, *got_headers = got_head.splitlines()
    want_status, *want_headers = want_head.splitlines()
    assert got_status == want_status
    got = dict(line.split(": ", 1) for line in got_headers)
    for name, value in (line.split(": ", 1) for line in want_headers):
        assert got[name] == value if name != "request-id" else got[name].startswith("req_")
    if "event-stream" in got["content-type"]:
        assert _events(got_body) == _events(want_body)
    else:
        assert _members(json.loads(got_body)) == _members(json.loads(want_body))


def _events(body: str) -> list[tuple[str, Any]]:
    return [(kind, _members(json.loads(data))) for kind, data in re.findall(r"event: (\w+)\ndata: (.*)\n", body)]


def _members(value: Any) -> Any:
    """All the names in a document, and the texts that are the same each time."""
    match value:
        case dict():
            return {name: _members(one) for name, one in value.items()}
        case list():
            return [_members(one) for one in value]
        case str() if not re.match(r"(msg|compl|req)_", value):
            return value
    return type(value)


async def _shell(script: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "sh", "-euc", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()

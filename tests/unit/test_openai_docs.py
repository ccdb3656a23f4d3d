"""docs/openai.md says what the code does: its tables are the code's own."""

import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from codeyard.producer.gateway.openai.convert import DEFAULT_MAX_TOKENS, LANES
from codeyard.producer.gateway.openai.described import CALLER, ENDINGS, SUBMIT
from codeyard.producer.gateway.openai.errors import CODES
from codeyard.producer.gateway.openai.parameters import ROWS, TABLE, Api, Parameter, Use
from codeyard.producer.gateway.problems import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()


def row_of(parameter: Parameter) -> str:
    unused = ", ".join(f"`{json.dumps(value)}`" for value in parameter.unused)
    becomes = {
        Use.SAMPLING: f"`sampling.{parameter.becomes}`" + (f"; {unused}: the engine's default" if unused else ""),
        Use.READ: parameter.becomes,
        Use.IGNORED: f"ignored: {parameter.becomes}",
        Use.REFUSED: f"refused ({parameter.becomes})" + (f", unless {unused}" if unused else ""),
    }[parameter.use]
    return f"| `{parameter.name}` | {', '.join(parameter.apis)} | {becomes} |"


def test_every_parameter_is_in_the_table_in_the_same_words() -> None:
    """The page is read by those who have no gateway at hand."""
    rows = [line for line in PAGE.splitlines() if re.match(r"\| `\w+` \| (chat|completions|responses)", line)]

    assert rows == [row_of(parameter) for parameter in TABLE]


@pytest.mark.parametrize(
    "api, params",
    [
        (Api.CHAT, chat_create_params.CompletionCreateParamsStreaming),
        (Api.COMPLETIONS, completion_create_params.CompletionCreateParamsStreaming),
        (Api.RESPONSES, response_create_params.ResponseCreateParamsStreaming),
    ],
)
def test_the_table_has_a_row_for_everything_the_official_sdk_can_send(api: Api, params: type) -> None:
    """What it adds in a later version must be thought about."""
    assert set(get_type_hints(params)) <= set(ROWS[api])


def test_every_error_code_is_in_the_table_with_its_status() -> None:
    """What a program decides by."""
    expected = {(400, "unknown_parameter"), (400, "unsupported_parameter"), (400, "missing_required_parameter")}
    for kind in (*SUBMIT, *CALLER, "job-not-found", "invalid-parameter"):
        status = 400 if KINDS[kind].status == 422 else KINDS[kind].status
        expected.add((status, CODES.get(kind, kind.replace("-", "_"))))
    for status, codes in ENDINGS.items():
        expected |= {(status, code) for code in codes if " " not in code}

    found = {
        (int(status), code)
        for status, codes in re.findall(r"^\| (\d{3}) \| (`.*?) \|", PAGE, re.M)
        for code in re.findall(r"`(\w+)`", codes)
    }

    assert found - {(500, "generation_restarted"), (500, "engine_error"), (500, "poison")} == expected


def test_lanes_and_defaults_are_those_of_the_code() -> None:
    """Numbers and words that people plan with."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `(interactive|standard|bulk)` \|", PAGE, re.M)
    found = {tier: lane for tiers, lane in rows for tier in re.findall(r"`(\w+)`", tiers)}

    assert found == {tier: lane.value for tier, lane in LANES.items()}
    for api, number in DEFAULT_MAX_TOKENS.items():
        assert re.search(rf"{number:,} tokens? .*{api}", PAGE), api

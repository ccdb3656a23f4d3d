"""The table of parameters, the code that follows it, the SDK it answers, and the page that shows it."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params
from pydantic import BaseModel

from codeyard.producer.gateway.anthropic.body import CompleteBody, CountBody, MessageBody
from codeyard.producer.gateway.anthropic.errors import STATUS_OF, TYPES
from codeyard.producer.gateway.anthropic.parameters import COMPLETE, MESSAGES, SAMPLING, Parameter, sampled
from codeyard.producer.gateway.openapi import describe
from codeyard.producer.gateway.problems import KINDS
from codeyard.shared.job import Sampling

PAGE = (Path(__file__).parents[2] / "docs" / "anthropic.md").read_text()
ROUTES = ("/v1/messages", "/v1/messages/count_tokens", "/v1/complete")


@pytest.mark.parametrize("heading, table", [("/v1/messages", MESSAGES), ("/v1/complete", COMPLETE)])
def test_the_page_shows_the_table(heading: str, table: tuple[Parameter, ...]) -> None:
    """Row for row, in the same words."""
    section = PAGE.partition(f"### {heading}\n")[2].partition("\n## ")[0].partition("\n### ")[0]

    rows = [
        tuple(cell.strip().strip("`") for cell in row[1:-1].split("|"))
        for row in re.findall(r"^\|.*\|$", section, re.M)
    ]

    assert rows[2:] == [(one.name, one.fate, one.becomes, one.note) for one in table]


@pytest.mark.parametrize("body, table", [(MessageBody, MESSAGES), (CountBody, MESSAGES), (CompleteBody, COMPLETE)])
def test_what_the_table_maps_is_what_is_read(body: type[BaseModel], table: tuple[Parameter, ...]) -> None:
    """A row without its code, or code without its row, would be a promise nobody keeps."""
    assert set(body.model_fields) == {one.name for one in table if one.fate == "mapped"}


@pytest.mark.parametrize("table", [MESSAGES, COMPLETE])
def test_what_becomes_a_part_of_sampling_is_a_field_of_it(table: tuple[Parameter, ...]) -> None:
    """It is copied by that name."""
    named = {one.becomes.removeprefix(SAMPLING) for one in table if one.becomes.startswith(SAMPLING)}

    assert set(sampled(table)) <= named <= set(Sampling.model_fields)


@pytest.mark.parametrize(
    "params",
    [
        message_create_params.MessageCreateParamsNonStreaming,
        message_create_params.MessageCreateParamsStreaming,
        message_count_tokens_params.MessageCountTokensParams,
        beta_params.MessageCreateParamsNonStreaming,
    ],
)
def test_the_table_has_a_row_for_everything_the_official_sdk_can_send(params: type) -> None:
    """What it adds in a later version must be thought about: `betas` alone goes into a header."""
    assert set(get_type_hints(params)) - {"betas"} <= {one.name for one in MESSAGES}


def test_the_page_lists_every_status_with_its_type() -> None:
    """In the order of the statuses."""
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \| .+ \|$", PAGE, re.M)

    assert rows == [(str(status), kind) for status, kind in TYPES.items()]


def test_what_a_submission_can_be_refused_with_is_described_and_has_a_type() -> None:
    """By the native route's own list: a new kind of refusal reaches these routes too."""
    described = "".join(answer["description"] for answer in _responses("/v1/messages").values())
    kinds = re.findall(r"`([a-z-]+)`", "".join(answer["description"] for answer in _responses("/v1/jobs").values()))
    refusals = [kind for kind in kinds if kind in KINDS]

    assert len(refusals) > 10
    assert [kind for kind in refusals if kind not in described] == []
    assert {STATUS_OF.get(kind, KINDS[kind].status) for kind in refusals} <= set(TYPES)


def _responses(route: str) -> dict[str, Any]:
    responses: dict[str, Any] = describe()["paths"][route]["post"]["responses"]
    return responses


@pytest.mark.parametrize("route", ROUTES)
def test_the_example_of_the_description_is_a_request_that_is_read(route: str) -> None:
    """It is what people copy."""
    content = describe()["paths"][route]["post"]["requestBody"]["content"]["application/json"]
    bodies: dict[str, type[BaseModel]] = {"/v1/messages": MessageBody, "/v1/complete": CompleteBody}
    body = bodies.get(route, CountBody)

    jsonschema.Draft202012Validator(content["schema"]).validate(content["example"])
    assert body.model_validate(content["example"]).model_extra == {}

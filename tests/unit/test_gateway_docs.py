"""The API's description: complete, true, and readable on a machine without internet."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.routing import Route
from support.asgi import JOB_ID, MadeUpJobs, app_over, http_to, status

from codeyard.producer.gateway.openapi import describe
from codeyard.producer.gateway.pages import SHOWN_SCHEMAS, landing_page, reference_page
from codeyard.producer.gateway.problems import KINDS
from codeyard.shared.errors import JobNotFound
from codeyard.shared.record import Failure, Result, State

DOCS = Path(__file__).parents[2] / "docs"


def _validate(document: Any, schema: dict[str, Any]) -> None:
    """`schema` may refer into the OpenAPI document."""
    whole = {**schema, "components": describe()["components"]}
    jsonschema.Draft202012Validator(whole).validate(document)


def test_every_route_is_described_and_every_description_has_its_route() -> None:
    """The document is written by hand; this is what holds it to the code."""
    routes = {
        (route.path, method.lower())
        for route in app_over(MadeUpJobs()).router.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }

    described = {(path, method) for path, methods in describe()["paths"].items() for method in methods}

    assert described == routes


def test_every_schema_is_valid_and_every_example_matches_its_schema() -> None:
    """Examples are what people copy."""
    for schema in describe()["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [operation for methods in describe()["paths"].values() for operation in methods.values()]
    for operation in operations:
        for exchanged in (operation.get("requestBody", {}), *operation["responses"].values()):
            for content in exchanged.get("content", {}).values():
                if "example" in content:
                    _validate(content["example"], content["schema"])


async def test_the_example_body_is_accepted() -> None:
    """It is the first thing people send."""
    body = describe()["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["example"]
    async with http_to(app_over(MadeUpJobs())) as http:
        assert (await http.post("/v1/jobs", json=body)).status_code == 202


@pytest.mark.parametrize(
    "known",
    [
        status(),
        status(
            State.FAILED,
            started_at=2.0,
            finished_at=3.0,
            result=Result(state=State.FAILED, error=Failure(code="too_long", message="the prompt is too long")),
        ),
    ],
)
async def test_answers_are_as_described(known: Any) -> None:
    """A client generated from the document must be able to read them."""
    async with http_to(app_over(MadeUpJobs(known=known))) as http:
        for method, path, template in (
            ("post", "/v1/jobs", "/v1/jobs"),
            ("get", "/v1/jobs", "/v1/jobs"),
            ("get", f"/v1/jobs/{JOB_ID}", "/v1/jobs/{job_id}"),
            ("delete", f"/v1/jobs/{JOB_ID}", "/v1/jobs/{job_id}"),
            ("get", "/readyz", "/readyz"),
        ):
            body = {"model": "tiny", "prompt": "x"} if method == "post" else None
            answer = await http.request(method, path, json=body)
            described = describe()["paths"][template][method]["responses"][str(answer.status_code)]
            _validate(answer.json(), described["content"]["application/json"]["schema"])


async def test_problems_are_as_described() -> None:
    """Also those no handler of ours wrote."""
    schema = {"$ref": "#/components/schemas/Problem"}
    async with http_to(app_over(MadeUpJobs(error=JobNotFound(JOB_ID)))) as http:
        for method, path in (("POST", "/v1/jobs"), ("GET", f"/v1/jobs/{JOB_ID}"), ("GET", "/x"), ("PUT", "/docs")):
            _validate((await http.request(method, path)).json(), schema)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.ids |= {given["id"] or ""} if "id" in given else set()
        self.links |= {given[name] or "" for name in ("href", "src") if name in given}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("text", [reference_page(), landing_page()])
def test_a_page_needs_nothing_from_elsewhere(text: str) -> None:
    """Many of the machines this runs on have no internet."""
    page = _Page(text)

    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link.startswith(("/", "#")) for link in page.links)
    assert "url(" not in text
    assert page.open == []


def test_every_problem_type_and_every_link_in_the_reference_leads_somewhere() -> None:
    """A problem's `type` is a link to what to do about it."""
    page = _Page(reference_page())

    assert set(KINDS) <= page.ids
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert set(SHOWN_SCHEMAS) <= page.ids


async def test_the_pages_and_the_document_are_served() -> None:
    """Where a person and a program start."""
    async with http_to(app_over(MadeUpJobs())) as http:
        landing, page, document = [await http.get(path) for path in ("/", "/docs", "/openapi.json")]

    assert (landing.text, page.text) == (landing_page(), reference_page())
    assert document.json() == describe()
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_the_handbook_lists_every_problem_in_the_same_words() -> None:
    """docs/http-api.md is read by those who have no gateway at hand."""
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\d+) \| (.*) \|$", (DOCS / "http-api.md").read_text(), re.M)

    assert rows == [(name, str(kind.status), kind.remedy) for name, kind in KINDS.items()]

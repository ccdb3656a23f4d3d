"""OpenAI's routes for callers of several tenants: each sees its own, in the same words as what never was."""

from collections.abc import Sequence
from typing import Any

import pytest
from support.asgi import JOB_ID, MadeUpJobs, MadeUpModels, app_over, http_to, status
from support.tokens import SECRET, MadeUpKeys, auth_settings, token

from codeyard.producer.gateway.auth import Authenticator, Credentials
from codeyard.producer.gateway.keys import ApiKeys
from codeyard.producer.gateway.tokens import Tokens
from codeyard.shared.record import Record

NOBODYS = "99999999-9999-4999-8999-999999999999"


class Untouched(MadeUpModels):
    """A store that must not be asked for a record."""

    async def read(self, job_ids: Sequence[str]) -> list[Record | None]:
        raise AssertionError("another tenant's record was read")


def credentials() -> Authenticator:
    auth = auth_settings(hs256_secret=SECRET)
    return Credentials(auth, ApiKeys(MadeUpKeys(), cache_s=5), Tokens(auth, None))


def as_tenant(name: str, scope: str = "submit read cancel") -> dict[str, str]:
    return {"Authorization": f"Bearer {token(tenant=name, scope=scope)}"}


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("GET", "/v1/responses/resp_{id}", None),
        ("GET", "/v1/responses/resp_{id}?stream=true&starting_after=1", None),
        ("HEAD", "/v1/responses/resp_{id}", None),
        ("POST", "/v1/responses/resp_{id}/cancel", None),
        ("POST", "/v1/responses", {"model": "tiny", "input": "x", "previous_response_id": "resp_{id}"}),
    ],
)
async def test_a_response_of_another_tenant_is_not_found_whatever_is_asked_of_it(
    method: str, path: str, body: dict[str, Any] | None
) -> None:
    """Not even that it exists can be learned, and nothing is done to it."""
    jobs = MadeUpJobs(known=status(tenant="owner"))
    app = app_over(jobs, models=Untouched(), auth=credentials())
    answers = []
    async with http_to(app) as http:
        for job_id in (JOB_ID, NOBODYS):
            sent = {name: value.format(id=job_id) for name, value in (body or {}).items()} or None
            answer = await http.request(method, path.format(id=job_id), json=sent, headers=as_tenant("guesser"))
            answers.append((answer.status_code, answer.text.replace(job_id, "ID")))

    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert jobs.submitted == []


@pytest.mark.parametrize(
    "method, path, scope",
    [
        ("POST", "/v1/chat/completions", "submit"),
        ("POST", "/v1/completions", "submit"),
        ("POST", "/v1/responses", "submit"),
        ("GET", f"/v1/responses/resp_{JOB_ID}", "read"),
        ("POST", f"/v1/responses/resp_{JOB_ID}/cancel", "cancel"),
        ("GET", "/v1/models", "read"),
        ("GET", "/v1/models/tiny", "read"),
    ],
)
async def test_each_route_wants_its_own_scope_and_names_it(method: str, path: str, scope: str) -> None:
    """In OpenAI's body."""
    others = " ".join({"submit", "read", "cancel"} - {scope})
    async with http_to(app_over(MadeUpJobs(), auth=credentials())) as http:
        answer = await http.request(method, path, json={}, headers=as_tenant("default", others))

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert scope in answer.json()["error"]["message"]
    assert "insufficient_scope" in answer.headers["www-authenticate"]

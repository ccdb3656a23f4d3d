"""Rollouts over HTTP: the same as `codeyard models`, for whoever has the scope."""

from collections.abc import Sequence

import pytest
from support.asgi import MadeUpJobs, MadeUpModels, app_over, http_to

from codeyard.producer.gateway.auth import Caller
from codeyard.shared.access.keys import Scope

ROLLOUT = "/v1/admin/models/tiny/rollout"


class Callers:
    """Everyone is this caller."""

    def __init__(self, *scopes: Scope) -> None:
        self._caller = Caller("default", frozenset(scopes), "test")

    async def caller(self, authorization: Sequence[str], api_key: Sequence[str]) -> Caller:
        return self._caller


async def test_a_rollout_is_begun_seen_and_taken_back() -> None:
    """Each answer is the model as it is then."""
    models = MadeUpModels()
    async with http_to(app_over(MadeUpJobs(), models=models)) as http:
        before = await http.get("/v1/admin/models")
        begun = await http.post(ROLLOUT, json={"location": "/models/two", "percent": 10})
        again = await http.post(ROLLOUT, json={"location": "/models/three"})
        shared = await http.post(ROLLOUT, json={"percent": 50})
        back = await http.post("/v1/admin/models/tiny/rollback", json={"reason": "worse answers"})
        one = await http.get("/v1/admin/models/tiny")

    assert [model["alias"] for model in before.json()["models"]] == ["other", "tiny"]
    rollout = begun.json()["rollout"]
    assert (rollout["phase"], rollout["percent"], rollout["waits_for"]) == ("prepare", 10, ["w"])
    assert (again.status_code, again.json()["type"]) == (409, "/docs#rollout-refused")
    assert shared.json()["rollout"]["percent"] == 50
    assert back.json()["rollout"]["phase"] == "rolled_back"
    assert one.json() == back.json()
    assert models.known["tiny"].revision == "tiny-1"


@pytest.mark.parametrize(
    "path, body, status",
    [
        (ROLLOUT, b"{", 400),
        (ROLLOUT, b'{"percent":0}', 422),
        (ROLLOUT, b'{"lokation":"/x"}', 422),
        (ROLLOUT, b'{"percent":100}', 409),
        (ROLLOUT, b" " * 10_000, 413),
        ("/v1/admin/models/nobody/rollout", b'{"location":"/x"}', 404),
        ("/v1/admin/models/tiny/rollback", b"", 409),
    ],
)
async def test_what_cannot_be_done_is_said_and_changes_nothing(path: str, body: bytes, status: int) -> None:
    """As a problem document, like everywhere."""
    models = MadeUpModels()
    before = dict(models.known)
    async with http_to(app_over(MadeUpJobs(), models=models)) as http:
        answer = await http.post(path, content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert models.known == before


@pytest.mark.parametrize("method, path", [("GET", "/v1/admin/models"), ("POST", ROLLOUT)])
async def test_only_an_admin_may_ask(method: str, path: str) -> None:
    """A key that submits jobs must not move models."""
    ordinary = Callers(Scope.SUBMIT, Scope.READ, Scope.CANCEL)
    async with http_to(app_over(MadeUpJobs(), auth=ordinary)) as http:
        answer = await http.request(method, path, json={"location": "/x"})
    async with http_to(app_over(MadeUpJobs(), auth=Callers(Scope.ADMIN))) as http:
        allowed = await http.request(method, path, json={"location": "/x"})

    assert answer.status_code == 403
    assert allowed.status_code == 200

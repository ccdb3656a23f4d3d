"""The app with credentials: every route asks, shows a tenant its own jobs only, and gives nothing away."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from support.asgi import JOB_ID, MadeUpJobs, app_over, http_to, limits_over, status
from support.tokens import SECRET, STATIC, MadeUpKeys, MadeUpSource, auth_settings, rsa_key, some_key, token

from codeyard.producer.gateway.auth import Credentials
from codeyard.producer.gateway.jwks import KeySet
from codeyard.producer.gateway.keys import ApiKeys
from codeyard.producer.gateway.openapi import describe
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.producer.gateway.tokens import Tokens
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import JobNotFound, SettingsError
from codeyard.shared.job import job_id_for_key
from codeyard.shared.record import Event, EventKind, State
from codeyard.shared.settings import LimitSettings, load
from codeyard.shared.telemetry import JsonFormatter, TextFormatter

OPEN = {"/", "/docs", "/openapi.json", "/healthz", "/readyz"}
JOB = {"model": "tiny", "prompt": "x"}
NOBODYS = "99999999-9999-4999-8999-999999999999"
ROUTES = [
    ("GET", "/v1/jobs/{id}"),
    ("GET", "/v1/jobs/{id}/events"),
    ("HEAD", "/v1/jobs/{id}/events"),
    ("DELETE", "/v1/jobs/{id}"),
]


def credentials(store: MadeUpKeys | None = None, *, key_set: KeySet | None = None, **given: Any) -> Credentials:
    auth = auth_settings(hs256_secret=SECRET, static_key=STATIC, **given)
    return Credentials(auth, ApiKeys(store or MadeUpKeys(), cache_s=5), Tokens(auth, key_set))


def as_tenant(name: str, scope: str = "submit read cancel") -> dict[str, str]:
    return {"Authorization": f"Bearer {token(tenant=name, scope=scope)}"}


class Recording(MadeUpJobs):
    """Also says which jobs it was asked to stream or cancel."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.touched: list[str] = []

    def stream(self, job_id: str, after: int = 0) -> Any:
        self.touched.append(f"stream {job_id}")
        return super().stream(job_id, after)

    async def cancel(self, job_id: str) -> Any:
        self.touched.append(f"cancel {job_id}")
        return await super().cancel(job_id)

    async def wait(self, job_id: str, timeout: float) -> Any:
        self.touched.append(f"wait {job_id}")
        return await super().wait(job_id, timeout)


# Who gets in ---------------------------------------------------------------------------------------


async def test_every_route_but_the_open_ones_asks_for_credentials() -> None:
    """Read off the app itself: a route that is new here is closed until this list says otherwise."""
    app = app_over(MadeUpJobs(), auth=credentials(), open_metrics=False)
    routes = [route for route in app.router.routes if isinstance(route, Route)]
    closed = {route.path for route in routes} - OPEN
    assert {"/v1/jobs", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/events", "/metrics"} <= closed

    async with http_to(app) as http:
        for route in routes:
            for method in route.methods or ():
                answer = await http.request(method, route.path.replace("{job_id}", JOB_ID), json=JOB)
                if route.path in OPEN:
                    assert answer.status_code == 200, route.path
                else:
                    assert answer.status_code == 401, (method, route.path)
                    assert answer.headers["www-authenticate"] == 'Bearer realm="codeyard"'


@pytest.mark.parametrize(
    "method, path, scope",
    [
        ("POST", "/v1/jobs", "submit"),
        ("GET", "/v1/jobs", "read"),
        ("GET", f"/v1/jobs/{JOB_ID}", "read"),
        ("GET", f"/v1/jobs/{JOB_ID}/events", "read"),
        ("DELETE", f"/v1/jobs/{JOB_ID}", "cancel"),
        ("GET", "/metrics", "admin"),
    ],
)
async def test_each_route_wants_its_own_scope_and_names_it(method: str, path: str, scope: str) -> None:
    """A key that reads must not submit; the answer says what is missing."""
    others = " ".join(one.value for one in Scope if one.value not in (scope, "admin"))
    jobs = MadeUpJobs(events=[Event(seq=1, kind=EventKind.END, state=State.SUCCEEDED)])
    app = app_over(jobs, auth=credentials(), open_metrics=False)
    async with http_to(app) as http:
        refused = await http.request(method, path, json=JOB, headers=as_tenant("default", others))
        let_in = [
            await http.request(method, path, json=JOB, headers=as_tenant("default", given))
            for given in (scope, "admin")
        ]

    assert (refused.status_code, refused.json()["type"]) == (403, "/docs#forbidden")
    assert scope in refused.json()["detail"]
    assert "insufficient_scope" in refused.headers["www-authenticate"]
    assert all(answer.status_code < 300 for answer in let_in)
    documented = describe()["paths"][path.replace(JOB_ID, "{job_id}")][method.lower()]["responses"]
    assert {"401", "403"} <= set(documented)


async def test_metrics_are_open_unless_the_settings_say_otherwise() -> None:
    """A scraper on the inside has no key."""
    async with http_to(app_over(MadeUpJobs(), auth=credentials())) as http:
        assert (await http.get("/metrics")).status_code == 200


async def test_nothing_is_read_from_a_caller_before_it_is_known() -> None:
    """An upload of a megabyte costs a stranger nothing and us nothing."""

    async def endless() -> Any:
        raise AssertionError("the body was read")
        yield b""

    async with http_to(app_over(MadeUpJobs(), auth=credentials())) as http:
        transport_headers = {"Content-Type": "application/json", "Content-Length": "1000000"}
        answer = await http.post("/v1/jobs", content=endless(), headers=transport_headers)

    assert answer.status_code == 401


async def test_without_a_key_set_and_without_a_store_the_answer_is_to_try_again() -> None:
    """503: clients throw credentials away that were called wrong."""
    source, store = MadeUpSource(), MadeUpKeys()
    source.away = store.away = True
    auth = credentials(store, key_set=KeySet(source, auth_settings()))
    async with http_to(app_over(MadeUpJobs(), auth=auth)) as http:
        by_token = await http.get("/v1/jobs", headers={"Authorization": f"Bearer {token(rsa_key(), 'RS256')}"})
        by_key = await http.get("/v1/jobs", headers={"x-api-key": some_key().text})

    assert (by_token.status_code, by_token.json()["type"]) == (503, "/docs#auth-unavailable")
    assert (by_key.status_code, by_key.json()["type"]) == (503, "/docs#store-unavailable")
    assert by_token.headers["retry-after"] == by_key.headers["retry-after"] == "2"


HEADER = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=80)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.tuples(
            st.sampled_from(["authorization", "x-api-key"]),
            st.one_of(HEADER, HEADER.map("Bearer {}".format), st.just(f"Bearer {token()[:-9]}")),
        ),
        max_size=3,
    ),
    route=st.sampled_from([("POST", "/v1/jobs"), ("GET", "/v1/jobs"), *ROUTES]),
)
async def test_no_authorization_header_makes_a_server_error(
    values: list[tuple[str, str]], route: tuple[str, str]
) -> None:
    """Every byte that HTTP lets through in a header."""
    method, path = route
    async with http_to(app_over(MadeUpJobs(), auth=credentials())) as http:
        raw = [(name.encode(), value.strip().encode("latin-1")) for name, value in values]
        answer = await http.request(method, path.replace("{id}", JOB_ID), headers=raw, json=JOB)

    assert answer.status_code == 401


# Other tenants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, path", ROUTES)
@pytest.mark.parametrize("prefer", [{}, {"Prefer": "wait=60"}])
async def test_another_tenants_job_is_not_there_and_nothing_happens_to_it(
    method: str, path: str, prefer: Mapping[str, str]
) -> None:
    """The very answer that a job gets which never was: a guessed or leaked id tells nothing, and at once."""
    jobs = Recording(known=status(tenant="victim"))
    async with http_to(app_over(jobs, auth=credentials())) as http:
        headers = {**as_tenant("attacker", "admin"), **prefer}
        theirs = await http.request(method, path.replace("{id}", JOB_ID), headers=headers)
        nobodys = await http.request(method, path.replace("{id}", NOBODYS), headers=headers)
        touched = list(jobs.touched)
        own = await http.request(method, path.replace("{id}", JOB_ID), headers=as_tenant("victim"))

    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text.replace(JOB_ID, NOBODYS) == nobodys.text
    assert {name: value for name, value in theirs.headers.items() if name != "date"} == dict(nobodys.headers)
    assert touched == []
    assert own.status_code == 200


async def test_no_call_on_a_tenants_jobs_reaches_anothers_job() -> None:
    """Each asks by itself: other protocols call them in another order than the HTTP routes do."""
    jobs = Recording(known=status(tenant="victim"))

    def attacker() -> TenantJobs:
        return TenantJobs(jobs, "attacker", limits_over(LimitSettings()))

    for call in (
        attacker().status(JOB_ID),
        attacker().wait(JOB_ID, 60.0),
        anext(attacker().stream(JOB_ID)),
        attacker().cancel(JOB_ID),
    ):
        with pytest.raises(JobNotFound):
            await call
    assert await attacker().recent(20) == []

    assert jobs.touched == []


async def test_the_list_holds_only_the_tenants_own_jobs() -> None:
    """Also when the newest of the fleet are all somebody else's."""

    asked: list[int] = []

    class Many(MadeUpJobs):
        async def recent(self, limit: int = 20) -> list[Any]:
            asked.append(limit)
            everyone = ["noisy"] * 300 + ["quiet"] + ["noisy"] * 100
            return [status(tenant=tenant, key=f"k{n}") for n, tenant in enumerate(everyone)][:limit]

    async with http_to(app_over(Many(), auth=credentials())) as http:
        quiet = (await http.get("/v1/jobs?limit=5", headers=as_tenant("quiet"))).json()["jobs"]
        noisy = (await http.get("/v1/jobs?limit=5", headers=as_tenant("noisy"))).json()["jobs"]
        nobody = (await http.get("/v1/jobs?limit=5", headers=as_tenant("nobody"))).json()["jobs"]

    assert [job["key"] for job in quiet] == ["k300"]
    assert [job["key"] for job in noisy] == [f"k{n}" for n in range(5)]
    assert nobody == []
    assert max(asked) <= 1_000


async def test_the_same_key_of_two_tenants_is_two_jobs() -> None:
    """Attaching by a guessed key would read another's result."""
    jobs = MadeUpJobs()
    async with http_to(app_over(jobs, auth=credentials())) as http:
        for tenant in ("acme", "bravo"):
            headers = {**as_tenant(tenant), "Idempotency-Key": "release-1"}
            assert (await http.post("/v1/jobs", json=JOB, headers=headers)).status_code == 202

    assert [(one["tenant"], one["job_id"]) for one in jobs.submitted] == [
        ("acme", job_id_for_key("acme", "release-1")),
        ("bravo", job_id_for_key("bravo", "release-1")),
    ]


async def test_a_tenant_is_never_taken_from_the_body_or_another_header() -> None:
    """Only from the credential."""
    jobs = MadeUpJobs()
    async with http_to(app_over(jobs, auth=credentials())) as http:
        in_body = await http.post("/v1/jobs", json={**JOB, "tenant": "victim"}, headers=as_tenant("acme"))
        headers = {**as_tenant("acme"), "tenant": "victim", "x-tenant": "victim", "x-tenant-id": "victim"}
        await http.post("/v1/jobs?tenant=victim", json=JOB, headers=headers)

    assert (in_body.status_code, in_body.json()["field"]) == (422, "tenant")
    assert [one["tenant"] for one in jobs.submitted] == ["acme"]


# Secrets -------------------------------------------------------------------------------------------


async def test_secrets_are_in_no_answer_and_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong, at any level."""
    made, stranger = some_key(), some_key()
    store = MadeUpKeys(made.key)
    good = token()
    sent = [
        *(
            {"Authorization": f"Bearer {text}"}
            for text in (made.text, stranger.text, STATIC, good, good[:-4], good + "x")
        ),
        *({"x-api-key": text} for text in (made.text, stranger.text, STATIC + "y", SECRET)),
        {"Authorization": f"Basic {STATIC}"},
        {"Authorization": f"Bearer {made.text}", "x-api-key": STATIC},
    ]
    answers: list[httpx.Response] = []
    failing = MadeUpJobs(RuntimeError("what nobody expected"))
    with caplog.at_level(logging.DEBUG):
        for jobs in (MadeUpJobs(), failing):
            async with http_to(app_over(jobs, auth=credentials(store))) as http:
                for headers in sent:
                    answers += [
                        await http.post("/v1/jobs", json=JOB, headers=headers),
                        await http.get(f"/v1/jobs/{JOB_ID}", headers=headers),
                    ]

    assert {answer.status_code for answer in answers} >= {202, 401, 403, 404, 500}
    logged = "".join(
        formatter.format(record) for formatter in (TextFormatter(), JsonFormatter()) for record in caplog.records
    )
    assert "request_failed" in logged
    told = logged + "".join(answer.text + str(answer.headers) for answer in answers)
    secrets = [
        STATIC,
        SECRET,
        good.split(".")[2],
        made.text.split("_")[2],
        stranger.text.split("_")[2],
        made.key.digest,
    ]
    for secret in secrets:
        assert secret not in told
        assert secret[:20] not in told


def test_secrets_of_the_settings_are_masked_wherever_settings_are_printed() -> None:
    """repr for logs, JSON for `codeyard doctor`, and the error about a setting beside them."""
    auth = auth_settings(hs256_secret=SECRET, static_key=STATIC)

    for printed in (repr(auth), str(auth), auth.model_dump_json(), str(auth.model_dump())):
        assert SECRET not in printed
        assert STATIC not in printed


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"CODEYARD_AUTH_HS256_SECRET": "hunter2-hunter2"}, "at least 32 bytes"),
        ({"CODEYARD_AUTH_HS256_SECRET": "hunter2-" * 5}, "CODEYARD_AUTH_ISSUER"),
        ({"CODEYARD_AUTH_STATIC_KEY": "hunter2-" * 5, "CODEYARD_AUTH_MODE": "perhaps"}, "CODEYARD_AUTH_MODE"),
        ({"CODEYARD_AUTH_STATIC_KEY": "hunter2-" * 5, "CODEYARD_AUTH_TYPO": "hunter2-" * 5}, "CODEYARD_AUTH_TYPO"),
        ({"CODEYARD_AUTH": "hunter2"}, "auth"),
        ({"CODEYARD_AUTH_JWKS_URL": "http://keys.example/"}, "https"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_without_any_secret(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message ends in a log or on a screen that is shared."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        load()

    assert said.lower() in str(caught.value).lower()
    assert not re.search("hunter2", str(caught.value))


async def test_the_log_says_who_was_calling_by_the_id_of_the_key(caplog: pytest.LogCaptureFixture) -> None:
    """The person on call finds the tenant, and the key to revoke."""
    made = some_key(tenant="acme")
    with caplog.at_level(logging.DEBUG):
        async with http_to(app_over(MadeUpJobs(RuntimeError("odd")), auth=credentials(MadeUpKeys(made.key)))) as http:
            await http.get(f"/v1/jobs/{JOB_ID}", headers={"x-api-key": made.text})
            await http.get(f"/v1/jobs/{JOB_ID}")

    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.endswith("edge")]
    known, counted, unknown = map(json.loads, lines)
    assert (known["event"], known["tenant"], known["caller"]) == ("request_failed", "acme", f"key {made.key.id}")
    assert (counted["event"], counted["caller"]) == ("http_request", f"key {made.key.id}")
    assert (unknown["status"], "caller" in unknown) == (401, False)


async def test_a_job_that_is_not_there_is_told_apart_from_none_of_them() -> None:
    """Sanity: the tenant's own missing job is the same 404."""
    async with http_to(app_over(MadeUpJobs(JobNotFound(JOB_ID)), auth=credentials())) as http:
        assert (await http.get(f"/v1/jobs/{JOB_ID}", headers=as_tenant("acme"))).status_code == 404

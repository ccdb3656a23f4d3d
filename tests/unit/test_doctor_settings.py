"""Where a setting comes from, what must not be shown, and names that were misspelt."""

import json
from pathlib import Path

import pytest
from support.doctor import healthy, only, place

from codeyard.cli.checks.check import Place, Status
from codeyard.cli.checks.settings import (
    HIDDEN,
    Effective,
    check_settings,
    effective,
    explain_refusal,
    unknown_variables,
    variables,
    without_secrets,
)
from codeyard.shared.errors import SettingsError
from codeyard.shared.settings import load

PASSWORD = "correct-horse-battery-staple-42-and-more"


def shown(there: Place) -> dict[str, Effective]:
    return {one.variable: one for one in effective(there)}


def test_every_setting_is_shown_once_with_its_default() -> None:
    """What is left out there is what somebody will need."""
    found = effective(place())
    assert [one.variable for one in found] == list(variables())
    assert {one.source for one in found} == {"default"}
    assert "CODEYARD_STORE_LEASE_S" in variables()
    assert json.loads(json.dumps([one.value for one in found]))


def test_the_source_of_each_value_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line over environment over file over default; the one that won is named."""
    file = tmp_path / "yard.yaml"
    file.write_text("namespace: filed\nstore: {lease_s: 4, renew_s: 2}\nmodels: {coder: {adapters: {a: /a}}}\n")
    environment = {"CODEYARD_STORE_LEASE_S": "5", "codeyard_log_level": "DEBUG", "CODEYARD_WORKER": '{"shards": 2}'}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {"broker": {"url": "sqlite:///given.db"}, "namespace": None}
    settings = load(file, {"broker": given["broker"]})

    found = shown(Place(settings, environment, file, given))

    assert {name: (found[name].value, found[name].source) for name in found if found[name].source != "default"} == {
        "CODEYARD_NAMESPACE": ("filed", "file"),
        "CODEYARD_LOG_LEVEL": ("DEBUG", "environment"),
        "CODEYARD_BROKER_URL": ("sqlite:///given.db", "argument"),
        "CODEYARD_STORE_LEASE_S": (5.0, "environment"),
        "CODEYARD_STORE_RENEW_S": (2.0, "file"),
        "CODEYARD_WORKER_SHARDS": (2, "environment"),
        "CODEYARD_MODELS": ({"coder": {"engine": {}, "adapters": {"a": "/a"}}}, "file"),
    }


def test_no_secret_is_shown_wherever_it_stands() -> None:
    """The output goes into issues and chats."""
    there = place(
        broker={"url": f"amqp://user:{PASSWORD}@host/"},
        store={"url": f"redis://host/0?password={PASSWORD}&socket_timeout=3"},
        auth={
            "static_key": PASSWORD,
            "hs256_secret": PASSWORD,
            "issuer": "https://issuer",
            "audience": "yard",
        },
        models={"coder": {"adapters": {"api_token": PASSWORD}}},
    )
    found = effective(there)
    assert PASSWORD not in json.dumps([one.value for one in found])
    values = {one.variable: one.value for one in found}
    assert values["CODEYARD_AUTH_STATIC_KEY"] == HIDDEN
    assert values["CODEYARD_AUTH_ISSUER"] == "https://issuer"
    assert values["CODEYARD_STORE_URL"] == f"redis://host/0?password={HIDDEN}&socket_timeout=3"
    assert values["CODEYARD_MODELS"]["coder"]["adapters"]["api_token"] == HIDDEN


@pytest.mark.parametrize(
    "url,expected",
    [
        ("sqlite:////var/yard.db", "sqlite:////var/yard.db"),
        ("redis://:pw@h:1/2", "redis://:***@h:1/2"),
        ("rediss://h?ssl_ca_certs=/ca.pem", "rediss://h?ssl_ca_certs=/ca.pem"),
        ("redis://h?username=u&password=pw", "redis://h?username=u&password=***"),
    ],
)
def test_a_url_keeps_all_but_its_secrets(url: str, expected: str) -> None:
    """One must still see which server it is."""
    assert without_secrets(url) == expected


MISSPELT = {
    "CODEYARD_BROKR_URL": "did you mean CODEYARD_BROKER_URL?",
    "CODEYARD_WORKER_MODELS": "did you mean CODEYARD_WORKER_MODEL?",
    "CODEYARD_LOGLEVEL": "did you mean CODEYARD_LOG_LEVEL?",
    "CODEYARD_COFNIG": "did you mean CODEYARD_CONFIG?",
    "CODEYARD_QQQ": "unset it",
}


@pytest.mark.parametrize("name,way_out", MISSPELT.items())
def test_a_misspelt_variable_is_told_with_what_it_may_have_meant(name: str, way_out: str) -> None:
    """It would be passed over in silence, and the value with it stays out of sight."""
    [finding] = unknown_variables({name: PASSWORD, "PATH": "/bin"})
    assert name in finding.text
    assert way_out in finding.way_out
    assert PASSWORD not in f"{finding.text}{finding.way_out}"


def test_what_is_no_mistake_is_not_told() -> None:
    """Settings in either case, groups as JSON, models by alias, and the test suite's own."""
    environment = {
        "CODEYARD_STORE_LEASE_S": "3",
        "codeyard_store_renew_s": "1",
        "CODEYARD_STORE": "{}",
        "CODEYARD_MODELS_CODER": "{}",
        "CODEYARD_CONFIG": "x",
        "CODEYARD_TEST_STORE_URL": "x",
        "OTHER": "x",
    }
    assert list(unknown_variables(environment)) == []


def test_variables_that_kubernetes_makes_are_recognised() -> None:
    """A service named codeyard-gateway puts six of them into every pod, one of which looks like a setting."""
    environment = {
        "CODEYARD_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "CODEYARD_GATEWAY_SERVICE_PORT": "8080",
        "CODEYARD_GATEWAY_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    findings = list(unknown_variables(environment))
    assert len(findings) == 3
    assert all("enableServiceLinks: false" in finding.way_out for finding in findings)

    refused = refusal(CODEYARD_GATEWAY_PORT="tcp://10.0.0.1:8080")
    [finding] = explain_refusal(refused, {"CODEYARD_GATEWAY_PORT": "tcp://10.0.0.1:8080"})
    assert "enableServiceLinks: false" in finding.way_out


def refusal(**environment: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsError) as refused:
            load()
    return str(refused.value)


def test_settings_that_cannot_be_read_are_told_one_by_one() -> None:
    """Each with its variable; a name that a group does not have with the one that was meant."""
    findings = explain_refusal(
        refusal(
            CODEYARD_STORE_LEASE_S="soon",
            CODEYARD_BROKER_URLL=f"amqp://u:{PASSWORD}@h",
            CODEYARD_AUTH_HS256_SECRET="short",
            CODEYARD_MODELS=f'{{"coder": {{"engine": {{"engine_args": {{"hf_token": "{PASSWORD}"}}}}}}}}',
        ),
        {},
    )
    assert {finding.status for finding in findings} == {Status.FAIL}
    texts = {finding.text.partition(":")[0].split()[0]: finding for finding in findings}
    assert {"CODEYARD_STORE_LEASE_S", "CODEYARD_BROKER_URLL", "CODEYARD_AUTH_HS256_SECRET"} <= set(texts)
    assert texts["CODEYARD_BROKER_URLL"].way_out == "did you mean CODEYARD_BROKER_URL?"
    assert PASSWORD not in str(findings)


async def test_a_summary_says_how_much_comes_from_where(tmp_path: Path) -> None:
    """The first thing to look at: was the file read at all?"""
    file = tmp_path / "yard.yaml"
    file.write_text("namespace: filed\n")
    there = place({"CODEYARD_LOG_LEVEL": "DEBUG", "CODEYARD_BROKR_URL": "x"}, config=file, namespace="filed")
    findings = await check_settings(there)
    assert only(findings, Status.WARN) == ["CODEYARD_BROKR_URL is no setting, and is ignored"]
    [text] = only(findings, Status.OK)
    assert text.startswith(f"1 from the environment, 1 from {file}; ")
    assert healthy(await check_settings(place()))

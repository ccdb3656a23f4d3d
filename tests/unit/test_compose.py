"""docker-compose.yml, checked without Docker: the specification's schema, and what a schema cannot know."""

import importlib
import json
import re
import subprocess
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from pydantic import SecretStr

from codeyard.cli.main import COMMANDS
from codeyard.shared import settings
from codeyard.shared.settings import Settings

ROOT = Path(__file__).parents[2]
OURS = ["gateway", "worker", "worker-gpu"]
SECRETS = {
    "RABBITMQ_PASSWORD": "s3cret-one",
    "REDIS_PASSWORD": "s3cret-two",
    "GATEWAY_API_KEY": "s3cret-three-of-at-least-32-characters",
}


def test_the_file_is_valid_by_the_compose_specification() -> None:
    """No Docker runs where these tests do; the schema is the one that Docker Compose itself validates with."""
    schema = json.loads((resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())

    jsonschema.Draft202012Validator(schema).validate(raw())
    jsonschema.Draft202012Validator(schema).validate(with_defaults())


def test_every_variable_is_in_the_example_and_no_other() -> None:
    """Someone who fills in .env.example has said all there is to say."""
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", (ROOT / "docker-compose.yml").read_text()))

    assert used == set(env_example())


@pytest.mark.parametrize("service", OURS)
def test_a_service_gets_settings_that_exist_and_are_valid(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable would be ignored, and the service would run on its default."""
    environment = with_defaults()["services"][service]["environment"]
    for name, value in environment.items():
        assert isinstance(value, str), f"{name} must be quoted: YAML would make it {value!r}"
        monkeypatch.setenv(name, value)

    loaded = settings.load()

    for name, value in environment.items():
        if not name.startswith("CODEYARD_"):
            continue
        owner, _, field = name.removeprefix("CODEYARD_").lower().partition("_")
        group = getattr(loaded, owner) if owner in Settings.model_fields and field else loaded
        field = field if group is not loaded else f"{owner}_{field}"
        assert field in type(group).model_fields, f"{name} is no setting"
        got = getattr(group, field)
        assert (got.get_secret_value() if isinstance(got, SecretStr) else str(got)) == value


@pytest.mark.parametrize("service", OURS)
def test_a_service_starts_with_a_command_line_that_parses(service: str) -> None:
    """The image's entry point is `codeyard`."""
    for words in (with_defaults()["services"][service]["command"], dockerfile(service).command):
        module, name = COMMANDS[words[0]]
        command: click.Command = getattr(importlib.import_module(module), name)
        command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize("service", OURS)
def test_a_service_waits_for_healthy_servers_and_uses_the_names_they_have(service: str) -> None:
    """A worker that starts before RabbitMQ would only restart in a loop."""
    spec = with_defaults()["services"][service]

    assert {name: needs["condition"] for name, needs in spec["depends_on"].items()} == {
        "rabbitmq": "service_healthy",
        "redis": "service_healthy",
    }
    assert "@rabbitmq:5672/" in spec["environment"]["CODEYARD_BROKER_URL"]
    assert "@redis:6379/" in spec["environment"]["CODEYARD_STORE_URL"]


def test_every_service_has_a_health_check_and_comes_back_after_a_restart() -> None:
    """`docker compose ps` tells what is wrong, and a reboot needs nobody."""
    for name, spec in with_defaults()["services"].items():
        assert spec["healthcheck"]["test"], name
        assert spec["restart"] == "unless-stopped", name


@pytest.mark.parametrize("service", OURS)
def test_a_health_check_asks_a_port_that_the_service_listens_on(service: str) -> None:
    """A wrong port would make a good service look dead for ever."""
    spec = with_defaults()["services"][service]
    probed = re.search(r"127\.0\.0\.1:(\d+)/(\w+)", spec["healthcheck"]["test"][-1])
    assert probed is not None

    kind = "GATEWAY" if service == "gateway" else "WORKER_METRICS"
    assert probed[1] == spec["environment"][f"CODEYARD_{kind}_PORT"]
    assert probed[2] == ("readyz" if service == "gateway" else "metrics")
    assert int(probed[1]) in dockerfile(service).exposed


@pytest.mark.parametrize("service", OURS)
def test_a_service_is_given_longer_to_stop_than_it_takes(service: str) -> None:
    """SIGKILL in the middle of a drain would make other workers repeat its jobs."""
    grace_s = int(with_defaults()["services"][service]["stop_grace_period"].removesuffix("s"))
    needed_s = 0.0 if service == "gateway" else settings.WorkerSettings().drain_s

    assert grace_s > needed_s


def test_no_secret_is_written_down() -> None:
    """Passwords come from .env, which is not committed, and have no default."""
    for name in SECRETS:
        assert not env_example()[name], f"{name} has a value in .env.example"
    uses = re.findall(r"\$\{(\w*(?:PASSWORD|API_KEY))(.*?)\}", (ROOT / "docker-compose.yml").read_text())
    assert {name for name, _ in uses} == set(SECRETS)
    assert all(rest.startswith(":?") for _, rest in uses), "a password with a default"
    for spec in raw()["services"].values():
        for name, value in spec["environment"].items():
            if re.search("PASS|AUTH(?!_MODE)|TOKEN|SECRET|KEY", name) or "://" in str(value):
                assert "${" in value, f"{name} is literal"
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_gateway_asks_for_credentials() -> None:
    """It listens on all addresses of its container, where it refuses to start without."""
    environment = with_defaults()["services"]["gateway"]["environment"]

    assert environment["CODEYARD_AUTH_MODE"] == "on"
    assert environment["CODEYARD_AUTH_STATIC_KEY"] == SECRETS["GATEWAY_API_KEY"]
    assert not any("AUTH" in name for name in with_defaults()["services"]["worker"]["environment"])


def test_one_command_writes_the_secrets_and_never_over_those_there(tmp_path: Path) -> None:
    """`make up` on a new checkout just starts; on an old one it must not lock anyone out."""
    (tmp_path / ".env.example").write_text((ROOT / ".env.example").read_text())
    script = ROOT / "infra/local/make-env.sh"

    done = subprocess.run([script, tmp_path], capture_output=True, text=True, timeout=30, check=True)
    written = (tmp_path / ".env").read_text()
    subprocess.run([script, tmp_path], capture_output=True, timeout=30, check=True)

    values = dict(line.split("=", 1) for line in written.splitlines() if line and not line.startswith("#"))
    assert (tmp_path / ".env").read_text() == written
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert all(re.fullmatch("[0-9a-f]{48}", values[name]) for name in SECRETS)
    assert len({values[name] for name in SECRETS}) == len(SECRETS)
    assert set(values) == set(env_example())
    assert not any(values[name] in done.stdout for name in SECRETS)


def test_only_this_machine_is_served() -> None:
    """A published port is open to the network unless it names an address, whatever the firewall says."""
    for name, spec in with_defaults()["services"].items():
        for port in spec.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"


def test_what_was_promised_is_on_a_named_volume() -> None:
    """`docker compose down` and up again must not lose an accepted job."""
    services = with_defaults()["services"]

    assert "rabbitmq-data:/var/lib/rabbitmq" in services["rabbitmq"]["volumes"]
    assert services["rabbitmq"]["hostname"]  # without one, a new container is a new, empty node
    assert "redis-data:/data" in services["redis"]["volumes"]
    mounted = {volume.split(":")[0] for spec in services.values() for volume in spec.get("volumes", [])}
    assert mounted == set(raw()["volumes"])


def test_redis_keeps_what_it_confirmed_and_forgets_nothing_to_make_room() -> None:
    """The defaults of the image do neither."""
    command = with_defaults()["services"]["redis"]["command"][-1]

    for option in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction", "--requirepass"):
        assert option in command


def test_servers_have_the_versions_the_tests_run_on() -> None:
    """One pair of images, here and in the integration tests."""
    from support.services import RABBITMQ_IMAGE, REDIS_IMAGE

    assert with_defaults()["services"]["rabbitmq"]["image"] == RABBITMQ_IMAGE
    assert with_defaults()["services"]["redis"]["image"] == REDIS_IMAGE


def test_the_gpu_worker_runs_only_when_asked_for_and_gets_the_gpus() -> None:
    """Without a GPU the reservation would fail the whole start."""
    services = with_defaults()["services"]

    assert [name for name, spec in services.items() if spec.get("profiles")] == ["worker-gpu"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["worker-gpu"]["environment"]["CODEYARD_WORKER_ENGINE"] == "vllm"
    assert services["worker"]["environment"]["CODEYARD_WORKER_ENGINE"] == "torch"


@pytest.mark.parametrize("service", OURS)
def test_an_image_runs_without_root_and_installs_extras_that_exist(service: str) -> None:
    """The file system is read-only and no capability is left; root would gain nothing."""
    image = dockerfile(service)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert image.user.isdigit()
    assert image.user != "0"
    assert image.extras <= set(extras)
    for source in image.copied:
        assert (ROOT / source).exists(), f"{source} is not in the build context"
        assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines(), f"{source} is ignored"
    for volume in with_defaults()["services"][service].get("volumes", []):
        assert f"-g {image.user} {volume.split(':')[1]}" in image.text, "a volume takes its owner from the image"


class Dockerfile:
    """What the tests ask of one."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        self.user = re.findall(r"^USER (\S+)", self.text, re.MULTILINE)[-1]
        self.exposed = {int(port) for port in re.findall(r"^EXPOSE (\d+)", self.text, re.MULTILINE)}
        self.command = json.loads(re.findall(r"^CMD (\[.*\])", self.text, re.MULTILINE)[-1])
        self.extras = {
            extra for listed in re.findall(r"install '\.\[([\w,-]+)\]'", self.text) for extra in listed.split(",")
        }
        self.copied = [
            source
            for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", self.text, re.MULTILINE)
            for source in sources.split()
        ]


def dockerfile(service: str) -> Dockerfile:
    return Dockerfile(ROOT / raw()["services"][service]["build"]["dockerfile"])


@cache
def raw() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@cache
def with_defaults() -> dict[str, Any]:
    """The file as Compose reads it with .env.example, passwords filled in."""
    values = {name: value for name, value in env_example().items() if value} | SECRETS
    text = (ROOT / "docker-compose.yml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(interpolated(text, values))
    return loaded


def interpolated(text: str, values: dict[str, str]) -> str:
    """`${NAME:-default}`, `${NAME:?message}` and `$$`, as the specification defines them."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, kind, rest = match[1], match[2], match[3]
        if name in values:
            return values[name]
        assert kind != ":?", f"{name} has no value"
        return str(rest or "")

    return re.sub(r"\$\$|\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


@cache
def env_example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}

"""Where callbacks may go: what is written into `callback_url` must not lead into the network behind the gateway."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from codeyard.producer.webhooks.policy import Policy
from codeyard.producer.webhooks.sending import Fate, Sender
from codeyard.shared.errors import InvalidJob, SettingsError
from codeyard.shared.settings import WebhookSettings, load

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
EVERYWHERE = ("hooks.example.com", "*.example.org", "hooks.example.net:8443", "169.254.169.254", "[::1]", "localhost")


def policy(**settings: Any) -> Policy:
    return Policy(WebhookSettings(**{"allowed_hosts": EVERYWHERE, "secret": SECRET, **settings}))


@pytest.mark.parametrize(
    "url, authority, path",
    [
        ("https://hooks.example.com", "hooks.example.com", "/"),
        ("https://hooks.example.com?x=1", "hooks.example.com", "/?x=1"),
        ("https://HOOKS.example.com:443/a/b?c=%20", "hooks.example.com", "/a/b?c=%20"),
        ("https://a.b.example.org/x", "a.b.example.org", "/x"),
        ("https://hooks.example.net:8443/x", "hooks.example.net:8443", "/x"),
    ],
)
def test_an_allowed_url_is_taken_as_it_is(url: str, authority: str, path: str) -> None:
    """What was checked is what is asked."""
    target = policy().target(url)

    assert (target.authority, target.path) == (authority, path)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",  # another host
        "https://hooks.example.com.evil.com/",
        "https://evilhooks.example.com/",
        "https://example.org/",  # the wildcard stands for a name in front
        "https://evilexample.org/",
        "https://hooks.example.com:8443/",  # the port was not allowed
        "https://hooks.example.net/",
        "http://hooks.example.com/",  # in the clear
        "https://user@hooks.example.com/",
        "https://hooks.example.com:x@evil.com/",
        "https://hooks.example.com@evil.com/",
        "https://evil.com\\@hooks.example.com/",
        "https://evil.com#hooks.example.com",
        "https://hooks.example.com/#x",
        "https://hooks.example.com\t.evil.com/",
        "https://hooks%2eexample.com/",
        "https://hooks.example.com./",
        "https://[::1%25eth0]/",
        "https:///hooks.example.com/",
        "https:hooks.example.com",
        "//hooks.example.com/",
        "hooks.example.com",
        "file:///etc/passwd",
        "gopher://hooks.example.com/",
        "ftp://hooks.example.com/",
        "https://hooks.example.com:0/",
        "https://hooks.example.com:65536/",
        "https://hooks.example.com:443:443/",
        "https://hooks.example.com/\r\nX-Injected: 1",
        "https://hooks.example.com/ HTTP/1.1\r\nHost: evil.com",
        "https://hooks.example.com/\u2603",
        "https://hooks\u3002example.com/",  # an ideographic full stop, which some resolvers take for one
        "",
    ],
)
def test_a_url_that_is_not_plainly_an_allowed_host_is_refused(url: str) -> None:
    """Parsers differ in what they read into the rest."""
    with pytest.raises(InvalidJob) as refused:
        policy().target(url)

    assert refused.value.field == "callback_url"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # where clouds keep credentials
        "100.64.0.1",  # carriers' own
        "0.0.0.0",
        "192.0.0.8",
        "198.18.0.1",
        "224.0.0.1",
        "224.0.1.1",  # multicast, and global all the same
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "fd12:3456:789a::1",
        "fec0::1",  # site-local, deprecated and still routed somewhere
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",  # mapped
        "::ffff:10.0.0.1",
        "::127.0.0.1",  # compatible
        "64:ff9b::7f00:1",  # NAT64
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",  # 6to4
        "2002:a9fe:a9fe::1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",  # Teredo, of 127.0.0.1
    ],
)
def test_no_address_that_is_not_public_is_connected_to(address: str) -> None:
    """Private, loopback, link-local, and IPv4 ones in IPv6 clothes."""
    assert policy().refused(ipaddress.ip_address(address)) is not None


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_public_addresses_are(address: str) -> None:
    """Or nobody would be told anything."""
    assert policy().refused(ipaddress.ip_address(address)) is None


def test_a_private_network_that_was_configured_is_connected_to_and_no_other() -> None:
    """Receivers in one's own network are the operator's to allow."""
    own = policy(private_networks=["10.20.0.0/16"])

    assert own.refused(ipaddress.ip_address("10.20.3.4")) is None
    assert own.refused(ipaddress.ip_address("::ffff:10.20.3.4")) is None
    assert own.refused(ipaddress.ip_address("10.21.3.4")) is not None
    assert own.refused(ipaddress.ip_address("127.0.0.1")) is not None


@pytest.mark.parametrize("url", ["https://169.254.169.254/latest/meta-data", "https://[::1]/"])
def test_an_address_written_as_such_is_refused_when_the_job_comes(url: str) -> None:
    """Even if the host was allowed by mistake, and before anything is queued."""
    with pytest.raises(InvalidJob, match="not a public one"):
        policy().check(url, "default")


def test_without_allowed_hosts_every_callback_is_refused_and_says_which_setting() -> None:
    """The default: nothing is told to anyone."""
    with pytest.raises(InvalidJob, match="CODEYARD_WEBHOOK_ALLOWED_HOSTS"):
        Policy(WebhookSettings()).check("https://hooks.example.com/", "default")


def test_a_tenant_without_a_secret_gets_no_callbacks() -> None:
    """An unsigned message is one that anybody can send."""
    some = policy(secret=None, secrets={"team-a": SECRET})

    some.check("https://hooks.example.com/", "team-a")
    with pytest.raises(InvalidJob, match="no secret"):
        some.check("https://hooks.example.com/", "team-b")


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_hosts": ("hooks.example.com",)},  # nothing to sign with
        {"secret": "hunter2"},
        {"secret": "whsec_c2hvcnQ="},
        {"secret": "whsec_!!!"},
        {"secret": f"{SECRET} whsec_!!!"},
        {"secrets": {"team-a": "whsec_c2hvcnQ="}},
        {"allowed_hosts": ("*",), "secret": SECRET},
        {"allowed_hosts": ("*.*.com",), "secret": SECRET},
        {"allowed_hosts": ("https://hooks.example.com",), "secret": SECRET},
        {"allowed_hosts": ("hooks.example.com/path",), "secret": SECRET},
    ],
)
def test_settings_that_would_not_hold_are_refused_at_start(settings: dict[str, Any]) -> None:
    """A wildcard over everything is no list of hosts."""
    with pytest.raises(ValidationError):
        WebhookSettings(**settings)


def test_a_refused_secret_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was mistyped is most of the secret."""
    monkeypatch.setenv("CODEYARD_WEBHOOK_SECRET", "whsec_hunter2hunter2")

    with pytest.raises(SettingsError, match="CODEYARD_WEBHOOK_SECRET") as refused:
        load()

    assert "hunter2" not in str(refused.value)


def test_two_secrets_sign_while_one_is_changed() -> None:
    """Receivers and gateways do not change theirs in the same second."""
    both = WebhookSettings(allowed_hosts=("a.example.com",), secret=f"{SECRET} whsec_{'A' * 32}")

    assert len(both.keys_of("default")) == 2


@given(st.text(max_size=60) | st.from_regex(r"https?://[a-z0-9.@:\[\]\\/?#%-]{0,40}", fullmatch=True))
def test_whatever_is_written_is_a_target_of_an_allowed_host_or_refused(url: str) -> None:
    """No other error, and no host that is not in the list."""
    try:
        target = policy(allow_http=True).target(url)
    except InvalidJob:
        return
    assert target.host in {"hooks.example.com", "hooks.example.net", "169.254.169.254", "::1", "localhost"} or (
        target.host.endswith(".example.org")
    )
    assert target.path.startswith("/")
    assert not set(url) & set("\r\n @#\\")


async def test_of_a_names_many_addresses_a_single_private_one_refuses_all() -> None:
    """Whoever owns the name chooses which one we would try."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.1"]

    sender = Sender(policy(), timeout_s=5.0, resolve=resolve)

    answer = await sender.send("https://hooks.example.com/", {}, b"{}")

    assert (answer.fate, "10.0.0.1" in answer.reason) == (Fate.HOPELESS, False)


async def test_a_name_that_stands_for_this_machine_is_refused_by_the_real_resolver() -> None:
    """The list allows the name; its address is what counts."""
    answer = await Sender(policy(), timeout_s=5.0).send("https://localhost/", {}, b"{}")

    assert answer.fate is Fate.HOPELESS


async def test_a_name_that_no_resolver_would_take_is_a_failure_and_no_crash() -> None:
    """A label over 63 characters makes the standard library raise something else than OSError."""
    answer = await Sender(policy(), timeout_s=5.0).send(f"https://{'a' * 64}.example.org/", {}, b"{}")

    assert answer.fate is Fate.FAILED

"""Where callbacks may go: which URLs are taken with a job, and which addresses are connected to.

Promise: what `target` returns is what will be asked, part by part; nothing is parsed a second time by something
that may read it differently. A name that is allowed may still stand for an address that is not: `refused` is asked
about every address, after the name was resolved, and only an address that passed is connected to.
Called by: gateway (when a job comes), webhooks.sending (when it is told).
"""

import ipaddress
import re
from dataclasses import dataclass

from codeyard.shared.errors import InvalidJob
from codeyard.shared.settings import WebhookSettings

FIELD = "callback_url"
NOT_PUBLIC = "the host stands for an address that is not a public one"
DEFAULT_PORTS = {"https": 443, "http": 80}
SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48")))
# Of IANA's special-purpose registries, what `is_global` of Python before 3.12.4 takes for public.
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Narrower than RFC 3986 on purpose: no user, no fragment, no backslash, nothing encoded in the host.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[!-Z\[\]^-~]*)?(?:\?[!-Z\[\]^-~]*)?)"
)


@dataclass(frozen=True, slots=True)
class Target:
    scheme: str
    host: str  # lower case, without brackets
    port: int
    path: str  # and query; begins with /

    @property
    def authority(self) -> str:
        """For the Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if DEFAULT_PORTS[self.scheme] == self.port else f"{host}:{self.port}"

    def at(self, address: str) -> str:
        """The URL with the address in place of the name."""
        host = f"[{address}]" if ":" in address else address
        return f"{self.scheme}://{host}:{self.port}{self.path}"


class Policy:
    def __init__(self, settings: WebhookSettings) -> None:
        self._settings = settings

    def check(self, url: str, tenant: str) -> None:
        """A job that comes with this callback. Raises InvalidJob saying why it is not taken."""
        if not self._settings.allowed_hosts:
            raise InvalidJob("callbacks are off here: CODEYARD_WEBHOOK_ALLOWED_HOSTS names no host", field=FIELD)
        target = self.target(url)
        if not self._settings.keys_of(tenant):
            raise InvalidJob("no secret to sign callbacks with is configured for this tenant", field=FIELD)
        if (literal := _address(target.host)) is not None and (reason := self.refused(literal)):
            raise InvalidJob(reason, field=FIELD)

    def target(self, url: str) -> Target:
        """Raises InvalidJob."""
        found = _URL.fullmatch(url)
        if found is None or "#" in url:
            raise InvalidJob("an https URL of a host name, without user, password or fragment", field=FIELD)
        scheme, host = found["scheme"], found["host"].lower().strip("[]")
        port = int(found["port"] or DEFAULT_PORTS[scheme])
        if scheme == "http" and not self._settings.allow_http:
            raise InvalidJob("only https is allowed here", field=FIELD)
        if not 0 < port < 65_536 or not self._allows(scheme, host, port):
            raise InvalidJob("this host and port are not among those that callbacks may go to", field=FIELD)
        path = found["path"]
        return Target(scheme, host, port, path if path.startswith("/") else f"/{path}")

    def refused(self, address: Address) -> str | None:
        """Why an address is not connected to; None if it may be."""
        inner = _unwrapped(address)
        if any(inner.version == net.version and inner in net for net in self._settings.private_networks):
            return None
        if any(inner.version == net.version and inner in net for net in SPECIAL):
            return NOT_PUBLIC
        open_to_all = inner.is_global and not inner.is_multicast and not inner.is_reserved
        if open_to_all and not (isinstance(inner, ipaddress.IPv6Address) and inner.is_site_local):
            return None
        return NOT_PUBLIC

    def _allows(self, scheme: str, host: str, port: int) -> bool:
        for pattern in self._settings.allowed_hosts:
            name, _, allowed_port = pattern.rpartition(":") if _has_port(pattern) else (pattern, "", "")
            fits = host.endswith(name[1:]) if name.startswith("*.") else host == name.strip("[]")
            if fits and port == int(allowed_port or DEFAULT_PORTS[scheme]):
                return True
        return False


def _has_port(pattern: str) -> bool:
    return bool(re.search(r"(\]|^[^:]*):[0-9]+$", pattern))


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour or address
    if address in NAT64 or (int(address) >> 32 == 0 and int(address) > 1):  # the second: "compatible", deprecated
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.teredo[1] if address.teredo else address

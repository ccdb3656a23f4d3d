"""Is anybody there? A TCP connection, before a client library tries for its whole timeout.

Called by: checks.broker, checks.store, checks.fleet.
"""

import errno
import socket
from urllib.parse import urlsplit

from codeyard.cli.checks.check import Finding, aside, fail

DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}


async def unreachable(url: str, *, variable: str, start: str, within_s: float) -> Finding | None:
    """Why nothing answers at the URL's host and port; None: something does.

    Args:
        variable: the setting that holds the URL.
        start: how to start such a server here.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or DEFAULT_PORTS[parts.scheme]

    def connect() -> OSError | None:
        try:
            socket.create_connection((host, port), timeout=within_s).close()
        except OSError as error:
            return error
        return None

    return None if (error := await aside(connect)) is None else _explained(error, host, port, variable, start, within_s)


def _explained(error: OSError, host: str, port: int, variable: str, start: str, within_s: float) -> Finding:
    where = f"{host}:{port}"
    if isinstance(error, socket.gaierror):
        way_out = f"mend the host in {variable}; inside a container it is the service's name, not localhost"
        return fail(f"there is no host {host} ({error.strerror})", way_out)
    if isinstance(error, TimeoutError):
        way_out = f"a firewall or a wrong address swallows it: mend {variable}, or let port {port} through"
        return fail(f"{where}: no connection within {within_s:g} s", way_out)
    if error.errno == errno.ECONNREFUSED:
        return fail(f"{where}: nobody listens there", f"{start}, or mend {variable}")
    return fail(f"{where}: {error.strerror or error}", f"mend {variable}")

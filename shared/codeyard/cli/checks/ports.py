"""Are the ports free that gateway and worker would listen on; if not, who has them? Called by: cli.doctor."""

import errno
import http.client
import importlib.util
import socket
from dataclasses import dataclass

from codeyard.cli.checks.check import Finding, Place, aside, fail, ok, skipped
from codeyard.cli.checks.processes import Process, listener

LOOPBACK = "127.0.0.1"  # where a worker serves its metrics
METRICS = b"# HELP codeyard_"  # in what a gateway or worker of ours answers at /metrics
READ_BYTES = 65_536
VARIABLES = {
    "gateway": "CODEYARD_GATEWAY_PORT",
    "gateway's gRPC": "CODEYARD_GATEWAY_GRPC_PORT",
    "worker metrics": "CODEYARD_WORKER_METRICS_PORT",
}


@dataclass(frozen=True, slots=True)
class Bound:
    """Whether a port could be had. `error` is an errno, None: it is free."""

    error: int | None = None
    reason: str = ""
    owner: Process | None = None
    answers_as_ours: bool = False


async def check_ports(place: Place) -> list[Finding]:
    gateway, worker = place.settings.gateway, place.settings.worker
    findings = []
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        findings.append(skipped("gateway: not installed", "to serve the API here: pip install 'codeyard[gateway]'"))
    else:
        bound = await aside(lambda: try_port(gateway.host, gateway.port, within_s=place.answer_s))
        findings.append(port_finding("gateway", gateway.host, gateway.port, bound))
        if gateway.grpc_port is not None:
            findings.append(await _grpc(gateway.host, gateway.grpc_port, within_s=place.answer_s))
    if worker.metrics_port is None:
        findings.append(skipped("worker metrics: CODEYARD_WORKER_METRICS_PORT is not set"))
    else:
        port = worker.metrics_port
        bound = await aside(lambda: try_port(LOOPBACK, port, within_s=place.answer_s))
        findings.append(port_finding("worker metrics", LOOPBACK, port, bound))
    return findings


async def _grpc(host: str, port: int, *, within_s: float) -> Finding:
    if importlib.util.find_spec("grpc") is None:
        return fail("gateway's gRPC: CODEYARD_GATEWAY_GRPC_PORT is set", "pip install 'codeyard[grpc]', or unset it")
    bound = await aside(lambda: try_port(host, port, within_s=within_s))
    return port_finding("gateway's gRPC", host, port, bound)


def try_port(host: str, port: int, *, within_s: float) -> Bound:
    """Take it and give it back, as a server would take it; if it is taken, ask who answers there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except socket.gaierror as error:
        return Bound(errno.EADDRNOTAVAIL, error.strerror or str(error))
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed just now is free
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return Bound(error.errno or -1, error.strerror or str(error))
            return Bound(errno.EADDRINUSE, "", listener(port), _answers_as_ours(host, port, within_s=within_s))
    return Bound()


def _answers_as_ours(host: str, port: int, *, within_s: float) -> bool:
    """Also where /proc hides whose process it is, as in another container."""
    reachable = {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}.get(host, host)
    link = http.client.HTTPConnection(reachable, port, timeout=within_s)
    try:
        link.request("GET", "/metrics")
        return METRICS in link.getresponse().read(READ_BYTES)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()


def port_finding(what: str, host: str, port: int, bound: Bound) -> Finding:
    where = f"{host}:{port}"
    variable = VARIABLES[what]
    if port == 0:
        return ok(f"{what}: any free port of {host}")
    match bound.error:
        case None:
            return ok(f"{what}: {where} is free")
        case errno.EADDRINUSE:
            ours = bound.answers_as_ours or (bound.owner is not None and bound.owner.ours)
            who = str(bound.owner) if bound.owner else "a process that /proc does not show"
            if ours:
                return ok(f"{what}: {where} is taken by codeyard itself: {who}")
            return fail(f"{what}: {where} is taken by {who}", f"end it, or set {variable} (0: any free one)")
        case errno.EACCES:
            way_out = f"a port from 1024 up in {variable}, and a proxy in front of it"
            return fail(f"{what}: this user may not listen on {where}", way_out)
        case errno.EADDRNOTAVAIL:
            return fail(f"{what}: {host} is no address of this machine ({bound.reason})", "set CODEYARD_GATEWAY_HOST")
        case _:
            return fail(f"{what}: cannot listen on {where}: {bound.reason}", f"set {variable}")

"""gRPC's share of the gateway process: listen, say how we are, drain.

    serving -> told to stop -> health says NOT_SERVING, no new calls; streams and waits end by `kit.stopping`,
    what is under way has `DRAIN_S` on top of the longest submission -> the rest is cut off

Health (grpc.health.v1) follows the same probes as /readyz. Health and reflection are open to all, as /healthz and
/openapi.json are. Called by: gateway.serve.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from codeyard.producer.gateway.auth import Authenticator
from codeyard.producer.gateway.jobs import Jobs
from codeyard.producer.gateway.limits import Limits
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.gateway.waiting import unless
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.calls import Calls
from codeyard.producer.rpc.door import Door
from codeyard.producer.rpc.server import Fleet, handlers_of
from codeyard.shared.errors import BrokerUnavailable, SettingsError, StoreUnavailable

log = logging.getLogger(__name__)

SERVICE: str = pb.DESCRIPTOR.services_by_name["Fleet"].full_name

DRAIN_S = 2.0  # on top of the longest submission, for calls under way when told to stop
HEALTH_S = 2.0  # between two looks at the servers
PROBE_S = 2.0  # for a server to answer

KEEPALIVE_MS = 30_000  # of silence, then a ping: a reader that vanished is noticed after this and the time to answer
KEEPALIVE_ANSWER_MS = 10_000
CLIENT_PINGS_MS = 10_000  # callers may ping this often; below it they are told "too many pings"
OVERSIZE_FACTOR = 2  # messages up to this times the limit are read, so that the refusal can say what the limit is

Probe = Callable[[], Awaitable[str]]


@asynccontextmanager
async def serving(
    jobs: Jobs, kit: Kit, *, auth: Authenticator, limits: Limits, probes: Mapping[str, Probe], host: str, port: int
) -> AsyncIterator[str]:
    """The service, answering, at the address that is given; leaving waits until it has drained.
    Raises SettingsError if the port cannot be had."""
    calls = Calls(jobs, auth, limits, kit.metrics)
    fleet = Fleet(kit, calls)
    door = Door(SERVICE, auth, calls)
    server = grpc.aio.server(interceptors=[door], options=_options(kit.settings.max_body_bytes))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers_of(fleet)),))
    told = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(told, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _bound(server, host, port)
    await _tell(told, probes)
    await server.start()
    log.info("grpc_ready", extra={"address": address})
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(_follow(told, probes, kit.stopping), name="grpc health")
        draining = tasks.create_task(_drain(server, told, calls, kit), name="grpc drain")
        try:
            yield address
            kit.stopping.set()  # a gateway that ends in another way ends this too
            await draining
            await fleet.settled()
        finally:  # and what is left when it is cut short
            following.cancel()
            draining.cancel()
            await server.stop(None)
            await fleet.close()


def _options(max_body_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", OVERSIZE_FACTOR * max_body_bytes + 65_536),
        ("grpc.max_send_message_length", -1),  # a result is as long as it is; its reader sets what it takes
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_ANSWER_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_ANSWER_MS),  # on a silent line this is what counts; else a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # no bound: two would be all that a silent stream gets
        ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_PINGS_MS),
        ("grpc.so_reuseport", 0),  # a second process on the port is an error, not half of the calls
    ]


def _bound(server: grpc.aio.Server, host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{name}:{port}")
    except RuntimeError:  # gRPC has logged the reason
        raise SettingsError(
            f"cannot listen on {name}:{port} for gRPC; choose another with --grpc-port (0: any free one)"
        ) from None
    return f"{name}:{bound}"


async def _drain(server: grpc.aio.Server, told: health.aio.HealthServicer, calls: Calls, kit: Kit) -> None:
    """Health watches and reflection never end by themselves: when our own calls are over, they are cut off."""
    await kit.stopping.wait()
    await told.enter_graceful_shutdown()
    stopped = server.stop(kit.settings.submit_timeout_s + DRAIN_S)
    await unless(_true(stopped), calls.idle.wait())
    await server.stop(None)


async def _true(work: Awaitable[None]) -> bool:
    await work
    return True


async def _follow(told: health.aio.HealthServicer, probes: Mapping[str, Probe], stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        await unless(stopping.wait(), asyncio.sleep(HEALTH_S))
        await _tell(told, probes)


async def _tell(told: health.aio.HealthServicer, probes: Mapping[str, Probe]) -> None:
    answers = await asyncio.gather(*(_answers(name, probe) for name, probe in probes.items()))
    serving_status = health_pb2.HealthCheckResponse.ServingStatus
    status = serving_status.SERVING if all(answers) else serving_status.NOT_SERVING
    for name in (health.OVERALL_HEALTH, SERVICE):
        await told.set(name, status)


async def _answers(name: str, probe: Probe) -> bool:
    try:
        async with asyncio.timeout(PROBE_S):
            await probe()
    except (TimeoutError, BrokerUnavailable, StoreUnavailable) as error:
        log.warning("not_serving", extra={"server": name, "error": str(error) or f"no answer within {PROBE_S:g} s"})
        return False
    return True

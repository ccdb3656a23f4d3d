"""The line between caller and gateway: one that falls silent, one that is cut, one that is encrypted."""

import asyncio
import datetime
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from support.asgi import JOB_ID, MadeUpJobs, limits_over
from support.brokers import comes_to
from support.fleet import Backend
from support.gateway import MODEL, GatewayUnderTest, gateway_running, settings_for
from support.proxy import TcpProxy
from support.tokens import ec_key

from codeyard.producer.gateway.auth import Development
from codeyard.producer.gateway.surface import Kit
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc import serving
from codeyard.producer.rpc.calls import Calls
from codeyard.producer.rpc.client import Inferred, RpcClient, Wanted
from codeyard.producer.rpc.codeyard_pb2_grpc import FleetStub, add_FleetServicer_to_server
from codeyard.producer.rpc.server import Fleet
from codeyard.producer.submission import Submission
from codeyard.shared.record import State
from codeyard.shared.settings import GatewaySettings, LimitSettings
from codeyard.shared.store.port import Store
from codeyard.shared.telemetry import Metrics


@asynccontextmanager
async def proxied(backend: Backend) -> AsyncIterator[tuple[GatewayUnderTest, TcpProxy, str]]:
    settings = settings_for(backend.broker_url, backend.store_url, backend.namespace, grpc_port=0)
    async with gateway_running(settings) as gateway:
        host, port = gateway.grpc.split(":")
        async with TcpProxy(host, int(port)) as proxy:
            yield gateway, proxy, f"127.0.0.1:{proxy.port}"


async def test_a_caller_that_vanished_without_a_word_is_noticed(
    embedded: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that lost its power closes no connection: the gateway asks, and lets go of who does not answer."""
    monkeypatch.setattr(serving, "KEEPALIVE_MS", 300)
    monkeypatch.setattr(serving, "KEEPALIVE_ANSWER_MS", 300)
    async with proxied(embedded) as (gateway, proxy, address), grpc.aio.insecure_channel(address) as channel:
        call = FleetStub(channel).StreamInference()
        submission = pb.Submission(text="def f(", model=MODEL)
        request = pb.InferenceRequest(correlation_id="a", submission=submission, cancel_on_disconnect=True)
        await call.write(request)
        job_id = (await anext(aiter(call))).job_id
        assert await gateway.metric("codeyard_streams_open") == 1

        proxy.stall()

        assert await comes_to(lambda: gateway.metric("codeyard_streams_open"), 0.0) == 0

        async def state() -> str:
            return str((await gateway.http.get(f"/v1/jobs/{job_id}")).json()["state"])

        assert await comes_to(state, "cancelled") == "cancelled"
        proxy.resume()


async def test_a_gateway_that_vanished_without_a_word_is_noticed_and_left(embedded: Backend) -> None:
    """The client's pings find it out; the stream goes on over another line."""
    async with proxied(embedded) as (gateway, proxy, address):
        keepalive = {"grpc.keepalive_time_ms": 300, "grpc.keepalive_timeout_ms": 300, "grpc.http2.ping_timeout_ms": 300}
        async with RpcClient(f"ipv4:{address},{gateway.grpc}", options=keepalive) as client:
            job = await gateway.submit_and_claim()
            await job.says("one ")
            following = client.stream(job.job_id)
            seen = [await anext(following)]
            proxy.stall()
            await job.says("two")
            await job.succeeds()
            seen += [event async for event in following]
            proxy.resume()

    assert [event.seq for event in seen] == [1, 2, 3]


async def test_lines_that_are_cut_again_and_again_lose_and_repeat_nothing(embedded: Backend) -> None:
    """In the middle of whatever is on its way: requests, events, results."""
    pieces: list[Inferred] = []
    async with proxied(embedded) as (gateway, proxy, address), RpcClient(address) as client:
        names = [f"job-{n}" for n in range(10)]
        inferring = client.infer(Wanted(n, Submission("def f(", MODEL, idempotency_key=n)) for n in names)
        for name in names:
            accepted = await client.submit("def f(", model=MODEL, idempotency_key=name)
            job = await gateway.claimed(accepted.id)
            await job.says(f"{name} ", "and ", "more")
            await job.succeeds()
        async for piece in inferring:
            pieces.append(piece)
            if len(pieces) % 7 == 0:
                proxy.cut()

    for name in names:
        mine = [piece for piece in pieces if piece.correlation_id == name]
        assert [piece.sequence_id for piece in mine] == [1, 2, 3, 4]
        assert b"".join(piece.delta for piece in mine).decode() == f"{name} and more"
        assert mine[-1].result is not None
        assert mine[-1].result.state is State.SUCCEEDED


async def test_a_client_with_tls_talks_to_a_proxy_that_ends_it() -> None:
    """The gateway speaks plain HTTP/2; keys travel over an encrypted line to what is in front of it."""
    key, certificate = _self_signed()
    server = grpc.aio.server()
    fleet = _fleet()
    add_FleetServicer_to_server(fleet, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    try:
        tls = grpc.ssl_channel_credentials(root_certificates=certificate)
        async with RpcClient(f"127.0.0.1:{port}", credential="k", tls=tls) as client:
            status = await client.get(JOB_ID)
    finally:
        await server.stop(None)

    assert status.id == JOB_ID


def _fleet() -> Fleet:
    kit = Kit(GatewaySettings(), Metrics(), asyncio.Event(), cast(Store, None))
    return Fleet(kit, Calls(MadeUpJobs(), Development(), limits_over(LimitSettings()), kit.metrics))


def _self_signed() -> tuple[bytes, bytes]:
    key = ec_key("tls")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)

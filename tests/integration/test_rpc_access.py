"""Who is let in over gRPC, how much, and what the service tells of itself; on real stores."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.brokers import comes_to
from support.fleet import Backend
from support.gateway import MODEL, PATIENCE_S, GatewayUnderTest, gateway_running, settings_for
from support.rpc import status_and_kind, trailing
from support.servers import RedisServer
from support.tokens import AUDIENCE, ISSUER, token

from codeyard.producer.gateway.serve import run_gateway
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.client import GatewayUnavailable, RpcClient, Wanted
from codeyard.producer.rpc.codeyard_pb2_grpc import FleetStub
from codeyard.producer.submission import Submission
from codeyard.shared.access.keys import Scope, make_key
from codeyard.shared.connect import open_keys
from codeyard.shared.errors import JobTooLarge, RateLimited, SettingsError, StoreUnavailable
from codeyard.shared.job import job_id_for_key, new_job_id
from codeyard.shared.settings import AuthSettings, LimitSettings, Settings
from codeyard.shared.topology import Topology

Code = grpc.StatusCode
SECRET = "s" * 40
AUTH = {"hs256_secret": SECRET, "issuer": ISSUER, "audience": AUDIENCE, "key_cache_s": 0}
GOOD = pb.Submission(text="def f(", model=MODEL)


def settings_of(backend: Backend, *, limit: dict[str, Any] | None = None, **gateway: Any) -> Settings:
    settings = settings_for(backend.broker_url, backend.store_url, backend.namespace, grpc_port=0, **gateway)
    return settings.model_copy(
        update={"auth": AuthSettings.model_validate(AUTH), "limit": LimitSettings.model_validate(limit or {})}
    )


class Caller:
    """A stub, and what it shows of itself."""

    def __init__(self, stub: Any, *metadata: tuple[str, str]) -> None:
        self.stub = stub
        self.metadata = metadata

    async def submit(self, submission: pb.Submission = GOOD) -> Any:
        return await self.stub.Submit(pb.SubmitRequest(submission=submission), metadata=self.metadata)

    async def every_way(self, job_id: str) -> list[grpc.aio.AioRpcError]:
        """What each way to a job is refused with; a stream of inferences has no way to an id."""
        ways = [
            self.stub.Get(pb.GetRequest(job_id=job_id), metadata=self.metadata),
            self.stub.Get(pb.GetRequest(job_id=job_id, wait_s=30), metadata=self.metadata),
            self.stub.Cancel(pb.CancelRequest(job_id=job_id), metadata=self.metadata),
            anext(aiter(self.stub.Stream(pb.StreamRequest(job_id=job_id), metadata=self.metadata))),
        ]
        refused = []
        for way in ways:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await way
            refused.append(caught.value)
        return refused


def bearer(**claims: Any) -> tuple[str, str]:
    return "authorization", f"Bearer {token(SECRET, **claims)}"


@asynccontextmanager
async def stub_to(gateway: GatewayUnderTest) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        yield FleetStub(channel)


async def test_a_guessed_id_of_another_tenant_opens_nothing(backend: Backend) -> None:
    """In the same words as an id that never was; the same key is a job of one's own; the job is untouched."""
    async with gateway_running(settings_of(backend)) as gateway, stub_to(gateway) as stub:
        victim, attacker = Caller(stub, bearer(tenant="victim")), Caller(stub, bearer(tenant="attacker", scope="admin"))
        job_id = (await victim.submit(pb.Submission(text="def f(", model=MODEL, key="release-1"))).status.id
        job = await gateway.claimed(job_id)
        await job.says("secret")

        refused, of_nobody = await attacker.every_way(job_id), await attacker.every_way(nobody := new_job_id())
        same_key = await attacker.submit(pb.Submission(text="def f(", model=MODEL, key="release-1"))
        call = stub.StreamInference(metadata=attacker.metadata)
        submission = pb.Submission(text="def f(", model=MODEL, key="release-1")
        await call.write(pb.InferenceRequest(correlation_id="x", submission=submission))
        inferred = await anext(aiter(call))
        call.cancel()
        await job.succeeds()
        mine = await stub.Get(pb.GetRequest(job_id=job_id), metadata=victim.metadata)

    assert [status_and_kind(error) for error in refused] == [(Code.NOT_FOUND, "job-not-found")] * 4
    said = [(error.details() or "").replace(job_id, "ID") for error in refused]
    assert said == [(error.details() or "").replace(nobody, "ID") for error in of_nobody]
    assert not same_key.attached
    assert same_key.status.id == inferred.job_id == job_id_for_key("attacker", "release-1") != job_id
    assert (mine.state, mine.result.text) == (pb.STATE_SUCCEEDED, "secret")


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param([], id="nothing"),
        pytest.param([("authorization", "Basic dTpw")], id="another scheme"),
        pytest.param([bearer(exp=int(time.time()) - 60)], id="an expired token"),
        pytest.param([bearer(aud="elsewhere")], id="a token for another service"),
        pytest.param([("authorization", f"Bearer {token('x' * 40)}")], id="a token with another key"),
        pytest.param([("x-api-key", "cy_0123456789abcdef_" + "x" * 43)], id="an unknown API key"),
        pytest.param([bearer(), bearer(tenant="other")], id="two credentials"),
    ],
)
async def test_without_valid_credentials_no_method_says_anything(
    shown: list[tuple[str, str]], embedded: Backend
) -> None:
    """Of jobs that are there neither; and what was shown is in no answer."""
    async with gateway_running(settings_of(embedded)) as gateway, stub_to(gateway) as stub:
        there = (await Caller(stub, bearer()).submit()).status.id
        stranger = Caller(stub, *shown)
        refused = await stranger.every_way(there)
        with pytest.raises(grpc.aio.AioRpcError) as submitting:
            await stranger.submit()
        with pytest.raises(grpc.aio.AioRpcError) as inferring:
            await anext(aiter(stub.StreamInference(metadata=shown)))

    everything = [*refused, submitting.value, inferring.value]
    assert [status_and_kind(error) for error in everything] == [(Code.UNAUTHENTICATED, "unauthorized")] * 6
    for error in everything:
        assert all(value not in (error.details() or "") for _, value in shown)


async def test_of_a_caller_without_credentials_no_message_is_read(embedded: Backend) -> None:
    """One that is far too long ends as if it were short: nobody has looked at it, nor kept room for it."""
    settings = settings_of(embedded, max_body_bytes=100_000)
    async with gateway_running(settings) as gateway, stub_to(gateway) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Caller(stub).submit(pb.Submission(text="x" * 1_000_000, model=MODEL))
        with pytest.raises(grpc.aio.AioRpcError) as let_in:
            await Caller(stub, bearer()).submit(pb.Submission(text="x" * 1_000_000, model=MODEL))
        counted = await gateway.metric('codeyard_grpc_calls_total{route="Submit",status="UNAUTHENTICATED"}')

    assert refused.value.code() is Code.UNAUTHENTICATED
    assert let_in.value.code() is Code.RESOURCE_EXHAUSTED
    assert counted == 1


async def test_each_method_asks_for_its_scope(embedded: Backend) -> None:
    """A credential that leaked from a dashboard must not be able to submit or cancel."""
    async with gateway_running(settings_of(embedded)) as gateway, stub_to(gateway) as stub:
        job_id = (await Caller(stub, bearer()).submit()).status.id

        async def codes(scope: str) -> list[grpc.StatusCode]:
            caller = Caller(stub, bearer(scope=scope))
            call = stub.StreamInference(metadata=caller.metadata)
            await call.done_writing()
            answers = await asyncio.gather(
                caller.submit(),
                stub.Get(pb.GetRequest(job_id=job_id), metadata=caller.metadata),
                call.code(),
                stub.Cancel(pb.CancelRequest(job_id=job_id), metadata=caller.metadata),
                return_exceptions=True,
            )
            return [
                answer.code()
                if isinstance(answer, grpc.aio.AioRpcError)
                else answer
                if isinstance(answer, Code)
                else Code.OK
                for answer in answers
            ]

        denied = Code.PERMISSION_DENIED
        assert await codes("submit") == [Code.OK, denied, denied, denied]
        assert await codes("read") == [denied, Code.OK, denied, denied]
        assert await codes("submit read") == [Code.OK, Code.OK, Code.OK, denied]
        assert await codes("cancel") == [denied, denied, denied, Code.OK]

        call = stub.StreamInference(metadata=[bearer(scope="submit read")])
        await call.write(pb.InferenceRequest(correlation_id="x", submission=GOOD, cancel_on_disconnect=True))
        refusal = (await anext(aiter(call))).refusal
        call.cancel()
    assert (refusal.code, refusal.kind) == (denied.value[0], "forbidden")


async def test_a_revoked_key_submits_nothing_more_on_a_stream_that_is_open(embedded: Backend) -> None:
    """A connection can live for weeks; what it has begun goes on, as an event stream does."""
    async with gateway_running(settings_of(embedded)) as gateway, stub_to(gateway) as stub:
        keys = await _keys(embedded)
        made = make_key("laptop", tenant="acme", scopes=list(Scope), now=time.time(), expires_in_s=None)
        await keys.put([made.key])
        call = stub.StreamInference(metadata=[("x-api-key", made.text)])
        responses = aiter(call)
        await call.write(pb.InferenceRequest(correlation_id="before", submission=GOOD))
        job = await gateway.claimed((await anext(responses)).job_id)

        await keys.put([made.key.model_copy(update={"revoked_at": time.time()})])
        await call.write(pb.InferenceRequest(correlation_id="after", submission=GOOD))
        refused = await anext(responses)
        await job.says("x")
        await job.succeeds()
        rest = [await anext(responses), await anext(responses)]
        call.cancel()
        await keys.close()

    assert (refused.correlation_id, refused.refusal.kind) == ("after", "unauthorized")
    assert [(one.delta, one.is_end) for one in rest] == [(b"x", False), (b"", True)]


async def test_limits_count_and_refuse_as_over_http(backend: Backend) -> None:
    """One bucket for both protocols; what is left is in the metadata, also of a refusal, which says when."""
    limits = {"requests_per_minute": 3, "requests_burst": 3}
    async with gateway_running(settings_of(backend, limit=limits)) as gateway, stub_to(gateway) as stub:
        name, value = bearer()
        await gateway.http.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}, headers={name: value})
        call = stub.Submit(pb.SubmitRequest(submission=GOOD), metadata=[(name, value)])
        await call
        left = dict(list(await call.trailing_metadata()))
        async with RpcClient(gateway.grpc, credential=value.removeprefix("Bearer ")) as client:
            await client.submit("x", model=MODEL)
            with pytest.raises(RateLimited) as refused:
                await client.submit("x", model=MODEL)
            [inferred] = [one async for one in client.infer([Wanted("w", Submission("x", MODEL))])]
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await stub.Submit(pb.SubmitRequest(submission=GOOD), metadata=[(name, value)])

    assert left["x-ratelimit-limit-requests"] == "3"
    assert left["x-ratelimit-remaining-requests"] == "1"
    assert refused.value.limit == "requests"
    assert refused.value.retry_after_s >= 1
    assert isinstance(inferred.error, RateLimited)
    assert status_and_kind(raw.value) == (Code.RESOURCE_EXHAUSTED, "rate-limited")
    told = dict(trailing(raw.value))
    assert int(str(told["retry-after"])) >= 1
    assert int(str(told["grpc-retry-pushback-ms"])) == 1_000 * int(str(told["retry-after"]))
    assert told["x-ratelimit-remaining-requests"] == "0"


async def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(embedded: Backend) -> None:
    """A little over it, in our words; far over it, by gRPC itself, before it is all in memory."""
    settings = settings_of(embedded, max_body_bytes=100_000)
    async with gateway_running(settings) as gateway, stub_to(gateway) as stub:
        caller = Caller(stub, bearer())
        with pytest.raises(grpc.aio.AioRpcError) as over:
            await caller.submit(pb.Submission(text="x" * 100_000, model=MODEL))
        with pytest.raises(grpc.aio.AioRpcError) as far_over:
            await caller.submit(pb.Submission(text="x" * 1_000_000, model=MODEL))
        accepted = await caller.submit(pb.Submission(text="x" * 99_000, model=MODEL))
        async with RpcClient(gateway.grpc, credential=token(SECRET)) as client:
            for num_chars in (100_000, 1_000_000):
                with pytest.raises(JobTooLarge):
                    await client.submit("x" * num_chars, model=MODEL)

    assert status_and_kind(over.value) == (Code.INVALID_ARGUMENT, "too-large")
    assert far_over.value.code() is Code.RESOURCE_EXHAUSTED
    assert accepted.status.state == pb.STATE_QUEUED


async def test_a_deadline_ends_a_stream_and_its_job_goes_on(embedded: Backend) -> None:
    """A caller's time is its own."""
    async with gateway_running(settings_of(embedded)) as gateway, stub_to(gateway) as stub:
        caller = Caller(stub, bearer())
        job_id = (await caller.submit()).status.id
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await anext(aiter(stub.Stream(pb.StreamRequest(job_id=job_id), metadata=caller.metadata, timeout=0.3)))
        counted = 'codeyard_grpc_calls_total{route="Stream",status="DEADLINE_EXCEEDED"}'
        assert await comes_to(lambda: gateway.metric(counted), 1.0) == 1
        status = await stub.Get(pb.GetRequest(job_id=job_id), metadata=caller.metadata)

    assert ended.value.code() is Code.DEADLINE_EXCEEDED
    assert status.state == pb.STATE_QUEUED


async def test_reflection_lists_the_service_and_describes_its_messages(embedded: Backend) -> None:
    """grpcurl and its like need no copy of the .proto, and no credentials to read it."""

    def described(address: str) -> tuple[set[str], list[str]]:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName("codeyard.v1.Fleet")
            return set(database.get_services()), [method.name for method in service.methods]

    async with gateway_running(settings_of(embedded)) as gateway:
        services, methods = await asyncio.to_thread(described, gateway.grpc)

    assert {"codeyard.v1.Fleet", "grpc.health.v1.Health"} <= services
    assert methods == ["Submit", "Get", "Stream", "Cancel", "StreamInference"]


@pytest.mark.services
async def test_health_follows_readiness(tmp_path: Path, namespace: str, private_redis: RedisServer) -> None:
    """An orchestrator stops sending callers to a gateway whose store is away, and starts again; and one that is
    told to stop says so while it drains."""
    settings = settings_for(
        f"sqlite:///{tmp_path / 'yard.db'}", private_redis.url, namespace, grpc_port=0, submit_timeout_s=1.5
    )
    settings = settings.model_copy(update={"store": settings.store.model_copy(update={"timeout_s": 0.5})})
    async with gateway_running(settings) as gateway, grpc.aio.insecure_channel(gateway.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.ServingStatus

        async def says(service: str = "") -> int:
            return int((await health.Check(health_pb2.HealthCheckRequest(service=service))).status)

        assert await says() == await says("codeyard.v1.Fleet") == serving.SERVING
        watched = aiter(health.Watch(health_pb2.HealthCheckRequest(service="codeyard.v1.Fleet")))
        seen = [(await anext(watched)).status]
        private_redis.kill()
        seen.append((await anext(watched)).status)
        async with RpcClient(gateway.grpc, timeout_s=3.0) as client:
            with pytest.raises(StoreUnavailable):
                await client.submit("x", model=MODEL)
        private_redis.start()
        seen.append((await anext(watched)).status)
        gateway.stop.set()
        seen.append((await anext(watched)).status)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await anext(watched)

    assert seen == [serving.SERVING, serving.NOT_SERVING, serving.SERVING, serving.NOT_SERVING]
    assert ended.value.code() is Code.UNAVAILABLE


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
async def test_without_authentication_grpc_does_not_listen_beyond_loopback_either(host: str, embedded: Backend) -> None:
    """The same rule for every protocol."""
    settings = settings_of(embedded, host=host).model_copy(update={"auth": AuthSettings()})
    listening: list[str] = []

    with pytest.raises(SettingsError, match="codeyard keys make"):
        async with asyncio.timeout(PATIENCE_S):
            await run_gateway(settings, asyncio.Event(), on_grpc=listening.append)

    assert listening == []


async def test_a_port_that_is_taken_is_said_at_start_and_not_shared(embedded: Backend) -> None:
    """gRPC would share it by default, and each of two gateways would get half of the calls."""
    async with gateway_running(settings_of(embedded)) as gateway:
        taken = int(gateway.grpc.rpartition(":")[2])
        same = gateway.settings.gateway.model_copy(update={"grpc_port": taken})
        second = settings_of(embedded).model_copy(update={"gateway": same})
        with pytest.raises(SettingsError, match="--grpc-port"):
            async with asyncio.timeout(PATIENCE_S):
                await run_gateway(second, asyncio.Event())


async def test_nobody_at_the_address_is_an_error_of_ours_after_the_time_for_it(embedded: Backend) -> None:
    """With the word that a submission may have been accepted: the caller tries again under its key."""
    async with gateway_running(settings_of(embedded)) as gateway:
        address = gateway.grpc
    async with RpcClient(address, timeout_s=0.5, away_s=0.5) as client:
        with pytest.raises(GatewayUnavailable) as submitting:
            await client.submit("x", model=MODEL)
        with pytest.raises(GatewayUnavailable):
            await anext(client.stream(new_job_id()))
        with pytest.raises(GatewayUnavailable):
            await anext(client.infer([Wanted("w", Submission("x", MODEL))]))

    assert submitting.value.maybe_accepted


async def _keys(backend: Backend) -> Any:
    return await open_keys(settings_of(backend).store, Topology(backend.namespace))

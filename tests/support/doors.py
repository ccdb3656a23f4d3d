"""Every way into a fleet, and what each says when it cannot take a job: one question, one answer, five doors.

The asyncio client, the blocking one (in a thread), HTTP, OpenAI's SDK and gRPC. `ask` tries within `timeout_s` and is
`Told` why not; `insist` waits by the means that the door has for it: a longer `timeout_s` of the clients, the SDK's
retries, `Retry-After` of HTTP.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import openai

from codeyard.producer import AsyncClient, Client, Submission
from codeyard.producer.gateway.problems import kind_of
from codeyard.producer.gateway.serve import run_gateway
from codeyard.producer.rpc import asking
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.client import RpcClient
from codeyard.shared.errors import FleetError
from codeyard.shared.job import JobId, job_id_for_key
from codeyard.shared.settings import Settings
from codeyard.worker.simulation.virtual_time import pass_time
from support.fleet import READY_S
from support.rpc import status_and_kind, trailing

DOORS = ("async client", "blocking client", "HTTP", "OpenAI", "gRPC")
MAX_TOKENS = 16  # of what is asked for here; every simulated answer has so many
TRANSPORT_S = 180.0  # longer than any answer a test waits for


@dataclass(frozen=True, slots=True)
class Told:
    """A refusal. `kind`: of gateway.problems.KINDS; `status`: HTTP's or gRPC's, None of a client without a gateway."""

    kind: str
    text: str
    status: int | grpc.StatusCode | None = None
    retry_after_s: float | None = None


class Doors:
    """Open with `open_doors`."""

    def __init__(
        self, client: AsyncClient, blocking: Client, http: httpx.AsyncClient, sdk: openai.AsyncOpenAI, rpc: RpcClient
    ) -> None:
        self.client = client
        self.blocking = blocking
        self.http = http
        self.sdk = sdk
        self.rpc = rpc

    async def ask(self, door: str, prompt: str, key: str) -> JobId | Told:
        """The job's id once it is accepted, by OpenAI's door once it is answered."""
        asked = Submission(prompt, idempotency_key=key, sampling={"max_tokens": MAX_TOKENS})
        try:
            match door:
                case "async client":
                    return (await self.client.submit(prompt, **_options(asked))).id
                case "blocking client":
                    return (await asyncio.to_thread(self.blocking.submit, prompt, **_options(asked))).id
                case "HTTP":
                    return await self._post(asked)
                case "OpenAI":
                    return await self._complete(self.sdk.with_options(max_retries=0), asked)
                case "gRPC":
                    stub: Any = self.rpc._link.stub  # without the client's own tries: what one call is told
                    answer = await stub.Submit(pb.SubmitRequest(submission=asking.message_of(asked)))
                    return str(answer.status.id)
        except FleetError as error:
            return Told(kind_of(error), str(error), None, getattr(error, "retry_after_s", None))
        except grpc.aio.AioRpcError as error:
            code, kind = status_and_kind(error)
            return Told(kind, str(error.details()), code, _seconds(dict(trailing(error))))
        raise ValueError(door)

    async def insist(self, door: str, prompt: str, key: str) -> JobId:
        """Wait until the job is accepted. Raises AssertionError if it was refused after all."""
        asked = Submission(prompt, idempotency_key=key, sampling={"max_tokens": MAX_TOKENS})
        match door:
            case "OpenAI":
                told = await self._complete(self.sdk.with_options(max_retries=100), asked)
            case "gRPC":
                return (await self.rpc.submit(prompt, **_options(asked))).id
            case "HTTP":
                while isinstance(told := await self._post(asked), Told) and told.retry_after_s is not None:
                    await pass_time(told.retry_after_s)
            case _:
                told = await self.ask(door, prompt, key)
        assert not isinstance(told, Told), (door, told)
        return told

    async def _post(self, asked: Submission) -> JobId | Told:
        body = {"model": asked.model, "prompt": asked.prompt, "sampling": dict(asked.sampling)}
        answer = await self.http.post("/v1/jobs", json=body, headers={"Idempotency-Key": str(asked.idempotency_key)})
        said = answer.json()
        if answer.is_success:
            return str(said["id"])
        kind = str(said["type"]).removeprefix("/docs#")
        return Told(kind, str(said["detail"]), answer.status_code, _seconds(answer.headers))

    async def _complete(self, sdk: openai.AsyncOpenAI, asked: Submission) -> JobId | Told:
        key = str(asked.idempotency_key)
        try:
            await sdk.completions.create(
                model=asked.model,
                prompt=str(asked.prompt),
                max_tokens=MAX_TOKENS,
                extra_headers={"Idempotency-Key": key},
            )
        except openai.APIStatusError as error:
            kind = str(error.code).replace("_", "-")
            return Told(kind, error.message, error.status_code, _seconds(error.response.headers))
        return job_id_for_key("default", key)


@asynccontextmanager
async def open_doors(settings: Settings, url: str, rpc: str, *, timeout_s: float) -> AsyncIterator[Doors]:
    """`timeout_s` is what the three clients of ours have for a submission; the gateway's is its setting."""
    blocking = Client(settings=settings, timeout_s=timeout_s)
    async with (
        AsyncClient(settings=settings, timeout_s=timeout_s) as client,
        httpx.AsyncClient(base_url=url, timeout=TRANSPORT_S, trust_env=False) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=TRANSPORT_S) as sdk,
        RpcClient(rpc, timeout_s=timeout_s) as caller,
    ):
        try:
            yield Doors(client, blocking, http, sdk, caller)
        finally:
            await asyncio.to_thread(blocking.close)


@asynccontextmanager
async def gateway_front(settings: Settings) -> AsyncIterator[tuple[str, str]]:
    """A gateway in this process on free ports: its URL, and the address of its gRPC."""
    stop, url, rpc = asyncio.Event(), asyncio.get_running_loop().create_future(), list[str]()
    group = settings.gateway.model_copy(update={"port": 0, "grpc_port": 0})
    front = settings.model_copy(update={"gateway": group})
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_gateway(front, stop, on_ready=url.set_result, on_grpc=rpc.append), name="gateway")
        async with asyncio.timeout(READY_S):
            await url
        try:
            yield url.result(), rpc[0]
        finally:
            stop.set()


def _options(asked: Submission) -> dict[str, Any]:
    return {"idempotency_key": asked.idempotency_key, "sampling": asked.sampling}


def _seconds(headers: Mapping[str, Any]) -> float | None:
    after = headers.get("retry-after")
    return None if after is None or not math.isfinite(float(after)) else float(after)

"""What every call has in common: who is calling, what a refusal looks like, how it is counted.

The gRPC counterpart of gateway.edge and of `for_callers` in gateway.app: the same authenticator, the same
`TenantJobs`, the same refusals. Nothing unexpected gets out: it ends as INTERNAL with an incident number, logged
once under that number. Called by: rpc.server.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from codeyard.producer.gateway.auth import Authenticator, Caller
from codeyard.producer.gateway.jobs import Jobs
from codeyard.producer.gateway.limits import Limits
from codeyard.producer.gateway.problems import KINDS, Refused, kind_of, problem_of
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.producer.rpc.refusals import MEMBERS, Told, code_of, headers_of
from codeyard.shared.access.keys import Scope
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import FleetError
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Calls:
    """Of one gateway process. `idle` is set while none is under way."""

    def __init__(self, jobs: Jobs, auth: Authenticator, limits: Limits, metrics: Metrics) -> None:
        self._jobs = jobs
        self._auth = auth
        self._limits = limits
        self._metrics = metrics
        self._open = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @asynccontextmanager
    async def answering(self, context: Context, method: str) -> AsyncIterator["Call"]:
        """Around a whole call: what is raised within ends it with the status that it stands for."""
        started_s = time.monotonic()
        call = Call(context, self._jobs, self._auth, self._limits)
        status = "OK"
        self._open += 1
        self.idle.clear()
        try:
            yield call
        except asyncio.CancelledError:
            left_s = context.time_remaining()
            status = "DEADLINE_EXCEEDED" if left_s is not None and left_s <= 0 else "CANCELLED"
            raise
        except Exception as error:
            told = told_of(error) or _unexpected(error, method, call)
            status = told.code.name
            await context.abort(told.code, told.message, told.metadata())
        finally:
            self._open -= 1
            if self._open == 0:
                self.idle.set()
            took_s = time.monotonic() - started_s
            self._metrics.grpc_calls.labels(route=method, status=status).inc()
            self._metrics.grpc_call.labels(route=method).observe(took_s)
            log.debug("grpc_call", extra={"route": method, "status": status, "took_s": took_s, **call.who})


class Call:
    """One call. `caller` is known once `jobs` was asked for."""

    def __init__(self, context: Context, jobs: Jobs, auth: Authenticator, limits: Limits) -> None:
        self.context = context
        self.caller: Caller | None = None
        self._jobs = jobs
        self._auth = auth
        self._limits = limits

    async def jobs(self, *scopes: Scope) -> TenantJobs:
        """Those of whoever calls, whose credentials are checked each time: a call may outlive them.
        Raises Unauthorized, Forbidden, StoreUnavailable, AuthUnavailable."""
        self.caller = await self._auth.caller(self.values("authorization"), self.values("x-api-key"))
        for scope in scopes:
            self.caller.require(scope)
        return TenantJobs(self._jobs, self.caller.tenant, self._limits)

    @property
    def who(self) -> dict[str, str]:
        """For log lines; never the credential."""
        return {"tenant": self.caller.tenant, "caller": self.caller.name} if self.caller else {}

    def values(self, name: str) -> Sequence[str]:
        """Of one header, all, in order."""
        return values_in(self.context.invocation_metadata(), name)


def values_in(metadata: Any, name: str) -> Sequence[str]:
    """`metadata`: pairs, as gRPC has them of a call; None of one without any."""
    return [value for key, value in metadata or () if key == name and isinstance(value, str)]


def told_of(error: Exception) -> Told | None:
    """What a caller is told of one of our errors: what HTTP's callers are told. None of one that is not for them."""
    if not isinstance(error, Refused | FleetError) or (kind := kind_of(error)) == "internal-error":
        return None
    answer = problem_of(error)
    document = json.loads(bytes(answer.body))
    retry_after = answer.headers.get("retry-after", "")
    return Told(
        code_of(kind, KINDS[kind].status),
        kind,
        document["detail"],
        float(retry_after) if retry_after.isdigit() else None,
        {name: document[name] for name in MEMBERS if name in document},
        headers_of(answer.headers.items()),
    )


def _unexpected(error: Exception, method: str, call: Call) -> Told:
    incident = new_nonce()[:12]
    log.error("call_failed", exc_info=error, extra={"incident": incident, "route": method, **call.who})
    return Told(
        grpc.StatusCode.INTERNAL,
        "internal-error",
        f"something went wrong here; the gateway's log has it as {incident}",
    )

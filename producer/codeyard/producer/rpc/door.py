"""Credentials before the message: who is not let in gets no memory of ours for what it sends.

gRPC reads the message of a call with one request before it asks the handler, however long it is. This interceptor
comes first, with the call's metadata alone; a call that it refuses ends without its message being read. The
handlers check again, with scopes, and for as long as a call lives. Called by: rpc.serving.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from codeyard.producer.gateway.auth import Authenticator
from codeyard.producer.rpc.calls import Calls, Context, values_in
from codeyard.shared.errors import AuthUnavailable, StoreUnavailable, Unauthorized

Handler = Any  # grpc.RpcMethodHandler, which is generic for type checkers alone
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # as Handler
    """Of one service; the others (health, reflection) are open to all."""

    def __init__(self, service: str, auth: Authenticator, calls: Calls) -> None:
        self._prefix = f"/{service}/"
        self._auth = auth
        self._calls = calls

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        asked = handler_call_details
        if asked.method.startswith(self._prefix):
            given = asked.invocation_metadata
            try:
                await self._auth.caller(values_in(given, "authorization"), values_in(given, "x-api-key"))
            except (Unauthorized, StoreUnavailable, AuthUnavailable) as error:
                return self._refusing(asked.method.removeprefix(self._prefix), error)
        return await continuation(asked)

    def _refusing(self, method: str, error: Exception) -> Handler:
        """A handler of streams, whatever the method is: only those are asked before the first message is read."""

        async def refuse(_: Any, context: Context) -> None:
            async with self._calls.answering(context, method):
                raise error

        return grpc.stream_stream_rpc_method_handler(refuse)

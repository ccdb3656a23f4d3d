"""Ask again for as long as it takes: a fleet that is being broken refuses, and its errors say so."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from codeyard.shared.errors import BrokerUnavailable, FleetError, StoreUnavailable

T = TypeVar("T")

AGAIN_S = 0.1
LIMIT_S = 120.0  # a server that was left alone and does not answer for this long is not coming back


async def until_accepted(call: Callable[[], Awaitable[T]]) -> T:
    """Until `call` succeeds, whatever it is refused for; the caller bounds it."""
    while True:
        try:
            return await call()
        except FleetError:
            await asyncio.sleep(AGAIN_S)


async def until_answered(call: Callable[[], Awaitable[T]]) -> T:
    """Past servers that do not answer, for LIMIT_S. Raises what the last call raised."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + LIMIT_S
    while True:
        try:
            return await call()
        except (BrokerUnavailable, StoreUnavailable):
            if loop.time() > give_up_s:
                raise
            await asyncio.sleep(AGAIN_S)

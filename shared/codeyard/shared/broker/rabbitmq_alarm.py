"""A RabbitMQ that is short of memory or disk: it stops reading from connections that publish, and says so.

While that lasts a publish is neither taken nor refused, and no confirm comes. What is published all the same piles up
in the socket and is there several times when the alarm is over; so publishers wait (`unblocked`), as long as they
have time, and say then what it was (`BLOCKED`).
Called by: rabbitmq_publishing, rabbitmq_probe; producer.pika_publisher hears it from pika.
"""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the blocking client has no use for aiormq
    from aiormq.abc import AbstractConnection as Wire

BLOCKED = (
    "it has stopped taking messages, because an alarm of memory or disk is on (connection.blocked; "
    "`rabbitmq-diagnostics alarms` says which)"
)


async def is_blocked(wire: "Wire", *, within_s: float = 0.0) -> bool:
    """Whether the server has blocked this connection and does not take that back `within_s`."""
    try:
        async with asyncio.timeout(within_s):
            await wire.ready()
    except TimeoutError:
        return True
    return False


async def unblocked(wire: "Wire") -> None:
    """Return when the server reads from this connection again, or when it is lost."""
    if not await is_blocked(wire):
        return
    ready, lost = asyncio.create_task(wire.ready()), wire.closing
    try:
        await asyncio.wait([ready, lost], return_when=asyncio.FIRST_COMPLETED)
    finally:
        ready.cancel()
        lost.cancel()

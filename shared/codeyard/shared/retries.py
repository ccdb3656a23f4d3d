"""Repeat a call to a server that is away, as tenacity's policies say, at no cost where it is not.

Called by: worker.patience, shared.reading, producer.submission. Which errors mean "away", how long to wait and
when to give up is theirs.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type

T = TypeVar("T")


async def repeat(call: Callable[[], Awaitable[T]], away: tuple[type[Exception], ...], **policy: Any) -> T:
    """What `call` returns, repeated while it raises one of `away`; `policy` is AsyncRetrying's. Other errors pass.

    The first try, mostly the only one, is made without tenacity: its bookkeeping takes 9 us a call and leaves
    two dozen objects that hold each other to the garbage collector, on the way of every claim and every commit.
    """
    try:
        return await call()
    except away as error:
        first: Exception | None = error
    async for attempt in AsyncRetrying(retry=retry_if_exception_type(away), reraise=True, **policy):
        with attempt:
            if first is not None:
                told, first = first, None
                raise told
            return await call()
    raise AssertionError("tenacity returns or raises")

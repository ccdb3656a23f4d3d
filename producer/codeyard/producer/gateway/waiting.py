"""Wait for work that a caller may leave alone, or a stop may end."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def unless(work: Coroutine[Any, Any, T], *interruptions: Coroutine[Any, Any, Any]) -> T | None:
    """The result of `work`, or None if one of `interruptions` ended first. Raises what `work` raises.

    Whatever is still under way is cancelled, and over, before this returns.
    """
    main = asyncio.ensure_future(work)
    others = [asyncio.ensure_future(one) for one in interruptions]
    try:
        await asyncio.wait([main, *others], return_when=asyncio.FIRST_COMPLETED)
        return main.result() if main.done() else None
    finally:
        for task in (main, *others):
            task.cancel()
        await asyncio.gather(main, *others, return_exceptions=True)


async def hung_up(receive: Receive) -> None:
    """Return when the caller is gone. Only after the body was read: what comes before is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass

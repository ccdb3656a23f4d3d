"""An asyncio event loop whose clock jumps: an hour of waiting passes as fast as its callbacks run.

When nothing is ready the clock moves to the next timer, so `asyncio.sleep(30)` returns at once, at 30 s on
`loop.time()`. For code that waits on timers and other tasks only: a loop that would have to wait for a
socket or a thread stands still, and says so. The same program gives the same run.
Called by: loadtest/bench_models.py, tests.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Never waits: it moves the clock by what it was told to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is due and nothing will be: every task waits for something outside")
        self.now_s += max(0.0, timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


async def pass_time(seconds: float) -> None:
    """That long on the loop's clock."""
    await asyncio.sleep(seconds)


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on such a loop."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)

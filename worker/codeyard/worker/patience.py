"""Wait out a broker or store that is away: a worker's restart costs a model load, so it does not give up."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from codeyard.shared.errors import BrokerUnavailable, StoreUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0  # back in business this long after the server is, at most


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat `call` until the server answers, with exponential backoff and full jitter.

    Every call of the two ports may be repeated. Other errors pass through; cancelling ends it.
    """
    retrying = AsyncRetrying(
        retry=retry_if_exception_type((BrokerUnavailable, StoreUnavailable)),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        before_sleep=_say_so,
        reraise=True,
    )
    async for attempt in retrying:
        with attempt:
            return await call()
    raise AssertionError("tenacity returns or raises")


def _say_so(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("server_away", extra={"error": str(error), "num_tries": state.attempt_number})

"""Wait out a broker or store that is away: a worker's restart costs a model load, so it does not give up."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import RetryCallState, wait_random_exponential

from codeyard.shared.errors import BrokerUnavailable, StoreUnavailable
from codeyard.shared.retries import repeat

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0  # back in business this long after the server is, at most
AWAY = (BrokerUnavailable, StoreUnavailable)
WAIT = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat `call` until the server answers, with exponential backoff and full jitter.

    Every call of the two ports may be repeated. Other errors pass through; cancelling ends it.
    """
    return await repeat(call, AWAY, wait=WAIT, before_sleep=_say_so)


def _say_so(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("server_away", extra={"error": str(error), "num_tries": state.attempt_number})

"""A call to a server that is away is repeated; one that is there costs nothing beside the call."""

import gc
from collections.abc import Iterator

import pytest
from tenacity import RetryCallState, stop_after_attempt, wait_none

from codeyard.shared.errors import BrokerUnavailable, JobNotFound, StoreUnavailable
from codeyard.shared.retries import repeat

AWAY = (StoreUnavailable, BrokerUnavailable)


class Server:
    """Answers each call with the next of what it was given; errors are raised."""

    def __init__(self, *answers: str | Exception) -> None:
        self._answers: Iterator[str | Exception] = iter(answers)
        self.num_calls = 0

    async def __call__(self) -> str:
        self.num_calls += 1
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_a_server_that_is_away_is_asked_until_it_answers() -> None:
    """A worker's restart costs a model load: it outlasts both servers."""
    server = Server(StoreUnavailable("1"), BrokerUnavailable("2"), StoreUnavailable("3"), "here")

    assert await repeat(server, AWAY, wait=wait_none()) == "here"
    assert server.num_calls == 4


async def test_every_failure_is_told_once_and_in_order() -> None:
    """What the first try raised is counted by the policy like any other."""
    told: list[tuple[int, str]] = []

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        told.append((state.attempt_number, str(state.outcome.exception())))

    await repeat(
        Server(StoreUnavailable("one"), StoreUnavailable("two"), "here"), AWAY, wait=wait_none(), before_sleep=tell
    )

    assert [(number, text.split(": ")[1]) for number, text in told] == [(1, "one"), (2, "two")]


async def test_when_the_policy_gives_up_the_last_error_is_raised() -> None:
    """A caller with a deadline is told what it was."""
    server = Server(StoreUnavailable("one"), StoreUnavailable("two"), "never asked")

    with pytest.raises(StoreUnavailable, match="two"):
        await repeat(server, AWAY, wait=wait_none(), stop=stop_after_attempt(2))
    assert server.num_calls == 2


async def test_an_error_of_another_kind_passes_at_once() -> None:
    """An answer that is no is an answer."""
    server = Server(JobNotFound("j"), "never asked")

    with pytest.raises(JobNotFound):
        await repeat(server, AWAY, wait=wait_none())
    assert server.num_calls == 1


async def test_a_call_that_is_answered_leaves_nothing_to_the_garbage_collector() -> None:
    """Every claim and every commit passes here."""
    server = Server(*["here"] * 100)
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            await repeat(server, AWAY, wait=wait_none())
        assert gc.collect() == 0
    finally:
        gc.enable()

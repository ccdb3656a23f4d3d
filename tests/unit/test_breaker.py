"""The breaker's promises, over random histories; and a server's port behind one."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from codeyard.producer.gateway.breaker import TRAFFIC, Breaker, Position, Ticket
from codeyard.producer.gateway.health import Breakers
from codeyard.shared.broker.port import PublishOutcome
from codeyard.shared.errors import BrokerUnavailable, FleetError, StoreUnavailable
from codeyard.shared.settings import BreakerSettings
from codeyard.shared.telemetry import Metrics

SETTINGS = BreakerSettings(requests=4, window_s=5.0, share=0.5, open_s=5.0, probe_s=3.0)


class Histories(RuleBasedStateMachine):
    """Calls begin and end in any order and at any time, beside a naive account of the closed breaker."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(SETTINGS)
        self.now_s = 100.0
        self.under_way: list[Ticket] = []
        self.counted: list[tuple[float, bool]] = []
        self.opened_s = 0.0
        self.probed_s = float("-inf")
        self.spell: set[Ticket] = set()  # probes since it opened last

    @rule(quarters=st.integers(0, 24))
    def time_passes(self, quarters: int) -> None:
        self.now_s += quarters / 4  # exact, so that edges are met

    @rule()
    def a_call_asks(self) -> None:
        before = self.breaker.position
        ticket = self.breaker.admit(self.now_s)
        if before is Position.CLOSED:
            assert ticket == TRAFFIC
        elif before is Position.OPEN:
            assert (ticket is not None) == (self.now_s >= self.opened_s + SETTINGS.open_s)
        else:
            assert (ticket is not None) == (self.now_s >= self.probed_s + SETTINGS.probe_s)
        if ticket:
            assert self.breaker.position is Position.HALF_OPEN
            assert ticket not in self.spell
            self.spell.add(ticket)
            self.probed_s = self.now_s
        if ticket is not None:
            self.under_way.append(ticket)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), good=st.booleans())
    def a_call_ends(self, data: st.DataObject, good: bool) -> None:
        ticket = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        before = self.breaker.position
        self.breaker.record(good, self.now_s, ticket)
        after = self.breaker.position
        if before is Position.CLOSED:
            self.counted = [one for one in self.counted if one[0] > self.now_s - SETTINGS.window_s]
            self.counted.append((self.now_s, good))
            bad = sum(not one for _, one in self.counted)
            opens = len(self.counted) >= SETTINGS.requests and bad >= SETTINGS.share * len(self.counted)
            assert after is (Position.OPEN if opens else Position.CLOSED)
        elif before is Position.HALF_OPEN and ticket in self.spell:
            assert after is (Position.CLOSED if good else Position.OPEN)
        else:
            assert after is before  # what was let through earlier says nothing any more
        if after is not before:
            self.opened_s, self.counted, self.spell = self.now_s, [], set()

    @invariant()
    def what_it_says_of_itself_is_what_it_does(self) -> None:
        refuses = self.breaker.refuses_for_s(self.now_s)
        assert 0.0 <= refuses <= max(SETTINGS.open_s, SETTINGS.probe_s)
        assert self.breaker.position is not Position.CLOSED or refuses == 0.0


TestHistories = Histories.TestCase


def test_fewer_outcomes_than_asked_for_never_open_it() -> None:
    """Two failures at night are not an outage."""
    breaker = Breaker(SETTINGS)

    for n in range(20):
        breaker.record(False, 2.0 * n, TRAFFIC)  # never more than three within the window

    assert breaker.position is Position.CLOSED


def test_a_probe_that_told_nothing_makes_room_for_another_at_once() -> None:
    """A probe that was refused for its own sake must not hold up the next."""
    breaker = Breaker(SETTINGS)
    for _ in range(4):
        breaker.record(False, 0.0, TRAFFIC)
    probe = breaker.admit(5.0)
    assert probe
    assert breaker.admit(5.0) is None

    breaker.unused(probe, 5.0)

    assert breaker.admit(5.0) == probe + 1


def test_a_job_that_takes_longer_than_a_probe_may_still_closes_it() -> None:
    """Other probes went meanwhile; the first one's success is as good as theirs."""
    breaker = Breaker(SETTINGS)
    for _ in range(4):
        breaker.record(False, 0.0, TRAFFIC)
    first = breaker.admit(5.0)
    assert first
    assert breaker.admit(9.0)

    breaker.record(True, 9.5, first)

    assert breaker.position is Position.CLOSED


class Server:
    """A port of two calls, as a store has and as a broker has."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.outcome = PublishOutcome.CONFIRMED
        self.num_calls = 0
        self.hangs = asyncio.Event()
        self.timing = "as it is"

    async def read(self, group: Sequence[str]) -> list[str]:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        return list(group)

    async def publish(self, group: Sequence[str]) -> list[PublishOutcome]:
        self.num_calls += 1
        return [self.outcome] * len(group)

    async def hang(self) -> None:
        await self.hangs.wait()

    async def ping(self) -> str:
        self.num_calls += 1
        return "server 1"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def breakers(clock: Clock) -> tuple[Breakers, CollectorRegistry]:
    metrics = Metrics(CollectorRegistry())
    return Breakers(SETTINGS, metrics, clock=clock), metrics.registry


async def test_what_answers_readiness_is_probed_by_the_next_call() -> None:
    """Somebody saw that it is back: nobody is refused for the rest of the pause. The ping alone closes nothing."""
    server, clock = Server(), Clock()
    all_of_them, _ = breakers(clock)
    guarded = all_of_them.guarded_store(server)
    server.error = StoreUnavailable("gone")
    for _ in range(4):
        with pytest.raises(StoreUnavailable, match="gone"):
            await guarded.read(["a"])
    with pytest.raises(StoreUnavailable, match="asked again"):
        await guarded.read(["a"])

    assert await guarded.ping() == "server 1"
    with pytest.raises(StoreUnavailable, match="gone"):  # asked, and not back after all
        await guarded.read(["a"])
    with pytest.raises(StoreUnavailable, match="asked again"):
        await guarded.read(["a"])
    await guarded.ping()
    server.error = None

    assert await guarded.read(["a"]) == ["a"]
    assert await guarded.read(["a"]) == ["a"]


async def test_a_server_that_does_not_answer_is_not_asked_and_comes_back_by_a_probe() -> None:
    """At once, with the time of the next try; and nobody has to tell that it is back."""
    server, clock = Server(), Clock()
    all_of_them, registry = breakers(clock)
    guarded = all_of_them.guarded_store(server)
    server.error = StoreUnavailable("gone")
    for _ in range(4):
        with pytest.raises(StoreUnavailable, match="gone"):
            await guarded.read(["a"])

    with pytest.raises(StoreUnavailable, match="asked again") as refused:
        await guarded.read(["a"])

    assert server.num_calls == 4
    assert refused.value.retry_after_s == 5.0
    assert registry.get_sample_value("codeyard_breaker_state", {"kind": "store", "model": ""}) == 2
    server.error = None
    clock.now_s += 5.0
    assert await guarded.read(["a"]) == ["a"]
    assert registry.get_sample_value("codeyard_breaker_state", {"kind": "store", "model": ""}) == 0


async def test_only_one_call_is_the_probe() -> None:
    """A herd that has waited must not fall upon a server that is just coming back."""
    server, clock = Server(), Clock()
    guarded = breakers(clock)[0].guarded_store(server)
    server.error = StoreUnavailable("gone")
    for _ in range(4):
        with pytest.raises(StoreUnavailable):
            await guarded.read(["a"])
    server.error = None
    clock.now_s += 5.0
    probe = asyncio.create_task(guarded.hang())
    await asyncio.sleep(0)

    answers = await asyncio.gather(*(guarded.read(["a"]) for _ in range(10)), return_exceptions=True)

    assert all(isinstance(one, StoreUnavailable) for one in answers)
    server.hangs.set()
    await probe
    assert await guarded.read(["a"]) == ["a"]


async def test_a_cancelled_probe_leaves_the_way_free() -> None:
    """Its caller hung up: that says nothing of the server."""
    server, clock = Server(), Clock()
    guarded = breakers(clock)[0].guarded_store(server)
    server.error = StoreUnavailable("gone")
    for _ in range(4):
        with pytest.raises(StoreUnavailable):
            await guarded.read(["a"])
    server.error = None
    clock.now_s += 5.0
    probe = asyncio.create_task(guarded.hang())
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)

    assert await guarded.read(["a"]) == ["a"]


async def test_a_broker_that_confirms_nothing_counts_as_away() -> None:
    """It raises nothing: each message's outcome says that there was no answer."""
    server, clock = Server(), Clock()
    guarded = breakers(clock)[0].guarded_broker(server)
    server.outcome = PublishOutcome.UNKNOWN
    for _ in range(4):
        await guarded.publish(["a", "b"])

    with pytest.raises(BrokerUnavailable):
        await guarded.publish(["a"])


async def test_what_a_port_refuses_for_good_reasons_does_not_count() -> None:
    """A full queue answers; so does a conflict."""
    server, clock = Server(), Clock()
    guarded = breakers(clock)[0].guarded_broker(server)
    server.error = FleetError("refused")
    server.outcome = PublishOutcome.FULL
    for _ in range(10):
        await guarded.publish(["a"])
        with pytest.raises(FleetError, match="refused"):
            await guarded.read(["a"])

    server.error = None
    assert await guarded.read(["a"]) == ["a"]


async def test_a_port_with_less_patience_follows_the_breaker_and_does_not_move_it() -> None:
    """Limits wait a second for their answer: that many late ones are no reason to turn everyone away."""
    server, impatient, clock = Server(), Server(), Clock()
    all_of_them, _ = breakers(clock)
    guarded, following = all_of_them.guarded_store(server), all_of_them.following_store(impatient)
    impatient.error = StoreUnavailable("late")
    for _ in range(20):
        with pytest.raises(StoreUnavailable, match="late"):
            await following.read(["a"])
    assert await guarded.read(["a"]) == ["a"]

    server.error = StoreUnavailable("gone")
    for _ in range(3):  # of four outcomes
        with pytest.raises(StoreUnavailable, match="gone"):
            await guarded.read(["a"])

    with pytest.raises(StoreUnavailable, match="asked again"):
        await following.read(["a"])
    assert impatient.num_calls == 20


async def test_readiness_asks_the_server_itself() -> None:
    """A probe of an orchestrator must not be told what the breaker thinks."""
    server, clock = Server(), Clock()
    guarded = breakers(clock)[0].guarded_store(server)
    server.error = StoreUnavailable("gone")
    for _ in range(4):
        with pytest.raises(StoreUnavailable):
            await guarded.read(["a"])

    assert await guarded.ping() == "server 1"
    assert guarded.timing == "as it is"

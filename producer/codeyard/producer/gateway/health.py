"""The breakers of one gateway, and the servers' ports behind theirs.

A `guarded` port is the port: each call asks the breaker first, fails at once while it is open, and tells the
breaker how it went. So whoever uses the port, the reconciler too, is what finds out that the server is away and
that it is back. Called by: gateway.serve, gateway.fallback.
"""

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from codeyard.producer.gateway.breaker import Breaker, Position, Ticket
from codeyard.shared.broker.port import PublishOutcome
from codeyard.shared.errors import BrokerUnavailable, StoreUnavailable
from codeyard.shared.settings import BreakerSettings
from codeyard.shared.telemetry import Metrics

log = logging.getLogger(__name__)

P = TypeVar("P")

NO_MODEL = ""  # the label of a server's breaker
PING = "ping"  # readiness asks the server itself, and whoever waits for the server learns of its answer
UNGUARDED = frozenset({"close"})


class Breakers:
    """Of the store, of the broker, and of each model that outcomes were seen of. Belongs to one event loop."""

    def __init__(
        self, settings: BreakerSettings, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._gauge = metrics.breaker_state
        self._clock = clock
        self._models: dict[str, Switch] = {}  # as many as there are aliases: an unknown one has no outcomes
        self.store = self._switch("store", NO_MODEL)
        self.broker = self._switch("broker", NO_MODEL)

    def model(self, name: str) -> "Switch":
        """For outcomes: makes it if there is none."""
        if name not in self._models:
            self._models[name] = self._switch("model", name)
        return self._models[name]

    def known(self, name: str) -> "Switch | None":
        """For questions: what a caller made up leaves no trace."""
        return self._models.get(name)

    def guarded_store(self, port: P) -> P:
        """Any port that raises StoreUnavailable."""
        return cast(P, _Guarded(port, self.store, StoreUnavailable))

    def following_store(self, port: P) -> P:
        """One that fails at once with the store and tells the breaker nothing: it has less patience than the store."""
        return cast(P, _Following(port, self.store, StoreUnavailable))

    def guarded_broker(self, port: P) -> P:
        return cast(P, _Guarded(port, self.broker, BrokerUnavailable))

    def _switch(self, kind: str, model: str) -> "Switch":
        return Switch(Breaker(self._settings), kind, model, self._gauge, self._clock)


class Switch:
    """One breaker with its clock, its metric and its log line."""

    def __init__(self, breaker: Breaker, kind: str, model: str, gauge: Any, clock: Callable[[], float]) -> None:
        self._breaker = breaker
        self._fields = {"kind": kind, "model": model}
        self._gauge = gauge.labels(**self._fields)
        self._gauge.set(breaker.position)
        self._told = breaker.position
        self._clock = clock
        self.trouble = ""  # the last that was said by what failed

    def refuses_for_s(self) -> float:
        return self._breaker.refuses_for_s(self._clock())

    def admit(self) -> Ticket | None:
        ticket = self._breaker.admit(self._clock())
        self._tell()
        return ticket

    def record(self, good: bool, ticket: Ticket) -> None:
        self._breaker.record(good, self._clock(), ticket)
        self._tell()

    def answered(self) -> None:
        self._breaker.answered(self._clock())

    def unused(self, ticket: Ticket) -> None:
        self._breaker.unused(ticket, self._clock())

    def _tell(self) -> None:
        position = self._breaker.position
        if position is self._told:
            return
        self._told = position
        self._gauge.set(position)
        level = logging.WARNING if position is Position.OPEN else logging.INFO
        log.log(level, "breaker_turned", extra={**self._fields, "position": position.name.lower()})


class _Guarded:
    """`port` with every coroutine method of it behind the breaker."""

    def __init__(self, port: object, switch: Switch, away: type[StoreUnavailable] | type[BrokerUnavailable]) -> None:
        self._port = port
        self._switch = switch
        self._away = away
        self._calls: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self._calls:
            return self._calls[name]
        found = getattr(self._port, name)
        if name in UNGUARDED or not inspect.iscoroutinefunction(found):
            return found
        self._calls[name] = call = self._beside(found) if name == PING else self._behind(found)
        return call

    def _beside(self, ping: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **more: Any) -> Any:
            answer = await ping(*args, **more)
            self._switch.answered()
            return answer

        return call

    def _behind(self, method: Callable[..., Any]) -> Callable[..., Any]:
        switch, away = self._switch, self._away

        async def call(*args: Any, **more: Any) -> Any:
            ticket = switch.admit()
            if ticket is None:
                raise not_asked(away, switch)
            told = False
            try:
                answer = await method(*args, **more)
                switch.record(not _unanswered(answer), ticket)
                told = True
            except away as error:
                switch.trouble = str(error).partition(": ")[2]
                switch.record(False, ticket)
                told = True
                raise
            finally:
                if not told:  # cancelled, or an error of another kind: it says nothing about the server
                    switch.unused(ticket)
            return answer

        return call


class _Following(_Guarded):
    def _behind(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **more: Any) -> Any:
            if self._switch.refuses_for_s() > 0:
                raise not_asked(self._away, self._switch)
            return await method(*args, **more)

        return call


def not_asked(
    away: type[StoreUnavailable] | type[BrokerUnavailable], switch: Switch
) -> StoreUnavailable | BrokerUnavailable:
    for_s = switch.refuses_for_s()
    last = f"; the last time: {switch.trouble}" if switch.trouble else ""
    return away(f"it did not answer lately and is asked again in {for_s:.2g} s{last}", retry_after_s=max(1.0, for_s))


def _unanswered(answer: object) -> bool:
    """A broker that confirms nothing raises nothing either: the outcome of each message says so."""
    return (
        isinstance(answer, Sequence)
        and not isinstance(answer, str | Mapping)
        and bool(answer)
        and all(one is PublishOutcome.UNKNOWN for one in answer)
    )

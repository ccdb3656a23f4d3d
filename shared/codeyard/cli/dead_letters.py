"""What lies in the dead-letter queue, and what can be done with it: read, redrive, purge.

Promise: a letter leaves the queue only when its job is accepted again, was so before, or a person said
so; dying between any two steps leaves it there, and repeating is safe (docs/dead-letters.md).
A queue cannot be looked into without taking from it: letters are held unacked meanwhile, and whoever looks
at the same time does not see them. Called by: cli.dead. Does not know about: the terminal.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from codeyard.shared.broker.port import Broker, Consumer, Delivery, PublishOutcome
from codeyard.shared.envelope import Envelope, new_nonce, open_delivery, seal
from codeyard.shared.errors import MalformedMessage
from codeyard.shared.job import Job
from codeyard.shared.record import Failure, Record, Result, State
from codeyard.shared.store import transitions
from codeyard.shared.store.port import Queued, Redrive, Redriven, RedriveVerdict, Store
from codeyard.shared.topology import Topology

MAX_HELD = 50_000  # letters looked at in one go; AMQP's prefetch ends at 65,535
QUIET_S = 1.0  # nothing more comes after this: others hold the rest, or the count was stale
GROUP = 256  # jobs redriven in one round trip
ADDED = frozenset({"reason", "error", "history", "queue"})  # headers of a letter that its message did not have
MALFORMED = "malformed"

EXPLAINED: Mapping[str, str] = {
    RedriveVerdict.REDRIVEN: "accepted again",
    RedriveVerdict.ALREADY: "redriven before",
    RedriveVerdict.LIVE: "its job is not final yet; letter kept",
    RedriveVerdict.ENDED: "its job succeeded or was cancelled after all; letter kept",
    RedriveVerdict.SUPERSEDED: "its id has since been used by another submission; letter kept",
    RedriveVerdict.CONFLICT: "its id belongs to a job with another body; letter kept",
    MALFORMED: "not a job; letter kept",
    PublishOutcome.FULL: "accepted again; its queue is full, the reconciler will publish it; letter kept",
    PublishOutcome.UNROUTABLE: "accepted again, but no worker ever served its revision; letter kept",
    PublishOutcome.UNKNOWN: "accepted again; the broker did not confirm, the reconciler looks after it; letter kept",
}
DONE = frozenset({RedriveVerdict.REDRIVEN, RedriveVerdict.ALREADY})


@dataclass(frozen=True, slots=True, eq=False)
class Letter:
    """One dead letter. `envelope` is None where the body is no job, and `trouble` says why."""

    delivery: Delivery
    envelope: Envelope | None
    trouble: str = ""

    @classmethod
    def of(cls, delivery: Delivery) -> "Letter":
        try:
            return cls(delivery, open_delivery(delivery))
        except MalformedMessage as error:
            return cls(delivery, None, str(error))

    @property
    def id(self) -> str:
        """The job's, or where the message has none, a name derived from its body."""
        return self.delivery.message_id or f"body-{hashlib.sha256(self.delivery.body).hexdigest()[:12]}"

    @property
    def job(self) -> Job | None:
        return self.envelope.job if self.envelope else None

    @property
    def reason(self) -> str:
        return str(self.delivery.headers.get("reason", ""))

    @property
    def error(self) -> str:
        return str(self.delivery.headers.get("error", "")) or self.trouble

    @property
    def queue(self) -> str:
        """The job queue it was meant for."""
        return str(self.delivery.headers.get("queue", ""))

    @property
    def died_in(self) -> str:
        """The incarnation: publishers that did not reserve are known by their publication, as in the claim."""
        return (self.envelope.incarnation or self.envelope.publication) if self.envelope else ""

    @property
    def tenant(self) -> str:
        return self.job.tenant if self.job else str(self.delivery.headers.get("tenant", ""))

    @property
    def headers(self) -> dict[str, object]:
        """The original ones."""
        return {name: value for name, value in self.delivery.headers.items() if name not in ADDED}

    @property
    def history(self) -> list[Any]:
        """What the worker knew of its attempts; one entry with the text where it is not a list."""
        text = str(self.delivery.headers.get("history", "[]"))
        try:
            found = json.loads(text)
        except ValueError:
            return [text]
        return found if isinstance(found, list) else [found]

    def age_s(self, now: float) -> float | None:
        """Since it was dead-lettered, by the clocks of that machine and this one."""
        at = self.delivery.timestamp
        return None if at is None else max(0.0, now - at)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters. Empty fields want all; `older_s` and `newer_s` are ages in seconds."""

    ids: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()
    model: str | None = None
    tenant: str | None = None
    older_s: float | None = None
    newer_s: float | None = None

    @property
    def everything(self) -> bool:
        return self == Wanted()

    def takes(self, letter: Letter, now: float) -> bool:
        age_s = letter.age_s(now)
        return (
            (not self.ids or letter.id in self.ids)
            and (not self.reasons or letter.reason in self.reasons)
            and (self.model is None or (letter.job is not None and letter.job.model == self.model))
            and (self.tenant is None or letter.tenant == self.tenant)
            and (self.older_s is None or (age_s is not None and age_s >= self.older_s))
            and (self.newer_s is None or (age_s is not None and age_s < self.newer_s))
        )


@dataclass(frozen=True, slots=True)
class Treated:
    """What became of a letter. `gone`: it has left the queue."""

    letter: Letter
    outcome: str  # a RedriveVerdict, a PublishOutcome or MALFORMED
    gone: bool

    @property
    def text(self) -> str:
        return EXPLAINED[self.outcome]


@dataclass(slots=True)
class Hand:
    """Letters in hand, oldest first, until the context ends: then those not acked go back."""

    letters: list[Letter]
    consumer: Consumer | None = None
    now: float = field(default_factory=time.time)

    def select(self, wanted: Wanted) -> list[Letter]:
        return [letter for letter in self.letters if wanted.takes(letter, self.now)]

    async def ack(self, letters: Sequence[Letter]) -> None:
        if letters:
            assert self.consumer is not None
            await self.consumer.ack([letter.delivery for letter in letters])


@asynccontextmanager
async def in_hand(broker: Broker, topology: Topology) -> AsyncIterator[Hand]:
    """All letters there are, at most MAX_HELD. Raises BrokerUnavailable."""
    [depth] = await broker.depth([topology.dead_queue])
    if depth == 0:
        yield Hand([])
        return
    most = min(depth + GROUP, MAX_HELD)
    consumer = await broker.consume({topology.dead_queue: most})
    try:
        yield Hand([Letter.of(one) for one in await _received(consumer, depth, most)], consumer)
    finally:
        await consumer.close()


async def _received(consumer: Consumer, expected: int, most: int) -> list[Delivery]:
    found: list[Delivery] = []
    while len(found) < most:
        try:
            async with asyncio.timeout(QUIET_S if found else 5 * QUIET_S):
                found += await consumer.receive(most - len(found))
        except TimeoutError:
            break
        if len(found) >= expected:
            break
    return found


# Redrive -------------------------------------------------------------------------------------------


async def foretold(letters: Sequence[Letter], store: Store) -> list[Treated]:
    """What `redrive` would do, by the very function that decides it; nothing is changed."""
    requests = {letter: _request(letter) for letter in letters}
    ids = [request.job.id for request in requests.values() if request is not None]
    records = dict(zip(ids, await store.read(ids), strict=True)) if ids else {}
    found = []
    for letter, request in requests.items():
        outcome: str = MALFORMED
        if request is not None:
            step = transitions.redrive(records[request.job.id], request, time.time(), store.timing)
            outcome = step.outcome.verdict
        found.append(Treated(letter, outcome, gone=False))
    return found


async def redrive(
    hand: Hand, letters: Sequence[Letter], broker: Broker, store: Store, topology: Topology, *, timeout_s: float
) -> list[Treated]:
    """Redrive, publish, mark queued, ack: each step confirmed before the next. Raises BrokerUnavailable,
    StoreUnavailable; what was not acked is in the queue again, and repeating is safe."""
    treated = []
    for start in range(0, len(letters), GROUP):
        treated += await _redrive_group(hand, letters[start : start + GROUP], broker, store, topology, timeout_s)
    return treated


async def _redrive_group(
    hand: Hand, letters: Sequence[Letter], broker: Broker, store: Store, topology: Topology, timeout_s: float
) -> list[Treated]:
    asked = [(letter, request) for letter in letters if (request := _request(letter)) is not None]
    answers = await store.redrive([request for _, request in asked]) if asked else []
    outcomes: dict[Letter, str] = dict.fromkeys(letters, MALFORMED)
    outcomes |= {letter: answer.verdict for (letter, _), answer in zip(asked, answers, strict=True)}

    lives = _one_for_each_job(asked, answers)
    messages = [
        seal(
            record.job,
            topology,
            publication=request.publication,
            incarnation=record.incarnation,
            deadline_at=record.deadline_at,
            traceparent=request_trace,
        )
        for request, record, request_trace in lives.values()
    ]
    published = await broker.publish(messages, timeout_s=timeout_s) if messages else []
    told = dict(zip(lives, published, strict=True))
    confirmed = [Queued(one, lives[one][0].publication) for one, how in told.items() if how is PublishOutcome.CONFIRMED]
    if confirmed:
        await store.mark_queued(confirmed)

    treated = []
    for letter, outcome in outcomes.items():
        if outcome == RedriveVerdict.REDRIVEN and letter.job is not None:
            how = told[letter.job.id]
            outcome = outcome if how is PublishOutcome.CONFIRMED else how
        treated.append(Treated(letter, outcome, gone=outcome in DONE))
    await hand.ack([one.letter for one in treated if one.gone])
    return treated


def _request(letter: Letter) -> Redrive | None:
    if letter.envelope is None:
        return None
    failure = Failure(code=letter.reason or "failed", message=letter.error)
    return Redrive(
        job=letter.envelope.job,
        digest=letter.envelope.digest,
        died_in=letter.died_in,
        outcome=Result(state=State.FAILED, error=failure),
        incarnation=new_nonce(),
        publication=new_nonce(),
    )


_Life = tuple[Redrive, Record, str | None]


def _one_for_each_job(asked: Sequence[tuple[Letter, Redrive]], answers: Sequence[Redriven]) -> dict[str, _Life]:
    """A job may have two letters of the same death, and is published once."""
    lives: dict[str, _Life] = {}
    for (letter, request), answer in zip(asked, answers, strict=True):
        if answer.verdict is RedriveVerdict.REDRIVEN and answer.record is not None and letter.envelope is not None:
            lives.setdefault(request.job.id, (request, answer.record, letter.envelope.traceparent))
    return lives

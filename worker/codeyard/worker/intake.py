"""From deliveries to claimed jobs.

1. Receive a group of deliveries. 2. Decode each; what does not decode is dead-lettered and the worker
goes on; what is of a later version is passed on to a newer worker (docs/upgrades.md). 3. Claim the rest in one
round trip. 4. By verdict: run it, adopt it, hold it, or end it.

Owns: deliveries until they are in the hand, dead-lettered, held or acked. Called by: worker.service.
Does not know about: engines, schedulers.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codeyard.shared.broker.port import Consumer, Delivery, Message
from codeyard.shared.envelope import PASSED_ON, Envelope, carried, open_delivery, times_passed_on
from codeyard.shared.errors import LaterVersion, MalformedMessage
from codeyard.shared.store.port import Claim, Claimed, ClaimVerdict, Store
from codeyard.worker.execution import poisoned
from codeyard.worker.hand import Hand
from codeyard.worker.held import Finished, HeldJob
from codeyard.worker.patience import persist
from codeyard.worker.settler import Settler, dead_letter_headers, retry_delay_s

log = logging.getLogger(__name__)

MAX_GROUP = 256  # deliveries claimed in one round trip
MIN_HOLD_S = 0.05
MAX_PASSES = 32  # of one message, an hour through the delay queues: by then an upgrade has brought a newer worker

MINE = {ClaimVerdict.RUN, ClaimVerdict.ADOPT}
ACK = {ClaimVerdict.FINAL, ClaimVerdict.DUPLICATE, ClaimVerdict.EXPIRED, ClaimVerdict.CANCELLED}
DEAD = {
    ClaimVerdict.RECORD_MISSING: "no record, and past its deadline",
    ClaimVerdict.CONFLICT: "the message's body is not the one recorded under this id",
}


@dataclass(frozen=True, slots=True)
class _Arrival:
    delivery: Delivery
    envelope: Envelope


class Intake:
    def __init__(
        self,
        consumer: Consumer,
        store: Store,
        settler: Settler,
        hand: Hand,
        *,
        owner: str,
        on_claimed: Callable[[HeldJob], None],
    ) -> None:
        self._consumer = consumer
        self._store = store
        self._settler = settler
        self._hand = hand
        self._owner = owner
        self._on_claimed = on_claimed
        self._open = asyncio.Event()
        self._open.set()

    def allow(self, open: bool) -> None:
        """Whether deliveries are taken: not while memory is at its limit. What is in hand goes on."""
        if open:
            self._open.set()
        else:
            self._open.clear()

    async def run(self) -> None:
        """Until cancelled. A group is taken whole: cancellation between its steps only repeats work."""
        async with asyncio.TaskGroup() as holds:  # parent of arrivals that wait: for another's lease, for the broker
            while True:
                await self._open.wait()
                deliveries = await persist(lambda: self._consumer.receive(MAX_GROUP))
                arrivals = self._decode(deliveries, holds)
                if arrivals:
                    await self._claim(arrivals, holds)

    def _decode(self, deliveries: Sequence[Delivery], aside: asyncio.TaskGroup) -> list[_Arrival]:
        """The rest is published elsewhere, aside: a broker that takes no messages still delivers."""
        arrivals, later = [], []
        dead: list[tuple[Delivery, str, str]] = []
        for delivery in deliveries:
            try:
                arrivals.append(_Arrival(delivery, open_delivery(delivery)))
            except LaterVersion as error:
                if times_passed_on(delivery) < MAX_PASSES:
                    later.append(delivery)
                else:
                    dead.append((delivery, "later_version", str(error)))
            except MalformedMessage as error:
                dead.append((delivery, "malformed", str(error)))
        if later:
            aside.create_task(self._pass_on(later), name="pass on")
        if dead:
            aside.create_task(self._bury(dead), name="bury")
        return arrivals

    async def _pass_on(self, later: Sequence[Delivery]) -> None:
        """By way of the delay queues: requeued they would come straight back, and stand before what is readable
        here. No attempt is charged: nothing was claimed."""
        copies = []
        for delivery in later:
            times = times_passed_on(delivery) + 1
            headers = {**carried(delivery), PASSED_ON: times}
            copies.append((Message(delivery.queue, delivery.message_id, delivery.body, headers), retry_delay_s(times)))
        log.warning("messages_of_a_later_version", extra={"num_jobs": len(later), "queue": later[0].queue})
        await self._settler.defer(copies)
        await persist(lambda: self._consumer.ack(later))

    async def _claim(self, arrivals: Sequence[_Arrival], holds: asyncio.TaskGroup) -> None:
        claims = [
            Claim(
                job=arrival.envelope.job,
                digest=arrival.envelope.digest,
                publication=arrival.envelope.publication,
                owner=self._owner,
                incarnation=arrival.envelope.incarnation,
                published_at=arrival.envelope.published_at,
                deadline_at=arrival.envelope.deadline_at,
            )
            for arrival in arrivals
        ]
        claimed = await persist(lambda: self._store.claim(claims))
        done: list[Delivery] = []
        dead: list[tuple[Delivery, str, str]] = []
        for arrival, answer in zip(arrivals, claimed, strict=True):
            verdict = answer.verdict
            if verdict in MINE:
                self._take(arrival, answer)
            elif verdict is ClaimVerdict.HOLD:
                holds.create_task(
                    self._ask_again(arrival, answer.hold_s, holds), name=f"hold {arrival.envelope.job.id}"
                )
            elif verdict is ClaimVerdict.POISON:
                self._condemn(arrival, answer)
            elif verdict in ACK:
                done.append(arrival.delivery)
            else:
                dead.append((arrival.delivery, str(verdict), DEAD[verdict]))
        if dead:
            holds.create_task(self._bury(dead), name="bury")
        if done:
            await persist(lambda: self._consumer.ack(done))

    def _take(self, arrival: _Arrival, answer: Claimed) -> None:
        """Ours under this fence, by this delivery or by another that was answered first: the same message may be
        here twice, and its two answers come in any order. Two runs under one fence would write one stream. One
        that is adopted and unknown here is ours all the same: an earlier claim's answer was lost."""
        held = self._hand.get(arrival.envelope.job.id)
        if held is not None and held.fence == answer.fence:
            self._settler.adopt(held, arrival.delivery)
            return
        held = HeldJob.of(arrival.envelope, arrival.delivery, answer, time.monotonic())
        self._hand.add(held)
        self._on_claimed(held)

    def _condemn(self, arrival: _Arrival, answer: Claimed) -> None:
        held = HeldJob.of(arrival.envelope, arrival.delivery, answer, time.monotonic())
        self._hand.add(held)
        self._settler.put(Finished(held, poisoned(answer.attempt)))

    async def _ask_again(self, arrival: _Arrival, hold_s: float, holds: asyncio.TaskGroup) -> None:
        """Keep it unacked until the other owner is done or gone, then claim again."""
        await asyncio.sleep(max(MIN_HOLD_S, hold_s))
        await self._claim([arrival], holds)

    async def _bury(self, dead: Sequence[tuple[Delivery, str, str]]) -> None:
        messages = [
            Message(
                queue=delivery.queue,
                message_id=delivery.message_id,
                body=delivery.body,
                headers={**carried(delivery), **dead_letter_headers(reason, text)},
            )
            for delivery, reason, text in dead
        ]
        for delivery, reason, text in dead:
            log.warning(
                "message_dead_lettered", extra={"message_id": delivery.message_id, "reason": reason, "error": text}
            )
        await self._settler.dead_letter(messages)
        await persist(lambda: self._consumer.ack([delivery for delivery, _, _ in dead]))

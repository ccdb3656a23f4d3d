"""Find jobs whose message or owner was lost, and put that right. Runs in every worker and gateway.

The store's index says which jobs are due for a look; `transitions.recover` decides; here the decision is
carried out. Any number of reconcilers may work at once: the store lets one win each job.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codeyard.shared.broker.port import Broker, Delivery, Message, PublishOutcome
from codeyard.shared.envelope import Envelope, new_nonce, open_delivery, seal
from codeyard.shared.errors import BrokerUnavailable, MalformedMessage, StoreUnavailable
from codeyard.shared.record import Failure, Record, Result, State
from codeyard.shared.store.port import (
    Claim,
    ClaimVerdict,
    Commit,
    Queued,
    Recovered,
    RecoverVerdict,
    Recovery,
    Store,
)
from codeyard.shared.topology import Topology

log = logging.getLogger(__name__)

GROUP = 256  # jobs looked at in one round trip
PERIOD_S = 1.0  # between looks when nothing is due, jittered by half
PUBLISH_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What one look did, in jobs."""

    looked_at: int = 0
    expired: int = 0
    republished: int = 0


async def run_reconciler(
    broker: Broker,
    store: Store,
    topology: Topology,
    stop: asyncio.Event,
    *,
    period_s: float = PERIOD_S,
    on_done: Callable[[Reconciled], None] = lambda _: None,
) -> None:
    """Until `stop` is set. A broker or store that is away is only logged: the next look follows."""
    while not stop.is_set():
        done = Reconciled()
        try:
            done = await reconcile_once(broker, store, topology)
            on_done(done)
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("reconciler_waits", extra={"error": str(error)})
        if done.looked_at < GROUP:
            await _pause(stop, period_s * random.uniform(0.5, 1.5))


async def reconcile_once(broker: Broker, store: Store, topology: Topology) -> Reconciled:
    """One look at what is due now. Raises BrokerUnavailable, StoreUnavailable."""
    due = await store.due(GROUP)
    if not due:
        return Reconciled()
    publications = {job_id: new_nonce() for job_id in due}
    answers = await store.recover([Recovery(job_id, publications[job_id]) for job_id in due])
    unsure = [answer.record for answer in answers if answer.verdict is RecoverVerdict.ASK_QUEUE and answer.record]
    if unsure:
        answers += await _recover_unsure(broker, store, topology, unsure, publications)
    lost = [answer.record for answer in answers if answer.verdict is RecoverVerdict.REPUBLISH and answer.record]
    republished = await _publish_again(broker, store, topology, lost, publications) if lost else 0
    expired = sum(answer.verdict is RecoverVerdict.EXPIRED for answer in answers)
    if republished or expired:
        log.info("reconciled", extra={"republished": republished, "expired": expired})
    return Reconciled(len(due), expired, republished)


async def settle_dropped(broker: Broker, store: Store, topology: Topology, stop: asyncio.Event) -> None:
    """Commit as failed what the broker itself dead-lettered, so that no caller waits for ever.

    Until `stop` is set. Order: publish to the dead-letter queue, commit, ack.
    """
    owner = f"dropped:{new_nonce()}"  # one for all tries: a claim whose answer was lost is found again
    while not stop.is_set():
        try:
            consumer = await broker.consume({topology.dropped_queue: GROUP})
            try:
                while True:
                    group = await consumer.receive(GROUP)
                    await _settle_dropped(broker, store, owner, group)
                    await consumer.ack(group)
            finally:
                await consumer.close()
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("dropped_not_settled", extra={"error": str(error)})
            await _pause(stop, PERIOD_S)


async def _recover_unsure(
    broker: Broker, store: Store, topology: Topology, unsure: Sequence[Record], publications: dict[str, str]
) -> list[Recovered]:
    """Queued for long: is the message still there? An empty queue says no; a worker would have claimed it."""
    queue_of = {record.id: topology.job_queue(record.job.revision, record.lane, record.job.shard) for record in unsure}
    queues = sorted(set(queue_of.values()))
    empty = {queue: depth == 0 for queue, depth in zip(queues, await broker.depth(queues), strict=True)}
    return await store.recover(
        [Recovery(record.id, publications[record.id], queue_empty=empty[queue_of[record.id]]) for record in unsure]
    )


async def _publish_again(
    broker: Broker, store: Store, topology: Topology, lost: Sequence[Record], publications: dict[str, str]
) -> int:
    messages = [
        seal(
            record.job,
            topology,
            publication=publications[record.id],
            incarnation=record.incarnation,
            deadline_at=record.deadline_at,
            attempt=record.attempt,
        )
        for record in lost
    ]
    outcomes = await broker.publish(messages, timeout_s=PUBLISH_TIMEOUT_S)
    confirmed = [
        Queued(record.id, publications[record.id])
        for record, outcome in zip(lost, outcomes, strict=True)
        if outcome is PublishOutcome.CONFIRMED
    ]
    if confirmed:
        await store.mark_queued(confirmed)
    return len(confirmed)


async def _settle_dropped(broker: Broker, store: Store, owner: str, group: Sequence[Delivery]) -> None:
    """Return when these may be acked: each job is final, or someone alive has a delivery of its own."""
    opened = [(delivery, _opened(delivery)) for delivery in group]
    await _dead_letter(broker, [delivery for delivery, _ in opened])
    held = await _fail_dropped(store, owner, [envelope for _, envelope in opened if envelope is not None])
    if held:
        # Mostly a process that died, or lost its answer, between this claim and the commit: it never renews.
        await asyncio.sleep(max(hold_s for _, hold_s in held))
        await _fail_dropped(store, owner, [envelope for envelope, _ in held])


async def _fail_dropped(store: Store, owner: str, envelopes: Sequence[Envelope]) -> list[tuple[Envelope, float]]:
    """Commit what can be claimed. What another owner holds is left: seconds until its lease is over."""
    if not envelopes:
        return []
    claims = [
        Claim(e.job, e.digest, e.publication, owner, e.incarnation, e.published_at, e.deadline_at) for e in envelopes
    ]
    answers = list(zip(envelopes, await store.claim(claims), strict=True))
    failure = Failure(code="dropped_by_broker", message="the broker dead-lettered this job's message")
    commits = [
        Commit(envelope.job.id, answer.fence, envelope.publication, Result(state=State.FAILED, error=failure))
        for envelope, answer in answers
        if answer.verdict in (ClaimVerdict.RUN, ClaimVerdict.ADOPT, ClaimVerdict.POISON)
    ]
    if commits and not all(answer.may_ack for answer in await store.commit(commits)):
        raise StoreUnavailable("its answers took longer than a lease")  # all of them come again
    return [(envelope, answer.hold_s) for envelope, answer in answers if answer.verdict is ClaimVerdict.HOLD]


async def _dead_letter(broker: Broker, group: Sequence[Delivery]) -> None:
    messages = [
        Message(
            queue=str(delivery.headers.get("queue", delivery.queue)),  # where it was dropped
            message_id=delivery.message_id,
            body=delivery.body,
            headers={
                **{name: value for name, value in delivery.headers.items() if isinstance(value, str | int | float)},
                "reason": "dropped_by_broker",
                "error": f"the broker gave it up: {delivery.headers.get('reason', 'no reason')}",
            },
        )
        for delivery in group
    ]
    outcomes = await broker.dead_letter(messages, timeout_s=PUBLISH_TIMEOUT_S)
    if any(outcome is not PublishOutcome.CONFIRMED for outcome in outcomes):
        raise BrokerUnavailable("the dead-letter queue did not confirm")


def _opened(delivery: Delivery) -> Envelope | None:
    try:
        return open_delivery(delivery)
    except MalformedMessage:
        return None


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass

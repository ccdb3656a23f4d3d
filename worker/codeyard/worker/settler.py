"""End jobs: the outcome into the store first, and only then the delivery.

Many endings share a round trip. The order for each, every step confirmed before the next:
- finished:    (failed: dead-letter ->) commit -> ack
- retry:       release, attempt charged -> publish a delayed copy -> ack
- handed back: release, attempt not charged -> requeue
- lost:        read -> ack if the job is final or counts on another publication, else requeue
Dying between any two steps is safe: the delivery comes back and the claim table sorts it out. A broker
or store that does not answer is asked again, with backoff, for as long as it takes. Endings that are published
stand in a line of their own: a broker that takes no messages keeps no other result from the store.
Called by: worker.intake, worker.runner. Does not know about: engines.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from codeyard.shared.broker.port import Broker, Consumer, Delivery, Message, PublishOutcome
from codeyard.shared.envelope import new_nonce, seal
from codeyard.shared.record import State
from codeyard.shared.store.port import Commit, Committed, CommitVerdict, Release, Store
from codeyard.shared.telemetry import Metrics
from codeyard.shared.topology import DELAY_STEPS_S, Topology
from codeyard.worker.held import Ending, Finished, HandBack, HeldJob, Lost, Retry
from codeyard.worker.patience import persist

log = logging.getLogger(__name__)

T = TypeVar("T")

REPUBLISH_PAUSE_S = 0.5  # after a dead or delay queue was full or did not answer


@dataclass(slots=True)
class _Batch:
    """One group of endings by kind, in the order they came."""

    finished: list[Finished] = field(default_factory=list)
    retries: list[Retry] = field(default_factory=list)
    handed_back: list[HandBack] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)

    @classmethod
    def of(cls, endings: Sequence[Ending]) -> "_Batch":
        batch = cls()
        for ending in endings:
            match ending:
                case Finished():
                    batch.finished.append(ending)
                case Retry():
                    batch.retries.append(ending)
                case HandBack():
                    batch.handed_back.append(ending)
                case Lost():
                    batch.lost.append(ending)
        return batch


class Settler:
    """Takes endings through `put`, settles them in groups of what is there."""

    def __init__(
        self,
        broker: Broker,
        consumer: Consumer,
        store: Store,
        topology: Topology,
        metrics: Metrics,
        *,
        group: int,
        publish_timeout_s: float,
        on_settled: Callable[[HeldJob], None],
    ) -> None:
        self._broker = broker
        self._consumer = consumer
        self._store = store
        self._topology = topology
        self._metrics = metrics
        self._group = group
        self._publish_timeout_s = publish_timeout_s
        self._on_settled = on_settled
        self._endings: asyncio.Queue[Ending] = asyncio.Queue()
        self._published: asyncio.Queue[Ending] = asyncio.Queue()  # failed and to be retried
        self._earlier: dict[HeldJob, list[Delivery]] = {}  # deliveries of jobs in hand, all but the newest

    def put(self, ending: Ending) -> None:
        """Never blocks: the queue is bounded by the prefetch, since each held job ends once."""
        (self._published if _is_published(ending) else self._endings).put_nowait(ending)

    def adopt(self, held: HeldJob, delivery: Delivery) -> None:
        """A job in hand came once more. Each of its deliveries ends when it does: the earlier one may be of a
        connection that is gone, or of a publish that the broker took twice and would hold for ever."""
        self._earlier.setdefault(held, []).append(held.delivery)
        held.delivery = delivery

    async def run(self) -> None:
        """Until cancelled; `drain` waits for what is there."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._settle_line(self._endings), name="settle")
            tasks.create_task(self._settle_line(self._published), name="publish and settle")

    async def _settle_line(self, endings: asyncio.Queue[Ending]) -> None:
        while True:
            group = [await endings.get()]
            while len(group) < self._group and not endings.empty():
                group.append(endings.get_nowait())
            started_s = time.monotonic()
            await self._settle(_Batch.of(group))
            self._metrics.settle.observe(time.monotonic() - started_s)
            for _ in group:
                endings.task_done()

    async def drain(self) -> None:
        """Return when everything put so far is settled."""
        await self._endings.join()
        await self._published.join()

    async def _settle(self, batch: _Batch) -> None:
        if batch.finished:
            await self._finish(batch.finished)
        if batch.retries:
            await self._retry(batch.retries)
        if batch.handed_back:
            await self._hand_back([ending.held for ending in batch.handed_back])
        if batch.lost:
            await self._let_go([ending.held for ending in batch.lost])

    async def _finish(self, endings: Sequence[Finished]) -> None:
        failed = [ending for ending in endings if ending.result.state is State.FAILED]
        if failed:
            await self.dead_letter([_dead_letter(ending) for ending in failed])
        commits = [
            Commit(
                ending.held.id,
                ending.held.fence,
                ending.held.envelope.publication,
                ending.result,
                ending.held.log.flush(),
            )
            for ending in endings
        ]
        self._metrics.commit_group_size.observe(len(commits))
        committed = await persist(lambda: self._store.commit(commits))
        await self._end([ending.held for ending in endings], [answer.may_ack for answer in committed])
        for ending, answer in zip(endings, committed, strict=True):
            self._report(ending, answer)

    async def _retry(self, endings: Sequence[Retry]) -> None:
        pairs: list[tuple[Message, float]] = []
        releases: list[Release] = []
        for ending in endings:
            held, publication, delay_s = ending.held, new_nonce(), retry_delay_s(ending.held.attempt)
            message = seal(
                held.job,
                self._topology,
                publication=publication,
                incarnation=held.fence.rsplit(".", 1)[0],
                deadline_at=held.envelope.deadline_at,
                attempt=held.attempt,
                traceparent=held.envelope.traceparent,
            )
            pairs.append((message, delay_s))
            releases.append(Release(held.id, held.fence, publication, delay_s=delay_s, charge=True))
            self._metrics.retries.inc()
            log.info(
                "job_retried",
                extra={"job": held.id, "attempt": held.attempt, "delay_s": delay_s, "reason": ending.reason},
            )
        await persist(lambda: self._store.release(releases))  # first: a copy that arrives before it is a duplicate
        await self.defer(pairs)
        await self._end([ending.held for ending in endings], [True] * len(endings))

    async def _hand_back(self, held: Sequence[HeldJob]) -> None:
        releases = [Release(one.id, one.fence, one.envelope.publication) for one in held]
        await persist(lambda: self._store.release(releases))
        await self._end(held, [False] * len(held))

    async def _let_go(self, held: Sequence[HeldJob]) -> None:
        records = await persist(lambda: self._store.read([one.id for one in held]))
        may_ack = [
            record is not None and (record.state.final or record.publication != one.envelope.publication)
            for one, record in zip(held, records, strict=True)
        ]
        self._metrics.lease_lost.inc(len(held))
        await self._end(held, may_ack)

    async def defer(self, pairs: Sequence[tuple[Message, float]]) -> None:
        """Return when the delay queues have all of these, each with its seconds."""
        await self._publish_all(list(pairs), lambda rest: self._broker.defer(rest, timeout_s=self._publish_timeout_s))

    async def dead_letter(self, messages: Sequence[Message]) -> None:
        """Return when the dead-letter queue has them all. Each carries its reason and history as headers."""
        for message in messages:
            self._metrics.dead_letters.labels(reason=str(message.headers["reason"])).inc()
        await self._publish_all(
            list(messages), lambda rest: self._broker.dead_letter(rest, timeout_s=self._publish_timeout_s)
        )

    async def _publish_all(
        self, items: list[T], publish: Callable[[Sequence[T]], Awaitable[list[PublishOutcome]]]
    ) -> None:
        """Publish until every item is confirmed. A copy too many is harmless, one too few is not."""
        while items:
            outcomes = await persist(partial(publish, items))
            rest = [
                item for item, outcome in zip(items, outcomes, strict=True) if outcome is not PublishOutcome.CONFIRMED
            ]
            if rest:
                log.warning("publish_repeated", extra={"num_jobs": len(rest), "outcomes": sorted(set(outcomes))})
                await asyncio.sleep(REPUBLISH_PAUSE_S)
            items = rest

    async def _end(self, held: Sequence[HeldJob], may_ack: Sequence[bool]) -> None:
        """Every delivery of these, also those adopted while others are being ended; then they are settled."""
        left, ended = list(zip(held, may_ack, strict=True)), set[Delivery]()
        while left:
            deliveries = [(one, ok) for job, ok in left for one in (*self._earlier.pop(job, ()), job.delivery)]
            done = [one for one, ok in deliveries if ok and one not in ended]
            back = [one for one, ok in deliveries if not ok and one not in ended]
            if done:
                await persist(lambda: self._consumer.ack(done))  # noqa: B023 - awaited here
            if back:
                await persist(lambda: self._consumer.requeue(back))  # noqa: B023 - awaited here
            ended.update(done, back)
            left = [(job, ok) for job, ok in left if job.delivery not in ended]
        for job in held:
            self._earlier.pop(job, None)
            self._on_settled(job)

    def _report(self, ending: Finished, answer: Committed) -> None:
        """One summary line per job, and its metrics."""
        held, result = ending.held, ending.result
        if answer.verdict is not CommitVerdict.COMMITTED:
            log.info("result_refused", extra={"job": held.id, "verdict": answer.verdict})
            return
        job = held.job
        self._metrics.jobs.labels(model=job.model, lane=job.lane, outcome=result.state).inc()
        self._metrics.tokens.labels(model=job.model, kind="prompt").inc(result.usage.prompt_tokens)
        self._metrics.tokens.labels(model=job.model, kind="completion").inc(result.usage.completion_tokens)
        first_token_s = None if held.first_token_s is None else held.first_token_s - held.submitted_s
        if first_token_s is not None:
            self._metrics.first_token.labels(lane=job.lane).observe(first_token_s)
        if result.generate_s is not None:
            self._metrics.generate.labels(lane=job.lane).observe(result.generate_s)
        log.info(
            "job_ended",
            extra={
                "job": held.id,
                "lane": job.lane,
                "attempt": held.attempt,
                "outcome": result.state,
                "queue_wait_s": round(held.claimed_s - held.submitted_s, 3),
                "generate_s": round(result.generate_s or 0.0, 3),
                **({} if first_token_s is None else {"first_token_s": round(first_token_s, 3)}),
                **({"error": result.error.code} if result.error else {}),
            },
        )


def _is_published(ending: Ending) -> bool:
    return isinstance(ending, Retry) or (isinstance(ending, Finished) and ending.result.state is State.FAILED)


def retry_delay_s(attempt: int) -> float:
    """Wait before attempt + 1: the fixed steps of the delay queues, the longest from then on."""
    return float(DELAY_STEPS_S[min(attempt, len(DELAY_STEPS_S)) - 1])


def dead_letter_headers(reason: str, message: str, history: Sequence[dict[str, object]] = ()) -> dict[str, str]:
    """What `codeyard.dead` carries besides the original headers."""
    return {"reason": reason, "error": message[:1_000], "history": json.dumps(list(history))[:8_000]}


def _dead_letter(ending: Finished) -> Message:
    held, error = ending.held, ending.result.error
    reason, text = (error.code, error.message) if error else ("failed", "")
    history = [{"attempt": held.attempt, "error": text[:200], "generate_s": ending.result.generate_s}]
    original = {k: v for k, v in held.delivery.headers.items() if isinstance(v, str | int | float)}
    return Message(
        queue=held.delivery.queue,
        message_id=held.id,
        body=held.delivery.body,
        headers={**original, **dead_letter_headers(reason, text, history)},
    )

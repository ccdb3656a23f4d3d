"""Submit jobs so that "accepted" is true: reserve, publish, confirm, mark queued, and only then say so.

    estimate would start after its deadline -> DeadlineTooSoon
    long prompt -> written to the store, the job carries its claim (shared.claims)
    reserve  new -> publish          attached, accepted -> done: the job that is there answers
             attached, still reserved -> wait for its submitter, one publish timeout at most, then publish it
             conflict -> IdempotencyConflict
    publish  confirmed -> mark queued -> accepted     full -> QueueFull     unroutable -> UnknownModel
             no answer -> again, until the deadline; then BrokerUnavailable(maybe_accepted=True)

Every step takes a group and may be repeated; concurrent `submit` calls share round trips. A reservation
that did not get as far as the broker stays reserved: the same key attaches to it and publishes it at
once if it is this submitter's own (`_mine`), and the reconciler ends it after a minute otherwise.
Called by: async_client, client (through async_client), gateway (through async_client).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError
from tenacity import stop_after_delay, wait_random_exponential

from codeyard.producer.waits import WaitBoard
from codeyard.shared.alias import Alias
from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.broker.port import Message, Publisher, PublishOutcome
from codeyard.shared.chat import Chat
from codeyard.shared.claims import SetAside, deposit, set_aside
from codeyard.shared.envelope import new_nonce, seal
from codeyard.shared.errors import (
    BrokerUnavailable,
    DeadlineTooSoon,
    FleetError,
    IdempotencyConflict,
    InvalidJob,
    QueueFull,
    StorageQuotaExceeded,
    StoreUnavailable,
    UnknownModel,
)
from codeyard.shared.job import DEFAULT_TIMEOUT_S, Job, JobId, Lane, Sampling, job_id_for_key, new_job_id, shared_key
from codeyard.shared.record import Record, State
from codeyard.shared.retries import repeat
from codeyard.shared.store.port import Queued, QueuedVerdict, Reservation, Reserved, ReserveVerdict, Store
from codeyard.shared.store.transitions import was_never_accepted
from codeyard.shared.topology import Topology

T = TypeVar("T")

ALIAS_TTL_S = 2.0  # how stale the revision that a new job is pinned to may be
PAUSE_S = 0.2  # before a publish to a broker that was away is tried again
RETRY_AFTER_S = 5.0  # of QueueFull
WAIT = wait_random_exponential(multiplier=0.1, max=1.0)  # before a store call is repeated
MAX_MINE = 10_000  # own reservations remembered, the oldest forgotten first


@dataclass(frozen=True, slots=True)
class Submission:
    """What a caller asks for. `timeout_s` is the job's deadline from now, not how long a call waits."""

    prompt: str | Sequence[int] | Chat
    model: str = "starter"
    lane: Lane | str = Lane.STANDARD
    idempotency_key: str | None = None
    sampling: Sampling | Mapping[str, Any] = field(default_factory=Sampling)
    stream: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S
    tenant: str = "default"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    traceparent: str | None = None
    asked_model: str | None = None  # what the caller named, where `model` stands in for it
    callback_url: str | None = None  # told the job's end by a gateway, if its settings allow the host
    share: bool = False  # equal jobs without a key of their own are one; see docs/claim-checks.md
    job_id: JobId | None = None  # of a submission without a key, where it must be known before; otherwise a new one


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job is at the broker, or was before. `record` may already be final."""

    record: Record
    attached: bool
    estimated_start_s: float | None = None  # from now; None: it is not known, or not new


@dataclass(slots=True)
class _Draft:
    """One submission on its way; `outcome` ends it."""

    submission: Submission
    outcome: Accepted | FleetError | None = None
    job: Job | None = None
    aside: SetAside | None = None  # a long prompt, to be deposited before the job is reserved
    reserved: Reserved | None = None
    publication: str = field(default_factory=new_nonce)
    published: bool = False  # a publish was tried: the broker may have it
    estimated_start_s: float | None = None

    @property
    def record(self) -> Record:
        assert self.reserved is not None
        return self.reserved.record


class Submitter:
    """The protocol above, for groups. Holds no connection of its own and needs no closing."""

    def __init__(
        self,
        publisher: Publisher,
        store: Store,
        blobs: Callable[[], Awaitable[BlobStore]],
        topology: Topology,
        board: WaitBoard,
        *,
        publish_timeout_s: float,
        max_prompt_bytes: int,
        refuse_late: bool = True,
    ) -> None:
        self._publisher = publisher
        self._store = store
        self._blobs = blobs
        self._topology = topology
        self._board = board
        self._publish_timeout_s = publish_timeout_s
        self._max_prompt_bytes = max_prompt_bytes
        self._refuse_late = refuse_late
        self._aliases: Mapping[str, Alias] = {}
        self._aliases_until_s = 0.0
        self._mine: dict[str, None] = {}  # publications reserved here and never confirmed

    async def submit(self, group: Sequence[Submission], *, timeout_s: float) -> list[Accepted | FleetError]:
        """One outcome per item, in order. Takes at most about `timeout_s`, whatever the servers do."""
        until_s = time.monotonic() + timeout_s
        drafts = [_Draft(submission) for submission in group]
        try:
            await self._build(drafts, until_s)
            await self._refuse(_open(drafts), until_s)
            await self._deposit(_open(drafts), until_s)
            await self._reserve(_open(drafts), until_s)
            await self._publish(_open(drafts), until_s)
        except (BrokerUnavailable, StoreUnavailable) as error:
            for draft in _open(drafts):
                draft.outcome = _unavailable(error, draft)
        return [draft.outcome or _unavailable(BrokerUnavailable("no answer in time"), draft) for draft in drafts]

    # The steps -------------------------------------------------------------------------------------

    async def _build(self, drafts: Sequence[_Draft], until_s: float) -> None:
        """Check each submission and pin it to the revision its alias points to now, and to a shard."""
        await self._board.ready()
        for draft in drafts:
            asked = draft.submission
            alias = await self._alias(asked.model, until_s)
            if alias is None:
                draft.outcome = UnknownModel(asked.model)
                continue
            try:
                job = _job(asked, alias)
                if aside := set_aside(job, max_prompt_bytes=self._max_prompt_bytes):
                    draft.aside, job = aside, aside.job
                job.encode()  # raises JobTooLarge before anything is reserved
                shards, per_tenant = alias.shards, alias.shards_per_tenant
                shard = self._board.shard(job.revision, job.lane, job.tenant, shards=shards, per_tenant=per_tenant)
                draft.estimated_start_s = self._board.estimate_s(job.revision, job.lane)
                self._board.publishing(job.revision, job.lane, shard)
                draft.job = job.model_copy(update={"shard": shard}) if shard else job
            except FleetError as error:
                draft.outcome = error

    async def _refuse(self, drafts: Sequence[_Draft], until_s: float) -> None:
        """New jobs that would start after their deadline are not begun. One that is there already is attached
        to, whatever the line is now."""
        late = [draft for draft in drafts if self._refuse_late and _is_late(draft)]
        if not late:
            return
        ids = [draft.job.id for draft in late if draft.job is not None]
        records = await _within(until_s, lambda: self._store.read(ids))
        for draft, record in zip(late, records, strict=True):
            if record is None:
                assert draft.estimated_start_s is not None
                draft.outcome = DeadlineTooSoon(
                    estimated_start_s=draft.estimated_start_s, timeout_s=draft.submission.timeout_s
                )

    async def _deposit(self, drafts: Sequence[_Draft], until_s: float) -> None:
        """Long prompts are in the store before anyone can see their jobs."""
        for draft in drafts:
            if draft.aside is not None:
                try:
                    await _within(until_s, partial(self._deposit_one, draft.aside))
                except StorageQuotaExceeded as error:
                    draft.outcome = error
                draft.aside = None  # the bytes

    async def _deposit_one(self, aside: SetAside) -> None:
        await deposit(await self._blobs(), aside, self._store.timing)

    async def _alias(self, name: str, until_s: float) -> Alias | None:
        now_s = time.monotonic()
        if now_s >= self._aliases_until_s or name not in self._aliases:
            self._aliases = await _within(until_s, self._store.aliases)
            self._aliases_until_s = now_s + ALIAS_TTL_S
        return self._aliases.get(name)

    async def _reserve(self, drafts: Sequence[_Draft], until_s: float) -> None:
        if not drafts:
            return
        requests = []
        for draft in drafts:
            assert draft.job is not None
            requests.append(Reservation(draft.job, draft.job.digest(), draft.publication, new_nonce()))
        answers = await _within(until_s, lambda: self._store.reserve(requests))
        for draft, answer in zip(drafts, answers, strict=True):
            draft.reserved = answer
            if answer.verdict is ReserveVerdict.CONFLICT:
                draft.outcome = IdempotencyConflict(answer.record.id)
            elif answer.verdict is ReserveVerdict.NEW:
                self._remember(answer.record.publication)
            elif answer.record.state is not State.RESERVED:
                draft.outcome = Accepted(answer.record, attached=True)
        waiting = [draft for draft in _open(drafts) if draft.record.publication not in self._mine]
        if waiting:
            await self._await_submitter(waiting, until_s)

    async def _await_submitter(self, drafts: Sequence[_Draft], until_s: float) -> None:
        """Somebody else reserved these and is about to publish them: give it one publish timeout, but keep half of
        the caller's time. Who always has less than that would never publish a job whose submitter is gone."""
        grace_s = min(self._publish_timeout_s, (until_s - time.monotonic()) / 2)
        ends_s = time.monotonic() + grace_s
        left, given_up = list(drafts), list[_Draft]()
        async with self._store.watch(left[0].record.id) as wakeup:
            while left and time.monotonic() < ends_s:
                await wakeup.wait(min(0.05, max(0.0, ends_s - time.monotonic())))
                ids = [draft.record.id for draft in left]
                records = await _within(until_s, partial(self._store.read, ids))
                still: list[_Draft] = []
                for draft, record in zip(left, records, strict=True):
                    if record is None or record.state is State.RESERVED:
                        still.append(draft)
                    elif was_never_accepted(record):
                        given_up.append(draft)
                    else:
                        draft.outcome = Accepted(record, attached=True)
                left = still
        for draft in left:
            draft.publication = new_nonce()  # ours from here on; the other's, if it exists, is a duplicate
        await self._reserve(given_up, until_s)  # the reconciler ended the other's: these begin anew

    async def _publish(self, drafts: Sequence[_Draft], until_s: float) -> None:
        """Publish until each has an answer; confirmed ones are marked queued, and only then accepted."""
        left = list(drafts)
        while left:
            messages = [self._message(draft) for draft in left]
            timeout_s = min(self._publish_timeout_s, until_s - time.monotonic())
            if timeout_s <= 0:
                return  # what is left has no answer: unavailable, maybe accepted
            for draft in left:
                draft.published = True
            try:
                outcomes = await self._publisher.publish(messages, timeout_s=timeout_s)
            except BrokerUnavailable:
                if time.monotonic() + PAUSE_S >= until_s:
                    raise
                await asyncio.sleep(PAUSE_S)
                continue
            confirmed = [d for d, o in zip(left, outcomes, strict=True) if o is PublishOutcome.CONFIRMED]
            if confirmed:
                await self._accept(confirmed, until_s)
            for draft, outcome in zip(left, outcomes, strict=True):
                if outcome is PublishOutcome.FULL:
                    job = draft.record.job
                    queue = self._topology.job_queue(job.revision, job.lane, job.shard)
                    draft.outcome = QueueFull(queue, retry_after_s=draft.estimated_start_s or RETRY_AFTER_S)
                elif outcome is PublishOutcome.UNROUTABLE:
                    draft.outcome = UnknownModel(draft.submission.model)
            left = _open(left)

    async def _accept(self, drafts: Sequence[_Draft], until_s: float) -> None:
        """Confirmed by the broker. Told to nobody before the store knows, or the reconciler would end it."""
        marks = [Queued(draft.record.id, draft.publication) for draft in drafts]
        verdicts = await _within(until_s, lambda: self._store.mark_queued(marks))
        for draft, verdict in zip(drafts, verdicts, strict=True):
            self._mine.pop(draft.record.publication, None)
            if verdict is QueuedVerdict.LAPSED:  # this process stood still, and the reconciler gave the job up
                draft.outcome = BrokerUnavailable("its confirm came too late", job_id=draft.record.id)
                continue
            attached = draft.reserved is not None and draft.reserved.verdict is ReserveVerdict.ATTACHED
            record = draft.record
            if record.state is State.RESERVED:
                record = record.model_copy(update={"state": State.QUEUED})
            estimate_s = None if attached else draft.estimated_start_s
            draft.outcome = Accepted(record, attached=attached, estimated_start_s=estimate_s)

    def _message(self, draft: _Draft) -> Message:
        record = draft.record
        return seal(
            record.job,
            self._topology,
            publication=draft.publication,
            incarnation=record.incarnation,
            deadline_at=record.deadline_at,
            traceparent=draft.submission.traceparent,
        )

    def _remember(self, publication: str) -> None:
        self._mine[publication] = None
        while len(self._mine) > MAX_MINE:
            del self._mine[next(iter(self._mine))]


def _job(asked: Submission, alias: Alias) -> Job:
    key, sampling = asked.idempotency_key, asked.sampling
    if key is None and asked.share:
        checked = sampling if isinstance(sampling, Sampling) else _sampling(sampling)
        key = shared_key(asked.asked_model or asked.model, asked.prompt, checked)
    job_id: JobId = asked.job_id or new_job_id() if key is None else job_id_for_key(asked.tenant, key)
    return Job.build(
        id=job_id,
        tenant=asked.tenant,
        key=job_id if key is None else key,
        model=asked.model,
        revision=alias.pin(job_id).revision,
        lane=asked.lane,
        prompt=asked.prompt if isinstance(asked.prompt, str | Chat) else tuple(asked.prompt),
        sampling=sampling.model_dump() if isinstance(sampling, Sampling) else dict(sampling),
        stream=asked.stream,
        timeout_s=asked.timeout_s,
        metadata=dict(asked.metadata),
        asked_model=asked.asked_model,
        callback_url=asked.callback_url,
    )


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling.model_validate(dict(fields))
    except ValidationError as error:
        raise InvalidJob(str(error.errors(include_url=False)[0]["msg"]), field="sampling") from None


def _is_late(draft: _Draft) -> bool:
    return draft.estimated_start_s is not None and draft.estimated_start_s > draft.submission.timeout_s


def _open(drafts: Sequence[_Draft]) -> list[_Draft]:
    return [draft for draft in drafts if draft.outcome is None]


def _unavailable(error: BrokerUnavailable | StoreUnavailable, draft: _Draft) -> FleetError:
    job_id = draft.record.id if draft.reserved is not None else None
    text = str(error).partition(": ")[2] or str(error)
    retry_after_s = error.retry_after_s
    return type(error)(text, job_id=job_id, maybe_accepted=draft.published, retry_after_s=retry_after_s)


async def _within(until_s: float, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a store call with backoff until it answers. After the deadline, what it said last is raised."""
    stop = stop_after_delay(max(0.0, until_s - time.monotonic()))
    said: list[StoreUnavailable] = []

    async def ask() -> T:
        try:
            return await call()
        except StoreUnavailable as error:
            said[:] = [error]
            raise

    try:
        async with asyncio.timeout(max(0.05, until_s - time.monotonic())):
            return await repeat(ask, (StoreUnavailable,), wait=WAIT, stop=stop)
    except TimeoutError:
        pass
    raise said.pop() if said else StoreUnavailable("no answer in time")

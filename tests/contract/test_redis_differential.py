"""The Lua scripts against transitions.py, which they port: random calls on both, outcome by outcome."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.redis_server import running_redis
from support.store_calls import make_job, success

from codeyard.shared.envelope import new_nonce
from codeyard.shared.job import Job
from codeyard.shared.record import Event, EventKind, Record, Result, State
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store import transitions
from codeyard.shared.store.port import (
    Append,
    AppendVerdict,
    CallbackOutcome,
    CancelVerdict,
    Claim,
    ClaimVerdict,
    Commit,
    CommitVerdict,
    NoteCallback,
    Queued,
    QueuedVerdict,
    RecoverVerdict,
    Recovery,
    Redrive,
    RedriveVerdict,
    Release,
    ReleaseVerdict,
    Renewal,
    Reservation,
    ReserveVerdict,
    TakeCallback,
    Timing,
)
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology, store_shard

pytestmark = pytest.mark.services

SEEDS = range(24)
NUM_STEPS = 50
TICK_S = 40.0  # time passes in these; the durations below end between two of them
TIMES = (
    "lease_until",
    "created_at",
    "queued_at",
    "started_at",
    "finished_at",
    "deadline_at",
    "check_at",
    "expires_at",
    "callback_at",
)
SLACK_S = 2.0  # what the server's clock may add during one step
SETTINGS: dict[str, Any] = {
    "lease_s": 100,
    "grace_s": 40,
    "unpublished_s": 300,
    "queue_check_s": 220,
    "longest_run_s": 1_000,
    "retention_s": 500_000,
}


@dataclass
class Model:
    """The specification over a dict. Its clock is the server's, plus `ahead_s`."""

    timing: Timing
    ahead_s: float = 0.0
    now: float = 0.0
    records: dict[str, Record] = field(default_factory=dict)
    events: dict[str, list[Event]] = field(default_factory=dict)

    def call(self, name: str, group: Sequence[Any]) -> list[Any]:
        return [self._step(name, request) for request in group]

    def _step(self, name: str, request: Any) -> Any:
        job_id = request if isinstance(request, str) else getattr(request, "job_id", None) or request.job.id
        transition: Callable[..., transitions.Step[Any]] = getattr(transitions, name.replace("callbacks", "callback"))
        arguments = () if name == "cancel" else (request,)
        before = self.records.get(job_id)
        step = transition(before, *arguments, self.now, self.timing)
        if step.record is not None:
            self.records[job_id] = step.record
            if step.record.last_seq == 0:
                self.events[job_id] = []  # a new incarnation
        self.events.setdefault(job_id, []).extend(step.events)
        return step.outcome


@dataclass
class Calls:
    """Draws requests that are often right, and often wrong in one thing."""

    choose: random.Random
    model: Model
    jobs: list[Job]
    now: float = 0.0

    def draw(self, now: float) -> tuple[str, list[Any]]:
        self.now = now
        names = (
            "reserve",
            "mark_queued",
            "claim",
            "renew",
            "append",
            "commit",
            "release",
            "cancel",
            "recover",
            "redrive",
            "take_callbacks",
            "note_callbacks",
        )
        name = self.choose.choices(names, weights=(4, 4, 6, 2, 3, 1, 4, 1, 6, 3, 2, 2))[0]
        return name, [getattr(self, f"_{name}")(self._job()) for _ in range(self.choose.randint(1, 4))]

    def _job(self) -> Job:
        return self.choose.choice(self.jobs)

    def _nonce(self) -> str:
        return self.choose.choice(("p1", "p2"))

    def _owner(self) -> str:
        return self.choose.choice(("worker-1", "worker-2"))

    def _fence(self, job: Job) -> str:
        record = self.model.records.get(job.id)
        if record is None or self.choose.random() < 0.15:
            return self.choose.choice(("", "p1.1", "none"))
        return record.fence

    def _digest(self, job: Job) -> str:
        return job.digest() if self.choose.random() < 0.9 else "another body"

    def _events(self, job: Job) -> list[Event]:
        record = self.model.records.get(job.id)
        first = (record.last_seq if record else 0) + self.choose.choice((1, 1, 1, 1, 0, -1, 2))
        kinds = (EventKind.TOKENS, EventKind.TOKENS, EventKind.RESTARTED)
        return [
            Event(seq=seq, kind=self.choose.choice(kinds), text='é "\n/', token_ids=(seq,))
            for seq in range(max(1, first), max(1, first) + self.choose.randint(0, 3))
        ]

    def _reserve(self, job: Job) -> Reservation:
        return Reservation(job, self._digest(job), self._nonce(), self._nonce())

    def _mark_queued(self, job: Job) -> Queued:
        return Queued(job.id, self._nonce())

    def _claim(self, job: Job) -> Claim:
        record = self.model.records.get(job.id)
        incarnation = record.incarnation if record and self.choose.random() < 0.8 else self.choose.choice(("", "p2"))
        now = self.now
        return Claim(
            job,
            self._digest(job),
            record.publication if record and self.choose.random() < 0.7 else self._nonce(),
            self._owner(),
            incarnation,
            published_at=self.choose.choice((None, now - 500.0, now - 5_000.0)),
            deadline_at=self.choose.choice((None, None, now + 1_020.0, now - 20.0, now + 10_000_020.0)),
        )

    def _renew(self, job: Job) -> Renewal:
        return Renewal(job.id, self._fence(job), alone=self.choose.random() < 0.5)

    def _append(self, job: Job) -> Append:
        return Append(job.id, self._fence(job), self._events(job))

    def _commit(self, job: Job) -> Commit:
        result = self.choose.choice((success("one"), success("two"), Result(state=State.FAILED)))
        return Commit(job.id, self._fence(job), self._nonce(), result, self._events(job))

    def _release(self, job: Job) -> Release:
        delay_s = self.choose.choice((0.0, TICK_S))
        return Release(job.id, self._fence(job), self._nonce(), delay_s, charge=self.choose.random() < 0.5)

    def _cancel(self, job: Job) -> str:
        return job.id

    def _recover(self, job: Job) -> Recovery:
        return Recovery(job.id, self._nonce(), queue_empty=self.choose.choice((None, None, True, False)))

    def _redrive(self, job: Job) -> Redrive:
        record = self.model.records.get(job.id)
        lives = [record.incarnation, *(past.incarnation for past in record.history)] if record else []
        died_in = self.choose.choice((*lives, *lives, 'p"1'))
        outcome = Result(state=State.FAILED)
        return Redrive(job, self._digest(job), died_in, outcome, new_nonce(), self._nonce())

    def _take_callbacks(self, job: Job) -> TakeCallback:
        return TakeCallback(job.id, lease_s=60.0)

    def _note_callbacks(self, job: Job) -> NoteCallback:
        record = self.model.records.get(job.id)
        incarnation = record.incarnation if record and self.choose.random() < 0.9 else "another"
        attempt = (record.callback_attempts if record else 1) - self.choose.choice((0, 0, 0, 1))
        return NoteCallback(job.id, incarnation, attempt, self.choose.choice(list(CallbackOutcome)), delay_s=20.0)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[RedisStore]:
    async with running_redis(tmp_path / "redis") as server:
        store = await RedisStore.open(StoreSettings(url=server.url, **SETTINGS), Topology(f"t-{new_nonce()[:8]}"))
        yield store
        await store.close()


async def test_every_script_decides_as_the_transition_it_ports(store: RedisStore) -> None:
    """Two adapters, one protocol: a job must not fare differently because of where its record lies."""
    seen = await crash_alone_until_it_is_poison(store)

    for seed in SEEDS:
        seen |= await compare(store, seed)

    everything = {
        *{f"reserve {verdict}" for verdict in ReserveVerdict},
        *{f"mark_queued {verdict}" for verdict in QueuedVerdict},
        *{f"claim {verdict}" for verdict in ClaimVerdict},
        *{f"append {verdict}" for verdict in AppendVerdict},
        *{f"commit {verdict}" for verdict in CommitVerdict},
        *{f"release {verdict}" for verdict in ReleaseVerdict},
        *{f"cancel {verdict}" for verdict in CancelVerdict},
        *{f"recover {verdict}" for verdict in RecoverVerdict},
        *{f"redrive {verdict}" for verdict in RedriveVerdict},
        *{f"take_callbacks {taken}" for taken in (True, False)},
        *{f"note_callbacks {noted}" for noted in (True, False)},
    }
    assert everything - seen == set(), "these calls never met some verdicts: choose other seeds"


async def compare(store: RedisStore, seed: int) -> set[str]:
    """One random life of a few jobs on both. Returns the verdicts met."""
    choose = random.Random(seed)
    model = Model(store.timing)
    jobs = [
        make_job(f"{seed}-{n}", timeout_s=timeout_s, callback_url="https://hooks.example.com/x" if n % 2 else None)
        for n, timeout_s in enumerate((80_020.0, 80_020.0, 1_020.0, 20.5))
    ]
    calls = Calls(choose, model, jobs)
    seen = set()
    for number in range(NUM_STEPS):
        if choose.random() < 0.35:
            await pass_time(store, model, TICK_S * choose.choice((1, 2, 3, 4, 8)))
        name, group = calls.draw(await model_time(store, model))
        seen |= await call_both(store, model, jobs, name, group, where=f"seed {seed}, step {number}")
    return seen


async def crash_alone_until_it_is_poison(store: RedisStore) -> set[str]:
    """What chance hardly ever does: one job's owner is lost three times while it ran alone."""
    model, job = Model(store.timing), make_job(timeout_s=86_420.0)
    seen: set[str] = set()
    for crash in range(store.timing.poison_after + 1):
        claim = Claim(job, job.digest(), "p1", "worker-1", "p1")
        seen |= await call_both(store, model, [job], "claim", [claim], where=f"crash {crash}")
        alone = Renewal(job.id, model.records[job.id].fence, alone=True)
        seen |= await call_both(store, model, [job], "renew", [alone], where=f"crash {crash}")
        await pass_time(store, model, 3 * TICK_S)
    return seen


async def call_both(
    store: RedisStore, model: Model, jobs: Sequence[Job], name: str, group: list[Any], *, where: str
) -> set[str]:
    """One call on both, which must agree on its outcomes and on all there is afterwards."""
    where = f"{where}: {name}({group})"
    now = await model_time(store, model)

    expected = model.call(name, group)
    found = await getattr(store, name)([on_the_servers_clock(request, model.ahead_s) for request in group])

    assert plain(found, model.ahead_s) == close_to(plain(expected)), where
    stored = await store.read([job.id for job in jobs])
    assert plain(stored, model.ahead_s) == close_to(plain([model.records.get(job.id) for job in jobs])), where
    for job in jobs:
        assert await store.events(job.id, after=0) == model.events.get(job.id, []), where
    due = {job.id for job in jobs if job.id in model.records and 0 < model.records[job.id].check_at <= now}
    assert {job.id for job in jobs} & set(await store.due(100)) == due, where
    calling = {job.id for job in jobs if job.id in model.records and 0 < model.records[job.id].callback_at <= now}
    assert {job.id for job in jobs} & set(await store.callbacks_due(100)) == calling, where
    if name == "take_callbacks":
        return {f"{name} {outcome is not None}" for outcome in expected}
    return {f"{name} {getattr(outcome, 'verdict', outcome)}" for outcome in expected}


async def model_time(store: RedisStore, model: Model) -> float:
    whole, micro = await store._link.command("TIME")
    model.now = int(whole) + int(micro) / 1e6 + model.ahead_s
    return model.now


async def pass_time(store: RedisStore, model: Model, seconds: float) -> None:
    """The model's clock goes ahead. Redis's cannot, so every time it holds goes back as far."""
    model.ahead_s += seconds
    topology = store._topology
    for job_id, record in model.records.items():
        for name in TIMES:
            if getattr(record, name):
                await store._link.command("HINCRBYFLOAT", topology.job_key(job_id, "record"), name, repr(-seconds))
        if record.check_at:
            due = topology.shard_key(store_shard(job_id), "due")
            await store._link.command("ZINCRBY", due, int(-seconds * 1_000_000), job_id)
        if record.callback_at:
            due = topology.shard_key(store_shard(job_id), "callbacks")
            await store._link.command("ZINCRBY", due, int(-seconds * 1_000_000), job_id)


def on_the_servers_clock(request: Any, ahead_s: float) -> Any:
    if not isinstance(request, Claim):
        return request
    published_at, deadline_at = request.published_at, request.deadline_at
    return replace(
        request,
        published_at=None if published_at is None else published_at - ahead_s,
        deadline_at=None if deadline_at is None else deadline_at - ahead_s,
    )


def plain(value: Any, ahead_s: float = 0.0) -> Any:
    """Plain values, with the times of records on the model's clock."""
    if isinstance(value, list):
        return [plain(item, ahead_s) for item in value]
    if isinstance(value, Record):
        found = value.model_dump()
        return {name: at + ahead_s if name in TIMES and at else at for name, at in found.items()}
    if is_dataclass(value):
        return {part.name: plain(getattr(value, part.name), ahead_s) for part in fields(value)}
    return value


def close_to(value: Any) -> Any:
    """The same, but for the time that a step takes."""
    if isinstance(value, list):
        return [close_to(item) for item in value]
    if isinstance(value, dict):
        return {name: close_to(item) for name, item in value.items()}
    return pytest.approx(value, abs=SLACK_S) if isinstance(value, float) else value

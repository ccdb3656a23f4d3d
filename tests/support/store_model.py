"""The protocol over a dict, and random lives of a few jobs to lead on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from codeyard.shared.job import Job, JobId
from codeyard.shared.record import Event, EventKind, Record, Result, State
from codeyard.shared.store import transitions
from codeyard.shared.store.port import (
    Append,
    CallbackOutcome,
    Claim,
    Commit,
    NoteCallback,
    Queued,
    Recovery,
    Redrive,
    Release,
    Renewal,
    Reservation,
    TakeCallback,
    Timing,
)
from support.store_calls import make_job, success

TIMEOUTS_S = (50.0, 700.0, 86_400.0)


@dataclass
class Model:
    """The specification over a dict."""

    timing: Timing
    records: dict[JobId, Record] = field(default_factory=dict)
    streams: dict[JobId, list[Event]] = field(default_factory=dict)

    def call(self, name: str, group: Sequence[Any], now: float) -> list[Any]:
        self.forget(now)
        return [self._step(name, request, now) for request in group]

    def forget(self, now: float) -> None:
        for job_id in [job_id for job_id, record in self.records.items() if record.expires_at <= now]:
            del self.records[job_id]
            self.streams.pop(job_id, None)

    def due(self, now: float) -> list[JobId]:
        waiting = [record for record in self.records.values() if 0 < record.check_at <= now]
        return [record.id for record in sorted(waiting, key=lambda record: record.check_at)]

    def callbacks_due(self, now: float) -> list[JobId]:
        waiting = [record for record in self.records.values() if 0 < record.callback_at <= now]
        return [record.id for record in sorted(waiting, key=lambda record: record.callback_at)]

    def _step(self, name: str, request: Any, now: float) -> Any:
        job_id = request if isinstance(request, str) else getattr(request, "job_id", None) or request.job.id
        transition: Callable[..., transitions.Step[Any]] = getattr(transitions, name.replace("callbacks", "callback"))
        arguments = () if name == "cancel" else (request,)
        step = transition(self.records.get(job_id), *arguments, now, self.timing)
        if step.record is not None:
            self.records[job_id] = step.record
            if step.record.last_seq == 0:
                self.streams[job_id] = []
        self.streams.setdefault(job_id, []).extend(step.events)
        return step.outcome


@dataclass(frozen=True)
class Plan:
    """One request, drawn without knowing the record; `request` fills in what depends on it."""

    name: str
    job: int
    publication: str
    owner: str
    right: bool  # the fence, the body and the incarnation are the record's
    first: int  # of the events, counted from the record's last
    num_events: int
    flag: bool
    answer: bool | None

    def request(self, job: Job, record: Record | None, now: float) -> Any:
        fence = record.fence if record and self.right else "stale.1"
        digest = job.digest() if self.right or self.flag else "another body"
        kinds = (EventKind.TOKENS, EventKind.RESTARTED)
        after = max(0, (record.last_seq if record else 0) + self.first)
        numbers = range(after + 1, after + 1 + self.num_events)
        events = [Event(seq=seq, kind=kinds[seq % 2], text="é", token_ids=(seq,)) for seq in numbers]
        deadline = None if self.answer is None else now + (500 if self.answer else -1)
        result = success() if self.right else Result(state=State.FAILED)
        incarnation = record.incarnation if record and self.right else ""
        requests: dict[str, Callable[[], Any]] = {
            "reserve": lambda: Reservation(job, digest, self.publication, f"i-{self.publication}"),
            "mark_queued": lambda: Queued(job.id, self.publication),
            "claim": lambda: Claim(job, digest, self.publication, self.owner, incarnation, None, deadline),
            "renew": lambda: Renewal(job.id, fence, alone=self.flag),
            "append": lambda: Append(job.id, fence, events),
            "commit": lambda: Commit(job.id, fence, self.publication, result, events),
            "release": lambda: Release(job.id, fence, self.publication, float(self.num_events), charge=self.flag),
            "cancel": lambda: job.id,
            "recover": lambda: Recovery(job.id, self.publication, self.answer),
            "redrive": lambda: Redrive(
                job,
                digest,
                self._died_in(record),
                Result(state=State.FAILED),
                f"r-{self.publication}",
                self.publication,
            ),
            "take_callbacks": lambda: TakeCallback(job.id, 60.0),
            "note_callbacks": lambda: NoteCallback(
                job.id,
                incarnation or "another life",
                (record.callback_attempts if record else 1) - int(self.flag),
                list(CallbackOutcome)[self.num_events % 3],
                20.0,
            ),
        }
        return requests[self.name]()

    def _died_in(self, record: Record | None) -> str:
        if record is None or not self.right:
            return "another life"
        return record.history[0].incarnation if record.history and self.flag else record.incarnation


def plans(name: str) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        name=st.just(name),
        job=st.sampled_from(range(len(TIMEOUTS_S))),
        publication=st.sampled_from(["p1", "p1", "p2"]),
        owner=st.sampled_from(["worker-1", "worker-2"]),
        right=st.sampled_from([True, True, True, False]),
        first=st.sampled_from([0, 0, 0, -1, 1]),
        num_events=st.integers(0, 3),
        flag=st.booleans(),
        answer=st.sampled_from([None, True, False]),
    )


OFTEN = ("claim", "claim", "recover", "take_callbacks", "note_callbacks")
NAMES = st.sampled_from(
    ("reserve", "mark_queued", "claim", "renew", "append", "commit", "release", "cancel", "recover", "redrive", *OFTEN)
)
GROUPS = NAMES.flatmap(lambda name: st.lists(plans(name), min_size=1, max_size=4))
PAUSES_S = st.sampled_from([0.0, 0.0, 1.0, 60.0, 101.0, 145.0, 301.0, 1_000.0, 700_000.0])
Life = list[tuple[float, list[Plan]]]
LIVES: st.SearchStrategy[Life] = st.lists(st.tuples(PAUSES_S, GROUPS), min_size=1, max_size=30)


def new_jobs() -> list[Job]:
    """What a plan's `job` counts; none is the default timeout, so that deadlines come to pass."""
    return [
        make_job(f"key-{n}", timeout_s=timeout_s, callback_url=None if n == 1 else "https://hooks.example.com/x")
        for n, timeout_s in enumerate(TIMEOUTS_S)
    ]

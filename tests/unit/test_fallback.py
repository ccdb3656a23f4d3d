"""Who takes a job, what opens a model's breaker, and what is still answered while one is open."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from support.asgi import JOB_ID, MadeUpJob, MadeUpJobs, app_over, http_to, status

from codeyard.producer.gateway.fallback import GuardedJobs
from codeyard.producer.gateway.health import Breakers
from codeyard.shared.alias import Alias
from codeyard.shared.errors import BrokerUnavailable, JobNotFound, ModelUnavailable, StoreUnavailable
from codeyard.shared.job import JobId, Lane, Sampling
from codeyard.shared.notice import ModelNotice, Notice
from codeyard.shared.record import Event, EventKind, Failure, JobStatus, Result, State
from codeyard.shared.settings import BreakerSettings, GatewaySettings
from codeyard.shared.store.port import CancelVerdict, Store
from codeyard.shared.telemetry import Metrics

SETTINGS = BreakerSettings(requests=4, window_s=5.0, share=0.5, open_s=5.0, probe_s=3.0, unserved_s=10.0)
FALLBACKS = {"coder": "coder-small", "coder-small": "tiny"}


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Fleet:
    """As much of a store as says who serves what."""

    def __init__(self) -> None:
        self.serving = {"coder", "coder-small", "tiny"}

    async def aliases(self) -> Mapping[str, Alias]:
        return {name: Alias(name, f"{name}-1") for name in ("coder", "coder-small", "tiny")}

    async def notices(self) -> Mapping[str, str]:
        models = tuple(ModelNotice(name, f"{name}-1", "awake", serving=True) for name in sorted(self.serving))
        return {"w": Notice("w", "fake", models).encode()}


class Yard:
    """Jobs that stay as they were put until `end` says otherwise."""

    def __init__(self) -> None:
        self.known: dict[JobId, JobStatus] = {}
        self.error: Exception | None = None
        self.num_reads = 0

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        if self.error is not None:
            raise self.error
        job_id = fields["job_id"]
        attached = job_id in self.known
        if not attached:
            self.known[job_id] = status(id=job_id, model=fields["model"], asked_model=fields["asked_model"])
        return MadeUpJob(job_id, attached, self.known[job_id])

    def end(self, job_id: JobId, state: State, code: str = "") -> None:
        error = Failure(code=code, message="so") if code else None
        result = Result(state=state, error=error)
        self.known[job_id] = self.known[job_id].model_copy(update={"state": state, "result": result})

    async def status(self, job_id: JobId) -> JobStatus:
        self.num_reads += 1
        if job_id not in self.known:
            raise JobNotFound(job_id)
        return self.known[job_id]

    async def wait(self, job_id: JobId, timeout: float) -> JobStatus:
        return await self.status(job_id)

    async def stream(self, job_id: JobId, after: int = 0) -> AsyncGenerator[Event, None]:
        yield Event(seq=1, kind=EventKind.END, state=self.known[job_id].state)

    async def cancel(self, job_id: JobId) -> CancelVerdict:
        return CancelVerdict.CANCELLED

    async def recent(self, limit: int = 20) -> list[JobStatus]:
        return []


class World:
    def __init__(self, fallbacks: Mapping[str, str] | None = None, settings: BreakerSettings = SETTINGS) -> None:
        self.clock = Clock()
        self.registry = CollectorRegistry()
        self.breakers = Breakers(settings, Metrics(self.registry), clock=self.clock)
        self.yard = Yard()
        self.fleet = Fleet()
        store = cast(Store, self.fleet)
        self.jobs = GuardedJobs(self.yard, self.breakers, store, settings, fallbacks=fallbacks, clock=self.clock)
        self._num_ids = 0

    async def submit(
        self, model: str = "coder", *, lane: Lane = Lane.STANDARD, key: str | None = None, job_id: JobId | None = None
    ) -> JobStatus:
        self._num_ids += 1
        job = await self.jobs.submit(
            "x",
            model=model,
            lane=lane,
            idempotency_key=key,
            sampling=Sampling(),
            stream=False,
            timeout_s=60,
            metadata={},
            traceparent=None,
            tenant="default",
            job_id=job_id or f"job-{self._num_ids}",
        )
        return job.accepted_status

    async def ends(self, code: str = "engine_error", *, count: int = 4, model: str = "coder") -> None:
        """So many jobs of the model fail, and their callers see it."""
        for _ in range(count):
            job_id = (await self.submit(model)).id
            self.yard.end(job_id, State.FAILED if code else State.SUCCEEDED, code)
            await self.jobs.status(job_id)

    def state(self, model: str) -> float | None:
        return self.registry.get_sample_value("codeyard_breaker_state", {"kind": "model", "model": model})


async def test_a_model_whose_jobs_fail_in_the_engine_is_refused_at_once_and_says_until_when() -> None:
    """A caller that is told goes elsewhere; one that waits for the fifth failure does not."""
    world = World()
    await world.ends("engine_error")

    with pytest.raises(ModelUnavailable, match="coder") as refused:
        await world.submit()

    assert refused.value.retry_after_s == 5.0
    assert world.state("coder") == 2
    assert (await world.submit("tiny")).state is State.QUEUED


async def test_a_smaller_model_takes_the_job_and_the_status_says_for_whom() -> None:
    """Never silently: the caller asked for another one."""
    world = World(FALLBACKS)
    await world.ends("poison")

    taken = await world.submit()

    assert (taken.model, taken.asked_model) == ("coder-small", "coder")


async def test_a_stand_in_that_fails_too_is_followed_by_its_own() -> None:
    """The line goes on; and at its end the refusal names what was asked for."""
    world = World(FALLBACKS)
    await world.ends(model="coder")
    await world.ends(model="coder-small")

    assert (await world.submit()).model == "tiny"
    await world.ends(model="tiny")
    with pytest.raises(ModelUnavailable, match="'coder'"):
        await world.submit()


@pytest.mark.parametrize("code", ["invalid_prompt", "prompt_too_long", "unknown_revision"])
async def test_jobs_refused_for_what_they_ask_say_nothing_of_the_workers(code: str) -> None:
    """One caller's bad prompts must not close a model for all."""
    world = World()

    await world.ends(code, count=40)

    assert world.state("coder") == 0


async def test_one_probe_goes_when_the_time_is_over_and_its_success_opens_the_way() -> None:
    """The others are refused, or stood in for, until its outcome is seen."""
    world = World()
    await world.ends()
    world.clock.now_s += 5.0
    probe = await world.submit()
    with pytest.raises(ModelUnavailable):
        await world.submit()

    world.yard.end(probe.id, State.SUCCEEDED)
    await world.jobs.wait(probe.id, 1.0)

    assert world.state("coder") == 0
    assert (await world.submit()).model == "coder"


async def test_a_probe_that_is_not_accepted_makes_room_for_the_next() -> None:
    """A probe whose prompt was too large has probed nothing."""
    world = World()
    await world.ends()
    world.clock.now_s += 5.0
    world.yard.error = BrokerUnavailable("gone")
    with pytest.raises(BrokerUnavailable):
        await world.submit()
    world.yard.error = None

    assert (await world.submit()).state is State.QUEUED


async def test_the_same_job_is_attached_to_although_the_breaker_is_open() -> None:
    """A lost answer is always asked for again; and nothing new is generated."""
    world = World()
    before = await world.submit(key="k", job_id=JOB_ID)
    await world.ends()

    again = await world.submit(key="k", job_id=JOB_ID)

    assert again == before
    with pytest.raises(ModelUnavailable):
        await world.submit(key="other", job_id="another")


async def test_a_broker_that_is_away_refuses_new_jobs_and_not_the_known_ones() -> None:
    """Attaching needs the store alone."""
    world = World()
    await world.submit(key="k", job_id=JOB_ID)
    for _ in range(4):
        world.breakers.broker.record(False, 0)

    assert (await world.submit(key="k", job_id=JOB_ID)).id == JOB_ID
    assert (await world.jobs.status(JOB_ID)).id == JOB_ID
    with pytest.raises(BrokerUnavailable) as refused:
        await world.submit()
    assert refused.value.retry_after_s == 5.0


async def test_a_store_that_is_away_refuses_everything_at_once() -> None:
    """Nobody waits thirty seconds to be told so."""
    world = World()
    for _ in range(4):
        world.breakers.store.record(False, 0)

    for call in (
        world.submit(),
        world.jobs.status(JOB_ID),
        world.jobs.wait(JOB_ID, 30.0),
        anext(world.jobs.stream(JOB_ID)),
        world.jobs.cancel(JOB_ID),
        world.jobs.recent(),
    ):
        with pytest.raises(StoreUnavailable):
            await call
    assert world.yard.num_reads == 0


async def test_a_job_counts_once_and_only_where_it_was_seen_alive() -> None:
    """Somebody who reads one old failure again and again must not close the model."""
    world = World()
    for n in range(2):
        world.yard.known[f"old-{n}"] = status(id=f"old-{n}", model="coder")
        world.yard.end(f"old-{n}", State.FAILED, "engine_error")
    await world.ends(count=1)

    for _ in range(20):
        for job_id in world.yard.known:
            await world.jobs.status(job_id)

    assert world.state("coder") == 0


async def test_the_end_of_a_stream_counts_and_asks_only_where_it_was_bad() -> None:
    """The end event has no reason in it; one read for a failed job, none for the others."""
    world = World()
    ids = [(await world.submit()).id for _ in range(6)]
    for n, job_id in enumerate(ids):
        world.yard.end(job_id, State.SUCCEEDED if n < 2 else State.FAILED, "" if n < 2 else "engine_error")
        assert [event async for event in world.jobs.stream(job_id)]

    assert world.state("coder") == 2
    assert world.yard.num_reads == 4


async def test_an_interactive_job_is_not_left_waiting_for_workers_that_are_not_there() -> None:
    """Somebody sits and waits. In the other lanes a job outlives its workers: that is what a queue is for."""
    world = World()
    world.fleet.serving = {"tiny"}
    assert (await world.submit(lane=Lane.INTERACTIVE)).state is State.QUEUED  # it may be a restart
    world.clock.now_s += 11.0

    with pytest.raises(ModelUnavailable, match="no worker"):
        await world.submit(lane=Lane.INTERACTIVE)
    assert (await world.submit(lane=Lane.BULK)).model == "coder"


async def test_an_unserved_model_is_stood_in_for_by_one_that_is_served() -> None:
    """The line skips what nobody serves."""
    world = World(FALLBACKS)
    world.fleet.serving = {"tiny"}
    await world.submit(lane=Lane.INTERACTIVE)
    world.clock.now_s += 11.0

    assert (await world.submit(lane=Lane.INTERACTIVE)).model == "tiny"


async def test_a_model_that_nobody_knows_leaves_no_breaker_behind() -> None:
    """Names that callers make up would become series of metrics."""
    world = World()

    await world.submit("made-up")

    assert world.state("made-up") is None


async def test_the_answer_names_the_stand_in_in_a_header_too() -> None:
    """In every protocol over HTTP, also where the body has no place for it; and no name can break a header."""
    known = status(model="coder-small\u2603", asked_model="coder")
    async with http_to(app_over(MadeUpJobs(known=known))) as http:
        answer = await http.post("/v1/jobs", json={"model": "coder", "prompt": "x"})
        other = await http.get("/v1/jobs")

    assert answer.headers["x-codeyard-fallback-model"] == "coder-small%E2%98%83"
    assert answer.json()["asked_model"] == "coder"
    assert "x-codeyard-fallback-model" not in other.headers


@pytest.mark.parametrize("fallbacks", [{"a": "a"}, {"a": "b", "b": "c", "c": "a"}])
def test_fallbacks_that_go_in_a_circle_are_refused_at_start(fallbacks: Mapping[str, str]) -> None:
    """They would be found at the worst time."""
    with pytest.raises(ValueError, match="circle"):
        GatewaySettings(fallbacks=dict(fallbacks))


async def test_model_unavailable_is_a_503_with_retry_after() -> None:
    """Clients and proxies know what to do with that."""
    error = ModelUnavailable("coder", "no worker serves it now", retry_after_s=3.2)
    async with http_to(app_over(MadeUpJobs(error=error))) as http:
        answer = await http.post("/v1/jobs", json={"model": "coder", "prompt": "x"})

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "4")
    assert answer.json()["type"] == "/docs#model-unavailable"


TURN = {"model": "coder", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
PROTOCOLS = [
    ("/v1/jobs", {"model": "coder", "prompt": "x"}),
    ("/v1/chat/completions", TURN),
    ("/v1/completions", {"model": "coder", "prompt": "x"}),
    ("/v1/messages", TURN),
]


@pytest.mark.parametrize("path, body", PROTOCOLS, ids=[path for path, _ in PROTOCOLS])
@pytest.mark.parametrize(
    "error",
    [
        ModelUnavailable("coder", "no worker serves it now", retry_after_s=3.2),
        StoreUnavailable("it did not answer lately", retry_after_s=3.2),
        BrokerUnavailable("it did not answer lately", retry_after_s=3.2),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_every_protocol_answers_503_with_the_time_of_the_next_try(
    path: str, body: dict[str, Any], error: Exception
) -> None:
    """Each in its own words; the official SDKs wait for `Retry-After` before they try again."""
    async with http_to(app_over(MadeUpJobs(error=error))) as http:
        answer = await http.post(path, json=body)

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "4")


@pytest.mark.parametrize("path, body", PROTOCOLS, ids=[path for path, _ in PROTOCOLS])
async def test_every_protocol_names_the_stand_in_in_the_header(path: str, body: dict[str, Any]) -> None:
    """Also those whose answers have no place for it."""
    done = Result(state=State.SUCCEEDED, text="y", finish_reason="stop")
    known = status(State.SUCCEEDED, model="coder-small", asked_model="coder", result=done, finished_at=2.0)
    async with http_to(app_over(MadeUpJobs(known=known))) as http:
        answer = await http.post(path, json=body)

    assert answer.status_code == 200
    assert answer.headers["x-codeyard-fallback-model"] == "coder-small"

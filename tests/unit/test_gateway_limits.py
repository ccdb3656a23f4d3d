"""A tenant's limits at the gateway: what is taken, given back, looked up, and told."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from support.asgi import MadeUpJob, MadeUpJobs, MemoryLimits, app_over, http_to, limits_over, status
from support.tokens import STATIC, MadeUpKeys, auth_settings

from codeyard.producer.gateway.auth import Credentials
from codeyard.producer.gateway.keys import ApiKeys
from codeyard.producer.gateway.limits import (
    LOOK_PAGE,
    UNSEEN_S,
    Limits,
    anthropic_headers,
    duration,
    estimate,
    openai_headers,
)
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope, make_key
from codeyard.shared.errors import (
    BrokerUnavailable,
    FleetError,
    IdempotencyConflict,
    InvalidJob,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    StoreUnavailable,
    UnknownModel,
)
from codeyard.shared.job import JobId, Sampling, job_id_for_key, new_job_id
from codeyard.shared.limits.standing import Meter, Standing
from codeyard.shared.record import Event, EventKind, State
from codeyard.shared.settings import LimitSettings

JOB = {"model": "tiny", "prompt": "x" * 30, "sampling": {"max_tokens": 90}}  # 100 tokens, estimated
QUOTAS = LimitSettings(concurrent_jobs=2, tokens_per_minute=1_000, tokens_burst=1_000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class States:
    """What the store knows of jobs; `asked` counts round trips."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.known: dict[JobId, State] = {}
        self.error = error
        self.asked: list[int] = []

    async def __call__(self, group: Sequence[JobId]) -> list[State | None]:
        self.asked.append(len(group))
        if self.error is not None:
            raise self.error
        return [self.known.get(job_id) for job_id in group]


class Jobs(MadeUpJobs):
    """Accepts whatever it is given, as a job of its id and tenant; `attached` and `final` as the test says."""

    attached = False
    state = State.QUEUED

    async def submit(self, prompt: Any, **fields: Any) -> MadeUpJob:
        await super().submit(prompt, **fields)
        self.known = status(self.state, id=fields["job_id"], tenant=fields["tenant"])
        return MadeUpJob(fields["job_id"], self.attached, self.known)


async def submitted(jobs: TenantJobs, key: str | None = None) -> JobId:
    return (
        await jobs.submit(
            "x" * 30,
            model="tiny",
            lane="standard",  # type: ignore[arg-type]  # not looked at here
            idempotency_key=key,
            sampling=Sampling(max_tokens=90),
            stream=False,
            timeout_s=600.0,
            metadata={},
            traceparent=None,
        )
    ).job.id


def tokens_left(store: MemoryLimits, tenant: str = "acme") -> float:
    level = store.levels[tenant][1]
    assert level is not None
    return min(1_000.0, level.amount)


# Taken and given back ------------------------------------------------------------------------------


async def test_a_tenant_without_limits_costs_no_round_trip() -> None:
    """The default."""
    store = MemoryLimits()
    jobs = TenantJobs(Jobs(), "acme", limits_over(LimitSettings(), store))

    await submitted(jobs)

    assert store.num_calls == 0


@pytest.mark.parametrize(
    "error",
    [QueueFull("q", retry_after_s=1), UnknownModel("tiny"), InvalidJob("no", field="prompt"), StoreUnavailable("away")],
)
async def test_a_submission_that_came_to_nothing_gives_back_what_it_took(error: FleetError) -> None:
    """Tokens and the place among the live jobs; the request was one all the same."""
    store = MemoryLimits()
    limits = limits_over(QUOTAS.model_copy(update={"requests_per_minute": 10.0}), store)

    with pytest.raises(type(error)):
        await submitted(TenantJobs(Jobs(error), "acme", limits))

    assert store.jobs["acme"] == {}
    assert tokens_left(store) == 1_000
    requests = store.levels["acme"][0]
    assert requests is not None
    assert requests.amount == 9


async def test_a_submission_that_may_have_been_accepted_stays_counted() -> None:
    """The broker may have it: it leaves when it is seen to have ended, or was never there."""
    store = MemoryLimits()
    error = BrokerUnavailable("no confirm", maybe_accepted=True)

    with pytest.raises(BrokerUnavailable):
        await submitted(TenantJobs(Jobs(error), "acme", limits_over(QUOTAS, store)))

    assert len(store.jobs["acme"]) == 1
    assert tokens_left(store) == 900


async def test_a_conflict_does_not_take_the_other_job_out_of_the_count() -> None:
    """The id is that job's, which is live and was counted when it came."""
    store = MemoryLimits()
    limits = limits_over(QUOTAS, store)
    job_id = await submitted(TenantJobs(Jobs(), "acme", limits), "release-1")

    with pytest.raises(IdempotencyConflict):
        await submitted(TenantJobs(Jobs(IdempotencyConflict(job_id)), "acme", limits), "release-1")

    assert list(store.jobs["acme"]) == [job_id]
    assert tokens_left(store) == 900


async def test_attaching_costs_a_request_and_nothing_else() -> None:
    """Nothing new is generated: to a live job it adds none, to a final one it leaves none behind."""
    store, jobs = MemoryLimits(), Jobs()
    limits = limits_over(QUOTAS, store)
    tenant = TenantJobs(jobs, "acme", limits)
    first = await submitted(tenant, "release-1")
    jobs.attached = True

    assert await submitted(tenant, "release-1") == first
    assert (list(store.jobs["acme"]), tokens_left(store)) == ([first], 900)

    store.jobs["acme"].clear()  # as if it had come by another way, uncounted
    assert await submitted(tenant, "release-1") == first
    assert (list(store.jobs["acme"]), tokens_left(store)) == ([first], 900)

    store.jobs["acme"].clear()  # it ended
    jobs.state = State.SUCCEEDED
    assert await submitted(tenant, "release-1") == first
    assert (list(store.jobs["acme"]), tokens_left(store)) == ([], 900)


async def test_the_job_that_is_counted_is_the_job_that_is_submitted() -> None:
    """With a key and without: another id would never be seen to end."""
    store, jobs = MemoryLimits(), Jobs()
    tenant = TenantJobs(jobs, "acme", limits_over(QUOTAS, store))

    ids = [await submitted(tenant, "release-1"), await submitted(tenant)]

    assert ids[0] == job_id_for_key("acme", "release-1")
    assert [one["job_id"] for one in jobs.submitted] == ids == list(store.jobs["acme"])


@pytest.mark.parametrize("how", ["wait", "status", "stream", "cancel"])
async def test_a_job_that_is_seen_to_end_makes_room_at_once(how: str) -> None:
    """Without waiting for the tenant to be refused."""
    store, jobs = MemoryLimits(), Jobs()
    limits = limits_over(LimitSettings(concurrent_jobs=1), store)
    job_id = await submitted(TenantJobs(jobs, "acme", limits))
    jobs.known = status(State.SUCCEEDED, id=job_id, tenant="acme")
    jobs.events = [Event(seq=1, kind=EventKind.END, state=State.SUCCEEDED)]
    jobs.knows_only = job_id
    reader = TenantJobs(jobs, "acme", limits)

    if how == "wait":
        await reader.wait(job_id, 1.0)
    elif how == "status":
        await reader.status(job_id)
    elif how == "cancel":
        await reader.cancel(job_id)
    else:
        assert [event.kind async for event in reader.stream(job_id)] == [EventKind.END]

    assert store.jobs["acme"] == {}


# Looking for jobs that ended -----------------------------------------------------------------------


def full(num_jobs: int, settings: LimitSettings | None = None) -> tuple[Limits, MemoryLimits, States, Clock]:
    """A tenant with as many live jobs as it may have."""
    store, states, clock = MemoryLimits(), States(), Clock()
    store.jobs["acme"] = {new_job_id(): (100, 1e9) for _ in range(num_jobs)}
    for job_id in store.jobs["acme"]:
        states.known[job_id] = State.RUNNING
    return Limits(settings or LimitSettings(concurrent_jobs=num_jobs), store, states, clock=clock), store, states, clock


async def admitted(limits: Limits) -> bool:
    try:
        await limits.admit("acme", new_job_id(), tokens=100, timeout_s=600)
    except QuotaExceeded:
        return False
    return True


async def test_a_tenant_is_refused_only_after_its_live_jobs_were_looked_up() -> None:
    """A worker ends jobs without asking any gateway; nobody has to remember."""
    limits, store, states, _ = full(3)
    ended = list(store.jobs["acme"])[1]
    states.known[ended] = State.FAILED

    assert await admitted(limits)

    assert ended not in store.jobs["acme"]
    assert states.asked == [3]


async def test_a_tenant_whose_jobs_all_run_is_refused_and_told_when_to_come_back() -> None:
    """And looked up again only after a moment: a refused caller must not turn into hundreds of reads."""
    limits, _, states, clock = full(3)

    for _ in range(5):
        with pytest.raises(QuotaExceeded) as caught:
            await limits.admit("acme", new_job_id(), tokens=1, timeout_s=600)
    assert (caught.value.limit, caught.value.retry_after_s) == ("jobs", 2)
    assert states.asked == [3]

    clock.now += 0.2
    assert not await admitted(limits)
    assert states.asked == [3, 3]


async def test_many_callers_of_one_tenant_share_a_look() -> None:
    """And as many get in as there is room for."""
    limits, store, states, _ = full(3)
    for job_id in list(store.jobs["acme"])[:2]:
        states.known[job_id] = State.SUCCEEDED

    outcomes = await asyncio.gather(*(admitted(limits) for _ in range(10)))

    assert outcomes.count(True) == 2
    assert len(states.asked) <= 2


async def test_a_large_quota_is_looked_through_in_pages_and_goes_on_where_it_stopped() -> None:
    """The one that ended may be the last of thousands."""
    limits, store, states, clock = full(17 * LOOK_PAGE + 5)
    states.known[list(store.jobs["acme"])[-1]] = State.EXPIRED

    assert not await admitted(limits)
    assert sum(states.asked) == 16 * LOOK_PAGE

    clock.now += 1
    assert await admitted(limits)
    assert sum(states.asked) == 17 * LOOK_PAGE + 5


async def test_enqueued_tokens_make_room_the_same_way() -> None:
    """Failed and expired jobs must not clog the quota."""
    limits, store, states, _ = full(3, LimitSettings(enqueued_tokens=300))
    states.known[next(iter(store.jobs["acme"]))] = State.EXPIRED

    assert await admitted(limits)
    assert not await admitted(limits)


async def test_a_job_that_was_counted_and_never_submitted_leaves_after_a_minute() -> None:
    """Its gateway died in between: there is no record, and there never will be."""
    limits, store, states, clock = full(2)
    lost = next(iter(store.jobs["acme"]))
    del states.known[lost]

    assert not await admitted(limits)
    clock.now += UNSEEN_S - 1
    assert not await admitted(limits)
    clock.now += 1
    assert await admitted(limits)

    assert lost not in store.jobs["acme"]


async def test_a_job_whose_record_appears_late_is_not_taken_for_lost() -> None:
    """Counted first, reserved a moment later: in between a look finds nothing."""
    limits, store, states, clock = full(1)
    [job_id] = store.jobs["acme"]
    del states.known[job_id]
    assert not await admitted(limits)

    clock.now += UNSEEN_S / 2
    states.known[job_id] = State.QUEUED
    assert not await admitted(limits)
    clock.now += UNSEEN_S
    assert not await admitted(limits)

    assert job_id in store.jobs["acme"]


# Without a store -----------------------------------------------------------------------------------


async def test_with_limits_open_a_store_that_is_down_lets_everyone_in_uncounted() -> None:
    """The default: the submission itself will need the store anyway."""
    store = MemoryLimits()
    store.error = StoreUnavailable("away")
    limits = limits_over(LimitSettings(requests_per_minute=1, store_down="open"), store)

    for _ in range(3):
        admission = await limits.admit("acme", new_job_id(), tokens=1, timeout_s=60)
        assert openai_headers(admission.standing) == {}
        await limits.undo(admission, live=False)


async def test_with_limits_closed_a_store_that_is_down_refuses_what_cannot_be_counted() -> None:
    """Tenants without limits are not concerned."""
    store = MemoryLimits()
    store.error = StoreUnavailable("away")
    settings = LimitSettings.model_validate({"tenants": {"acme": {"requests_per_minute": 1}}, "store_down": "closed"})
    limits = limits_over(settings, store)

    with pytest.raises(StoreUnavailable):
        await limits.admit("acme", new_job_id(), tokens=1, timeout_s=60)
    await limits.admit("others", new_job_id(), tokens=1, timeout_s=60)


async def test_a_quota_that_cannot_be_looked_up_stays_a_refusal() -> None:
    """The count said no; that nobody can say who ended does not make it a yes."""
    limits, _, states, _ = full(1)
    states.error = StoreUnavailable("away")

    assert not await admitted(limits)


async def test_what_could_not_be_given_back_is_found_later() -> None:
    """A hiccup of the store must not fail an answer that is ready."""
    store, jobs = MemoryLimits(), Jobs()
    states = States()
    limits = limits_over(LimitSettings(concurrent_jobs=1), store, states)
    tenant = TenantJobs(jobs, "acme", limits)
    job_id = await submitted(tenant)
    jobs.knows_only = job_id
    jobs.known = status(State.SUCCEEDED, id=job_id, tenant="acme")

    store.error = StoreUnavailable("away")
    assert (await tenant.status(job_id)).state is State.SUCCEEDED
    store.error = None
    states.known[job_id] = State.SUCCEEDED

    await submitted(tenant)


# What a caller is told -----------------------------------------------------------------------------


def test_a_prompt_is_estimated_high_and_token_ids_are_counted() -> None:
    """The estimate is what is charged; the answer's share is all it may generate."""
    assert estimate("x" * 31, Sampling(max_tokens=90)) == 11 + 90
    assert estimate([1, 2, 3], Sampling(max_tokens=90)) == 3 + 90


async def test_accepted_and_refused_submissions_say_what_is_left() -> None:
    """In the headers that OpenAI's clients read."""
    settings = LimitSettings(requests_per_minute=60, requests_burst=2, tokens_per_minute=6_000, tokens_burst=500)
    limits = limits_over(settings)
    async with http_to(app_over(MadeUpJobs(), limits=limits)) as http:
        answers = [await http.post("/v1/jobs", json=JOB) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert [answer.headers["x-ratelimit-remaining-tokens"] for answer in answers] == ["400", "300", "300"]
    last = answers[-1]
    assert {name: value for name, value in last.headers.items() if name.startswith("x-ratelimit")} == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-limit-tokens": "500",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-remaining-tokens": "300",
        "x-ratelimit-reset-requests": "2s",
        "x-ratelimit-reset-tokens": "2s",
    }
    assert last.headers["retry-after"] == "1"
    assert (last.json()["type"], last.json()["limit"]) == ("/docs#rate-limited", "requests")


async def test_a_job_that_can_never_fit_is_not_told_to_come_back() -> None:
    """413, and which field to mend; waiting would be for ever."""
    for settings in (LimitSettings(tokens_per_minute=60, tokens_burst=99), LimitSettings(enqueued_tokens=99)):
        async with http_to(app_over(MadeUpJobs(), limits=limits_over(settings))) as http:
            answer = await http.post("/v1/jobs", json=JOB)

        assert (answer.status_code, answer.json()["field"]) == (413, "sampling.max_tokens")
        assert "retry-after" not in answer.headers


async def test_each_tenant_has_its_own_limits() -> None:
    """By name, in place of the general ones; a body limit too."""
    settings = LimitSettings.model_validate(
        {
            "requests_per_minute": 1,
            "tenants": {"big": {"requests_per_minute": 100, "body_bytes": 2_000}, "small": {"body_bytes": 100}},
        }
    )
    store, auth = MadeUpKeys(), auth_settings(static_key=STATIC)
    texts = {}
    for tenant in ("big", "small", "other"):
        made = make_key("k", tenant=tenant, scopes=[Scope.SUBMIT], now=0)
        texts[tenant] = made.text
        await store.put([made.key])
    app = app_over(MadeUpJobs(), auth=Credentials(auth, ApiKeys(store, cache_s=5), None), limits=limits_over(settings))

    async with http_to(app) as http:

        async def codes(tenant: str, size: int) -> list[int]:
            body = {**JOB, "prompt": "x" * size}
            headers = {"x-api-key": texts[tenant]}
            return [(await http.post("/v1/jobs", json=body, headers=headers)).status_code for _ in range(2)]

        assert await codes("big", 1_000) == [202, 202]
        assert await codes("big", 2_000) == [413, 413]
        assert await codes("small", 100) == [413, 413]
        assert await codes("other", 2_000) == [202, 429]


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (6.45, "6.5s"), (60, "1m0s"), (359.99, "6m0s"), (7_205, "2h0m5s")],
)
def test_resets_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    """Go's notation, rounded up: earlier than the truth would make a caller come too early."""
    assert duration(seconds) == text


def test_anthropics_headers_carry_moments() -> None:
    """The same numbers under their names."""
    standing = Standing(requests=Meter(50, 12.9, 1.2), tokens=None)

    assert anthropic_headers(standing, 1_795_226_400.5) == {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "12",
        "anthropic-ratelimit-requests-reset": "2026-11-21T02:00:02Z",
    }
    assert openai_headers(Standing()) == {}


async def test_a_rate_says_how_long_to_wait_and_for_what() -> None:
    """Rounded up by whoever writes the header."""
    limits = limits_over(LimitSettings(tokens_per_minute=60, tokens_burst=100))
    await limits.admit("acme", new_job_id(), tokens=80, timeout_s=60)

    with pytest.raises(RateLimited) as caught:
        await limits.admit("acme", new_job_id(), tokens=50, timeout_s=60)

    assert caught.value.limit == "tokens"
    assert caught.value.retry_after_s == pytest.approx(30)

"""The LimitStore port, on every adapter; and random histories that must go the same way on all of them."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import pytest
import pytest_asyncio
from support.limits import SLOW, LimitYard, ask
from support.redis_server import running_redis

from codeyard.shared.job import new_job_id
from codeyard.shared.limits.port import LimitStore
from codeyard.shared.limits.redis import RedisLimitStore
from codeyard.shared.limits.rules import Allowance, Bucket, GiveBack, Verdict
from codeyard.shared.settings import StoreSettings
from codeyard.shared.topology import Topology

JOBS = Allowance(concurrent_jobs=2)
TOKENS = Allowance(enqueued_tokens=100)


@pytest_asyncio.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
async def limits(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[LimitYard]:
    redis = request.param == "redis"
    url = request.getfixturevalue("redis_url") if redis else f"sqlite:///{tmp_path / 'yard.db'}"
    yard = LimitYard(url, Topology(namespace))
    yield yard
    await yard.tidy()


@pytest_asyncio.fixture
async def store(limits: LimitYard) -> LimitStore:
    return await limits.open()


async def granted(store: LimitStore, allowance: Allowance, *, tokens: int = 10, job_id: str | None = None) -> bool:
    [one] = await store.take([ask(job_id or new_job_id(), tokens=tokens, allowance=allowance)])
    return one.verdict is Verdict.GRANTED


# Buckets -------------------------------------------------------------------------------------------


async def test_a_burst_is_granted_and_then_no_more(store: LimitStore) -> None:
    """The bucket starts full; a refusal says how long to wait and takes nothing."""
    outcomes = [one for _ in range(7) for one in await store.take([ask(new_job_id())])]

    assert [one.verdict for one in outcomes] == [Verdict.GRANTED] * 5 + [Verdict.REQUESTS] * 2
    assert [round(one.requests_left) for one in outcomes] == [4, 3, 2, 1, 0, 0, 0]
    assert 3_000 < outcomes[-1].wait_s <= 3_600


async def test_a_bucket_fills_with_time_and_never_over_its_burst(limits: LimitYard, store: LimitStore) -> None:
    """A tenant that was away for a night has no night's worth of requests."""
    allowance = Allowance(requests=Bucket(per_s=0.01, burst=3))
    assert [await granted(store, allowance) for _ in range(4)] == [True, True, True, False]

    await limits.elapse(150)
    assert [await granted(store, allowance) for _ in range(2)] == [True, False]

    await limits.elapse(1_000_000)
    assert [await granted(store, allowance) for _ in range(4)] == [True, True, True, False]


async def test_tokens_are_taken_by_what_a_job_asks_for(store: LimitStore) -> None:
    """One long job weighs as much as many short ones; a short one still fits where a long one does not."""
    allowance = Allowance(tokens=Bucket(per_s=1 / 3_600, burst=100))

    assert [await granted(store, allowance, tokens=tokens) for tokens in (60, 50, 30, 10, 1)] == [
        True,
        False,
        True,
        True,
        False,
    ]


async def test_both_buckets_must_hold_enough_or_neither_gives(store: LimitStore) -> None:
    """A refusal for tokens must not use up requests."""
    allowance = Allowance(requests=SLOW, tokens=Bucket(per_s=1 / 3_600, burst=100))

    [refused] = await store.take([ask(new_job_id(), tokens=101, allowance=allowance)])
    [given] = await store.take([ask(new_job_id(), tokens=100, allowance=allowance)])

    assert refused.verdict is Verdict.TOKENS
    assert (round(given.requests_left), round(given.tokens_left)) == (4, 0)


async def test_tenants_do_not_share_a_bucket(store: LimitStore) -> None:
    """Whatever their names are made of."""
    allowance = Allowance(requests=Bucket(per_s=1 / 3_600, burst=1))
    tenants = ["acme", "acme:live", "a/c|me", "acme@x", "ACME"]

    outcomes = await store.take([ask(new_job_id(), tenant=tenant, allowance=allowance) for tenant in tenants * 2])

    assert [one.verdict for one in outcomes] == [Verdict.GRANTED] * 5 + [Verdict.REQUESTS] * 5


async def test_tokens_that_were_given_back_can_be_taken_again_and_no_more_than_the_burst(store: LimitStore) -> None:
    """A submission that the broker refused has generated nothing."""
    allowance = Allowance(tokens=Bucket(per_s=1 / 3_600, burst=100))
    assert await granted(store, allowance, tokens=80)

    await store.give_back([GiveBack("acme", new_job_id(), 80), GiveBack("acme", new_job_id(), 80)])

    assert [await granted(store, allowance, tokens=tokens) for tokens in (100, 1)] == [True, False]


async def test_two_gateways_together_never_grant_more_than_the_bucket_holds(limits: LimitYard) -> None:
    """Each on connections of its own, all at once."""
    stores = [await limits.open() for _ in range(2)]
    allowance = Allowance(requests=Bucket(per_s=1 / 3_600, burst=40))

    answers = await asyncio.gather(
        *(stores[n % 2].take([ask(new_job_id(), allowance=allowance)]) for n in range(100)),
    )

    verdicts = [one.verdict for one in itertools.chain.from_iterable(answers)]
    assert verdicts.count(Verdict.GRANTED) == 40


# Quotas --------------------------------------------------------------------------------------------


async def test_a_tenant_has_so_many_live_jobs_and_room_again_when_one_has_ended(store: LimitStore) -> None:
    """The quota is over ids: the one that ended makes room, once however often that is said."""
    first = new_job_id()
    assert [await granted(store, JOBS, job_id=job_id) for job_id in (first, new_job_id(), new_job_id())] == [
        True,
        True,
        False,
    ]

    await store.give_back([GiveBack("acme", first), GiveBack("acme", first)])

    assert [await granted(store, JOBS) for _ in range(2)] == [True, False]


async def test_enqueued_tokens_are_those_of_live_jobs(store: LimitStore) -> None:
    """Batches that failed or expired must not clog the quota."""
    first = new_job_id()
    assert await granted(store, TOKENS, tokens=70, job_id=first)
    assert not await granted(store, TOKENS, tokens=31)
    assert await granted(store, TOKENS, tokens=30)

    await store.give_back([GiveBack("acme", first)])

    assert [await granted(store, TOKENS, tokens=tokens) for tokens in (71, 70)] == [False, True]


async def test_a_job_that_nobody_took_back_leaves_at_its_end(limits: LimitYard, store: LimitStore) -> None:
    """Its gateway and its worker may both be gone: a crash leaves nothing stuck."""
    allowance = Allowance(concurrent_jobs=2, enqueued_tokens=100)
    asks = [ask(new_job_id(), tokens=50, live_s=live_s, allowance=allowance) for live_s in (60, 1_000)]
    assert [one.verdict for one in await store.take(asks)] == [Verdict.GRANTED] * 2
    assert not await granted(store, allowance, tokens=50)

    await limits.elapse(90)

    assert [await granted(store, allowance, tokens=50) for _ in range(2)] == [True, False]


async def test_a_job_that_is_live_already_is_counted_once(store: LimitStore) -> None:
    """The same key sent again attaches to the job that is there, and must be able to while the quota is full."""
    allowance = Allowance(tokens=Bucket(per_s=1 / 3_600, burst=100), concurrent_jobs=1, enqueued_tokens=80)
    job_id = new_job_id()

    first, again = await store.take([ask(job_id, tokens=80, allowance=allowance)] * 2)

    assert (first.verdict, first.added, first.charged) == (Verdict.GRANTED, True, 80)
    assert (again.verdict, again.added, again.charged) == (Verdict.GRANTED, False, 0)


async def test_live_jobs_are_listed_in_pages_for_whoever_looks_for_those_that_ended(store: LimitStore) -> None:
    """First those whose end is nearest: they are the oldest."""
    allowance = Allowance(concurrent_jobs=10)
    ids = [new_job_id() for _ in range(5)]
    await store.take([ask(one, live_s=100.0 * n, allowance=allowance) for n, one in enumerate(ids, start=1)])

    pages = [await store.live("acme", start=start, count=2) for start in (0, 2, 4, 6)]

    assert pages == [ids[0:2], ids[2:4], ids[4:], []]
    assert await store.live("nobody", start=0, count=10) == []


async def test_without_quotas_no_ids_are_kept(store: LimitStore) -> None:
    """They would only take room."""
    await store.take([ask(new_job_id())])

    assert await store.live("acme", start=0, count=10) == []


@pytest.mark.services
async def test_on_redis_every_key_has_an_end(redis_url: str, namespace: str) -> None:
    """A tenant that stays away leaves nothing behind."""
    yard = LimitYard(redis_url, Topology(namespace))
    store = await yard.open()
    allowance = Allowance(Bucket(1, 10), Bucket(1, 100), concurrent_jobs=5, enqueued_tokens=1_000)

    await store.take([ask(new_job_id(), live_s=60, allowance=allowance), ask(new_job_id(), allowance=allowance)])
    lifetimes = {key.rsplit(":", 1)[1]: left_s for key, left_s in (await yard.lifetimes()).items()}
    await yard.tidy()

    assert set(lifetimes) == {"levels", "live", "sizes"}
    assert 0 < lifetimes["levels"] <= 22
    assert 550 < lifetimes["live"] <= 602
    assert 550 < lifetimes["sizes"] <= 602


@pytest.mark.services
async def test_on_a_cluster_a_group_over_many_tenants_comes_back_in_its_order(tmp_path: Path) -> None:
    """Each tenant's keys lie in one slot; a node with all slots refuses a script over two, as any cluster does."""
    async with running_redis(tmp_path / "redis", "--cluster-enabled", "yes") as server:
        await server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        await server.cluster_formed()
        store = await RedisLimitStore.open(StoreSettings(url=server.url), Topology("cluster"))
        allowance = Allowance(requests=SLOW, concurrent_jobs=1)
        asks = [ask(new_job_id(), tenant=f"tenant-{n % 20}", allowance=allowance) for n in range(40)]

        outcomes = await store.take(asks)
        await store.give_back([GiveBack(one.tenant, one.job_id) for one in asks[:20]])

        assert [one.verdict for one in outcomes] == [Verdict.GRANTED] * 20 + [Verdict.JOBS] * 20
        assert await store.live("tenant-3", start=0, count=10) == []
        await store.close()


@pytest.mark.services
async def test_a_server_that_forgot_the_scripts_is_taught_again(redis_url: str, namespace: str) -> None:
    """A restart or a failover empties its cache of scripts."""
    yard = LimitYard(redis_url, Topology(namespace))
    store = await yard.open()
    await store.take([ask(new_job_id())])
    async with yard._redis() as redis:
        await redis.script_flush()

    assert [one.verdict for one in await store.take([ask(new_job_id())])] == [Verdict.GRANTED]
    await yard.tidy()


# All adapters alike --------------------------------------------------------------------------------


@pytest.mark.services
@pytest.mark.parametrize("seed", range(6))
async def test_random_histories_go_the_same_way_on_both(
    seed: int, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """lua/take.lua is a port of rules.py; this is what holds them together."""
    chance = random.Random(seed)
    yards = [LimitYard(url, Topology(namespace)) for url in (redis_url, f"sqlite:///{tmp_path / 'yard.db'}")]
    stores = [await yard.open() for yard in yards]
    ids = [new_job_id() for _ in range(12)]
    # Rates so low that the milliseconds between two calls on Redis's own clock decide nothing.
    allowances = [
        Allowance(requests=Bucket(1e-3, 6), tokens=Bucket(1e-2, 300)),
        Allowance(concurrent_jobs=3, enqueued_tokens=150),
        Allowance(requests=Bucket(1e-3, 9), concurrent_jobs=4),
        Allowance(Bucket(1e-3, 8), Bucket(1e-2, 200), 5, 120),
    ]
    for _ in range(80):
        action = chance.random()
        tenant, job_id = chance.choice(["acme", "b|c"]), chance.choice(ids)
        if action < 0.75:
            group = [
                ask(
                    chance.choice(ids),
                    tenant=chance.choice(["acme", "b|c"]),
                    tokens=chance.randint(0, 120),
                    live_s=chance.choice([50.0, 500.0, 5_000.0]),
                    allowance=chance.choice(allowances),
                )
                for _ in range(chance.randint(1, 4))
            ]
            ours, theirs = [[asdict(one) for one in await store.take(group)] for store in stores]
            for one, other in zip(ours, theirs, strict=True):
                for name, value in one.items():
                    slack = 10 if name.endswith("_s") else 0.1  # Redis's clock goes on, the other stands still
                    same = abs(value - other[name]) < slack if isinstance(value, float) else value == other[name]
                    assert same, (name, one, other)
        elif action < 0.9:
            tokens = chance.choice([0, 7, 1_000])
            for store in stores:
                await store.give_back([GiveBack(tenant, job_id, tokens)])
        else:
            seconds = chance.choice([20.0, 200.0])
            for yard in yards:
                await yard.elapse(seconds)
        lists = [[sorted(await store.live(of, start=0, count=50)) for of in ("acme", "b|c")] for store in stores]
        assert lists[0] == lists[1]
    for yard in yards:
        await yard.tidy()

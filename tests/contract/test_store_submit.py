"""Reserving and queueing: one key is one job, whoever asks and however often."""

import asyncio
from collections import Counter

import pytest
from support.store_calls import claim_of, commit_of, make_job, reservation_of, run_jobs
from support.stores import StoreYard, record_of, stream_of

from codeyard.shared.alias import Alias, Phase, Rollout, Target
from codeyard.shared.job import Job, Lane
from codeyard.shared.record import State
from codeyard.shared.store.port import (
    Claim,
    ClaimVerdict,
    Queued,
    QueuedVerdict,
    RecoverVerdict,
    Recovery,
    Reservation,
    ReserveVerdict,
    Store,
)
from codeyard.shared.topology import Topology

NEW, ATTACHED, CONFLICT = ReserveVerdict.NEW, ReserveVerdict.ATTACHED, ReserveVerdict.CONFLICT


async def test_a_first_reservation_is_new_and_gets_its_deadline_from_the_stores_clock(
    stores: StoreYard, store: Store
) -> None:
    """Clients' clocks decide nothing."""
    job = make_job(timeout_s=600.0)

    [reserved] = await store.reserve([reservation_of(job)])

    now = await stores.now()
    record = reserved.record
    assert reserved.verdict is NEW
    assert record == await record_of(store, job)
    assert (record.state, record.job, record.digest) == (State.RESERVED, job, job.digest())
    assert record.created_at == pytest.approx(now, abs=5)
    assert record.deadline_at == pytest.approx(record.created_at + 600.0, abs=0.001)
    assert record.check_at == pytest.approx(record.created_at + stores.timing.unpublished_s, abs=0.001)


async def test_the_publisher_of_a_reservation_finds_it_new_again(store: Store) -> None:
    """Its answer may have been lost: it must go on and publish, not wait for someone else to."""
    job = make_job()
    await store.reserve([reservation_of(job, "p1")])

    again, other = await store.reserve([reservation_of(job, "p1"), reservation_of(job, "p2")])

    assert (again.verdict, other.verdict) == (NEW, ATTACHED)
    assert other.record.publication == "p1"


@pytest.mark.parametrize("state", ["reserved", "queued", "running", "released", "succeeded", "cancelled"])
async def test_the_same_body_attaches_to_the_job_whatever_its_state(store: Store, state: str) -> None:
    """A retry minutes later replays the outcome instead of paying for it twice."""
    job = make_job()
    await store.reserve([reservation_of(job)])
    if state == "cancelled":
        await store.cancel([job.id])
    elif state != "reserved":
        await store.mark_queued([Queued(job.id, "p1")])
    if state in {"running", "succeeded"}:
        [claimed] = await store.claim([claim_of(job)])
    if state == "succeeded":
        await store.commit([commit_of(job, claimed)])
    before = await record_of(store, job)

    [attached] = await store.reserve([reservation_of(job, "p2")])

    assert attached.verdict is ATTACHED
    assert attached.record == before == await record_of(store, job)


async def test_lane_deadline_and_metadata_are_not_the_body(store: Store) -> None:
    """They say how a job travels; a client that retries with another deadline means the same job."""
    job = make_job("same")
    await store.reserve([reservation_of(job)])
    other = job.model_copy(update={"lane": Lane.BULK, "timeout_s": 5.0, "stream": True, "metadata": {"a": 1}})

    [attached] = await store.reserve([reservation_of(other, "p2")])

    assert attached.verdict is ATTACHED
    assert attached.record.job == job


async def test_another_body_under_the_key_is_a_conflict_that_changes_nothing(store: Store) -> None:
    """Neither answering with a stranger's result nor overwriting it would be right."""
    job, other = make_job("key"), make_job("key", prompt="class A:")
    await store.reserve([reservation_of(job)])
    before = await record_of(store, job)

    [conflict] = await store.reserve([reservation_of(other, "p2")])

    assert conflict.verdict is CONFLICT
    assert conflict.record == before == await record_of(store, job)


async def test_items_of_one_group_that_name_one_key_act_in_order(store: Store) -> None:
    """A gateway groups requests of different clients; the second of two equal ones attaches to the first."""
    job, other, stranger = make_job("key"), make_job("key", prompt="class A:"), make_job()

    outcomes = await store.reserve(
        [reservation_of(job), reservation_of(stranger), reservation_of(other, "p2"), reservation_of(job, "p3")]
    )

    assert [one.verdict for one in outcomes] == [NEW, NEW, CONFLICT, ATTACHED]
    assert [one.record.job for one in outcomes] == [job, stranger, job, job]


async def test_of_a_hundred_submitters_at_once_one_makes_the_job(stores: StoreYard, store: Store) -> None:
    """The race the idempotency key is for: a retry storm through several gateways."""
    other = await stores.open()
    job, different = make_job("key"), make_job("key", prompt="class A:")
    bodies = [job if n % 4 else different for n in range(100)]

    outcomes = await asyncio.gather(
        *[(store if n % 2 else other).reserve([reservation_of(body, f"p{n}")]) for n, body in enumerate(bodies)]
    )

    record = await record_of(store, job)
    told = Counter((one.verdict, body == record.job) for [one], body in zip(outcomes, bodies, strict=True))
    num_same = sum(body == record.job for body in bodies)
    assert told == {(NEW, True): 1, (ATTACHED, True): num_same - 1, (CONFLICT, False): 100 - num_same}
    assert {one.record.publication for [one] in outcomes} == {record.publication}


async def test_queued_is_told_once_and_again(store: Store) -> None:
    """The publisher repeats it when the answer was lost."""
    job = make_job()
    await store.reserve([reservation_of(job)])

    verdicts = [*await store.mark_queued([Queued(job.id, "p1")]), *await store.mark_queued([Queued(job.id, "p1")])]

    assert verdicts == [QueuedVerdict.QUEUED, QueuedVerdict.QUEUED]
    assert (await record_of(store, job)).state is State.QUEUED


async def test_queued_never_overwrites_a_live_owner_or_an_end(store: Store) -> None:
    """A worker may be faster than the publisher's own confirm."""
    running, done, missing = make_job(), make_job(), make_job()
    _, claimed = await run_jobs(store, running, done)
    await store.commit([commit_of(done, claimed)])
    before = [await record_of(store, running), await record_of(store, done)]

    verdicts = await store.mark_queued([Queued(job.id, "p9") for job in (running, missing, done)])

    assert verdicts == [QueuedVerdict.PASSED, QueuedVerdict.MISSING, QueuedVerdict.PASSED]
    assert [await record_of(store, running), await record_of(store, done)] == before


async def test_queued_too_late_is_told_so(stores: StoreYard, store: Store) -> None:
    """A submitter that stood still before it told the store must not tell its caller that the job is accepted."""
    job = make_job()
    await store.reserve([reservation_of(job)])
    await stores.elapse(stores.timing.unpublished_s + 1)
    await store.recover([Recovery(job.id, "p9")])
    ended = await record_of(store, job)

    [verdict] = await store.mark_queued([Queued(job.id, "p1")])

    assert verdict is QueuedVerdict.LAPSED
    assert await record_of(store, job) == ended


async def test_publishing_a_lost_owners_job_again_queues_it_as_a_suspect(stores: StoreYard, store: Store) -> None:
    """Its lease ended without release: it may be what killed the owner."""
    await run_jobs(store, job := make_job())
    await stores.elapse(stores.timing.lease_s + 1)

    [verdict] = await store.mark_queued([Queued(job.id, "p2")])

    record = await record_of(store, job)
    assert verdict is QueuedVerdict.QUEUED
    assert (record.state, record.publication, record.owner, record.crashes) == (State.QUEUED, "p2", "", 1)


@pytest.mark.parametrize("prompt", ["def add(a, b):", "another body altogether"])
async def test_a_job_that_was_never_accepted_can_be_submitted_again_under_its_key(
    stores: StoreYard, store: Store, prompt: str
) -> None:
    """The broker never had it, so nobody was promised anything: the key must not be burnt."""
    job = make_job("key")
    await store.reserve([reservation_of(job)])
    await stores.elapse(stores.timing.unpublished_s + 1)
    [recovered] = await store.recover([Recovery(job.id, "p2")])
    assert recovered.verdict is RecoverVerdict.EXPIRED
    assert [event.seq for event in await stream_of(store, job)] == [1]

    again = make_job("key", prompt=prompt)
    [reserved] = await store.reserve([Reservation(again, again.digest(), "p3", "i-again")])

    assert reserved.verdict is NEW
    assert (reserved.record.state, reserved.record.job, reserved.record.result) == (State.RESERVED, again, None)
    assert await stream_of(store, again) == []
    [claimed] = await store.claim([Claim(again, again.digest(), "p3", "worker-1", "i-again")])
    assert (claimed.verdict, claimed.attempt, claimed.last_seq) == (ClaimVerdict.RUN, 1, 0)


async def test_the_newest_records_come_first_and_no_more_than_asked(stores: StoreYard, store: Store) -> None:
    """For `codeyard jobs`: a person wants what just happened."""
    jobs = [make_job() for _ in range(4)]
    for job in jobs:
        await store.reserve([reservation_of(job)])
        await stores.elapse(1)

    assert [record.job for record in await store.recent(3)] == jobs[:0:-1]
    assert len(await store.recent(100)) == 4
    assert await store.recent(0) == []


async def test_an_alias_moves_only_from_what_was_read(store: Store) -> None:
    """Two who move it at once must not both believe that they did; a second worker must not redirect new jobs."""
    first, second, third = Alias("starter", "starter-1", 2_048), Alias("starter", "starter-2"), Alias("starter", "s-3")

    assert await store.swap_alias(None, first) == first
    assert await store.swap_alias(None, second) == first
    assert await store.aliases() == {"starter": first}
    assert await store.swap_alias(first, second) == second
    assert await store.swap_alias(first, third) == second
    assert await store.swap_alias(first, second) == second  # again: the answer was lost
    assert await store.swap_alias(Alias("other", "o-9"), Alias("other", "o-1")) == Alias("other", "o-1")
    assert await store.aliases() == {"starter": second, "other": Alias("other", "o-1")}


async def test_an_alias_keeps_its_rollout(store: Store) -> None:
    """All about it is one document: what is read is what was written."""
    rollout = Rollout(
        "r", Phase.CANARY, Target("m-1"), "/models/two", 10, Target("m-2", "/models/two", 4_096), 1.5, "why"
    )
    alias = Alias("m", "m-1", 2_048, shards=8, shards_per_tenant=3, rollout=rollout)

    await store.swap_alias(None, alias)

    assert await store.aliases() == {"m": alias}


async def test_a_workers_notice_ends_by_itself(stores: StoreYard, store: Store) -> None:
    """A worker that was killed must not be counted on; one that stops says so."""
    await store.announce("one", "first", ttl_s=0.5)
    await store.announce("one", "second", ttl_s=0.5)
    await store.announce("two", "kept", ttl_s=60)
    await store.announce("three", "gone", ttl_s=60)
    await store.announce("three", "", ttl_s=0)
    assert await store.notices() == {"one": "second", "two": "kept"}

    await stores.elapse(0.6)

    assert await store.notices() == {"two": "kept"}
    other = await stores.open(Topology(f"{stores.topology.namespace}-b"))
    assert await other.notices() == {}


async def test_two_fleets_on_one_server_do_not_see_each_other(stores: StoreYard, store: Store) -> None:
    """A namespace keeps staging's jobs out of production."""
    other = await stores.open(Topology(f"{stores.topology.namespace}-b"))
    job, changed = make_job("key"), make_job("key", prompt="class A:")
    await store.reserve([reservation_of(job)])
    await store.swap_alias(None, Alias("m", "m-1"))

    [reserved] = await other.reserve([reservation_of(changed)])

    assert reserved.verdict is NEW
    assert (await record_of(store, job)).job == job
    assert [record.job for record in await store.recent(10)] == [job]
    assert await other.aliases() == {}
    assert (await record_of(other, changed)).job == changed


async def test_an_empty_group_is_an_empty_answer(store: Store) -> None:
    """Callers pass what there is; nothing is a group too."""
    nothing: list[Job] = []
    assert await store.reserve([reservation_of(job) for job in nothing]) == []
    assert await store.claim([]) == []
    assert await store.renew([]) == []
    assert await store.commit([]) == []
    assert await store.read([]) == []


async def test_a_job_nobody_knows_is_missing_and_its_neighbours_are_not(store: Store) -> None:
    """One bad item never fails the others."""
    job = make_job()
    await store.reserve([reservation_of(job)])

    unknown, known, made_up = await store.read(["00000000-0000-0000-0000-000000000000", job.id, "j\u00f6b\n"])
    assert await store.states([job.id, "00000000-0000-0000-0000-000000000000", "j\u00f6b\n"]) == [
        State.RESERVED,
        None,
        None,
    ]

    assert (unknown, made_up) == (None, None)
    assert known is not None
    assert await store.events("nobody", after=0) == []


async def test_the_server_tells_its_name_and_version(stores: StoreYard, store: Store) -> None:
    """`codeyard doctor` prints it."""
    name, version = (await store.ping()).split()

    assert name == stores.kind
    assert version[0].isdigit()

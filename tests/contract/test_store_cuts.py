"""The link is cut before or after the effect of each call: the caller repeats, and it counts once.

`tests/contract/test_redis_link_cuts.py` does the same with a real TCP link.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest
from support.store_calls import claim_of, commit_of, make_job, reservation_of, tokens
from support.stores import StoreYard, record_of, stream_of

from codeyard.shared.alias import Alias
from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import Job
from codeyard.shared.record import Record
from codeyard.shared.store.port import Append, Claimed, ClaimVerdict, Queued, Recovery, Release, Renewal, Store

TIMES = {"lease_until", "created_at", "queued_at", "started_at", "finished_at", "deadline_at", "check_at", "expires_at"}
NO_CLAIM = Claimed(ClaimVerdict.RUN)


class Cut(StrEnum):
    BEFORE = "before"
    AFTER = "after"


class CutLink:
    """A store whose next call fails, without or with its effect."""

    def __init__(self, store: Store, cut: Cut) -> None:
        self._store = store
        self._cut: Cut | None = cut

    async def call(self, name: str, group: Sequence[Any]) -> list[Any]:
        cut, self._cut = self._cut, None
        if cut is Cut.BEFORE:
            raise StoreUnavailable("cut before the effect")
        outcomes: list[Any] = await getattr(self._store, name)(group)
        if cut is Cut.AFTER:
            raise StoreUnavailable("cut after the effect")
        return outcomes


@dataclass(frozen=True)
class Case:
    """A call, the state it is made in, and what its repeat may say if the first had taken effect."""

    name: str
    request: Callable[[Job, Claimed], Any]
    claimed: bool = False
    lost: bool = False
    told_again: str | None = None  # None: the same as the first time


CASES = [
    Case("reserve", lambda job, _: reservation_of(job, "p-new")),
    Case("mark_queued", lambda job, _: Queued(job.id, "p1")),
    Case("mark_queued", lambda job, _: Queued(job.id, "p2"), claimed=True, lost=True),
    Case("claim", lambda job, _: claim_of(job), told_again="adopt"),
    Case("claim", lambda job, _: claim_of(job, owner="worker-2"), claimed=True, lost=True, told_again="adopt"),
    Case("renew", lambda job, claimed: Renewal(job.id, claimed.fence, alone=True), claimed=True),
    Case("append", lambda job, claimed: Append(job.id, claimed.fence, [tokens(1), tokens(2)]), claimed=True),
    Case("commit", lambda job, claimed: commit_of(job, claimed), claimed=True),
    Case("release", lambda job, claimed: Release(job.id, claimed.fence, "p1"), claimed=True),
    Case("release", lambda job, claimed: Release(job.id, claimed.fence, "p2", 5.0, charge=True), claimed=True),
    Case("cancel", lambda job, _: job.id, told_again="already_final"),
    Case("cancel", lambda job, _: job.id, claimed=True),
    Case("recover", lambda job, _: Recovery(job.id, "p2"), claimed=True, lost=True, told_again="not_due"),
]


@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}{'-lost' * case.lost}")
async def test_a_call_repeated_after_a_cut_has_the_effect_of_one(
    stores: StoreYard, store: Store, case: Case, cut: Cut
) -> None:
    """The caller cannot know whether it happened; repeating must be right either way."""
    once, claimed_once = await prepare(stores, store, case)
    job, claimed = await prepare(stores, store, case)
    if case.lost:
        await stores.elapse(stores.timing.lease_s + stores.timing.grace_s + 1)
    link = CutLink(store, cut)

    [expected] = await getattr(store, case.name)([case.request(once, claimed_once)])
    with pytest.raises(StoreUnavailable):
        await link.call(case.name, [case.request(job, claimed)])
    [outcome] = await link.call(case.name, [case.request(job, claimed)])

    told = case.told_again if cut is Cut.AFTER and case.told_again else verdict(expected)
    assert verdict(outcome) == told
    if case.name == "reserve" and cut is Cut.AFTER:
        assert outcome.record == await record_of(store, job)
    assert timeless(await record_of(store, job), job) == timeless(await record_of(store, once), once)
    assert await stream_of(store, job) == await stream_of(store, once)


@pytest.mark.parametrize("cut", Cut)
async def test_a_claim_that_was_cut_gives_its_owner_the_same_right(store: Store, cut: Cut) -> None:
    """Fence and attempt are those of one claim, so that the job can be run and committed."""
    await store.reserve([reservation_of(job := make_job())])
    link = CutLink(store, cut)

    with pytest.raises(StoreUnavailable):
        await link.call("claim", [claim_of(job)])
    [claimed] = await link.call("claim", [claim_of(job)])

    assert claimed.attempt == 1
    [committed] = await store.commit([commit_of(job, claimed)])
    assert committed.verdict == "committed"


async def test_pointing_an_alias_twice_points_it_once(store: Store) -> None:
    """A worker repeats it at start until the store has answered."""
    alias = Alias("m", "m-1", 2_048)

    answers = [await store.swap_alias(None, alias) for _ in range(2)]

    assert answers == [alias, alias]
    assert await store.aliases() == {"m": alias}


async def prepare(stores: StoreYard, store: Store, case: Case) -> tuple[Job, Claimed]:
    """A job in the state the call is made for."""
    job = make_job()
    if case.name == "reserve":
        return job, NO_CLAIM
    await store.reserve([reservation_of(job)])
    if not case.claimed:
        return job, NO_CLAIM
    [claimed] = await store.claim([claim_of(job)])
    return job, claimed


def verdict(outcome: Any) -> str:
    return str(getattr(outcome, "verdict", outcome))


def timeless(record: Record, job: Job) -> dict[str, Any]:
    """What does not depend on which job it is, and when."""
    fields = record.model_dump(exclude={"id", "job", "digest", "incarnation", *TIMES})
    return {**fields, "fence": record.fence.removeprefix(record.incarnation)}

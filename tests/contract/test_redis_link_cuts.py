"""The link to Redis is lost before or after the effect of a call: the caller repeats, and it counts once."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from support.proxy import TcpProxy
from support.redis_server import running_redis
from support.store_calls import claim_of, commit_of, make_job, reservation_of, run_jobs, success, tokens

from codeyard.shared.errors import StoreUnavailable
from codeyard.shared.job import Job
from codeyard.shared.record import Record, State
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import (
    Append,
    Claimed,
    ClaimVerdict,
    Queued,
    Release,
    Renewal,
)
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology

pytestmark = pytest.mark.services

CALLS = ("reserve", "mark_queued", "claim", "renew", "append", "commit", "release", "cancel")
ATTEMPTS = 2  # of one call: the link itself repeats once, for a connection that went stale in the pool


class Loss(StrEnum):
    REQUEST = "request"  # before the effect
    REPLY = "reply"  # after the effect


class LossyLink(TcpProxy):
    """Loses not one script call, but as many in a row as it is told to."""

    def lose(self, loss: Loss, *, times: int) -> None:
        self._loss, self._times = loss, times
        self._arm()

    def _spring(self, link: Any) -> None:
        super()._spring(link)
        self._arm()  # before the client learns that it was cut, and comes back

    def _arm(self) -> None:
        if self.cuts < self._times:
            (self.drop_requests if self._loss is Loss.REQUEST else self.drop_replies)(b"EVALSHA")


@dataclass
class Yard:
    """One server, with a link that loses things and one that does not."""

    link: LossyLink
    lossy: RedisStore
    sound: RedisStore


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    topology = Topology("cuts")
    async with running_redis(tmp_path / "redis") as server, LossyLink("127.0.0.1", server.port) as link:
        lossy = await RedisStore.open(StoreSettings(url=f"redis://127.0.0.1:{link.port}/0"), topology)
        sound = await RedisStore.open(StoreSettings(url=server.url), topology)
        for job in (make_job(), make_job(), make_job()):  # so that the server knows every script
            (claimed,) = await run_jobs(sound, job)
            for name in CALLS[3:]:
                await getattr(sound, name)(requests(name, job, claimed))
        yield Yard(link, lossy, sound)
        await lossy.close()
        await sound.close()


def requests(name: str, job: Job, claimed: Claimed) -> Sequence[Any]:
    made: dict[str, Sequence[Any]] = {
        "reserve": [reservation_of(job)],
        "mark_queued": [Queued(job.id, "p1")],
        "claim": [claim_of(job)],
        "renew": [Renewal(job.id, claimed.fence, alone=True)],
        "append": [Append(job.id, claimed.fence, [tokens(1), tokens(2)])],
        "commit": [commit_of(job, claimed)],
        "release": [Release(job.id, claimed.fence, "p2", charge=True)],
        "cancel": [job.id],
    }
    return made[name]


async def prepare(store: RedisStore, name: str) -> tuple[Job, Claimed]:
    """A job in the state the call is made for."""
    job = make_job()
    if name == "reserve":
        return job, Claimed(ClaimVerdict.RUN)
    await store.reserve([reservation_of(job)])
    if name in {"mark_queued", "claim", "cancel"}:
        return job, Claimed(ClaimVerdict.RUN)
    (claimed,) = await store.claim([claim_of(job)])
    return job, claimed


def timeless(record: Record | None) -> dict[str, Any]:
    """What does not depend on which job it is, and when."""
    assert record is not None
    names = ("state", "publication", "counter", "owner", "attempt", "crashes", "alone", "cancel_requested", "last_seq")
    return {**{name: getattr(record, name) for name in names}, "result": record.result}


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_repeated_after_a_cut_has_the_effect_of_one(yard: Yard, name: str, loss: Loss) -> None:
    """The caller cannot know whether it happened; repeating must be right either way."""
    once, claimed_once = await prepare(yard.sound, name)
    job, claimed = await prepare(yard.sound, name)
    (expected,) = await getattr(yard.sound, name)(requests(name, once, claimed_once))
    yard.link.lose(loss, times=ATTEMPTS)

    with pytest.raises(StoreUnavailable):
        await getattr(yard.lossy, name)(requests(name, job, claimed))
    (outcome,) = await getattr(yard.lossy, name)(requests(name, job, claimed))

    assert yard.link.cuts == ATTEMPTS
    first, second = await yard.sound.read([once.id, job.id])
    assert timeless(second) == timeless(first)
    assert await yard.sound.events(job.id, after=0) == await yard.sound.events(once.id, after=0)
    told = str(getattr(outcome, "verdict", outcome))
    if loss is Loss.REPLY and name in {"claim", "cancel"}:  # these two say that it is so already
        assert told == {"claim": "adopt", "cancel": "already_final"}[name]
    elif name not in {"renew"}:
        assert told == str(getattr(expected, "verdict", expected))


@pytest.mark.parametrize("loss", Loss)
async def test_a_connection_that_went_stale_is_replaced_without_the_caller_noticing(yard: Yard, loss: Loss) -> None:
    """Every idle connection ends some day; a worker must not report an outage for it."""
    job, claimed = await prepare(yard.sound, "commit")
    yard.link.lose(loss, times=1)

    await yard.lossy.commit([commit_of(job, claimed)])

    (record,) = await yard.sound.read([job.id])
    assert record is not None
    assert (record.state, record.result, record.last_seq) == (State.SUCCEEDED, success(), 1)

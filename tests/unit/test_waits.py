"""The estimated start: Little's law over what the workers told, and nothing where nothing is known."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeyard.producer.waits import WaitBoard
from codeyard.shared.job import Lane
from codeyard.shared.notice import LaneLoad, ModelNotice, Notice, lane_load
from codeyard.shared.sharding import shards_of
from codeyard.shared.store.port import Store
from codeyard.worker.scheduling.drain import SPAN_S, DrainRate

BULK, STANDARD = Lane.BULK, Lane.STANDARD
IDLE = ModelNotice("m", "m-1", "awake", serving=True, slots=8, job_s=2.0)
BUSY = replace(IDLE, running=8, waiting={BULK: 2}, backlog={BULK: (30, 8)}, rate={BULK: 4.0})


def estimate(*workers: ModelNotice, lane: Lane = BULK, on_the_way: int = 0) -> float | None:
    load = lane_load(workers, lane)
    return load.start_s(on_the_way=on_the_way) if load else None


def test_a_free_slot_is_no_wait() -> None:
    """Also when more jobs are on the way than are seen, while they are fewer than the free slots."""
    assert estimate(IDLE) == 0.0
    assert estimate(IDLE, on_the_way=7) == 0.0
    assert estimate(IDLE, on_the_way=8) == pytest.approx(1 / 4)  # eight slots, two seconds a job


def test_a_line_drains_at_the_rate_that_was_measured() -> None:
    """Jobs at the broker over all shards, in hand, and on the way; workers add up, the queue does not."""
    assert estimate(BUSY) == pytest.approx(41 / 4)
    assert estimate(BUSY, BUSY) == pytest.approx(43 / 8)
    assert estimate(BUSY, on_the_way=4) == pytest.approx(45 / 4)
    assert estimate(BUSY, lane=STANDARD) == pytest.approx(1 / 4)  # no line of its own: the engine's own speed


def test_what_was_taken_since_the_workers_looked_is_no_longer_ahead() -> None:
    """A board is up to a second old; counting only what came since would make every line look longer."""
    load = LaneLoad(waiting=40, free=0, rate=4.0)

    assert load.start_s(on_the_way=4, age_s=1.0) == pytest.approx(41 / 4)
    assert load.start_s(on_the_way=0, age_s=60.0) == 0.0


def test_nothing_is_promised_where_nothing_is_known() -> None:
    """No worker, one that is loading, one that has not finished a job yet."""
    assert estimate() is None
    assert estimate(ModelNotice("m", "m-1", "disk")) is None
    assert estimate(replace(BUSY, rate={}, job_s=None)) is None
    assert estimate(replace(IDLE, job_s=None)) == 0.0


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0.01, 1e4))
def test_a_longer_line_is_never_a_shorter_wait(first: int, more: int, rate: float) -> None:
    """Whatever the rate."""
    worker = replace(BUSY, rate={BULK: rate})
    one, other = estimate(worker, on_the_way=first), estimate(worker, on_the_way=first + more)

    assert one is not None
    assert other is not None
    assert 0 <= one <= other


def test_the_rate_counts_only_while_there_is_a_line() -> None:
    """An empty lane drains as fast as jobs come, which says nothing."""
    drain = DrainRate()
    for second in range(10):
        drain.admitted(BULK, line=0, now_s=float(second))
    assert drain.rates(10.0) == {}
    for number in range(9):
        drain.admitted(BULK, line=5, now_s=20.0 + number / 4)
    assert drain.rates(22.0) == {BULK: pytest.approx(4.0)}
    assert drain.rates(24.0)[BULK] == pytest.approx(2.0)  # nothing was admitted for two seconds
    assert drain.rates(22.0 + SPAN_S + 1) == {}
    for run_s in (1.0, 3.0):
        drain.ended(run_s)
    assert drain.job_s == pytest.approx(2.0)


class _Notices:
    def __init__(self, *notices: Notice) -> None:
        self._notices = notices

    async def notices(self) -> dict[str, str]:
        return {"broken": "{", **{notice.owner: notice.encode() for notice in self._notices}}


def board_of(*notices: Notice) -> WaitBoard:
    store: Store = _Notices(*notices)  # type: ignore[assignment]  # the one call that is made
    return WaitBoard(store)


async def test_a_producer_sees_its_own_burst() -> None:
    """Workers tell of it a second later; the jobs in between must not all be promised the same place."""
    board = board_of(Notice("w", models=(BUSY,)))
    await board.ready()
    before = board.estimate_s("m-1@adapter-1", BULK)  # an adapter's jobs wait in its base's line
    for _ in range(40):
        board.publishing("m-1", BULK, 0)

    assert before == pytest.approx(41 / 4, abs=0.7)  # less what was taken since they looked
    assert board.estimate_s("m-1", BULK) == pytest.approx(81 / 4, abs=0.7)
    assert board.estimate_s("m-2", BULK) is None
    await board.close()


async def test_a_job_goes_to_the_emptiest_of_its_tenants_shards() -> None:
    """And never to another's; with nothing known it is any of them."""
    depths = tuple(range(16))
    board = board_of(Notice("w", models=(replace(BUSY, backlog={BULK: depths}),)))
    await board.ready()
    hand = shards_of("t", shards=16, per_tenant=4)

    def shard() -> int:
        return board.shard("m-1", BULK, "t", shards=16, per_tenant=4)

    assert shard() == min(hand)
    for _ in range(20):
        board.publishing("m-1", BULK, min(hand))
    assert shard() == sorted(hand)[1]
    assert board.shard("m-1", BULK, "t", shards=1, per_tenant=1) == 0
    assert {board.shard("other", BULK, "t", shards=16, per_tenant=4) for _ in range(200)} == set(hand)
    await board.close()


def test_a_notice_of_a_later_version_is_read() -> None:
    """Fields it adds are ignored; what we write is what we read."""
    notice = Notice("w", "simulated", (BUSY, IDLE))

    assert Notice.decode("w", notice.encode()) == notice
    assert Notice.decode("w", '{"engine":"x","later":{"a":1}}') == Notice("w", "x")

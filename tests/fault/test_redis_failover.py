"""A Redis primary is lost, or cut off, while results are committed; Sentinels promote a replica.

What docs/guarantees.md promises of that, and what it does not; `python -m loadtest.bench_failover` measures how much
is lost where nothing is promised.
"""

import contextlib
import time
from pathlib import Path

import pytest
from support import services
from support.doctor import healthy, place
from support.redis_group import Node, RedisGroup, lagging, redis_group
from support.redis_writers import GROUP, WORKERS, Loss, Writers, loss, writing
from support.servers import RedisServer

from codeyard.cli.checks.store import check_store

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]

BEFORE = 200  # acked results before each failure
AFTER = 40
CUT_OFF_S = 6  # how long a primary is left cut off, at most; longer than it takes to refuse writes by itself
MAX_LAG_S = 2
IN_FLIGHT = 2 * WORKERS * GROUP  # results whose acks may come in another order than their writes
LONG = [pytest.mark.long, pytest.mark.timeout(1_200)]
REPEATED = pytest.mark.parametrize("num_failovers", [pytest.param(20, marks=LONG)])
MIN_REPLICAS = ("--min-replicas-to-write", "1", "--min-replicas-max-lag", str(MAX_LAG_S))


@pytest.fixture(autouse=True)
def _need_redis() -> None:
    if not RedisServer.available():
        services.missing("redis-server to fail over", "redis-server", None)


async def fail_over(
    group: RedisGroup, writers: Writers, *, lags: Node | None = None, with_it: Node | None = None
) -> Loss:
    """Lose the primary among commits, while a replica lags perhaps, and perhaps another machine with it; wait for the
    next primary, look what is missing there, bring back what was lost."""
    old = await group.primary()
    gone = [old] if with_it is None else [old, with_it]
    async with lagging(lags) if lags is not None else contextlib.nullcontext():
        await writers.more(BEFORE)
        failed_s = time.monotonic()
        for node in gone:
            await group.lose(node)
    new = await group.promoted(old)
    found = await loss(new.server.url, dict(writers.acked), failed_s)
    for node in gone:
        await group.mend(node)
    await group.whole()
    writers.acked.clear()
    await writers.more(AFTER)
    return found


async def cut_off(group: RedisGroup, *, replicas: int) -> Loss:
    """The primary loses its network, with writers on its side of it; the others go on without. What of the writers'
    acks is gone when the network is mended?"""
    old = await group.primary()
    async with writing(group.isolated_url(old), replicas=replicas) as writers:
        await writers.more(BEFORE)
        cut_s = time.monotonic()
        group.cut_off(old)
        new = await group.promoted(old)
        while time.monotonic() < cut_s + CUT_OFF_S and not await writers.refused_throughout(1.0):
            pass  # something was acked
        found = await loss(new.server.url, dict(writers.acked), cut_s)
    await group.mend(old)
    await group.whole()
    return found


def tell(capsys: pytest.CaptureFixture[str], what: str, found: list[Loss]) -> None:
    losing = [one for one in found if one.lost]
    with capsys.disabled():
        print(
            f"\n{what}: {len(found)} times, {sum(one.acked for one in found)} acked, "
            f"{sum(one.lost for one in found)} lost in {len(losing)} of them "
            f"({sum(one.without_record for one in found)} without a record), at most {max(one.lost for one in found)}; "
            f"acked {min((one.first_s for one in losing), default=0.0):+.3f} to "
            f"{max((one.last_s for one in losing), default=0.0):+.3f} s from the failure"
        )


@pytest.mark.parametrize("num_failovers", [1, pytest.param(20, marks=LONG)])
async def test_no_acked_commit_is_lost_in_a_failover_when_the_one_replica_must_have_it(
    tmp_path: Path, num_failovers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """`CODEYARD_STORE_REPLICAS` is the number of replicas, so whichever is promoted has answered. The writers' store
    is opened once: it finds each new primary by itself."""
    async with redis_group(tmp_path, replicas=[()]) as group, writing(group.url, replicas=1) as writers:
        found = [await fail_over(group, writers) for _ in range(num_failovers)]
        said = await check_store(place(store={"url": group.url, "replicas": 1}, answer_s=10.0))

    assert healthy(said), said  # `codeyard doctor` finds the new primary too
    if num_failovers > 1:
        tell(capsys, "WAIT 1 of 1 replica", found)
    assert min(one.acked for one in found) >= BEFORE
    assert [one.lost for one in found] == [0] * num_failovers


@pytest.mark.parametrize("options", [(), MIN_REPLICAS], ids=["wait", "wait_and_min_replicas"])
@REPEATED
async def test_no_acked_commit_is_lost_with_the_primary_and_a_replica_when_both_replicas_must_have_it(
    tmp_path: Path, num_failovers: int, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The way to close the window of the tests below: every replica that may be promoted has answered, the one that
    lags too."""
    found = []
    async with redis_group(tmp_path, *options, replicas=[(), ()]) as group, writing(group.url, replicas=2) as writers:
        for _ in range(num_failovers):
            slow, brisk = await group.replicas()
            found.append(await fail_over(group, writers, lags=slow, with_it=brisk))

    tell(capsys, f"WAIT 2 of 2 replicas, the lagging one is left{', min-replicas 1' if options else ''}", found)
    assert [one.lost for one in found] == [0] * num_failovers


@pytest.mark.parametrize("both", [True, False], ids=["with_the_one_that_answered", "alone"])
@REPEATED
async def test_what_one_answer_of_two_replicas_loses_is_what_the_other_lags_behind(
    tmp_path: Path, num_failovers: int, both: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not promised: the replica that had not answered may be the one that is left, or that Sentinel takes. The
    newest results are lost, as many as it was behind."""
    found = []
    async with redis_group(tmp_path, replicas=[(), ()]) as group, writing(group.url, replicas=1) as writers:
        for _ in range(num_failovers):
            slow, brisk = await group.replicas()
            found.append(await fail_over(group, writers, lags=slow, with_it=brisk if both else None))

    tell(capsys, f"WAIT 1 of 2 replicas, one lags and {'is left' if both else 'Sentinel chooses'}", found)
    assert max(one.kept_after for one in found) <= IN_FLIGHT


@pytest.mark.parametrize("options", [(), MIN_REPLICAS], ids=["async", "min_replicas"])
@pytest.mark.parametrize("slowly", [False, True], ids=["in_step", "lagging"])
@REPEATED
async def test_what_asynchronous_replication_loses_is_the_newest_that_was_acked(
    tmp_path: Path, num_failovers: int, options: tuple[str, ...], slowly: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not promised: without `CODEYARD_STORE_REPLICAS` an ack waits for nobody, and min-replicas-to-write counts
    replicas that were there lately, not those that have the write."""
    found = []
    async with redis_group(tmp_path, *options, replicas=[()]) as group, writing(group.url) as writers:
        for _ in range(num_failovers):
            [replica] = await group.replicas()
            found.append(await fail_over(group, writers, lags=replica if slowly else None))

    tell(capsys, f"no WAIT, {'lagging' if slowly else 'in step'}{', min-replicas 1' if options else ''}", found)
    assert max(one.kept_after for one in found) <= IN_FLIGHT


@pytest.mark.parametrize("options", [(), MIN_REPLICAS], ids=["wait", "wait_and_min_replicas"])
@pytest.mark.parametrize("num_failovers", [pytest.param(5, marks=LONG)])
async def test_a_primary_that_is_cut_off_acks_nothing_that_is_lost_when_replicas_must_have_it(
    tmp_path: Path, num_failovers: int, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its writers are told that the store is unavailable, for as long as they are on the wrong side."""
    async with redis_group(tmp_path, *options, replicas=[()]) as group:
        found = [await cut_off(group, replicas=1) for _ in range(num_failovers)]

    tell(capsys, f"cut off, WAIT 1 of 1 replica{', min-replicas 1' if options else ''}", found)
    assert [one.lost for one in found] == [0] * num_failovers


@pytest.mark.parametrize("num_failovers", [pytest.param(5, marks=LONG)])
async def test_a_primary_that_is_cut_off_loses_what_it_acks_until_it_refuses_to(
    tmp_path: Path, num_failovers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not promised: without WAIT it acks on and on, and all of that is gone when the network is mended;
    min-replicas-to-write ends it after min-replicas-max-lag."""
    async with redis_group(tmp_path / "unbounded", replicas=[()]) as group:
        unbounded = [await cut_off(group, replicas=0) for _ in range(num_failovers)]
    async with redis_group(tmp_path / "bounded", *MIN_REPLICAS, replicas=[()]) as group:
        bounded = [await cut_off(group, replicas=0) for _ in range(num_failovers)]

    tell(capsys, "cut off, no WAIT", unbounded)
    tell(capsys, f"cut off, no WAIT, min-replicas 1 within {MAX_LAG_S} s", bounded)
    assert min(one.last_s for one in unbounded) > CUT_OFF_S - 1
    assert min(one.lost for one in unbounded) > 0
    assert max(one.last_s for one in bounded) < MAX_LAG_S + 2  # whole seconds, looked at once a second

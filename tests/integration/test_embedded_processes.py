"""The embedded file under several real processes, and under kill -9."""

import asyncio
import os
import sqlite3
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path

import pytest
from support import embedded_process
from support.brokers import comes_to, numbered, take
from support.children import Process
from support.children import running as running_script
from support.embedded_process import QUEUE, open_broker, open_store
from support.store_calls import success

from codeyard.shared.job import job_id_for_key
from codeyard.shared.record import State

pytestmark = pytest.mark.process

ROUNDS = 3
LINES = 20  # groups that a process confirms before it is killed


def running(file: Path, *what: str) -> AbstractAsyncContextManager[Process]:
    return running_script(Path(embedded_process.__file__), str(file), *what)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "yard.db"


async def test_what_a_killed_consumer_held_comes_to_the_next_at_once(file: Path) -> None:
    """No timeout has to pass: the kernel frees the lock with the process."""
    broker = await open_broker(str(file))
    await broker.publish(numbered(QUEUE, 5), timeout_s=5)
    consumer = await broker.consume({QUEUE: 10})

    async with running(file, "hold", "5") as other:
        assert await other.line() == "held 5"
        assert await broker.depth([QUEUE]) == [0]
        receiving = asyncio.create_task(consumer.receive(10))
        await other.kill()
        async with asyncio.timeout(2.0):  # a lease would take 3 s, a broken link longer
            deliveries = await receiving

    assert [(one.body, one.redelivered) for one in deliveries] == [(b"%d" % n, True) for n in range(5)]
    await broker.close()


async def test_a_child_that_outlives_a_killed_consumer_does_not_keep_its_messages(file: Path) -> None:
    """An engine's process is forked from the worker and may live a little longer."""
    broker = await open_broker(str(file))
    await broker.publish(numbered(QUEUE, 2), timeout_s=5)
    consumer = await broker.consume({QUEUE: 10})

    async with running(file, "fork", "2") as parent:
        told = [await parent.line(), await parent.line()]
        child = next(int(line.removeprefix("child ")) for line in told if line.startswith("child"))
        parent.kill_alone()
        taken = await take(consumer, 2)
        os.kill(child, 0)  # raises unless it is alive

    assert [one.redelivered for one in taken] == [True, True]
    await broker.close()


async def test_a_forked_child_opens_the_file_anew(file: Path) -> None:
    """SQLite's connections must not cross a fork; ours say so and leave the parent's alone."""
    async with running(file, "reopen") as process:
        assert await process.line() == "child done"
        assert await process.line() == "parent done"
        assert await process.ended() == 0

    store = await open_store(str(file))
    records = await store.read([job_id_for_key("tests", key) for key in ("parent", "child")])
    await store.close()
    assert [record.state for record in records if record] == [State.RESERVED, State.RESERVED]


async def test_killed_in_the_middle_of_writing_nothing_confirmed_is_lost(file: Path) -> None:
    """Two writers at once, killed again and again; whatever they told is in the file, whole."""
    confirmed: set[str] = set()
    for number in range(ROUNDS):
        async with running(file, "submit", f"a{number}") as first, running(file, "submit", f"b{number}") as second:
            lines = [await process.line() for _ in range(LINES) for process in (first, second)]
            lines += await first.kill()
            lines += await second.kill()
        confirmed |= {job_id for line in lines for job_id in line.split()}

    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        published = {job_id for (job_id,) in db.execute("SELECT message_id FROM messages")}
        counted = db.execute("SELECT free, (SELECT count(*) FROM messages) FROM queues WHERE free > 0").fetchall()
    store = await open_store(str(file))
    records = await store.read(sorted(confirmed))
    await store.close()
    assert len(confirmed) >= ROUNDS * LINES * 2 * embedded_process.GROUP
    assert confirmed <= published
    assert {record.state for record in records if record} == {State.QUEUED}
    assert None not in records
    assert [free for free, _ in counted] == [total for _, total in counted]


async def test_submitters_and_workers_at_once_settle_every_job_although_workers_are_killed(file: Path) -> None:
    """The whole path on one file: two workers die with deliveries in hand, a third finishes."""
    accepted: list[str] = []
    async with running(file, "submit", "jobs") as submitter, running(file, "work") as first:
        async with running(file, "work") as second:
            for _ in range(LINES):
                accepted += (await submitter.line()).split()
            await first.line()
            await second.line()
            await first.kill()
        for line in await submitter.kill():
            accepted += line.split()

    store = await open_store(str(file))

    async def unsettled() -> int:
        return sum(record is None or not record.state.final for record in await store.read(accepted))

    async with running(file, "work"):
        left = await comes_to(unsettled, 0)

    records = await store.read(accepted)
    await store.close()
    assert left == 0
    assert len(accepted) >= LINES * embedded_process.GROUP
    assert {record.state for record in records if record} == {State.SUCCEEDED}
    assert {record.result for record in records if record} == {success()}

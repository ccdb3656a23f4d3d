"""A process that leads jobs through their whole life on the embedded file, and tells what was confirmed.

python embedded_life.py FILE live NAME    for ever: submit, claim, stream, commit, retry, dead-letter, redrive, sweep
python embedded_life.py FILE finish       no new jobs; ends when every job is final and no letter is left
python embedded_life.py FILE freeze       take the file's write lock, say so, keep it until a line comes in

Each begins when a line comes in on standard input; until then it says `ready`. Then one line for each thing,
written when it was confirmed and not before, so that a reader may hold the file to it:

    up                        the file is open
    accepted ID...            queued at the broker, and so in the store
    passing COUNT             reserved in the namespace of BRIEF
    events ID INCARNATION SEQ the stream reaches SEQ
    committed ID INCARNATION STATE
    redriven ID
    refused ERROR             a call was refused; it goes on when a line comes in
    finished

Time on the file goes SPEED times as fast as the machine's, so that leases end and records expire meanwhile.
"""

import asyncio
import itertools
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Sequence

from codeyard.cli.dead_letters import in_hand, redrive
from codeyard.shared.broker.port import Consumer, Delivery, PublishOutcome
from codeyard.shared.broker.sqlite import SqliteBroker
from codeyard.shared.embedded.file import EmbeddedFile
from codeyard.shared.envelope import Envelope, new_nonce, open_delivery, seal
from codeyard.shared.errors import BrokerUnavailable, StoreUnavailable
from codeyard.shared.job import Job, Lane
from codeyard.shared.reconciler import reconcile_once
from codeyard.shared.record import Event, EventKind, Failure, Result, State
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store.port import (
    Append,
    AppendVerdict,
    Claim,
    Claimed,
    ClaimVerdict,
    Commit,
    CommitVerdict,
    Queued,
    QueuedVerdict,
    Release,
    Reservation,
    ReserveVerdict,
)
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology
from support.store_calls import make_job

TOPOLOGY = Topology("life")
BRIEF = Topology("brief")  # beside it in the same file: jobs that are swept soon after
QUEUE = TOPOLOGY.job_queue("m-1", Lane.STANDARD)
SPEED = 20.0
BASE = 1.7e9  # seconds since the epoch, when the fast clock showed the time
GROUP = 4
LENGTH = 3  # tokens events of a job that succeeds
FIRST = "first"  # how the incarnations begin that were not redriven
BRIEF_S = 5.0  # on the file: deadline, longest run and retention together are three times as long
QUIET_S = 0.1
TIMING = {"lease_s": 10.0, "grace_s": 5.0, "unpublished_s": 20.0, "queue_check_s": 10.0}  # on the file


def fast_clock() -> float:
    return BASE + (time.time() - BASE) * SPEED


def text_of(seq: int) -> str:
    return f"{seq};"


WHOLE = "".join(text_of(seq) for seq in range(1, LENGTH + 1))


def fate_of(job_id: str) -> str:
    """What befalls a job in its first life, the same in whatever process."""
    return ("succeeds", "succeeds", "retried", "dies")[zlib.crc32(job_id.encode()) % 4]


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def open_store(file: str, topology: Topology = TOPOLOGY) -> SqliteStore:
    short = {} if topology is TOPOLOGY else {"longest_run_s": BRIEF_S, "retention_s": BRIEF_S}
    settings = StoreSettings.model_validate({"url": f"sqlite:///{file}", **TIMING, **short})
    return await SqliteStore.open(settings, topology, clock=fast_clock)


async def open_broker(file: str) -> SqliteBroker:
    return await SqliteBroker.open(BrokerSettings(url=f"sqlite:///{file}"), TOPOLOGY, clock=fast_clock)


class Life:
    def __init__(self, store: SqliteStore, brief: SqliteStore, broker: SqliteBroker, consumer: Consumer) -> None:
        self._store = store
        self._brief = brief
        self._broker = broker
        self._consumer = consumer
        self._owner = f"process-{os.getpid()}"

    async def submit(self, jobs: Sequence[Job]) -> None:
        reserved = await self._store.reserve(
            [Reservation(job, job.digest(), new_nonce(), f"{FIRST}-{new_nonce()}") for job in jobs]
        )
        assert {one.verdict for one in reserved} == {ReserveVerdict.NEW}
        records = [one.record for one in reserved]
        messages = [
            seal(
                one.job,
                TOPOLOGY,
                publication=one.publication,
                incarnation=one.incarnation,
                deadline_at=one.deadline_at,
            )
            for one in records
        ]
        outcomes = await self._broker.publish(messages, timeout_s=5)
        confirmed = [one for one, how in zip(records, outcomes, strict=True) if how is PublishOutcome.CONFIRMED]
        queued = await self._store.mark_queued([Queued(one.id, one.publication) for one in confirmed])
        lapsed = QueuedVerdict.LAPSED  # it stood still for so long that the reconciler gave them up
        say("accepted", *(one.id for one, verdict in zip(confirmed, queued, strict=True) if verdict is not lapsed))

    async def come_and_go(self, jobs: Sequence[Job]) -> None:
        """Records that nobody wants any more soon, and each write sweeps some."""
        await self._brief.reserve([Reservation(job, job.digest(), "p", FIRST) for job in jobs])
        say("passing", len(jobs))

    async def work(self) -> bool:
        """Whether anything came."""
        try:
            async with asyncio.timeout(QUIET_S):
                deliveries = await self._consumer.receive(2 * GROUP)
        except TimeoutError:
            return False
        envelopes = [open_delivery(delivery) for delivery in deliveries]
        claims = await self._store.claim(
            [Claim(one.job, one.digest, one.publication, self._owner, one.incarnation) for one in envelopes]
        )
        for delivery, envelope, claimed in zip(deliveries, envelopes, claims, strict=True):
            match claimed.verdict:
                case ClaimVerdict.RUN | ClaimVerdict.ADOPT:
                    await self._run(delivery, envelope, claimed)
                case ClaimVerdict.HOLD:
                    await self._consumer.requeue([delivery])  # its owner was killed: until the lease is over
                case _:
                    await self._consumer.ack([delivery])
        return True

    async def _run(self, delivery: Delivery, envelope: Envelope, claimed: Claimed) -> None:
        job_id = envelope.job.id
        fate = fate_of(job_id) if envelope.incarnation.startswith(FIRST) else "succeeds"
        upto = LENGTH if fate == "succeeds" or (fate == "retried" and claimed.attempt > 1) else 1
        for seq in range(claimed.last_seq + 1, upto + 1):
            event = Event(seq=seq, kind=EventKind.TOKENS, text=text_of(seq))
            if await self._store.append([Append(job_id, claimed.fence, [event])]) == [AppendVerdict.APPENDED]:
                say("events", job_id, envelope.incarnation, seq)
        if upto == LENGTH:
            await self._commit(delivery, envelope, claimed, Result(state=State.SUCCEEDED, text=WHOLE))
        elif fate == "retried":
            await self._retry(delivery, envelope, claimed)
        else:
            await self._die(delivery, envelope, claimed)

    async def _commit(self, delivery: Delivery, envelope: Envelope, claimed: Claimed, result: Result) -> None:
        job_id = envelope.job.id
        [committed] = await self._store.commit([Commit(job_id, claimed.fence, envelope.publication, result)])
        if committed.verdict is CommitVerdict.COMMITTED:
            say("committed", job_id, envelope.incarnation, result.state)
        if committed.may_ack:
            await self._consumer.ack([delivery])

    async def _retry(self, delivery: Delivery, envelope: Envelope, claimed: Claimed) -> None:
        again = new_nonce()
        message = seal(
            envelope.job,
            TOPOLOGY,
            publication=again,
            incarnation=envelope.incarnation,
            deadline_at=envelope.deadline_at,
            attempt=claimed.attempt,
        )
        if await self._broker.defer([(message, 1.0)], timeout_s=5) == [PublishOutcome.CONFIRMED]:
            await self._store.release([Release(envelope.job.id, claimed.fence, again, delay_s=1.0, charge=True)])
            await self._consumer.ack([delivery])

    async def _die(self, delivery: Delivery, envelope: Envelope, claimed: Claimed) -> None:
        letter = seal(
            envelope.job,
            TOPOLOGY,
            publication=envelope.publication,
            incarnation=envelope.incarnation,
            deadline_at=envelope.deadline_at,
        )
        if await self._broker.dead_letter([letter], timeout_s=5) == [PublishOutcome.CONFIRMED]:
            failure = Failure(code="dies", message="once")
            await self._commit(delivery, envelope, claimed, Result(state=State.FAILED, text=text_of(1), error=failure))

    async def look_after(self) -> int:
        """Redrive what is dead, publish again what is lost. How many letters there were."""
        async with in_hand(self._broker, TOPOLOGY) as hand:
            treated = await redrive(hand, hand.letters, self._broker, self._store, TOPOLOGY, timeout_s=5)
        for one in treated:
            if one.gone:
                say("redriven", one.letter.id)
        await reconcile_once(self._broker, self._store, TOPOLOGY)
        return len(treated)

    async def unfinished(self) -> int:
        return sum(not record.state.final for record in await self._store.recent(100_000))

    async def close(self) -> None:
        for one in (self._broker, self._store, self._brief):
            await one.close()


async def open_life(file: str) -> Life:
    broker = await open_broker(file)
    await broker.declare([QUEUE])
    store, brief = await open_store(file), await open_store(file, BRIEF)
    life = Life(store, brief, broker, await broker.consume({QUEUE: 4 * GROUP}))
    say("up")
    return life


async def live(file: str, name: str) -> None:
    life: Life | None = None
    for number in itertools.count():
        try:
            life = life or await open_life(file)
            await life.submit([make_job(f"{name}-{number}-{n}") for n in range(GROUP)])
            await life.come_and_go([make_job(f"{name}-{number}-brief-{n}", timeout_s=BRIEF_S) for n in range(GROUP)])
            while await life.work():
                pass
            await life.look_after()
        except (BrokerUnavailable, StoreUnavailable) as error:
            say("refused", str(error).replace("\n", " "))
            await asyncio.to_thread(sys.stdin.readline)
            if life is not None:
                await life.close()  # what was in hand goes back
                life = None


async def finish(file: str) -> None:
    life = await open_life(file)
    while await life.work() or await life.look_after() or await life.unfinished():
        pass
    await life.close()
    say("finished")


async def freeze(file: str) -> None:
    """A transaction in which the process stands still; the test stops it there, or kills it."""

    def stand_still(db: sqlite3.Connection, now: float) -> None:
        db.execute("INSERT INTO queues (name) VALUES ('of the frozen')")
        say("locked")
        sys.stdin.readline()

    opened = await EmbeddedFile.open(f"sqlite:///{file}", wall=fast_clock)
    await opened.write(stand_still, timeout_s=3_600)
    say("committed")
    await opened.close()


if __name__ == "__main__":
    path, what, *rest = sys.argv[1:]
    say("ready")
    sys.stdin.readline()
    match what:
        case "live":
            asyncio.run(live(path, *rest))
        case "finish":
            asyncio.run(finish(path))
        case "freeze":
            asyncio.run(freeze(path))

"""What processes of `embedded_life` told, held against what is in the file. Called by: tests of the embedded file."""

import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from codeyard.shared.embedded.identity import damage
from codeyard.shared.record import Event, EventKind, State
from codeyard.shared.store.sqlite import SqliteStore
from support.embedded_life import WHOLE, fate_of, text_of

Life = tuple[str, str]
"""A job's id and its incarnation."""


class Book:
    def __init__(self) -> None:
        self.accepted: set[str] = set()
        self.refusals: list[str] = []
        self.num_passing = 0
        self._reached: dict[Life, int] = {}  # the last event told
        self._commits: Counter[Life] = Counter()
        self._states: dict[Life, str] = {}
        self._redriven: set[str] = set()

    def note(self, lines: Iterable[str]) -> None:
        for line in lines:
            match line.split():
                case ["accepted", *ids]:
                    self.accepted |= set(ids)
                case ["passing", count]:
                    self.num_passing += int(count)
                case ["events", job_id, incarnation, seq]:
                    self._reached[job_id, incarnation] = int(seq)
                case ["committed", job_id, incarnation, state]:
                    self._commits[job_id, incarnation] += 1
                    self._states[job_id, incarnation] = state
                case ["redriven", job_id]:
                    self._redriven.add(job_id)
                case ["refused", *words]:
                    self.refusals.append(" ".join(words))

    async def holds(self, store: SqliteStore) -> None:
        """All that was told is in the file, which may have gone on since."""
        told = {job_id for job_id, _ in [*self._reached, *self._states]}
        ids = sorted(self.accepted | self._redriven | told)
        records = dict(zip(ids, await store.read(ids), strict=True))
        for job_id in self.accepted:
            record = records[job_id]
            assert record is not None, f"{job_id} was accepted and is gone"
            assert record.state not in (State.RESERVED, State.EXPIRED, State.CANCELLED), (job_id, record.state)
        for job_id in self._redriven:
            record = records[job_id]
            assert record is not None
            assert record.history, f"{job_id} was redriven and does not know it"
        for (job_id, incarnation), seq in self._reached.items():
            events = await store.events(job_id, after=0)
            [now] = await store.read([job_id])  # after them: a process that goes on may have redriven it meanwhile
            assert now is not None
            if now.incarnation == incarnation:
                _in_order(events, job_id, seq)
        for (job_id, incarnation), state in self._states.items():
            record = records[job_id]
            assert record is not None
            past = {one.incarnation: one.result.state for one in record.history}
            there = record.state if record.incarnation == incarnation else past.get(incarnation)
            assert there == state, f"{job_id} was told as {state} and is {there}"
        assert set(self._commits.values()) <= {1}, "a job was committed twice"

    async def ended(self, store: SqliteStore) -> None:
        """And every job that was accepted has succeeded, the dead ones in their second life."""
        await self.holds(store)
        ids = sorted(self.accepted)
        for record in await store.read(ids):
            assert record is not None
            assert record.state is State.SUCCEEDED, (record.id, record.state)
            assert record.result is not None
            assert record.result.text == WHOLE
            assert len(record.history) == (fate_of(record.id) == "dies"), record.history
            _in_order(await store.events(record.id, after=0), record.id, record.last_seq)


def _in_order(events: list[Event], job_id: str, least: int) -> None:
    assert [event.seq for event in events] == list(range(1, len(events) + 1)), job_id
    assert len(events) >= least, f"{job_id} was told to reach {least} and has {len(events)}"
    told = [event.text for event in events if event.kind is EventKind.TOKENS]
    assert told == [text_of(seq) for seq in range(1, len(told) + 1)], job_id


def assert_whole(path: Path) -> None:
    """SQLite finds nothing wrong in it, and nor do we."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=30.0)) as db:
        db.execute("BEGIN")
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert damage(db) == ""
        db.execute("ROLLBACK")

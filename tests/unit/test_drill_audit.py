"""The audit finds what is wrong. A drill that cannot fail would prove nothing."""

from pathlib import Path
from typing import Any

import pytest

from codeyard.cli.drill.audit import FINAL, Ledger, judge, regenerated
from codeyard.cli.drill.ledger import Reader, Told, Writer
from codeyard.cli.drill.plan import MAX_TOKENS, PlannedJob, planned_job
from codeyard.shared.job import Job, job_id_for_key
from codeyard.shared.record import Event, EventKind, Failure, Record, Result, State, Usage
from codeyard.worker.engines.simulated import simulated_completion

ID = job_id_for_key("drill", "k")
STREAMING = planned_job(1, 3, can_fail=True)
FAILS = planned_job(1, 11, can_fail=True)


def answered(planned: PlannedJob, **changed: Any) -> tuple[Record, list[Event]]:
    """A job as it should be: its record and its stream. `changed` are fields of the result."""
    text, token_ids, reason = simulated_completion(planned.prompt, MAX_TOKENS)
    usage = Usage(prompt_tokens=5, completion_tokens=len(token_ids))
    fields = {
        "state": State.SUCCEEDED,
        "text": text,
        "finish_reason": reason,
        "usage": usage,
        "revision": "m-1",
        **changed,
    }
    result = Result(**fields)
    events = [
        Event(seq=1, kind=EventKind.TOKENS, text=text, token_ids=token_ids),
        Event(seq=2, kind=EventKind.END, state=result.state),
    ]
    return record_of(planned, result, 2), events


def record_of(planned: PlannedJob, result: Result | None, last_seq: int, **fields: Any) -> Record:
    job = Job.build(
        id=ID, tenant="drill", key="k", model="m", revision="m-1", prompt=planned.prompt, stream=planned.stream
    )
    state = result.state if result else State.RUNNING
    known = {"state": state, "job": job, "digest": "d", "incarnation": "i", "publication": "p", "attempt": 1}
    return Record(id=ID, created_at=1, deadline_at=2, expires_at=3, last_seq=last_seq, result=result, **known | fields)


def kinds(
    planned: PlannedJob,
    record: Record | None,
    events: list[Event],
    *,
    seen: str | None = None,
    has_letter: bool = False,
) -> list[str]:
    found = judge(planned, ID, record, events, seen=seen, simulated=True, has_letter=has_letter)
    return sorted({finding.kind for finding in found})


def test_a_job_that_is_as_planned_has_no_finding() -> None:
    """Otherwise every drill would fail."""
    record, events = answered(STREAMING)
    assert record.result is not None

    assert kinds(STREAMING, record, events, seen=record.result.encode()) == []


def test_an_accepted_job_without_a_record_or_without_an_end_is_lost() -> None:
    """The two ways to lose one."""
    assert kinds(STREAMING, None, []) == ["lost"]
    assert kinds(STREAMING, record_of(STREAMING, None, 0), []) == ["lost"]


def test_a_result_that_changed_after_it_was_final_is_a_duplicate() -> None:
    """Somebody committed a second time over the first."""
    record, events = answered(STREAMING)

    assert kinds(STREAMING, record, events, seen="another") == ["duplicated"]


def test_a_stream_with_two_ends_is_a_duplicate() -> None:
    """As if two workers had each committed."""
    record, events = answered(STREAMING)
    twice = [*events, Event(seq=3, kind=EventKind.END, state=State.SUCCEEDED)]

    assert "duplicated" in kinds(STREAMING, record.model_copy(update={"last_seq": 3}), twice)


@pytest.mark.parametrize(
    "changed",
    [
        {"text": "another"},
        {"usage": Usage(completion_tokens=1)},
        {"finish_reason": "abort"},
        {"revision": "m-2"},
        {"state": State.CANCELLED},
    ],
)
def test_an_answer_that_is_not_the_prompts_is_wrong(changed: dict[str, Any]) -> None:
    """Text, count, reason, weights and state are each looked at."""
    record, events = answered(STREAMING, **changed)

    assert "wrong" in kinds(STREAMING, record, events)


def test_a_stream_with_a_gap_or_other_text_is_found() -> None:
    """A reader of the stream must have had what the result says."""
    record, events = answered(STREAMING)
    gap = [events[0], events[1].model_copy(update={"seq": 3})]
    other = [events[0].model_copy(update={"text": "x"}), events[1]]

    assert kinds(STREAMING, record, gap) == ["stream"]
    assert kinds(STREAMING, record, other) == ["stream"]
    assert kinds(STREAMING, record, events[:1]) == ["stream"]


def test_text_before_a_restart_does_not_count() -> None:
    """Generated anew: what was streamed before is void, and told so."""
    record, events = answered(STREAMING)
    begun = Event(seq=1, kind=EventKind.TOKENS, text="half", token_ids=(1, 2, 3))
    anew = Event(seq=2, kind=EventKind.RESTARTED)
    stream = [begun, anew, *(event.model_copy(update={"seq": event.seq + 2}) for event in events)]
    record = record.model_copy(update={"last_seq": 4, "attempt": 2})

    assert kinds(STREAMING, record, stream) == []
    assert regenerated(record, stream) == 3


def test_each_further_attempt_of_a_job_that_does_not_stream_generates_it_anew() -> None:
    """Nothing of it was kept, so all of it counts."""
    planned = planned_job(1, 4, can_fail=True)
    record, events = answered(planned)
    assert record.result is not None

    assert regenerated(record, events) == 0
    tokens = record.result.usage.completion_tokens
    assert regenerated(record.model_copy(update={"attempt": 3}), events) == 2 * tokens


def test_a_planned_failure_needs_its_dead_letter() -> None:
    """A failure that nobody can look into or redrive is a loss."""
    result = Result(state=State.FAILED, error=Failure(code="engine_error", message="no"))
    record, events = record_of(FAILS, result, 1), [Event(seq=1, kind=EventKind.END, state=State.FAILED)]

    assert kinds(FAILS, record, events, has_letter=True) == []
    assert kinds(FAILS, record, events) == ["lost"]


def test_the_ledger_adds_up_or_says_so() -> None:
    """accepted = succeeded + failed + expired + cancelled, and the rest is lost."""
    record, events = answered(STREAMING)
    ledger = Ledger()
    for one, findings in (
        (record, []),
        (None, judge(STREAMING, ID, None, [], seen=None, simulated=True, has_letter=False)),
    ):
        ledger.enter(one, findings)

    assert (ledger.accepted, sum(ledger.states[state] for state in FINAL), ledger.count("lost")) == (2, 1, 1)
    assert ledger.balanced
    assert not ledger.good
    assert not Ledger(accepted=1).balanced
    assert len(events) == 2


def test_a_ledger_that_was_cut_within_a_line_is_read_and_written_on(tmp_path: Path) -> None:
    """A producer died while it wrote: what it had not finished was not told, the rest was."""
    path = tmp_path / "ledger"
    Writer(path).write([("A", 1, "id-1"), ("A", 2, "id-2")])
    with path.open("ab") as file:
        file.write(b"A 3 id")
    reader, told = Reader(path), Told()

    told.add(reader.news())
    Writer(path).write([("A", 4, "id-4"), ("R", 5, "too late\nfor it"), ("E", 6, "conflict")])
    told.add(reader.news())

    assert {number: text for number, text in told.accepted.items() if number != 3} == {1: "id-1", 2: "id-2", 4: "id-4"}
    assert told.refused == {5: "too late"}
    assert told.wrong == ["job 6: conflict"]


def test_one_number_accepted_under_two_ids_is_wrong(tmp_path: Path) -> None:
    """The key would have made two jobs."""
    told = Told()

    assert told.add([("A", 1, "id-1"), ("A", 1, "id-1")]) == ["id-1"]
    told.add([("A", 1, "id-2")])

    assert told.wrong
    assert Told.of(tmp_path / "nothing").accepted == {}

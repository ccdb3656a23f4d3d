"""What became of every accepted job, held against what was planned: the ledger, and whatever is wrong with it.

`judge` is a function of one job's plan, record, events and letters; it knows the answers. `Ledger` adds up.
Called by: run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from codeyard.cli.drill.plan import MAX_TOKENS, PlannedJob
from codeyard.shared.record import Event, EventKind, Record, State
from codeyard.worker.engines.simulated import simulated_completion

SHOWN = 20  # findings that a report spells out

LOST, DUPLICATED, WRONG, STREAM = "lost", "duplicated", "wrong", "stream"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be. `kind`: lost | duplicated | wrong | stream."""

    kind: str
    job: str
    text: str


@dataclass(slots=True)
class Ledger:
    """accepted = succeeded + failed + expired + cancelled + lost, in jobs."""

    accepted: int = 0
    refused: int = 0
    states: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    tokens: int = 0  # of all results
    regenerated_tokens: int = 0  # at most: what further attempts of jobs generated anew
    resumed: int = 0  # jobs that another worker took over and finished

    def count(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)

    @property
    def balanced(self) -> bool:
        return self.accepted == sum(self.states[state] for state in FINAL) + self.count(LOST)

    @property
    def good(self) -> bool:
        return self.balanced and not self.findings

    def enter(self, record: Record | None, findings: Sequence[Finding]) -> None:
        """One accepted job."""
        self.accepted += 1
        self.findings += findings
        if record is None or record.result is None:
            return
        self.states[record.state] += 1
        self.tokens += record.result.usage.completion_tokens
        if record.state is State.SUCCEEDED and record.attempt > 1:
            self.resumed += 1


FINAL = (State.SUCCEEDED, State.FAILED, State.EXPIRED, State.CANCELLED)


def judge(
    planned: PlannedJob,
    job_id: str,
    record: Record | None,
    events: Sequence[Event],
    *,
    seen: str | None,
    simulated: bool,
    has_letter: bool,
) -> list[Finding]:
    """Everything wrong with one accepted job.

    Args:
        seen: the result as somebody read it when the job had just become final; None: nobody did.
        simulated: the right answer is known; of another engine only that all accounts of it agree.
        has_letter: its message lies in the dead-letter queue.
    """
    if record is None:
        return [Finding(LOST, job_id, "no record")]
    if not record.state.final or record.result is None:
        return [Finding(LOST, job_id, f"still {record.state} (attempt {record.attempt})")]
    found = []
    result = record.result
    if seen is not None and seen != result.encode():
        found.append(Finding(DUPLICATED, job_id, "its result changed after it was final"))
    if sum(event.kind is EventKind.END for event in events) > 1:
        found.append(Finding(DUPLICATED, job_id, "its stream ends twice"))
    if record.state not in planned.expected:
        error = f": {result.error.code}: {result.error.message}" if result.error else ""
        wanted = " or ".join(sorted(planned.expected))
        found.append(Finding(WRONG, job_id, f"{record.state}{error}, expected {wanted}"))
    if record.job.prompt != planned.prompt:
        found.append(Finding(WRONG, job_id, "its prompt is not the one submitted"))
    if record.state is State.SUCCEEDED:
        found += _wrong_answer(planned, job_id, record, events, simulated=simulated)
    if record.state is State.FAILED and not has_letter:
        found.append(Finding(LOST, job_id, "failed without a dead letter"))
    return found + _wrong_stream(job_id, record, events)


def _wrong_answer(
    planned: PlannedJob, job_id: str, record: Record, events: Sequence[Event], *, simulated: bool
) -> list[Finding]:
    result = record.result
    assert result is not None
    found = []
    tokens = len(_token_ids(events))
    if simulated:
        text, token_ids, reason = simulated_completion(planned.prompt, MAX_TOKENS)
        if (result.text, result.finish_reason) != (text, reason):
            found.append(Finding(WRONG, job_id, "its text is not the prompt's answer"))
        tokens = len(token_ids)
    if result.usage.completion_tokens != tokens:
        count = result.usage.completion_tokens
        found.append(Finding(WRONG, job_id, f"usage counts {count} tokens, there are {tokens}"))
    if result.revision not in (None, record.job.revision):
        found.append(Finding(WRONG, job_id, f"made by revision {result.revision}, pinned to {record.job.revision}"))
    return found


def _wrong_stream(job_id: str, record: Record, events: Sequence[Event]) -> list[Finding]:
    """Dense numbers, `end` last, and for a success: the text is that of the result."""
    assert record.result is not None
    found = []
    if [event.seq for event in events] != list(range(1, record.last_seq + 1)):
        found.append(Finding(STREAM, job_id, "its stream has a gap or a repeat"))
    if not events or events[-1].kind is not EventKind.END or events[-1].state is not record.state:
        found.append(Finding(STREAM, job_id, "its stream does not end as the job did"))
    if record.state is State.SUCCEEDED and streamed_text(events) != record.result.text:
        found.append(Finding(STREAM, job_id, "its stream is not its result"))
    return found


def streamed_text(events: Sequence[Event]) -> str:
    """What a reader of the stream has at its end."""
    text = ""
    for event in events:
        text = "" if event.kind is EventKind.RESTARTED else text + event.text
    return text


def regenerated(record: Record, events: Sequence[Event]) -> int:
    """Tokens generated more than once, at most. A streaming job goes on from what is in its stream, so only what
    a `restarted` event threw away counts, and the last piece that a killed worker had not written yet does not
    appear; of another job each further attempt began anew."""
    if record.result is None:
        return 0
    if record.job.stream:
        thrown_away, now = 0, 0
        for event in events:
            if event.kind is EventKind.RESTARTED:
                thrown_away, now = thrown_away + now, 0
            now += len(event.token_ids)
        return thrown_away
    return max(0, record.attempt - 1) * record.result.usage.completion_tokens


def _token_ids(events: Sequence[Event]) -> list[int]:
    tokens: list[int] = []
    for event in events:
        tokens = [] if event.kind is EventKind.RESTARTED else [*tokens, *event.token_ids]
    return tokens

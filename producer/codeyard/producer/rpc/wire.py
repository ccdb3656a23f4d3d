"""What a caller sees of a job, as messages and back: status, result, events.

Called by: rpc.server, rpc.inference (to messages), rpc.client (from messages). Values pass unchanged, absent
ones stay absent: what came over gRPC equals what came over HTTP.
"""

from collections.abc import Iterable
from typing import Any

from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.asking import LANES
from codeyard.shared.chat import TokenLogprob, ToolCall, ToolCallDelta
from codeyard.shared.record import Event, EventKind, Failure, JobStatus, Result, State, Usage
from codeyard.shared.store.port import CancelVerdict

STATES: dict[State, pb.State] = {state: getattr(pb, f"STATE_{state.name}") for state in State}
EVENT_KINDS: dict[EventKind, pb.EventKind] = {kind: getattr(pb, f"EVENT_KIND_{kind.name}") for kind in EventKind}
OUTCOMES: dict[CancelVerdict, pb.CancelResponse.Outcome] = {
    verdict: getattr(pb.CancelResponse, f"OUTCOME_{verdict.name}")
    for verdict in CancelVerdict
    if verdict is not CancelVerdict.MISSING  # that is JobNotFound by then
}

_LANE_OF = {number: lane for lane, number in LANES.items()}
_STATE_OF = {number: state for state, number in STATES.items()}
_KIND_OF = {number: kind for kind, number in EVENT_KINDS.items()}
OUTCOME_OF = {number: verdict for verdict, number in OUTCOMES.items()}


# To messages ---------------------------------------------------------------------------------------


def status_message(status: JobStatus) -> pb.JobStatus:
    return pb.JobStatus(
        id=status.id,
        state=STATES[status.state],
        lane=LANES[status.lane],
        model=status.model,
        revision=status.revision,
        tenant=status.tenant,
        key=status.key,
        attempt=status.attempt,
        created_at=status.created_at,
        started_at=status.started_at,
        finished_at=status.finished_at,
        deadline_at=status.deadline_at,
        cancel_requested=status.cancel_requested,
        last_seq=status.last_seq,
        result=result_message(status.result) if status.result is not None else None,
        asked_model=status.asked_model,
        callback=status.callback,
    )


def result_message(result: Result, *, streamed: bool = False) -> pb.Result:
    """`streamed`: without what the reader has had in pieces."""
    return pb.Result(
        state=STATES[result.state],
        text="" if streamed else result.text,
        content=None if streamed else result.content,
        tool_calls=[pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in result.tool_calls],
        logprobs=() if streamed else logprob_messages(result.logprobs),
        finish_reason=result.finish_reason,
        stop=result.stop,
        usage=pb.Usage(prompt_tokens=result.usage.prompt_tokens, completion_tokens=result.usage.completion_tokens),
        error=pb.Failure(code=result.error.code, message=result.error.message) if result.error is not None else None,
        engine=result.engine,
        revision=result.revision,
        batch_size=result.batch_size,
        first_token_s=result.first_token_s,
        generate_s=result.generate_s,
    )


def event_message(event: Event) -> pb.Event:
    return pb.Event(
        seq=event.seq,
        kind=EVENT_KINDS[event.kind],
        text=event.text,
        token_ids=event.token_ids,
        content=event.content,
        tool_calls=delta_messages(event.tool_calls),
        logprobs=logprob_messages(event.logprobs),
        state=STATES[event.state] if event.state is not None else None,
        revision=event.revision,
    )


def delta_messages(deltas: Iterable[ToolCallDelta]) -> list[pb.ToolCallDelta]:
    return [
        pb.ToolCallDelta(index=delta.index, id=delta.id, name=delta.name, arguments=delta.arguments) for delta in deltas
    ]


def logprob_messages(logprobs: Iterable[TokenLogprob]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(token_id=one.token_id, text=one.text, logprob=one.logprob, top=logprob_messages(one.top))
        for one in logprobs
    ]


# From messages -------------------------------------------------------------------------------------


def status_of(message: pb.JobStatus) -> JobStatus:
    return JobStatus(
        id=message.id,
        state=_STATE_OF[message.state],
        lane=_LANE_OF[message.lane],
        model=message.model,
        revision=message.revision,
        tenant=message.tenant,
        key=message.key,
        attempt=message.attempt,
        created_at=message.created_at,
        **_given(message, "started_at", "finished_at", "asked_model", "callback"),
        deadline_at=message.deadline_at,
        cancel_requested=message.cancel_requested,
        last_seq=message.last_seq,
        result=result_of(message.result) if message.HasField("result") else None,
    )


def result_of(message: pb.Result) -> Result:
    failed = message.HasField("error")
    return Result(
        state=_STATE_OF[message.state],
        text=message.text,
        tool_calls=tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls),
        logprobs=logprobs_of(message.logprobs),
        usage=Usage(prompt_tokens=message.usage.prompt_tokens, completion_tokens=message.usage.completion_tokens),
        error=Failure(code=message.error.code, message=message.error.message) if failed else None,
        **_given(
            message,
            *("content", "finish_reason", "stop", "engine", "revision", "batch_size", "first_token_s", "generate_s"),
        ),
    )


def event_of(message: pb.Event) -> Event:
    return Event(
        seq=message.seq,
        kind=_KIND_OF[message.kind],
        text=message.text,
        token_ids=tuple(message.token_ids),
        tool_calls=deltas_of(message.tool_calls),
        logprobs=logprobs_of(message.logprobs),
        state=_STATE_OF.get(message.state),
        **_given(message, "content", "revision"),
    )


def deltas_of(messages: Iterable[pb.ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    return tuple(
        ToolCallDelta(index=one.index, arguments=one.arguments, **_given(one, "id", "name")) for one in messages
    )


def logprobs_of(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id=one.token_id, text=one.text, logprob=one.logprob, top=logprobs_of(one.top))
        for one in messages
    )


def _given(message: Any, *names: str) -> dict[str, Any]:
    """These optional fields, None where they are absent."""
    return {name: getattr(message, name) if message.HasField(name) else None for name in names}

"""Jobs, results and events as messages and back: nothing changes on the way, and nothing that comes can break it."""

import contextlib
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.requests import SubmitBody
from codeyard.producer.rpc import asking, wire
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.server import _asked
from codeyard.producer.submission import Submission
from codeyard.shared.chat import Chat, TokenLogprob, ToolCall, ToolCallDelta
from codeyard.shared.errors import InvalidJob
from codeyard.shared.job import Job, Lane, Sampling, new_job_id
from codeyard.shared.record import Callback, Event, EventKind, Failure, JobStatus, Result, State, Usage

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
names = st.from_regex(r"[a-zA-Z0-9_.:/-]{1,20}", fullmatch=True)
plain = st.from_regex(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,20}", fullmatch=True)
floats = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(min_value=0, max_value=1e10)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | floats | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(text, json_values, max_size=3)

output_formats = (
    st.builds(lambda schema: {"type": "json_schema", "json_schema": schema}, json_objects)
    | st.builds(lambda regex: {"type": "regex", "regex": regex}, some_text)
    | st.builds(lambda choice: {"type": "choice", "choice": choice}, st.lists(text, min_size=1, max_size=3))
)
samplings = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, 131_072),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(1, 2**31 - 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 10, exclude_min=True),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "seed": st.integers(0, 2**63 - 1),
        "stop": st.lists(some_text, max_size=3),
        "logprobs": st.integers(0, 20),
        "output_format": output_formats,
    },
).map(Sampling.model_validate)


@st.composite
def turns(draw: st.DrawFn) -> dict[str, Any]:
    role = draw(st.sampled_from(["system", "user", "assistant", "tool"]))
    turn: dict[str, Any] = {"role": role, "content": draw(text), "name": draw(st.none() | text)}
    if role == "assistant":
        calls = st.fixed_dictionaries({"id": some_text, "name": names, "arguments": text})
        turn["tool_calls"] = draw(st.lists(calls, max_size=2))
        turn["content"] = draw(st.none() | text) if turn["tool_calls"] else turn["content"]
    if role == "tool":
        turn["tool_call_id"] = draw(some_text)
    return turn


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    tools = st.fixed_dictionaries({"name": names, "description": st.none() | text, "parameters": json_objects})
    offered = draw(st.lists(tools, max_size=3, unique_by=lambda tool: str(tool["name"])))
    choices = ["auto", "none", *(["required", {"name": offered[0]["name"]}] if offered else [])]
    return Chat.model_validate(
        {
            "messages": draw(st.lists(turns(), min_size=1, max_size=4)),
            "tools": offered,
            "tool_choice": draw(st.sampled_from(choices)),
            "parallel_tool_calls": draw(st.booleans()),
        }
    )


submissions = st.builds(
    Submission,
    prompt=some_text | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple) | chats(),
    model=plain,
    lane=st.sampled_from(Lane),
    idempotency_key=st.none() | plain,
    sampling=samplings,
    stream=st.booleans(),
    timeout_s=st.floats(0, 604_800, exclude_min=True),
    metadata=json_objects,
    callback_url=st.none() | st.just("https://ci.example/hooks?job=1"),
    share=st.booleans(),
)


FIELDS = ("model", "prompt", "lane", "stream", "timeout_s", "metadata", "callback_url")


def job_of(asked: Any, key: str | None) -> Job:
    return Job.build(
        id=new_job_id(),
        key=key or "none",
        revision="r",
        **{name: getattr(asked, name) for name in FIELDS},
        sampling=asked.sampling.model_dump(),
    )


@given(submissions)
@settings(max_examples=300, deadline=None)
def test_a_submission_arrives_as_it_was_sent(asked: Submission) -> None:
    """To the last digit and in the order of its keys: it is the same job over HTTP, with the same digest."""
    sent = pb.Submission.FromString(asking.message_of(asked).SerializeToString())

    received, key = _asked(sent)

    assert (key, received.share) == (asked.idempotency_key, asked.share)
    assert job_of(received, key).model_dump(exclude={"id"}) == job_of(asked, key).model_dump(exclude={"id"})
    assert job_of(received, key).digest() == job_of(asked, key).digest()
    if isinstance(asked.prompt, Chat):  # what the template writes follows the order of keys
        assert isinstance(received.prompt, Chat)
        assert received.prompt.model_dump_json() == asked.prompt.model_dump_json()


def test_what_is_left_out_is_what_is_left_out_over_http() -> None:
    """The defaults are in one place."""
    received, key = _asked(pb.Submission(text="x", model="tiny"))

    assert received == SubmitBody.model_validate({"prompt": "x", "model": "tiny"})
    assert key is None


@pytest.mark.parametrize(
    "message, field",
    [
        (pb.Submission(model="m"), "prompt"),
        (pb.Submission(model="m", text=""), "prompt"),
        (pb.Submission(model="m", token_ids=pb.TokenIds()), "prompt"),
        (pb.Submission(model="m", token_ids=pb.TokenIds(ids=[2**31])), "prompt"),
        (pb.Submission(text="x"), "model"),
        (pb.Submission(model="a\nb", text="x"), "model"),
        (pb.Submission(model="m", text="x", lane=99), "lane"),  # type: ignore[arg-type]  # from a newer client
        (pb.Submission(model="m", text="x", key=""), "key"),
        (pb.Submission(model="m", text="x", key="a\r\nb"), "key"),
        (pb.Submission(model="m", text="x", key="x" * 201), "key"),
        (pb.Submission(model="m", text="x", timeout_s=0), "timeout_s"),
        (pb.Submission(model="m", text="x", timeout_s=float("nan")), "timeout_s"),
        (pb.Submission(model="m", text="x", timeout_s=float("inf")), "timeout_s"),
        (pb.Submission(model="m", text="x", metadata_json="{"), "metadata_json"),
        (pb.Submission(model="m", text="x", metadata_json="[]"), "metadata_json"),
        (pb.Submission(model="m", text="x", metadata_json='{"a": NaN}'), "metadata_json"),
        (pb.Submission(model="m", text="x", metadata_json='{"a": 1e999}'), "metadata"),
        (pb.Submission(model="m", text="x", metadata_json="[" * 100_000), "metadata_json"),
        (pb.Submission(model="m", text="x", sampling=pb.Sampling(temperature=float("nan"))), "sampling.temperature"),
        (pb.Submission(model="m", text="x", sampling=pb.Sampling(top_p=0)), "sampling.top_p"),
        (pb.Submission(model="m", text="x", sampling=pb.Sampling(seed=2**63)), "sampling.seed"),
        (pb.Submission(model="m", text="x", sampling=pb.Sampling(stop=[""])), "sampling.stop.0"),
        (
            pb.Submission(model="m", text="x", sampling=pb.Sampling(output_format=pb.OutputFormat())),
            "sampling.output_format",
        ),
        (pb.Submission(model="m", chat=pb.Chat()), "prompt.messages"),
        (pb.Submission(model="m", chat=pb.Chat(messages=[pb.Message(content="x")])), "prompt.messages.0.role"),
        (
            pb.Submission(model="m", chat=pb.Chat(messages=[pb.Message(role=pb.ROLE_USER)])),
            "prompt.messages.0",
        ),
        (
            pb.Submission(
                model="m",
                chat=pb.Chat(
                    messages=[pb.Message(role=pb.ROLE_USER, content="x")],
                    tools=[pb.Tool(name="f", parameters_json="[]")],
                ),
            ),
            "prompt.tools.0.parameters_json",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_field(message: pb.Submission, field: str) -> None:
    """A caller mends what it can find."""
    with pytest.raises((InvalidJob, Refused)) as refused:
        _asked(message)

    error = refused.value
    assert (error.members["field"] if isinstance(error, Refused) else getattr(error, "field", "")) == field


@given(st.binary(max_size=300))
@settings(max_examples=1_000, deadline=None)
def test_bytes_that_are_a_message_by_chance_are_a_job_or_refused(sent: bytes) -> None:
    """Whatever comes, nothing else is raised."""
    with contextlib.suppress(DecodeError, InvalidJob, Refused):
        received, _ = _asked(pb.Submission.FromString(sent))
        assert isinstance(received, SubmitBody)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lane": "urgent"},
        {"sampling": {"temperatur": 1}},
        {"sampling": {"max_tokens": "many"}},
        {"prompt": [-1]},
        {"prompt": ["a"]},
        {"prompt": 7},
        {"metadata": {"a": {1}}},
        {"metadata": {"a": float("nan")}},
    ],
)
def test_what_cannot_be_a_message_is_refused_before_it_is_sent(wrong: dict[str, Any]) -> None:
    """In the error that the other side would have had."""
    with pytest.raises(InvalidJob):
        asking.message_of(Submission(**{"prompt": "x", **wrong}))


# Results and events --------------------------------------------------------------------------------

logprobs = st.builds(
    TokenLogprob,
    token_id=st.integers(0, 2**31 - 1),
    text=text,
    logprob=floats,
    top=st.lists(st.builds(TokenLogprob, token_id=st.integers(0, 9), text=text, logprob=floats), max_size=2).map(tuple),
)
optional_text = st.none() | text
results = st.builds(
    Result,
    state=st.sampled_from(State),
    text=text,
    content=optional_text,
    tool_calls=st.lists(st.builds(ToolCall, id=some_text, name=names, arguments=text), max_size=2).map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=optional_text,
    usage=st.builds(Usage, prompt_tokens=st.integers(0, 2**40), completion_tokens=st.integers(0, 2**40)),
    error=st.none() | st.builds(Failure, code=text, message=text),
    stop=optional_text,
    engine=optional_text,
    revision=optional_text,
    batch_size=st.none() | st.integers(0, 10_000),
    first_token_s=st.none() | seconds,
    generate_s=st.none() | seconds,
)
statuses = st.builds(
    JobStatus,
    id=text,
    state=st.sampled_from(State),
    lane=st.sampled_from(Lane),
    model=text,
    revision=text,
    tenant=text,
    key=text,
    attempt=st.integers(0, 100),
    created_at=seconds,
    started_at=st.none() | seconds,
    finished_at=st.none() | seconds,
    deadline_at=seconds,
    cancel_requested=st.booleans(),
    last_seq=st.integers(0, 2**40),
    result=st.none() | results,
    asked_model=optional_text,
    callback=st.none() | st.sampled_from([one for one in Callback if one]),
)
events = st.builds(
    Event,
    seq=st.integers(1, 2**40),
    kind=st.sampled_from(EventKind),
    text=text,
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    content=optional_text,
    tool_calls=st.lists(
        st.builds(ToolCallDelta, index=st.integers(0, 9), id=optional_text, name=optional_text, arguments=text),
        max_size=2,
    ).map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    state=st.none() | st.sampled_from(State),
    revision=optional_text,
)


@given(statuses)
@settings(max_examples=200, deadline=None)
def test_a_status_and_its_result_arrive_as_they_are(status: JobStatus) -> None:
    """What is absent stays absent, what is 0 stays 0."""
    sent = wire.status_message(status).SerializeToString()

    assert wire.status_of(pb.JobStatus.FromString(sent)) == status


@given(events)
@settings(max_examples=200, deadline=None)
def test_an_event_arrives_as_it_is(event: Event) -> None:
    """A reader over gRPC sees what a reader over HTTP sees."""
    sent = wire.event_message(event).SerializeToString()

    assert wire.event_of(pb.Event.FromString(sent)) == event

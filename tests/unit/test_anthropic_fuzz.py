"""Whatever is sent: a job that can be submitted, or a refusal. Nothing else comes out."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeyard.producer.gateway.anthropic.body import BLOCK_TYPES
from codeyard.producer.gateway.anthropic.convert import Asked, read_count, read_message
from codeyard.producer.gateway.anthropic.errors import refuse
from codeyard.producer.gateway.anthropic.legacy import read_completion
from codeyard.producer.gateway.anthropic.parameters import COMPLETE, MESSAGES
from codeyard.producer.gateway.problems import Refused
from codeyard.shared.errors import InvalidJob
from codeyard.shared.job import Job, job_id_for_key

NAMES = [
    *(parameter.name for parameter in (*MESSAGES, *COMPLETE)),
    *("type", "role", "content", "text", "id", "name", "input", "tool_use_id", "is_error", "input_schema"),
    *("description", "schema", "format", "effort", "edits", "user_id", "disable_parallel_tool_use", "strict"),
]
WORDS = [
    *BLOCK_TYPES,
    *("user", "assistant", "system", "auto", "any", "tool", "none", "custom", "json_schema", "image", "disabled"),
    *("\n\nHuman: a\n\nAssistant:", "", "tiny"),
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 9, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308])
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
)
TREES: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)
VALID: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 5,
    "max_tokens_to_sample": 5,
    "prompt": "\n\nHuman: a\n\nAssistant:",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1]}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [], "is_error": True}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "f"},
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
}
ONLY = {
    read_message: {"max_tokens_to_sample", "prompt"},
    read_count: {"max_tokens_to_sample", "prompt"},
    read_completion: {"max_tokens", "messages", "tools", "tool_choice", "output_config"},
}
READERS: list[Any] = [read_message, read_count, read_completion]


@st.composite
def nearly_valid(draw: st.DrawFn) -> dict[str, Any]:
    """A good body with one thing replaced, somewhere inside."""
    body: dict[str, Any] = json.loads(json.dumps(VALID))
    at: Any = body
    while True:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not (isinstance(at[key], dict | list) and at[key] and draw(st.booleans())):
            break
        at = at[key]
    at[key] = draw(TREES)
    return body


def outcome(read: Callable[[bytes], Asked], body: bytes) -> Asked | None:
    """What is read can be submitted; what is refused can be said."""
    try:
        asked = read(body)
    except Refused as refused:
        answer = refuse(refused)
        assert 400 <= answer.status_code < 500
        assert json.loads(bytes(answer.body))["error"]["message"]
        return None
    try:
        job = Job.build(
            id=job_id_for_key("default", "k"),
            key="k",
            model=asked.model,
            revision="r",
            prompt=asked.prompt,
            sampling=asked.sampling,
            metadata=asked.metadata or {},
        )
    except InvalidJob:
        return asked
    assert Job.decode(job.encode()).digest() == job.digest()
    return asked


@pytest.mark.parametrize("read", READERS)
def test_the_good_body_is_good(read: Any) -> None:
    """Else the others would only ever see refusals."""
    body = {name: value for name, value in VALID.items() if name not in ONLY[read]}

    assert outcome(read, json.dumps(body).encode()) is not None


@pytest.mark.parametrize("read", READERS)
@settings(max_examples=400, deadline=None)
@given(body=nearly_valid())
def test_a_good_body_with_one_thing_changed(read: Any, body: dict[str, Any]) -> None:
    """The mistakes of real programs."""
    outcome(read, json.dumps({name: value for name, value in body.items() if name not in ONLY[read]}).encode())


@pytest.mark.parametrize("read", READERS)
@settings(max_examples=150, deadline=None)
@given(body=TREES)
def test_any_json_is_answered_or_refused(read: Any, body: Any) -> None:
    """Names and words that mean something, anywhere."""
    outcome(read, json.dumps(body).encode())


@pytest.mark.parametrize("read", READERS)
@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=50))
def test_any_bytes_are_answered_or_refused(read: Any, body: bytes) -> None:
    """Not JSON, mostly."""
    outcome(read, body)

"""The committed stubs are what the .proto says; the .proto is what the code can carry."""

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from pydantic import BaseModel

from codeyard.producer.gateway.requests import SubmitBody
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.generate import ROOT, generate
from codeyard.producer.submission import Submission
from codeyard.shared.chat import Chat, Message, TokenLogprob, Tool, ToolCall, ToolCallDelta
from codeyard.shared.job import Sampling
from codeyard.shared.record import Event, Failure, JobStatus, Result, Usage

STUBS = ("codeyard_pb2.py", "codeyard_pb2.pyi", "codeyard_pb2_grpc.py")
PACKAGE = Path("codeyard") / "producer" / "rpc"


def test_the_committed_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    """Whoever changes one and forgets the other would serve a protocol that is written nowhere."""
    generate(tmp_path)

    for name in STUBS:
        committed = (ROOT / PACKAGE / name).read_text()
        assert committed == (tmp_path / PACKAGE / name).read_text(), f"{name}: run generate.py"


def test_the_extra_allows_no_version_that_the_stubs_refuse() -> None:
    """They check at import which runtime they run on, and end the process on an older one."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    needed = project["optional-dependencies"]["grpc"]
    made_by = (ROOT / PACKAGE / "codeyard_pb2.py").read_text().partition("Protobuf Python Version: ")[2].split()[0]
    grpc_made_by = (ROOT / PACKAGE / "codeyard_pb2_grpc.py").read_text().partition("VERSION = '")[2].partition("'")[0]

    lower = {one.partition(">=")[0]: one.partition(">=")[2].partition(",")[0] for one in needed}
    assert lower["protobuf"] == made_by
    assert lower["grpcio"] == grpc_made_by


@pytest.mark.parametrize(
    "kind, message, otherwise",
    [
        (JobStatus, pb.JobStatus, {}),
        (Result, pb.Result, {"v": None}),
        (Usage, pb.Usage, {}),
        (Failure, pb.Failure, {}),
        (Event, pb.Event, {"v": None}),
        (ToolCallDelta, pb.ToolCallDelta, {}),
        (TokenLogprob, pb.TokenLogprob, {}),
        (Sampling, pb.Sampling, {}),
        (Chat, pb.Chat, {"tool_choice": "tool_mode"}),
        (Message, pb.Message, {}),
        (Tool, pb.Tool, {"parameters": "parameters_json"}),
        (ToolCall, pb.ToolCall, {}),
    ],
)
def test_every_field_of_ours_has_one_in_the_proto(
    kind: type[BaseModel], message: type, otherwise: dict[str, str | None]
) -> None:
    """A field that is added to a job or a result must not be lost over gRPC alone."""
    fields = message.DESCRIPTOR.fields_by_name  # type: ignore[attr-defined]  # of every generated message
    for name in kind.model_fields:
        if (expected := otherwise.get(name, name)) is not None:
            assert expected in fields, f"{kind.__name__}.{name}"


def test_every_field_of_a_submission_has_one_in_the_proto() -> None:
    """But for what is not the caller's to say, or travels as metadata."""
    fields = set(pb.Submission.DESCRIPTOR.fields_by_name)
    renamed = {"prompt": "text", "idempotency_key": "key", "metadata": "metadata_json"}
    elsewhere = {"tenant", "traceparent", "job_id", "asked_model"}
    for about in dataclasses.fields(Submission):
        if about.name not in elsewhere:
            assert renamed.get(about.name, about.name) in fields, about.name
    assert {renamed.get(name, name) for name in SubmitBody.model_fields} <= fields


def test_what_may_be_absent_is_told_from_what_is_zero() -> None:
    """proto3 forgets which it was, but for fields that are marked."""
    for kind, message in ((Sampling, pb.Sampling), (Result, pb.Result), (JobStatus, pb.JobStatus), (Event, pb.Event)):
        fields = message.DESCRIPTOR.fields_by_name
        for name, about in kind.model_fields.items():
            if about.default is None and fields[name].type != FieldDescriptor.TYPE_ENUM:
                assert fields[name].has_presence, f"{kind.__name__}.{name}"


@pytest.mark.parametrize("module", ["client", "link", "client_inference", "asking", "wire", "refusals"])
def test_the_client_needs_no_web_framework(module: str) -> None:
    """A program that only calls gateways installs codeyard[grpc], and not what gateways are made of."""
    code = f"import codeyard.producer.rpc.{module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert not {"fastapi", "starlette", "uvicorn", "httpx", "jwt"} & set(loaded.stdout.split())


def test_a_gateway_without_grpc_loads_none_of_it() -> None:
    """It is an extra, and half a second."""
    code = "import codeyard.producer.gateway.serve, sys; print(*{name.partition('.')[0] for name in sys.modules})"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert not {"grpc", "google", "grpc_health", "grpc_reflection"} & set(loaded.stdout.split())

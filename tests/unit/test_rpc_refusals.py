"""Refusals as gRPC statuses: one table, the same kinds as over HTTP, and our errors again at the caller's side."""

from pathlib import Path

import grpc
import pytest
from support.asgi import JOB_ID, MadeUpJobs
from support.rpc import service_over, status_and_kind, trailing

from codeyard.producer.gateway.problems import KIND_OF, KINDS, kind_of
from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.producer.rpc.calls import told_of
from codeyard.producer.rpc.client import RpcClient
from codeyard.producer.rpc.refusals import (
    CODES,
    ERROR_OF_KIND,
    GatewayUnavailable,
    Told,
    code_of,
    told_in,
)
from codeyard.shared.errors import (
    AuthUnavailable,
    BlobMissing,
    BrokerUnavailable,
    DeadlineTooSoon,
    FleetError,
    Forbidden,
    IdempotencyConflict,
    InvalidJob,
    JobNotFound,
    JobTooLarge,
    LimitReached,
    ModelUnavailable,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    RolloutRefused,
    StorageQuotaExceeded,
    StoreUnavailable,
    Unauthorized,
    UnknownModel,
)
from codeyard.shared.limits.standing import Meter, Standing

Code = grpc.StatusCode
DOCS = Path(__file__).parents[2] / "docs"
SUBMIT = pb.SubmitRequest(submission=pb.Submission(text="x", model="tiny"))
STANDING = Standing(requests=Meter(limit=10, remaining=0, reset_s=3.0))

# Of every error that a caller can meet: its status, and what the caller may ask it for.
ERRORS: list[tuple[FleetError, grpc.StatusCode, tuple[str, ...]]] = [
    (InvalidJob("too hot", field="sampling.temperature"), Code.INVALID_ARGUMENT, ("field",)),
    (JobTooLarge("too large", field="prompt"), Code.INVALID_ARGUMENT, ("field",)),
    (IdempotencyConflict(JOB_ID), Code.ALREADY_EXISTS, ("job_id",)),
    (QueueFull("q", retry_after_s=4.0), Code.RESOURCE_EXHAUSTED, ("retry_after_s",)),
    (
        DeadlineTooSoon(estimated_start_s=9.0, timeout_s=4.0),
        Code.RESOURCE_EXHAUSTED,
        ("estimated_start_s", "retry_after_s"),
    ),
    (UnknownModel("tiny"), Code.NOT_FOUND, ()),
    (JobNotFound(JOB_ID), Code.NOT_FOUND, ("job_id",)),
    (Unauthorized("no token"), Code.UNAUTHENTICATED, ()),
    (Forbidden("not yours"), Code.PERMISSION_DENIED, ()),
    (
        RateLimited("too fast", limit="requests", retry_after_s=3.0, standing=STANDING),
        Code.RESOURCE_EXHAUSTED,
        ("limit", "retry_after_s"),
    ),
    (
        QuotaExceeded("too many", limit="jobs", retry_after_s=2.0, standing=Standing()),
        Code.RESOURCE_EXHAUSTED,
        ("limit", "retry_after_s"),
    ),
    (
        LimitReached("too much", limit="tokens", retry_after_s=2.0, standing=Standing()),
        Code.RESOURCE_EXHAUSTED,
        ("limit", "retry_after_s"),
    ),
    (AuthUnavailable("no keys yet"), Code.UNAVAILABLE, ()),
    (ModelUnavailable("tiny", "its workers fail", retry_after_s=5.0), Code.UNAVAILABLE, ("retry_after_s",)),
    (
        BrokerUnavailable("no confirm", job_id=JOB_ID, maybe_accepted=True),
        Code.UNAVAILABLE,
        ("job_id", "maybe_accepted"),
    ),
    (StoreUnavailable("away"), Code.UNAVAILABLE, ("job_id", "maybe_accepted")),
    (StorageQuotaExceeded("full"), Code.RESOURCE_EXHAUSTED, ()),
    (BlobMissing("0" * 64), Code.NOT_FOUND, ()),
    (RolloutRefused("not there"), Code.FAILED_PRECONDITION, ()),
]


def test_every_error_that_a_caller_can_meet_is_in_this_list() -> None:
    """A new one is tried below, or this fails."""
    assert {type(error) for error, _, _ in ERRORS} == set(KIND_OF)


@pytest.mark.parametrize("error, code, known", ERRORS, ids=lambda one: type(one).__name__)
async def test_each_error_has_its_status_and_is_itself_again_at_the_caller(
    error: FleetError, code: grpc.StatusCode, known: tuple[str, ...]
) -> None:
    """With its words and with what it knows; programs decide by `codeyard-kind`, when to come back by `retry-after`."""
    async with service_over(MadeUpJobs(error)) as service:
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await service.stub.Submit(SUBMIT)
        async with RpcClient(service.address, timeout_s=1.0) as client:
            with pytest.raises(FleetError) as again:
                await client.submit("x", model="tiny")

    assert service.counted("Submit", code.name) >= 2  # counted when it is over, which the caller knows sooner
    kind = kind_of(error)
    assert status_and_kind(raw.value) == (code, kind)
    assert raw.value.details() == (error.reason if isinstance(error, InvalidJob) else str(error))
    assert type(again.value) is ERROR_OF_KIND[kind]
    assert isinstance(error, type(again.value)) or isinstance(again.value, type(error))
    assert str(again.value) == raw.value.details()
    assert {name: getattr(again.value, name) for name in known} == {name: getattr(error, name) for name in known}
    told = dict(trailing(raw.value))
    if code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE) and kind != "storage-full":
        assert float(str(told["retry-after"])) == (getattr(error, "retry_after_s", None) or 2.0)
    else:
        assert "retry-after" not in told
    assert ("x-ratelimit-remaining-requests" in told) == (isinstance(error, RateLimited))


@pytest.mark.parametrize("error, code, known", ERRORS, ids=lambda one: type(one).__name__)
def test_the_refusal_of_one_request_says_the_same_as_that_of_a_call(
    error: FleetError, code: grpc.StatusCode, known: tuple[str, ...]
) -> None:
    """On a stream of many a refusal is a message."""
    told = told_of(error)
    assert told is not None
    sent = pb.Refusal.FromString(told.refusal().SerializeToString())

    again = told_in(sent, getattr(error, "job_id", None) or "").error()

    assert (sent.code, sent.kind) == (code.value[0], kind_of(error))
    assert type(again) is ERROR_OF_KIND[kind_of(error)]
    for name in set(known) - {"limit", "estimated_start_s"}:
        assert getattr(again, name) == getattr(error, name)


def test_every_kind_of_refusal_has_a_status() -> None:
    """A status of HTTP that the table does not know would be an error in place of an answer."""
    for kind, about in KINDS.items():
        assert code_of(kind, about.status) is not Code.OK
    assert set(KIND_OF.values()) <= set(ERROR_OF_KIND)
    assert all(code in Code for code in CODES.values())


def test_the_page_has_the_table() -> None:
    """docs/grpc.md is where people look up what a status means."""
    page = (DOCS / "grpc.md").read_text()
    for kind in {*KIND_OF.values(), "invalid-parameter", "not-ready", "internal-error"}:
        code = code_of(kind, KINDS[kind].status).name
        row = next((line for line in page.splitlines() if line.startswith("|") and f"`{kind}`" in line), "")
        assert f"`{code}`" in row, f"docs/grpc.md: {kind} is {code}"


@pytest.mark.parametrize("error", [RuntimeError("secret detail"), FleetError("submission broke off: secret detail")])
async def test_what_nobody_expected_is_internal_without_its_cause_logged_once_under_its_number(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """As over HTTP: a number for the caller, the traceback for the person on call."""
    async with service_over(MadeUpJobs(error)) as service:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.stub.Get(pb.GetRequest(job_id=JOB_ID))

    assert status_and_kind(refused.value) == (Code.INTERNAL, "internal-error")
    assert "secret" not in (refused.value.details() or "")
    [logged] = [record for record in caplog.records if record.exc_info]
    assert logged.incident in (refused.value.details() or "")  # type: ignore[attr-defined]  # an extra


@pytest.mark.parametrize(
    "code, message, kind",
    [
        (Code.UNAVAILABLE, "failed to connect", GatewayUnavailable),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded", GatewayUnavailable),
        (Code.UNAUTHENTICATED, "says a proxy", Unauthorized),
        (Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 8)", JobTooLarge),
        (Code.UNIMPLEMENTED, "no such method", FleetError),
    ],
)
def test_what_grpc_itself_says_is_an_error_of_ours_too(
    code: grpc.StatusCode, message: str, kind: type[FleetError]
) -> None:
    """A caller catches one root."""
    assert type(Told(code, "", message).error()) is kind


def test_metadata_is_printable_whatever_a_field_is_called() -> None:
    """Anything else would make the refusal itself an error, or a header of its own."""
    told = Told(Code.INVALID_ARGUMENT, "invalid-job", "no", members={"field": "a\r\nx-evil: 1\u00e9" + "x" * 999})

    field = dict(told.metadata())["codeyard-field"]

    assert field.startswith("a??x-evil: 1?xxx")
    assert len(field) == 200

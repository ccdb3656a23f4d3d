"""Which errors of a submission a batch waits out, and which are its item's."""

import pytest

from codeyard.producer.gateway.batches.answers import AGAIN_S, Later, refusal_or_later
from codeyard.producer.gateway.batches.items import Item
from codeyard.producer.gateway.batches.record import Counts, Outcome
from codeyard.producer.gateway.openai.convert import Wanted
from codeyard.shared import errors
from codeyard.shared.errors import FleetError
from codeyard.shared.job import Sampling
from codeyard.shared.limits.standing import Standing


@pytest.mark.parametrize(
    "error, later",
    [
        (errors.QueueFull("q", retry_after_s=5), Later(5, room=True)),
        (errors.QuotaExceeded("jobs", limit="jobs", retry_after_s=2, standing=Standing()), Later(2, room=True)),
        (errors.RateLimited("requests", limit="requests", retry_after_s=3, standing=Standing()), Later(3)),
        (errors.DeadlineTooSoon(estimated_start_s=20, timeout_s=5), Later(15)),
        (errors.BrokerUnavailable("gone", maybe_accepted=True), None),
        (errors.StoreUnavailable("gone"), None),
        (errors.StorageQuotaExceeded("acme"), Later(AGAIN_S)),
        (FleetError("submission broke off"), Later(AGAIN_S, broken=True)),
    ],
)
def test_what_may_be_otherwise_in_a_while_is_waited_for(error: FleetError, later: Later | None) -> None:
    """Nobody looks after a batch at night."""
    found = refusal_or_later(error)

    assert found == later if later is not None else isinstance(found, Later)


@pytest.mark.parametrize(
    "error, code, param",
    [
        (errors.UnknownModel("nobody"), "model_not_found", "model"),
        (errors.InvalidJob("too odd", field="prompt"), "invalid_job", "prompt"),
        (errors.JobTooLarge("too long", field="prompt"), "too_large", "prompt"),
        (errors.IdempotencyConflict("id"), "idempotency_conflict", None),
    ],
)
def test_what_can_never_succeed_is_the_items_error(error: FleetError, code: str, param: str | None) -> None:
    """And holds up nobody behind it."""
    refusal = refusal_or_later(error)

    assert not isinstance(refusal, Later)
    assert (refusal.code, refusal.param) == (code, param)


def item(custom_id: str, num_choices: int = 1) -> Item:
    return Item(1, custom_id, "starter", (Wanted("def f(", Sampling()),) * num_choices, None)


def test_keys_of_items_are_no_callers_own_and_never_those_of_another_item() -> None:
    """An Idempotency-Key is ASCII; a choice's key is not another item's."""
    ids = ["a", "b", "a b", "\u00e4", "\n", "x" * 101, "x" * 102, "\u00b7" + "0" * 64, "a\u00b71"]
    keys = [key for custom_id in ids for key in item(custom_id, 3).keys("batch_1")]

    assert len(set(keys)) == 3 * len(ids)
    assert not any(key.isascii() for key in keys)
    assert all(len(key) <= 200 and key.isprintable() for key in keys)
    assert item("a").keys("batch_1") == item("a", 3).keys("batch_1")[:1]
    assert item("a").job_ids("batch_1", "acme") != item("a").job_ids("batch_1", "globex")


def test_counts_add_up() -> None:
    """Every outcome has a place."""
    counts = Counts()
    for number, outcome in enumerate(Outcome, start=1):
        counts = counts.plus(outcome, number)

    assert (counts.succeeded, counts.errored, counts.cancelled, counts.expired, counts.ended) == (1, 2, 3, 4, 10)

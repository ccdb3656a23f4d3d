"""Nothing that arrives is trusted before it is decoded."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeyard.shared.broker.port import Delivery
from codeyard.shared.envelope import new_nonce, open_delivery, seal
from codeyard.shared.errors import InvalidJob, JobTooLarge, MalformedMessage
from codeyard.shared.job import Job, Lane, new_job_id
from codeyard.shared.topology import MAX_SLUG_BYTES, Topology, slug


def job(**fields: object) -> Job:
    return Job.build(
        **{"id": new_job_id(), "key": "k", "model": "m", "revision": "m-1", "prompt": "def f():", **fields}
    )


def delivery(body: bytes, **headers: object) -> Delivery:
    return Delivery("q", "", body, headers, False, None, tag=None)


def test_what_was_sealed_opens_as_the_same_job() -> None:
    """The two directions are one contract."""
    sent = job(lane="bulk", sampling={"max_tokens": 7, "stop": ["\n\n"]}, metadata={"team": "a"})
    message = seal(sent, Topology(), publication=new_nonce(), incarnation="i", deadline_at=12.5)

    opened = open_delivery(Delivery(message.queue, message.message_id, message.body, message.headers, False, 1.0, None))

    assert opened.job == sent
    assert (opened.incarnation, opened.deadline_at, opened.published_at) == ("i", 12.5, 1.0)
    assert opened.digest == sent.digest()


def test_unknown_envelope_fields_are_kept_and_unknown_sampling_fields_refused() -> None:
    """A newer producer's envelope travels through an older worker; a newer sampling field must not be ignored."""
    body = json.loads(job().encode())
    kept = Job.decode(json.dumps({**body, "invented_later": [1]}).encode())
    assert json.loads(kept.encode())["invented_later"] == [1]

    with pytest.raises(MalformedMessage, match=r"sampling\.beam_width"):
        Job.decode(json.dumps({**body, "sampling": {"beam_width": 4}}).encode())


def test_a_thousand_malformed_messages_raise_nothing_but_malformed_message() -> None:
    """Whatever a broken or hostile publisher sends, the worker must be able to dead-letter it and go on."""
    rng = random.Random(7)
    whole = job(metadata={"a": [1, {"b": None}]}).encode()
    refused = 0
    for _ in range(1_000):
        body = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 9)] = rng.randbytes(rng.randint(0, 5))
        headers = {
            "publication": rng.choice([b"\xff", 7, None, "x" * 101, "ok"]),
            "deadline": rng.choice([1, "1", True]),
        }
        try:
            open_delivery(delivery(bytes(body), **headers))
        except MalformedMessage:
            refused += 1
    assert refused > 900


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_other_json_document_is_malformed_and_says_so_in_one_line(document: object) -> None:
    """No shape of JSON gets past with another error."""
    with pytest.raises(MalformedMessage) as refused:
        open_delivery(delivery(json.dumps(document).encode()))
    assert "\n" not in str(refused.value)


def test_a_message_id_that_is_not_the_jobs_is_refused() -> None:
    """Else a message could settle under another job's name."""
    with pytest.raises(MalformedMessage, match="message_id"):
        open_delivery(Delivery("q", new_job_id(), job().encode(), {}, False, None, None))


def test_what_makes_two_bodies_the_same() -> None:
    """Lane, deadline, stream and metadata say how a job travels, not what it is."""
    one = job(idempotent=True)
    assert one.digest() == job(lane="bulk", timeout_s=5, stream=True, metadata={"x": 1}, key="other").digest()
    assert one.digest() == job(sampling={"temperature": None}).digest()
    assert one.digest() != job(sampling={"temperature": 0.5}).digest()
    assert one.digest() != job(prompt="def g():").digest()
    assert one.digest() != job(model="n").digest()
    assert one.digest() != job(prompt=[1, 2]).digest()


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, -2]}, "prompt"),
        ({"sampling": {"temperature": 3}}, "sampling.temperature"),
        ({"lane": "express"}, "lane"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"key": "a\nb"}, "key"),
        ({"metadata": {"x": "y" * 9_000}}, "body"),
    ],
)
def test_an_invalid_job_names_the_field(fields: dict[str, object], field: str) -> None:
    """The caller must see what to mend."""
    with pytest.raises(InvalidJob) as wrong:
        job(**fields)
    assert wrong.value.field == field


def test_a_job_over_the_size_limit_is_refused_before_it_is_sent() -> None:
    """RabbitMQ would close the channel on it, with everybody else's messages."""
    with pytest.raises(JobTooLarge):
        job(prompt="x" * 1_100_000).encode()


def test_queue_names_are_unique_and_short_for_any_revision() -> None:
    """A revision is a name from outside: slashes, blanks, great length."""
    topology = Topology()
    names = ["a/b", "a b", "a%2Fb", "x" * 500, "x" * 499 + "y", "größe"]
    slugs = {slug(name) for name in names}
    assert len(slugs) == len(names)
    assert all(len(one) <= MAX_SLUG_BYTES for one in slugs)
    assert topology.job_queue("base@adapter", Lane.BULK) == topology.job_queue("base", Lane.BULK)

"""A job as a message: the headers around the body, written and read in one place.

Promise: `open_delivery` raises only `MalformedMessage`, whatever arrived; `LaterVersion`, which is one, for what a
newer release reads. Headers keep their meaning over all versions: they are read before the body is understood.
Called by: producer.submission, shared.reconciler (seal), worker.intake (open, passed_on).
"""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from codeyard.shared.broker.port import Delivery, HeaderValue, Message
from codeyard.shared.errors import MalformedMessage
from codeyard.shared.job import Job
from codeyard.shared.topology import Topology

MAX_NONCE_CHARS = 100
PASSED_ON = "passed_on"  # header: how many workers could not read it and left it to a newer one


@dataclass(frozen=True, slots=True)
class Envelope:
    """A decoded delivery. `incarnation` is "" from publishers that did not reserve."""

    job: Job
    digest: str
    publication: str
    incarnation: str
    deadline_at: float | None  # by the store's clock
    published_at: float | None
    traceparent: str | None


def new_nonce() -> str:
    """For a publication or an incarnation: 128 random bits, hex."""
    return uuid.uuid4().hex


def seal(
    job: Job,
    topology: Topology,
    *,
    publication: str,
    incarnation: str,
    deadline_at: float | None,
    attempt: int = 0,
    traceparent: str | None = None,
) -> Message:
    """The message for one publication of a job, to the queue of its revision and lane."""
    headers: dict[str, HeaderValue] = {
        "publication": publication,
        "incarnation": incarnation,
        "tenant": job.tenant,
        "attempt": attempt,
    }
    if deadline_at is not None:
        headers["deadline"] = deadline_at
    if traceparent:
        headers["traceparent"] = traceparent
    queue = topology.job_queue(job.revision, job.lane, job.shard)
    return Message(queue=queue, message_id=job.id, body=job.encode(), headers=headers)


def open_delivery(delivery: Delivery) -> Envelope:
    """Decode and check. Raises MalformedMessage with the first thing that is wrong."""
    job = Job.decode(delivery.body)
    if delivery.message_id and delivery.message_id != job.id:
        raise MalformedMessage("property message_id is not the job's id")
    publication = _text(delivery.headers, "publication") or f"message:{job.id}"
    deadline = delivery.headers.get("deadline")
    if deadline is not None and (isinstance(deadline, bool) or not isinstance(deadline, int | float)):
        raise MalformedMessage("header deadline is not a number")
    if deadline is not None and not math.isfinite(deadline):
        raise MalformedMessage("header deadline is not finite")
    return Envelope(
        job=job,
        digest=job.digest(),
        publication=publication,
        incarnation=_text(delivery.headers, "incarnation") or "",
        deadline_at=deadline,
        published_at=delivery.timestamp,
        traceparent=_text(delivery.headers, "traceparent"),
    )


def carried(delivery: Delivery) -> dict[str, HeaderValue]:
    """The headers that go along when its message is published elsewhere."""
    return {name: value for name, value in delivery.headers.items() if isinstance(value, str | int | float)}


def times_passed_on(delivery: Delivery) -> int:
    """0 for what is no count: the header is only ever ours."""
    count = delivery.headers.get(PASSED_ON, 0)
    return count if isinstance(count, int) and count > 0 else 0


def _text(headers: Mapping[str, object], name: str) -> str | None:
    value = headers.get(name)
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise MalformedMessage(f"header {name} is not text") from None
    if not isinstance(value, str) or len(value) > MAX_NONCE_CHARS:
        raise MalformedMessage(f"header {name} is not a text of at most {MAX_NONCE_CHARS} characters")
    return value

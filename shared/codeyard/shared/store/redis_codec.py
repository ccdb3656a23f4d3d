"""Requests as script arguments, and what scripts and hashes hold as records.

A record is a hash with one field per `Record` field: the job and the result as JSON text, times as
decimal seconds, whole numbers as decimal text, flags as 0 or 1, and "" for no result. `history` is a JSON
list of texts, one per earlier life, each JSON itself, so that Lua never has to write a result anew. The other side
of every function here is a script in lua/. Called by: store.redis.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from codeyard.shared.errors import MalformedMessage
from codeyard.shared.job import MAX_TIMEOUT_S, Job, JobId
from codeyard.shared.record import Event, Past, Record, Result
from codeyard.shared.store.port import (
    Append,
    Claim,
    Claimed,
    ClaimVerdict,
    Commit,
    Committed,
    CommitVerdict,
    NoteCallback,
    Queued,
    Recovered,
    RecoverVerdict,
    Recovery,
    Redrive,
    Redriven,
    RedriveVerdict,
    Release,
    Renewal,
    Renewed,
    Reservation,
    Reserved,
    ReserveVerdict,
    TakeCallback,
    Timing,
)
from codeyard.shared.store.transitions import MAX_HISTORY, MAX_QUEUE_CHECK_S, NEVER_PUBLISHED, REPUBLISH_RETRY_S

log = logging.getLogger(__name__)

NUM_RECENT = 256  # per shard; people look at the newest few hundred of the fleet
FIELDS = (  # in the order of `ALL` in lua/prelude.lua
    "id",
    "state",
    "job",
    "digest",
    "incarnation",
    "publication",
    "fence",
    "counter",
    "owner",
    "lease_until",
    "attempt",
    "crashes",
    "alone",
    "alone_crashes",
    "cancel_requested",
    "created_at",
    "queued_at",
    "started_at",
    "finished_at",
    "deadline_at",
    "check_at",
    "expires_at",
    "last_seq",
    "result",
    "history",
    "callback",  # from here on only in records of jobs with a callback
    "callback_at",
    "callback_attempts",
)

Request = dict[str, Any]
"""One item of a script's JSON argument; what is None in the port is left out. Long texts are bytes:
they travel beside the JSON, as they are."""
Stored = Sequence[str | bool]
"""The fields of a hash in the order of FIELDS; False for one that is not there."""


def protocol(timing: Timing) -> dict[str, Any]:
    """`timing` as the scripts see it: the durations, and the constants of transitions.py."""
    return {
        **asdict(timing),
        "max_timeout_s": MAX_TIMEOUT_S,
        "max_queue_check_s": MAX_QUEUE_CHECK_S,
        "republish_retry_s": REPUBLISH_RETRY_S,
        "never_published": NEVER_PUBLISHED,
        "max_history": MAX_HISTORY,
        "num_recent": NUM_RECENT,
    }


# Requests, one function per script -----------------------------------------------------------------


def reservation(request: Reservation) -> Request:
    job = request.job
    return {
        "id": job.id,
        "body": job.encode(),
        "digest": request.digest,
        "publication": request.publication,
        "incarnation": request.incarnation,
        "timeout_s": job.timeout_s,
        **_callback(job),
    }


def queued(request: Queued) -> Request:
    return {"id": request.job_id, "publication": request.publication}


def claim(request: Claim) -> Request:
    job = request.job
    fields = {
        "id": job.id,
        "body": job.encode(),
        "digest": request.digest,
        "publication": request.publication,
        "owner": request.owner,
        "incarnation": request.incarnation,
        "timeout_s": job.timeout_s,
        **_callback(job),
    }
    if request.published_at is not None:
        fields["published_at"] = request.published_at
    if request.deadline_at is not None:
        fields["deadline_at"] = request.deadline_at
    return fields


def renewal(request: Renewal) -> Request:
    return {"id": request.job_id, "fence": request.fence, "alone": request.alone}


def append(request: Append) -> Request:
    return {"id": request.job_id, "fence": request.fence, "events": _events(request.events)}


def commit(request: Commit) -> Request:
    return {
        "id": request.job_id,
        "fence": request.fence,
        "publication": request.publication,
        "state": request.result.state,
        "result": request.result.encode().encode(),
        "events": _events(request.events),
    }


def release(request: Release) -> Request:
    return {
        "id": request.job_id,
        "fence": request.fence,
        "publication": request.publication,
        "delay_s": request.delay_s,
        "charge": request.charge,
    }


def job_id(request: JobId) -> Request:
    return {"id": request}


def recovery(request: Recovery) -> Request:
    fields: Request = {"id": request.job_id}
    if request.queue_empty is not None:
        fields["queue_empty"] = request.queue_empty
    return fields


def redrive(request: Redrive) -> Request:
    job = request.job
    return {
        "id": job.id,
        "body": job.encode(),
        "digest": request.digest,
        "publication": request.publication,
        "incarnation": request.incarnation,
        "died_in": request.died_in,
        "result": request.outcome.encode().encode(),
        "timeout_s": job.timeout_s,
        **_callback(job),
    }


def callback_taking(request: TakeCallback) -> Request:
    return {"id": request.job_id, "lease_s": request.lease_s}


def callback_note(request: NoteCallback) -> Request:
    return {
        "id": request.job_id,
        "incarnation": request.incarnation,
        "attempt": request.attempt,
        "outcome": request.outcome,
        "delay_s": request.delay_s,
    }


def _callback(job: Job) -> Request:
    return {"callback": True} if job.callback_url else {}


def _events(events: Sequence[Event]) -> list[Request]:
    return [{"seq": event.seq, "body": event.encode().encode()} for event in events]


# Outcomes ------------------------------------------------------------------------------------------


def reserved(request: Reservation, verdict: str, stored: Stored) -> Reserved:
    """The script leaves out the job that the caller has just sent."""
    return Reserved(ReserveVerdict(verdict), record(stored, job=request.job))


def claimed(verdict: str, *rest: str | int | bool) -> Claimed:
    if verdict == ClaimVerdict.HOLD:
        return Claimed(ClaimVerdict.HOLD, hold_s=float(rest[0]))
    if not rest:
        return Claimed(ClaimVerdict(verdict))
    fence, attempt, deadline_in_s, waited_s, last_seq, suspect = rest
    return Claimed(
        ClaimVerdict(verdict),
        fence=str(fence),
        attempt=int(attempt),
        deadline_in_s=float(deadline_in_s),
        waited_s=float(waited_s),
        last_seq=int(last_seq),
        suspect=bool(suspect),
    )


def renewed(held: bool, cancel_requested: bool) -> Renewed:
    return Renewed(held, cancel_requested)


def committed(verdict: str, may_ack: bool) -> Committed:
    return Committed(CommitVerdict(verdict), may_ack)


def recovered(verdict: str, stored: Stored | None = None) -> Recovered:
    return Recovered(RecoverVerdict(verdict), readable(stored) if stored else None)


def redriven(verdict: str, stored: Stored | None = None) -> Redriven:
    return Redriven(RedriveVerdict(verdict), record(stored) if stored else None)


def readable(stored: Stored) -> Record | None:
    """None for a record that is not for this release to read: whoever looks after all jobs leaves it to a newer one
    and goes on with the others (docs/upgrades.md)."""
    try:
        return record(stored)
    except MalformedMessage as error:
        log.warning("record_not_readable", extra={"job": stored[0], "error": str(error)})
        return None


def record(stored: Stored, *, job: Job | None = None) -> Record:
    """Raises MalformedMessage if the hash is not one of ours. `job` stands in for a text left out."""
    fields: dict[str, object] = {name: text for name, text in zip(FIELDS, stored, strict=True) if text is not False}
    body, result = str(fields.get("job", "")), str(fields.get("result", ""))
    fields["job"] = Job.decode(body.encode()) if body or job is None else job
    fields["result"] = Result.decode(result) if result else None
    try:
        lives = json.loads(str(fields.get("history") or "[]"))
        fields["history"] = [Past.model_validate_json(life) for life in lives]
        return Record.model_validate(fields)
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise MalformedMessage(f"not a stored record: history: {error}") from None
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedMessage(f"not a stored record: {where}: {first['msg']}") from None

"""The message and its signature, as Standard Webhooks says (standardwebhooks.com, version 1 of 2023).

    webhook-id         the same for every delivery of one job's end: the receiver's key for "had it already"
    webhook-timestamp  seconds since the epoch, of this delivery
    webhook-signature  "v1," + base64(HMAC-SHA256(key, id + "." + timestamp + "." + body)), one for each key

The body names the job and how it ended, not what was generated: that is read with the caller's credentials.
Called by: webhooks.delivery.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from codeyard.shared.record import Record


def message_id(record: Record) -> str:
    """Letters and digits, whatever other languages wrote into the message that the incarnation comes from."""
    return "msg_" + hashlib.sha256(f"{record.id}.{record.incarnation}".encode()).hexdigest()[:32]


def body_of(record: Record) -> bytes:
    """UTF-8 JSON; the same bytes each time, so that a receiver may compare them."""
    job, result = record.job, record.result
    error = result.error if result else None
    data: dict[str, Any] = {
        "id": record.id,
        "key": job.key,
        "state": record.state,
        "model": job.model,
        "asked_model": job.asked_model,
        "revision": job.revision,
        "lane": job.lane,
        "attempt": record.attempt,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "usage": result.usage.model_dump() if result else None,
        "error": error.model_dump() if error else None,
        "metadata": job.metadata,
    }
    message = {
        "type": f"job.{record.state}",
        "timestamp": datetime.fromtimestamp(record.finished_at, UTC).isoformat().replace("+00:00", "Z"),
        "data": {name: value for name, value in data.items() if value is not None},
    }
    return json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode()


def signed_headers(record: Record, body: bytes, *, keys: Sequence[bytes], timestamp: int) -> Mapping[str, str]:
    """`keys`: the newest first; the receiver takes any that fits, so that keys can be changed one by one."""
    name = message_id(record)
    return {
        "content-type": "application/json",
        "user-agent": "codeyard-webhooks/1",
        "webhook-id": name,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signature(key, name, timestamp, body) for key in keys),
    }


def signature(key: bytes, message: str, timestamp: int, body: bytes) -> str:
    mac = hmac.new(key, b".".join((message.encode(), str(timestamp).encode(), body)), hashlib.sha256)
    return "v1," + base64.b64encode(mac.digest()).decode()

"""Messages of others whose properties cannot be decoded.

pamqp, which reads frames for aio-pika, fails on a timestamp past the year 9999 (nanoseconds, say) or a
text that is not UTF-8. That ends the connection, and the message is at the head of its queue again: one
such message would stop every lane of the fleet for ever. Here it arrives instead, with that property
empty or repaired, and is dead-lettered as malformed like any other if the job needs it.
Called by: shared.broker.rabbitmq_link, once.
"""

import struct
from typing import Any

from pamqp import decode

UNDECODABLE = (ValueError, OverflowError, OSError, RecursionError)
TIMESTAMP_BYTES = 8


def tolerate_undecodable_properties() -> None:
    """Exchange pamqp's decoders of what a publisher is free to write. Repeatable; sizes on the wire stay exact."""
    for kind, tolerant in (("timestamp", _timestamp), ("shortstr", _short_text), ("table", _table)):
        decode.METHODS[kind] = tolerant


def _timestamp(value: bytes) -> tuple[int, Any]:
    try:
        return decode.timestamp(value)
    except UNDECODABLE:
        return TIMESTAMP_BYTES, None


def _short_text(value: bytes) -> tuple[int, Any]:
    try:
        return decode.short_str(value)
    except UnicodeDecodeError:
        length = value[0]
        return 1 + length, value[1 : 1 + length].decode(errors="replace")


def _table(value: bytes) -> tuple[int, Any]:
    try:
        return decode.field_table(value)
    except UNDECODABLE:
        if len(value) < 4:
            raise
        (length,) = struct.unpack(">I", value[:4])
        return 4 + length, {}

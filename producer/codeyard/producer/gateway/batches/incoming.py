"""A batch that comes in one body, `{"requests": [...]}`, into the store request by request, as lines.

The body is read as it arrives: what is in memory is one request, whatever the body's size. Called by:
batches.anthropic_routes.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from codeyard.producer.gateway.batches.cutting import CutTooLong, RequestCutter
from codeyard.producer.gateway.files.sink import Sink
from codeyard.producer.gateway.files.upload import PAUSE_S, UPLOAD_S
from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.requests import check_media_type


async def receive(
    request: Request,
    sink: Sink,
    checked: Callable[[Any, int], bytes],
    *,
    most_bytes: int,
    most_item_bytes: int,
    most_items: int,
) -> int:
    """How many requests there were. `checked` makes a line of the one in a place, or raises Refused; so does this,
    for a body that is not such an object, too long, or says a `custom_id` twice."""
    check_media_type(request.headers)
    cutter = RequestCutter(most_item_bytes)
    seen: set[bytes] = set()  # digests of ids
    num_bytes = 0
    try:
        async with asyncio.timeout(UPLOAD_S):
            stream = request.stream()
            while True:
                async with asyncio.timeout(PAUSE_S):
                    piece = await anext(stream, None)
                if piece is None:
                    break
                num_bytes += len(piece)
                if num_bytes > most_bytes:
                    raise CutTooLong
                for raw in cutter.feed(piece):
                    await sink.write(_line(raw, len(seen), checked, seen) + b"\n")
                if len(seen) > most_items:
                    raise Refused("invalid-job", f"at most {most_items} requests", field="requests")
        if not cutter.complete():
            raise Refused("invalid-job", "an object with `requests` alone, a list of objects", field="requests")
    except CutTooLong:
        over = f"a body has at most {most_bytes} bytes, a request in it at most {most_item_bytes}"
        raise Refused("too-large", over, headers={"Connection": "close"}, field="body") from None
    except TimeoutError:
        detail = f"nothing of the body arrived for {PAUSE_S:g} s, or not all of it within {UPLOAD_S:g} s"
        raise Refused("body-timeout", detail, headers={"Connection": "close"}) from None
    except (ValueError, RecursionError) as error:
        raise Refused("malformed-json", str(error)[:200] or "not JSON") from None
    if not seen:
        raise Refused("invalid-job", "at least one request", field="requests")
    return len(seen)


def _line(raw: bytes, place: int, checked: Callable[[Any, int], bytes], seen: set[bytes]) -> bytes:
    """Raises Refused, ValueError, RecursionError."""
    one = json.loads(raw)
    line = checked(one, place)
    digest = hashlib.blake2b(one["custom_id"].encode(), digest_size=12).digest()
    if digest in seen:
        raise Refused("invalid-job", "an earlier request has this custom_id", field=f"requests.{place}.custom_id")
    seen.add(digest)
    return line

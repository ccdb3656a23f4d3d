"""Cut `{"requests": [{...}, {...}]}` into its requests while it arrives. Plain bytes in, plain bytes out.

Only where an object of the array begins and ends is found here; whether it is JSON is json's to say, request by
request, and for what is around them at the end. So a body can be as deep, long or wrong as it likes: what is held
is one request, and the frame. (ijson, the streaming parser, keeps a path for every level: 200 kB of brackets were
tens of gigabytes.)
Called by: batches.incoming.
"""

import json
import re

MAX_FRAME_BYTES = 1_048_576  # of what is not a request; of 50,000 of them 300 kB

_OUTSIDE = re.compile(rb'["\[\]{}]')
_IN_STRING = re.compile(rb'["\\]')
_OPENS = b"[{"


class CutTooLong(ValueError):
    """A request, or what is around them."""


class RequestCutter:
    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._frame = bytearray()  # the body with null in place of each request
        self._request: bytearray | None = None  # the one that is being read
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.num_requests = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The requests that end in this piece. Raises CutTooLong."""
        found: list[bytes] = []
        start = place = 0
        while place < len(piece):
            if self._escaped:
                self._escaped = False
                place += 1
                continue
            match = (_IN_STRING if self._in_string else _OUTSIDE).search(piece, place)
            if match is None:
                break
            place = match.end()
            character = match[0]
            if self._in_string:
                self._in_string, self._escaped = character != b'"', character == b"\\"
            elif character == b'"':
                self._in_string = True
            elif character in _OPENS:
                if self._request is None and self._depth == 2 and character == b"{":
                    self._keep(piece[start : match.start()])
                    start, self._request = match.start(), bytearray()
                self._depth += 1
            else:
                self._depth -= 1
                if self._request is not None and self._depth == 2:
                    self._keep(piece[start:place])
                    found.append(bytes(self._request))
                    start, self._request = place, None
                    self._keep(b"null")
                    self.num_requests += 1
        self._keep(piece[start:])
        return found

    def complete(self) -> bool:
        """Whether what was around the requests is exactly that object. Raises ValueError where it is not JSON."""
        frame = json.loads(bytes(self._frame))
        return self._request is None and frame == {"requests": [None] * self.num_requests}

    def _keep(self, part: bytes) -> None:
        kept, most = (self._frame, MAX_FRAME_BYTES) if self._request is None else (self._request, self._most_bytes)
        kept += part
        if len(kept) > most:
            raise CutTooLong

"""A multipart upload into the store, chunk by chunk: no more than one chunk of it is ever in memory.

Promise: whatever comes, this raises only Refused, ClientDisconnect and the store's errors; the file's bytes are
bounded as they come, and so are the other fields. Called by: files.routes.
"""

import asyncio
from dataclasses import dataclass, field

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from codeyard.producer.gateway.files.lines import LineCutter
from codeyard.producer.gateway.files.sink import Sink
from codeyard.producer.gateway.problems import Refused

PAUSE_S = 30.0  # between two pieces of a body
UPLOAD_S = 3_000.0  # for the whole
MAX_FIELD_BYTES = 65_536  # of headers and values that are not the file
MAX_FIELDS = 32


@dataclass(slots=True)
class Uploaded:
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    num_lines: int = 0


async def receive(request: Request, sink: Sink, *, most_bytes: int, most_line_bytes: int) -> Uploaded:
    """The part `file` goes into the sink, the other fields come back. Raises Refused."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Refused("unsupported-media-type", "the body must be multipart/form-data", field="Content-Type")
    parts = _Parts(most_line_bytes)
    try:
        parser = python_multipart.MultipartParser(boundary, parts.callbacks())
        async with asyncio.timeout(UPLOAD_S):
            stream = request.stream()
            while True:
                async with asyncio.timeout(PAUSE_S):
                    piece = await anext(stream, None)
                if piece is None:
                    break
                parser.write(piece)
                await sink.write(parts.take())
                if sink.size_bytes > most_bytes:
                    detail = f"a file has at most {most_bytes} bytes"
                    raise Refused("too-large", detail, headers={"Connection": "close"}, field="file")
            parser.finalize()
    except TimeoutError:
        detail = f"nothing of the body arrived for {PAUSE_S:g} s, or not all of it within {UPLOAD_S:g} s"
        raise Refused("body-timeout", detail, headers={"Connection": "close"}) from None
    except FormParserError as error:
        raise Refused("invalid-job", f"not a multipart body: {error}", field="body") from None
    if not parts.ended or parts.uploaded.filename is None:
        raise Refused("invalid-job", "a multipart body with a part `file` that has a filename", field="file")
    return parts.finished()


class _Parts:
    """What the parser calls. Bytes of the file gather until they are taken; they are at most one piece's."""

    def __init__(self, most_line_bytes: int) -> None:
        self.uploaded = Uploaded()
        self.ended = False
        self._cutter = LineCutter(most_line_bytes)
        self._file = bytearray()
        self._small = bytearray()  # of the header or value that is being read
        self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._in_file = False

    def callbacks(self) -> "python_multipart.multipart.MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._gather,
            "on_header_value": self._gather_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def take(self) -> bytes:
        data = bytes(self._file)
        self._file.clear()
        return data

    def finished(self) -> Uploaded:
        self.uploaded.num_lines += len(self._cutter.end())
        return self.uploaded

    def _begin(self) -> None:
        self._headers, self._name, self._in_file = {}, "", False
        self._small.clear()

    def _gather(self, data: bytes, start: int, end: int) -> None:
        self._small += data[start:end]
        if len(self._small) > MAX_FIELD_BYTES:
            raise Refused("invalid-job", f"a field other than the file of over {MAX_FIELD_BYTES} bytes", field="body")

    def _gather_value(self, data: bytes, start: int, end: int) -> None:
        if not self._header:
            self._header = bytes(self._small)
            self._small.clear()
        self._gather(data, start, end)

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = bytes(self._small)
        self._header = b""
        self._small.clear()
        if len(self._headers) > MAX_FIELDS:
            raise Refused("invalid-job", "a part with too many headers", field="body")

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self.uploaded.filename is not None:
                raise Refused("invalid-job", "one file at a time", field="file")
            self._in_file = True
            self.uploaded.filename = options.get(b"filename", b"file").decode(errors="replace")[:255]
        elif len(self.uploaded.fields) >= MAX_FIELDS:
            raise Refused("invalid-job", "too many fields", field="body")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._gather(data, start, end)
            return
        piece = data[start:end]
        self._file += piece
        self.uploaded.num_lines += len(self._cutter.feed(piece))

    def _part_end(self) -> None:
        if not self._in_file and self._name:
            self.uploaded.fields[self._name] = bytes(self._small).decode(errors="replace")
        self._small.clear()

    def _end(self) -> None:
        self.ended = True

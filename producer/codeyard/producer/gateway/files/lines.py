"""The lines of a text that comes in pieces. No line is held but the one that is being read.

Called by: files.upload (to count them), batches.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """`number` counts from 1, blank lines too. `raw` is None for a line that is too long."""

    number: int
    raw: bytes | None


class LineCutter:
    """Feed it pieces; blank lines are counted and left out."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._rest = bytearray()
        self._skipping = False
        self._number = 0

    def feed(self, piece: bytes) -> list[Line]:
        *whole, rest = piece.split(b"\n")
        lines: list[Line] = []
        for part in whole:
            self._take(part)
            lines += self._cut()
        self._take(rest)
        return lines

    def end(self) -> list[Line]:
        """The last line, if no line break ends it."""
        return self._cut() if self._rest or self._skipping else []

    def _take(self, part: bytes) -> None:
        if len(self._rest) + len(part) > self._most:
            self._skipping = True
            self._rest.clear()
        if not self._skipping:
            self._rest += part

    def _cut(self) -> list[Line]:
        self._number += 1
        raw = bytes(self._rest).removeprefix(BOM if self._number == 1 else b"").strip()
        too_long = self._skipping
        self._rest.clear()
        self._skipping = False
        return [Line(self._number, None if too_long else raw)] if raw or too_long else []


async def lines(pieces: AsyncIterator[bytes], *, most_bytes: int) -> AsyncGenerator[Line, None]:
    cutter = LineCutter(most_bytes)
    async for piece in pieces:
        for line in cutter.feed(piece):
            yield line
    for line in cutter.end():
        yield line

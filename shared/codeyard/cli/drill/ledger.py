"""What a producer was told, written down before it counts, and read back by whoever audits.

One line per fact, appended with one write to the kernel: a producer killed with -9 takes none of it along, and
at most its last line is cut short, which a reader leaves out. Lines: `A number id` accepted, `R number why`
refused for good, `E number what` something that must not be.
Called by: producing (writes), run (reads).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

ACCEPTED, REFUSED, WRONG = "A", "R", "E"


class Writer:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if (size := os.fstat(self._file).st_size) and _last_byte(path, size) != b"\n":
            os.write(self._file, b"\n")  # an earlier producer died within a line

    def write(self, facts: Iterable[tuple[str, int, str]]) -> None:
        """Returns when the kernel has them."""
        lines = "".join(f"{kind} {number} {text.splitlines()[0] if text else ''}\n" for kind, number, text in facts)
        if lines:
            os.write(self._file, lines.encode())

    def close(self) -> None:
        os.close(self._file)


@dataclass(slots=True)
class Reader:
    """Follows one ledger; `news` is what came since the last call."""

    path: Path
    _read: int = 0

    def news(self) -> list[tuple[str, int, str]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        facts = []
        for line in whole.decode(errors="replace").splitlines():
            kind, _, rest = line.partition(" ")
            number, _, text = rest.partition(" ")
            if kind in (ACCEPTED, REFUSED, WRONG) and number.isdigit():
                facts.append((kind, int(number), text))
        return facts


@dataclass(slots=True)
class Told:
    """All ledgers together."""

    accepted: dict[int, str] = field(default_factory=dict)  # id by number
    refused: dict[int, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> Self:
        told = cls()
        told.add(Reader(path).news())
        return told

    def add(self, facts: Iterable[tuple[str, int, str]]) -> list[str]:
        """Returns the ids that are new."""
        new = []
        for kind, number, text in facts:
            if kind == WRONG:
                self.wrong.append(f"job {number}: {text}")
            elif kind == REFUSED:
                self.refused[number] = text
            elif number not in self.accepted:
                self.accepted[number] = text
                self.refused.pop(number, None)
                new.append(text)
            elif self.accepted[number] != text:
                self.wrong.append(f"job {number}: accepted as {self.accepted[number]} and as {text}")
        return new


def _last_byte(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1)

"""The lines in which slots note what they ran while somebody records it; plain JSON, never unpickled."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

DONE, FAILED, CANCELLED, AGAIN = "done", "failed", "cancelled", "again"
OUTCOMES = (DONE, FAILED, CANCELLED, AGAIN)
"""What became of an attempt; `again`: its inputs were gone, and the task runs once more."""
MOST_TEXT = 300
"""Characters of a key, a name or an error."""
MOST_BYTES = 4 << 20
"""Of the lines of one step, unpacked."""


class Line(NamedTuple):
    """One attempt at a task.

    Attributes:
        key: key text.
        function: its name.
        began: when the slot turned to it, seconds since 1970 by the clock of its host.
        called: when its inputs were there and the function was called; `ended` if it never was.
        ended: when the function was through, and its result stored.
        nbytes: size of the result.
        outcome: one of `OUTCOMES`.
        error: what went wrong, in short.
    """

    key: str
    function: str
    began: float
    called: float
    ended: float
    nbytes: int = 0
    outcome: str = DONE
    error: str = ""


class Parcel(NamedTuple):
    """Lines that one slot sent together.

    Attributes:
        slot: its name.
        first: how many lines this slot wrote for the recording before, so that a gap shows.
        lines: in the order in which the attempts ended.
    """

    slot: str
    first: int
    lines: list[Line]


def pack(parcel: Parcel) -> bytes:
    """Return the form that goes through Redis: some 40 bytes a line."""
    rows = [
        (
            line.key[:MOST_TEXT],
            line.function[:MOST_TEXT],
            round(line.began, 6),
            round(line.called - line.began, 6),
            round(line.ended - line.began, 6),
            line.nbytes,
            OUTCOMES.index(line.outcome),
            line.error[:MOST_TEXT],
        )
        for line in parcel.lines
    ]
    text = json.dumps([parcel.slot, parcel.first, rows], separators=(",", ":"), ensure_ascii=False)
    return zlib.compress(text.encode(errors="replace"), 1)  # no half characters, which no file takes


def unpack(data: bytes) -> Parcel:
    """Read what `pack` made.

    Raises:
        ValueError: it is something else.
    """
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(data, MOST_BYTES)
        if not reader.eof:
            raise ValueError("lines that are cut off, or too many")
        slot, first, rows = json.loads(text)
        return Parcel(str(slot), int(first), [_line(*row) for row in rows])
    except (zlib.error, ValueError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"unreadable lines of a recording: {error}") from error


def _line(
    key: Any, function: Any, began: Any, called: Any, ended: Any, nbytes: Any, outcome: Any, error: Any
) -> Line:
    at = float(began)
    return Line(
        str(key),
        str(function),
        at,
        at + float(called),
        at + float(ended),
        int(nbytes),
        OUTCOMES[outcome],
        str(error),
    )


class Notebook:
    """How many lines a slot wrote for each recording that wants them."""

    def __init__(self) -> None:
        self.recordings: tuple[str, ...] = ()
        self._written: dict[str, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether lines are wanted of what is run now."""
        return bool(self.recordings)

    def turn_to(self, recordings: tuple[str, ...]) -> None:
        """Note for these, from now on."""
        if recordings != self.recordings:
            self.recordings = recordings
            self._written = {name: self._written.get(name, 0) for name in recordings}

    def pages(self, slot: str, lines: Sequence[Line]) -> list[tuple[str, bytes]]:
        """Return lines as each recording is to get them; the same again until `count` is called."""
        if not lines:
            return []
        return [(name, pack(Parcel(slot, n, list(lines)))) for name, n in self._written.items()]

    def count(self, n: int) -> None:
        """Note that so many lines arrived."""
        for name in self._written:
            self._written[name] += n

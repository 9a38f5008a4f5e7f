"""How a result lies in a file: a header with the sizes, then its parts, each aligned for any array.

magic | crc | number of parts | end | size of each part | padding | head | padding | buffer | ...
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

ALIGNMENT = 64
MAGIC = b"celmem1\n"
_FIXED = struct.Struct("<8sIIQ")
_CHECKED_HEAD = 64 << 10  # a guard, not a proof: a head may be a gigabyte
_IOV_MAX = 512  # buffers a single pwritev takes; the least of all systems is 1024 pieces
_PADDING = bytes(ALIGNMENT)


class Layout(NamedTuple):
    """Where the parts of a result are in its file.

    Attributes:
        sizes: bytes of each part, the pickle head first.
        offsets: where each begins.
        end: where the last one ends.
    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.sizes)


def lay_out(sizes: Sequence[int]) -> Layout:
    """Return the layout of parts of these sizes."""
    at = _FIXED.size + 8 * len(sizes)
    offsets = []
    for size in sizes:
        at = -(-at // ALIGNMENT) * ALIGNMENT
        offsets.append(at)
        at += size
    return Layout(tuple(sizes), tuple(offsets), at)


def header(layout: Layout, head: Any) -> bytes:
    """Return the header of a file whose first part is `head`."""
    table = struct.pack(f"<{len(layout.sizes)}Q", *layout.sizes)
    return _FIXED.pack(MAGIC, _checksum(table, head), len(layout.sizes), layout.end) + table


def parse(data: memoryview) -> Layout | None:
    """Return the layout of the file whose bytes these are; None if it is not whole."""
    if data.nbytes < _FIXED.size:
        return None
    magic, crc, count, end = _FIXED.unpack_from(data)
    if magic != MAGIC or count == 0 or data.nbytes < end or end < _FIXED.size + 8 * count:
        return None
    table = data[_FIXED.size : _FIXED.size + 8 * count]
    layout = lay_out(struct.unpack(f"<{count}Q", table))
    if layout.end != end or _checksum(table, cut(data, layout)[0]) != crc:
        return None
    return layout


def cut(data: memoryview, layout: Layout) -> list[memoryview]:
    """Return the parts in the bytes of a file, as views."""
    return [data[at : at + size] for at, size in zip(layout.offsets, layout.sizes, strict=True)]


def write_parts(fd: int, layout: Layout, parts: Sequence[memoryview]) -> None:
    """Write header and parts from the start of a file, without a copy and without the GIL."""
    pieces: list[memoryview] = []
    at = 0
    for offset, part in zip(
        (0, *layout.offsets), (memoryview(header(layout, parts[0])), *parts), strict=True
    ):
        if offset > at:
            pieces.append(memoryview(_PADDING)[: offset - at])
        if part.nbytes:
            pieces.append(part)
        at = offset + part.nbytes
    at = 0
    for first in range(0, len(pieces), _IOV_MAX):
        at = _write_all(fd, pieces[first : first + _IOV_MAX], at)


def flat(part: Any) -> memoryview:
    """Return the bytes of an object with the buffer protocol, as a view."""
    view = memoryview(part)
    return view.cast("B") if view.nbytes else memoryview(b"")  # a view with a zero in its shape has no cast


def _write_all(fd: int, pieces: list[memoryview], at: int) -> int:
    while pieces:
        n = os.pwritev(fd, pieces, at)  # no more than 2 GiB at a time
        at += n
        while pieces and n >= pieces[0].nbytes:
            n -= pieces.pop(0).nbytes
        if n:
            pieces[0] = pieces[0][n:]
    return at


def _checksum(table: Any, head: Any) -> int:
    return zlib.crc32(memoryview(head)[:_CHECKED_HEAD], zlib.crc32(table))

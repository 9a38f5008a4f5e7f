"""Checksums of results that leave memory: on their way through Redis, and spilled to a disk.

A byte that changes there is found by whoever reads it; he reports the copy as lost, and the result is made
again. Files in shared memory are not checked: they are memory. CRC-32 of zlib runs at 2.3 GB/s on one core of
the machine where SET and GET of Redis run at 0.35 and 1.2 GB/s, without the GIL.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from typing import Any

_TRAILER = struct.Struct("<4sI")
_MAGIC = b"crc1"
TRAILER_BYTES = _TRAILER.size
_PIECE = 1 << 20


def checksum(piece: Any, before: int = 0) -> int:
    """Return the checksum of bytes that follow on those with the checksum `before`."""
    return zlib.crc32(piece, before)


def checksum_of(parts: Iterable[Any]) -> int:
    """Return the checksum of parts, laid end to end."""
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found


def trailer_of(fd: int, nbytes: int) -> bytes:
    """Return what is put behind the first `nbytes` bytes of a file where they are spilled."""
    return _TRAILER.pack(_MAGIC, _of_file(fd, nbytes))


def is_whole(fd: int, nbytes: int) -> bool:
    """Tell whether the first bytes of a file are what its trailer says. Raises OSError as the disk does."""
    data = os.pread(fd, TRAILER_BYTES, nbytes)
    return len(data) == TRAILER_BYTES and _TRAILER.unpack(data) == (_MAGIC, _of_file(fd, nbytes))


def _of_file(fd: int, nbytes: int) -> int:
    found = at = 0
    while at < nbytes:
        piece = os.pread(fd, min(_PIECE, nbytes - at), at)
        if not piece:
            raise OSError("a file is shorter than it should be")
        found = zlib.crc32(piece, found)
        at += len(piece)
    return found

"""Large results and payloads in Redis: one hash per blob, in pieces, so that one UNLINK removes it whole.

A blob is written with a time to live; the script that makes a record refer to it takes that away. One whose
writer dies in between vanishes by itself.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from celery_mem.memory.checksum import checksum_of
from celery_mem.memory.serialize import Frames
from celery_mem.state.link import Command, Link

log = logging.getLogger("celery_mem.memory")

_SIZES = "<%dQ"


def write_commands(name: str, frames: Frames, *, piece_bytes: int, lease_s: float) -> list[Command]:
    """Return the commands that store `frames` under the Redis key `name`.

    Args:
        piece_bytes: most bytes per field; Redis takes no more than 512 MB.
        lease_s: time to live until a record adopts the blob.
    """
    parts: list[Any] = [frames.head, *frames.buffers]
    sizes = struct.pack(_SIZES % len(parts), *(memoryview(p).nbytes for p in parts))
    lease_ms = int(lease_s * 1000)
    checked = ("h", sizes, "c", checksum_of(parts))
    commands: list[Command] = [("HSET", name, *checked), ("PEXPIRE", name, lease_ms)]
    for i, piece in enumerate(cut(parts, piece_bytes)):
        commands.append(("HSET", name, i, piece))
        if i > 0:  # each piece may take long, all of them longer than the lease
            commands.append(("PEXPIRE", name, lease_ms))
    return commands


def write(link: Link, commands: Sequence[Command]) -> None:
    """Send the commands of `write_commands` a piece at a time, so that no reply waits for gigabytes."""
    for command in commands:
        link.call(*command)


def read(link: Link, name: str, what: str = "object") -> tuple[bytearray | bytes, list[bytearray]] | None:
    """Return head and buffers of a blob; None if it is not there, or not whole and as it was written."""
    packed, piece, check = link.call("HMGET", name, "h", 0, "c")
    if not packed or len(packed) % 8:
        return None
    sizes = struct.unpack(_SIZES % (len(packed) // 8), packed)
    whole = _Sink(sizes)
    at = 0
    while piece is not None and whole.write(piece):
        at += 1
        piece = link.call("HGET", name, at)
    if piece is None and not whole.is_full:
        return None
    if check is not None and b"%d" % checksum_of(whole.parts) != check:
        log.warning("the blob of %s in Redis is damaged", what)
        return None
    return whole.parts[0], whole.parts[1:]


def cut(parts: Sequence[Any], limit: int) -> Iterator[Any]:
    """Cut the parts, laid end to end, into pieces of at most `limit` bytes; whole pieces are not copied."""
    pending: list[memoryview] = []
    room = limit
    for part in parts:
        view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
        while view.nbytes:
            if not pending and view.nbytes >= limit:
                yield view[:limit]
                view = view[limit:]
                continue
            take = view[:room]
            pending.append(take)
            room -= take.nbytes
            view = view[take.nbytes :]
            if room == 0:
                yield _joined(pending)
                pending, room = [], limit
    if pending:
        yield _joined(pending)


def _joined(views: list[memoryview]) -> Any:
    return views[0] if len(views) == 1 else b"".join(views)


class _Sink:
    """Takes pieces in order and spreads them over parts of known sizes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.parts = [bytearray(size) for size in sizes]
        self._part = 0
        self._at = 0
        self._skip_full()

    @property
    def is_full(self) -> bool:
        return self._part == len(self.parts)

    def write(self, piece: bytes) -> bool:
        """Take one piece; returns whether more are expected."""
        view = memoryview(piece)
        while view.nbytes and not self.is_full:
            part = self.parts[self._part]
            n = min(len(part) - self._at, view.nbytes)
            part[self._at : self._at + n] = view[:n]
            self._at += n
            view = view[n:]
            self._skip_full()
        return not self.is_full

    def _skip_full(self) -> None:
        while not self.is_full and self._at == len(self.parts[self._part]):
            self._part += 1
            self._at = 0

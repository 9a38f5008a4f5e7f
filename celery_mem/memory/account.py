"""What a node folder holds, counted by all who change it: looking at 100,000 files takes too long."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

_FIELDS = struct.Struct("<4q")


class Usage(NamedTuple):
    """What lies in a node folder.

    Attributes:
        files: results, spilled ones too.
        nbytes: memory of those that are not spilled.
        pool_nbytes: memory of files that wait to be used again.
        spilled_nbytes: bytes of results on disk, or wherever they are spilled to.
    """

    files: int = 0
    nbytes: int = 0
    pool_nbytes: int = 0
    spilled_nbytes: int = 0


class Account:
    """Four sums in a small file, changed under a lock. A process that dies loses its last change at most.

    Nothing is kept open: a lock of the file (and no other kind) then excludes threads, processes and their
    children alike.

    Args:
        path: of the file; it is made when first used.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def add(self, files: int = 0, nbytes: int = 0, pool_nbytes: int = 0, spilled_nbytes: int = 0) -> None:
        """Add to the sums."""
        changes = (files, nbytes, pool_nbytes, spilled_nbytes)
        if any(changes):
            self._change(lambda now: Usage(*(a + b for a, b in zip(now, changes, strict=True))))

    def set(self, usage: Usage) -> None:
        """Replace the sums by what somebody counted."""
        self._change(lambda _: usage)

    def read(self) -> Usage:
        """Return the sums."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return Usage()
        try:
            sums = _read(fd)
        finally:
            os.close(fd)
        # One who takes a file may be counted before the one who put it there: below zero for a moment.
        return Usage(*(max(0, n) for n in sums))

    def _change(self, change: Callable[[Usage], Usage]) -> None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return  # the folder was removed
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.pwrite(fd, _FIELDS.pack(*change(_read(fd))), 0)
        finally:
            os.close(fd)  # and with it the lock


def _read(fd: int) -> Usage:
    data = os.pread(fd, _FIELDS.size, 0)
    return Usage(*_FIELDS.unpack(data)) if len(data) == _FIELDS.size else Usage()

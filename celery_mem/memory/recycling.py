"""Files of dropped results, kept to be written again: a fresh page costs several times a warm one.

A file may be written again only when nobody maps it any more, for a client may use an array long after
its future is gone. On Linux the kernel says so: a write lease is granted if and only if the file is neither
open nor mapped anywhere else. Where it is not granted, for whatever reason, the file is removed.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import signal
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from celery_mem.memory.process import is_alive, own_identity

LEAST = 32 << 10
_SLACK = 16 << 10  # so that 16 MiB and a header are not a class above 16 MiB
_TRIES = 4


def size_class(nbytes: int) -> int:
    """Return the size of a file for `nbytes` bytes: there are four sizes per power of two."""
    if nbytes <= LEAST:
        return LEAST
    body = nbytes - _SLACK
    step = 1 << ((body - 1).bit_length() - 3)
    return -(-body // step) * step + _SLACK


class Claimed(NamedTuple):
    """A file that this process may write.

    Attributes:
        path: where it is; nobody else looks there.
        fd: descriptor, for reading and writing.
        pool_nbytes: change of the memory that the pool holds.
    """

    path: str
    fd: int
    pool_nbytes: int


class Pool:
    """Files to be written again, in one folder per size; all processes of a host take from it.

    Args:
        path: the folder.
        work: folder on the same file system for files that are being written.
    """

    def __init__(self, path: str, work: str) -> None:
        self.path = path
        self.work = work
        self.may_recycle = hasattr(fcntl, "F_SETLEASE")
        self._names: dict[int, deque[str]] = {}
        self._made: set[int] = set()

    def put(self, path: str, size: int) -> None:
        """Take a file out of reach.

        Raises:
            FileNotFoundError: somebody else did.
        """
        if size not in self._made:
            os.makedirs(self._folder(size), 0o700, exist_ok=True)
            self._made.add(size)
        os.rename(path, f"{self._folder(size)}/{unique_name()}")

    def claim(self, size: int) -> Claimed | int:
        """Return a file of this size that nobody else can see; else the change of what the pool holds."""
        change = 0
        for _ in range(_TRIES if self.may_recycle else 0):
            path = self._take(size)
            if path is None:
                break
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            found = os.fstat(fd)
            change -= found.st_blocks * 512
            if found.st_nlink == 1 and found.st_size == size and self._is_unused(fd):
                return Claimed(path, fd, change)
            os.close(fd)
            os.unlink(path)
        return change

    def has(self, size: int) -> bool:
        """Tell whether there is a file of this size; somebody may take it at any time."""
        if not self.may_recycle:
            return False
        try:
            with os.scandir(self._folder(size)) as entries:
                return next(entries, None) is not None
        except FileNotFoundError:
            return False

    def trim(self, nbytes: int) -> int:
        """Remove files of `nbytes` bytes or a little more; returns the bytes removed."""
        freed = 0
        for entry in self._entries():
            if freed >= nbytes:
                break
            try:
                size = entry.stat(follow_symlinks=False).st_blocks * 512
                os.unlink(entry.path)
            except FileNotFoundError:
                continue
            freed += size
        return freed

    def nbytes(self) -> int:
        """Count the memory of all files."""
        total = 0
        for entry in self._entries():
            try:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:
                pass
        return total

    def _take(self, size: int) -> str | None:
        """Move any file of this size to a place of our own; the move has one winner."""
        path = f"{self.work}/{unique_name()}"
        names = self._names.setdefault(size, deque())
        for is_known in (True, False):  # what we know, then what there is
            while True:
                try:
                    name = names.popleft()  # atomic among threads
                except IndexError:
                    break
                try:
                    os.rename(f"{self._folder(size)}/{name}", path)
                    return path
                except FileNotFoundError:
                    continue
            if not is_known:
                return None
            try:
                names.extend(itertools.islice(sorted(os.listdir(self._folder(size))), 1000))
            except FileNotFoundError:
                return None
        return None

    def _is_unused(self, fd: int) -> bool:
        try:
            # One who opens it just now is made to wait for a moment, and we get a signal that nobody minds:
            # the usual one would end the process.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:  # in use
            return False
        except OSError:  # no leases on this file system
            self.may_recycle = False
            return False
        return True

    def _folder(self, size: int) -> str:
        return f"{self.path}/{size}"

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self.path):
            yield from os.scandir(folder.path)


# --- names of files that nobody else makes -----------------------------------------------------------------

_numbers = itertools.count()
_mine = (0, "")


def unique_name() -> str:
    """Return a file name that no process of the host gives twice, and that tells whose it is."""
    global _mine
    pid = os.getpid()
    if _mine[0] != pid:
        _mine = (pid, f"{own_identity()}.{pid_namespace()}.{secrets.token_hex(4)}")
    return f"{_mine[1]}.{next(_numbers)}"


def is_orphan(name: str) -> bool:
    """Tell whether the process that made this name is known to be gone."""
    identity, namespace, *_ = [*name.split("."), ""]
    return namespace == pid_namespace() and "-" in identity and not is_alive(identity)


def pid_namespace() -> str:
    """Return what tells apart containers that share files and have pids of their own."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return "0"


def supports_leases(folder: str) -> bool:
    """Tell whether the file system of a folder can say that nobody uses a file."""
    pool = Pool(folder, folder)
    path = f"{folder}/{unique_name()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return pool.may_recycle and pool._is_unused(fd)
    finally:
        os.close(fd)
        os.unlink(path)

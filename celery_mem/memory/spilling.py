"""Where results go when memory is short: a local folder, or any file system that fsspec knows."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

from celery_mem.memory.checksum import TRAILER_BYTES, trailer_of
from celery_mem.memory.recycling import unique_name

ABOUT = ".node"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class Spill(Protocol):
    """Keeps files by token, each there whole or not at all."""

    def put(self, token: str, fd: int, nbytes: int) -> None:
        """Keep a copy of the first `nbytes` bytes of a file, and a checksum behind them.

        Raises:
            OSError: there is no room.
        """

    def open(self, token: str) -> int | None:
        """Return a descriptor of the file, which never changes; None if it is not there."""

    def size(self, token: str) -> int | None:
        """Return the size of a file; None if it is not there."""

    def drop(self, token: str) -> int | None:
        """Remove a file; returns its size, None if it is not there."""

    def tokens(self) -> Iterator[str]:
        """Name what is there."""

    def destroy(self) -> None:
        """Remove everything."""


def make_spill(url: str, local: str) -> Spill:
    """Return the place that an address names.

    Args:
        url: a folder, or an address of fsspec; the folder's own name is part of it.
        local: the folder where a distant place notes what it has.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file", "local"):
        return LocalSpill(parts.path, os.path.dirname(local))
    return DistantSpill(url, local)


class LocalSpill:
    """A folder on a local disk; what is there is read by mapping it.

    It outlives a restart of the machine, which its node folder in memory does not; so it has a copy of what
    the node folder says of itself.

    Args:
        path: of the folder.
        node_folder: whose results they are.
    """

    def __init__(self, path: str, node_folder: str = "") -> None:
        self.path = path
        self.node_folder = node_folder

    def put(self, token: str, fd: int, nbytes: int) -> None:
        if not os.path.isdir(self.path):
            os.makedirs(self.path, 0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{self.node_folder}/node", f"{self.path}/{ABOUT}")
        temp = f"{self.path}/.{unique_name()}"
        out = os.open(temp, _NEW, 0o600)
        try:
            copy_bytes(fd, out, nbytes)
            os.pwrite(out, trailer_of(fd, nbytes), nbytes)
            os.rename(temp, f"{self.path}/{token}")
        except BaseException:
            os.unlink(temp)
            raise
        finally:
            os.close(out)

    def open(self, token: str) -> int | None:
        try:
            return os.open(f"{self.path}/{token}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None

    def size(self, token: str) -> int | None:
        try:
            return os.stat(f"{self.path}/{token}", follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def drop(self, token: str) -> int | None:
        size = self.size(token)
        if size is None:
            return None
        try:
            os.unlink(f"{self.path}/{token}")
        except FileNotFoundError:
            return None
        return size

    def tokens(self) -> Iterator[str]:
        try:
            entries = os.scandir(self.path)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry.name

    def destroy(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class DistantSpill:
    """A file system of fsspec: a file is copied there, and fetched whole by each who reads it.

    A local folder has a small file with the size for each; it is written last and removed first, so that a
    look takes no journey and nobody sees half a copy.
    """

    def __init__(self, url: str, local: str) -> None:
        self.url = url
        self.local = local
        self._notes = LocalSpill(local)
        self._found: tuple[Any, str] | None = None

    def put(self, token: str, fd: int, nbytes: int) -> None:
        fs, folder = self._fs()
        fs.makedirs(folder, exist_ok=True)
        os.makedirs(self.local, 0o700, exist_ok=True)
        with os.fdopen(os.dup(fd), "rb") as source, fs.open(f"{folder}/{token}", "wb") as target:
            source.seek(0)
            left = nbytes
            while left:
                piece = source.read(min(left, 1 << 20))
                target.write(piece)
                left -= len(piece)
            target.write(trailer_of(fd, nbytes))
        temp = f"{self.local}/.{unique_name()}"
        with os.fdopen(os.open(temp, _NEW, 0o600), "w") as note:
            note.write(str(nbytes + TRAILER_BYTES))
        os.rename(temp, f"{self.local}/{token}")

    def open(self, token: str) -> int | None:
        if self.size(token) is None:
            return None
        fs, folder = self._fs()
        fd, temp = tempfile.mkstemp(prefix="celery-mem-")
        try:
            fs.get_file(f"{folder}/{token}", temp)
        except FileNotFoundError:  # dropped meanwhile
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        finally:
            copy = os.open(temp, os.O_RDONLY | os.O_CLOEXEC)  # it may be another file by now
            os.unlink(temp)
        os.close(fd)
        return copy

    def size(self, token: str) -> int | None:
        try:
            with open(f"{self.local}/{token}") as note:
                return int(note.read())
        except FileNotFoundError:
            return None

    def drop(self, token: str) -> int | None:
        size = self.size(token)
        if self._notes.drop(token) is None:
            return None
        fs, folder = self._fs()
        fs.rm_file(f"{folder}/{token}")
        return size

    def tokens(self) -> Iterator[str]:
        return self._notes.tokens()

    def destroy(self) -> None:
        fs, folder = self._fs()
        if fs.exists(folder):
            fs.rm(folder, recursive=True)
        shutil.rmtree(self.local, ignore_errors=True)

    def _fs(self) -> tuple[Any, str]:
        if self._found is None:
            from fsspec.core import url_to_fs

            self._found = url_to_fs(self.url)
        return self._found


def copy_bytes(source: int, target: int, nbytes: int) -> None:
    """Copy the first bytes of a file to another, in the kernel where it can."""
    at = 0
    if hasattr(os, "sendfile") and os.uname().sysname == "Linux":
        while at < nbytes:
            n = os.sendfile(target, source, at, nbytes - at)
            if n == 0:
                break
            at += n
    while at < nbytes:
        piece = os.pread(source, min(nbytes - at, 1 << 20), at)
        if not piece:
            raise OSError("a file became shorter while it was copied")
        os.pwrite(target, piece, at)
        at += len(piece)

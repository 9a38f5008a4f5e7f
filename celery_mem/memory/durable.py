"""Durable files: results that outlive all nodes, under any address that fsspec knows.

A file is named like the version of the result that it holds, `<namespace>/<token>`, and never changes. Where
there are real folders, it appears when it is whole; elsewhere that is what an object store promises.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from celery_mem.config import Settings
from celery_mem.errors import ConfigError, RedisUnavailableError
from celery_mem.memory.layout import flat

MAGIC = b"CMD1"
_HEAD = struct.Struct("<4sI")
_UNFINISHED = ".part"
PIECE_BYTES = 8 << 20


class Kept(NamedTuple):
    """A result that was read: its pickle stream, its buffers, writable and nobody else's, bytes of all."""

    head: bytearray
    buffers: list[bytearray]
    nbytes: int


class DurableFiles:
    """The durable files of one namespace. Threads and processes may write, read and drop at once.

    Args:
        url: address of fsspec.
        namespace: has a folder of its own there.
    """

    def __init__(self, url: str, namespace: str) -> None:
        from fsspec.core import url_to_fs

        self.url = f"{url.rstrip('/')}/{namespace}"
        try:
            self._fs, self._folder = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"mem_durable_url {url!r} cannot be used: {error}") from error
        self._renames = "file" in _protocols(self._fs)

    def write(self, token: str, head: Any, buffers: Sequence[Any]) -> None:
        """Write a result. Raises OSError where there is no room, or no way."""
        parts = [flat(part) for part in (head, *buffers)]
        self._fs.makedirs(self._folder, exist_ok=True)
        path = f"{self._folder}/{token}"
        target = f"{path}.{secrets.token_hex(4)}{_UNFINISHED}" if self._renames else path
        try:
            with self._fs.open(target, "wb") as file:
                for piece in _pieces(parts):
                    file.write(piece)
            if self._renames:
                self._fs.mv(target, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(target)
            raise

    def read(self, token: str) -> Kept | None:
        """Return a result; None if there is no such file, or it is not what was written.

        Raises:
            OSError: the place cannot be reached.
        """
        try:
            with self._fs.open(f"{self._folder}/{token}", "rb") as file:
                return _parse(file)
        except FileNotFoundError:
            if self._renames and not self._fs.exists(self._folder):
                raise OSError(f"there is no folder {self._folder}; is it mounted here?") from None
            return None

    def has(self, token: str) -> bool:
        """Tell whether a file is there."""
        return bool(self._fs.exists(f"{self._folder}/{token}"))

    def drop(self, token: str) -> None:
        """Delete a file; one that is not there is no mistake."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._folder}/{token}")

    def files(self) -> Iterator[tuple[str, float]]:
        """Name what is there, and when it was written: seconds since the epoch, 0 where nobody knows."""
        try:
            found = self._fs.ls(self._folder, detail=True)
        except FileNotFoundError:
            return
        for entry in found:
            if entry["type"] == "file":
                yield entry["name"].rpartition("/")[2], _written(entry)


@cache
def _opened(url: str, namespace: str) -> DurableFiles:
    return DurableFiles(url, namespace)


def durable_files(settings: Settings) -> DurableFiles | None:
    """Return the place of durable files; None if durable results stay in Redis."""
    return _opened(settings.durable_url, settings.namespace) if settings.durable_url else None


def read_durable(files: DurableFiles | None, key: str, token: str) -> Kept | None:
    """Return a durable result; None if its file is gone.

    Raises:
        ConfigError: this process does not know where durable files are.
        RedisUnavailableError: the place cannot be reached now.
    """
    if files is None:
        raise ConfigError(
            f"the result of {key} is in a durable file, and mem_durable_url is not set in this process; "
            "set it as on the workers"
        )
    try:
        return files.read(token)
    except OSError as error:  # it may be there still: to call it lost would lose it
        raise RedisUnavailableError(
            f"the durable file of {key} at {files.url} cannot be read: {error}"
        ) from error


def _pieces(parts: Sequence[memoryview]) -> Iterator[Any]:
    table = _HEAD.pack(MAGIC, len(parts)) + struct.pack(f"<{len(parts)}Q", *(p.nbytes for p in parts))
    checksum = zlib.crc32(table)
    yield table
    for part in parts:
        for at in range(0, part.nbytes, PIECE_BYTES):
            piece = part[at : at + PIECE_BYTES]
            checksum = zlib.crc32(piece, checksum)
            yield piece
    yield struct.pack("<I", checksum)


def _parse(file: Any) -> Kept | None:
    start = file.read(_HEAD.size)
    if len(start) < _HEAD.size or start[:4] != MAGIC:
        return None
    (count,) = struct.unpack("<I", start[4:])
    table = file.read(8 * count)
    if len(table) < 8 * count or not count:
        return None
    checksum = zlib.crc32(start + table)
    parts = []
    for size in struct.unpack(f"<{count}Q", table):
        part = bytearray()
        while len(part) < size:
            piece = file.read(min(PIECE_BYTES, size - len(part)))
            if not piece:
                return None
            part += piece
        checksum = zlib.crc32(part, checksum)
        parts.append(part)
    if file.read(4) != struct.pack("<I", checksum):
        return None
    return Kept(parts[0], parts[1:], sum(map(len, parts)))


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _written(entry: dict[str, Any]) -> float:
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value: Any = entry.get(name)
        if isinstance(value, (int, float)):
            return float(value)
        if hasattr(value, "timestamp"):
            return float(value.timestamp())
    return 0.0

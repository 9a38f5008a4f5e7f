"""The node folder: the results of a node as files in shared memory, which every process of the host maps.

A result is there whole or not at all, under its token, and never changes. Who reads gets a mapping that is
writable and private (copy on write). Files of dropped results are written again, see `recycling`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from celery_mem.errors import CeleryMemError
from celery_mem.memory.account import Account, Usage
from celery_mem.memory.checksum import TRAILER_BYTES, is_whole
from celery_mem.memory.layout import Layout, cut, flat, header, lay_out, parse, write_parts
from celery_mem.memory.mapping import map_private, map_shared
from celery_mem.memory.recycling import (
    Pool,
    is_orphan,
    pid_namespace,
    size_class,
    supports_leases,
    unique_name,
)
from celery_mem.memory.roots import is_memory, is_private, own_folder, read_about, remove_folder, spill_folder
from celery_mem.memory.spilling import make_spill

log = logging.getLogger("celery_mem.memory")

MAP_LEAST = 256 << 10
"""Smaller files are read: a mapping costs a page fault per page or so."""
RECYCLE_BYTES = 256 << 20
_FULL = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOMEM,
    errno.ENOENT,
}  # ENOENT: the folder was removed
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_TOKEN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ABANDONED_S = 3600.0


class NoSpace(CeleryMemError):  # noqa: N818 (no fault of anybody: whoever meets it goes another way)
    """There is no room for a result among the node's files; keep it in Redis."""


class Mapped(NamedTuple):
    """A result that was read.

    Attributes:
        head: its pickle stream.
        buffers: its buffers, writable; nobody else sees what is written to them.
        nbytes: bytes of all parts.
    """

    head: memoryview
    buffers: list[memoryview]
    nbytes: int


class NodeFolder:
    """The results of one node: any number of processes write, read and drop at once.

    Args:
        path: of the folder, which is there; `create` and `open` make sure of it.
        about: what its file `node` says.
    """

    def __init__(self, path: str, about: dict[str, Any]) -> None:
        self.path = path
        self.node = str(about["node"])
        self.process = str(about["process"])
        self.recycle_bytes = int(about["recycle_bytes"])
        self.is_memory = bool(about["is_memory"])
        self._files = f"{path}/files"
        self._work = f"{path}/work"
        self._pool = Pool(f"{path}/pool", self._work)
        self._spill = make_spill(str(about["spill"]), f"{path}/spilled")
        self._account = Account(f"{path}/account")

    @classmethod
    def create(
        cls,
        root: str,
        namespace: str,
        node: str,
        process: str,
        *,
        recycle_bytes: int = RECYCLE_BYTES,
        spill_url: str = "",
    ) -> NodeFolder:
        """Make the folder of a node.

        Args:
            root: what `choose_root` returned.
            process: identity of the worker; when it is gone, the folder is dead.
            recycle_bytes: most memory that files of dropped results may keep.
            spill_url: where spilled results go; empty means a local folder.
        Raises:
            OSError: it cannot be made.
        """
        # Short, for the paths of sockets in it may have no more than a hundred characters.
        name = f"{re.sub('[^A-Za-z0-9_-]', '_', namespace)[:16]}-{secrets.token_hex(6)}"
        while True:
            parent = own_folder(root)
            new = f"{parent}/.new-{name}"
            try:
                os.mkdir(new, 0o700)
                break
            except FileNotFoundError:  # somebody just found the parent empty and removed it
                continue
        for part in ("files", "work", "pool", "spilled"):
            os.mkdir(f"{new}/{part}", 0o700)
        about = {
            "node": node,
            "process": process,
            "pids": pid_namespace(),
            "recycle_bytes": recycle_bytes if supports_leases(f"{new}/work") else 0,
            "is_memory": is_memory(new),
            "spill": f"{spill_url.rstrip('/')}/{name}" if spill_url else spill_folder(name),
        }
        with os.fdopen(os.open(f"{new}/node", _NEW, 0o600), "w") as file:
            json.dump(about, file)
        os.rename(new, f"{parent}/{name}")
        return cls(f"{parent}/{name}", about)

    @classmethod
    def open(cls, path: str) -> NodeFolder | None:
        """Return the folder at `path`; None if this host (or this user) has none there."""
        about = read_about(path) if path and is_private(path) else None
        return None if about is None else cls(path, about)

    # --- writing --------------------------------------------------------------------------------------------

    def write(self, token: str, head: Any, buffers: Sequence[Any] = ()) -> int:
        """Write a result; readers see it when it is whole. Returns its bytes.

        A token names the same bytes wherever it is: what is there already stays.

        Raises:
            NoSpace: it has to go elsewhere; nothing is left of it here.
        """
        parts = [flat(part) for part in (head, *buffers)]
        with self.begin(token, [part.nbytes for part in parts], map_parts=False) as incoming:
            with _no_space(self.path):
                write_parts(incoming.fd, incoming.layout, parts)
            return incoming.commit()

    def begin(self, token: str, sizes: Sequence[int], *, map_parts: bool = True) -> Incoming:
        """Start a result whose parts come in little by little, the head first.

        Raises:
            NoSpace: see `write`. All the room is taken now, so that filling the parts cannot fail.
        """
        self._file(token)
        layout = lay_out(sizes)
        size = size_class(layout.end)
        claimed = self._pool.claim(size)
        if not isinstance(claimed, int):
            self._account.add(pool_nbytes=claimed.pool_nbytes)
            incoming = Incoming(self, token, layout, claimed.path, claimed.fd)
        else:
            self._account.add(pool_nbytes=claimed)
            path = f"{self._work}/{unique_name()}"
            with _no_space(self.path):
                incoming = Incoming(self, token, layout, path, os.open(path, _NEW, 0o600))
        try:
            with _no_space(self.path):
                if isinstance(claimed, int):
                    os.ftruncate(incoming.fd, size)
                if map_parts:
                    incoming.map()
        except BaseException:
            incoming.abort()
            raise
        return incoming

    def can_recycle(self, sizes: Sequence[int]) -> bool:
        """Tell whether parts of these sizes would go into a warm file, which takes no longer than a copy."""
        return self._pool.has(size_class(lay_out(sizes).end))

    def link(self, other: NodeFolder, token: str) -> bool:
        """Have a result of another node of this host here too, in the same memory; returns whether it is.

        Each folder may drop its own: nobody writes to a file, and one with two names is not used again.
        """
        path = self._file(token)
        try:
            os.link(other._file(token), path, follow_symlinks=False)
            nbytes = os.stat(path, follow_symlinks=False).st_blocks * 512
        except FileExistsError:
            return True
        except OSError:  # it is spilled, or on another file system, or one without links
            return False
        self._account.add(files=1, nbytes=nbytes)
        return True

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, token: str) -> Mapped | None:
        """Return a result, also a spilled one; None if it is not here, or not as it was written.

        Raises:
            NoSpace: a result that was spilled far away cannot be fetched.
        """
        path = self._file(token)
        try:
            fd = _open_file(path)
            if fd is not None:
                return _read(fd, token)
            # One that is being spilled is in both places for a moment, never in none.
            fd = self._open_spilled(token)
            return None if fd is None else _read(fd, token, is_spilled=True)
        except OSError as error:  # of the disk
            log.warning("result %s cannot be read: %s", token, error)
            return None

    def has(self, token: str) -> bool:
        """Tell whether a result is here, spilled or not."""
        path = self._file(token)
        return os.path.exists(path) or self._spill.size(token) is not None

    def is_in_files(self, token: str) -> bool:
        """Tell whether a result is here and not spilled, at the cost of a look."""
        return os.path.exists(self._file(token))

    def tokens(self) -> Iterator[str]:
        """Name all results that are here, those that are spilled too."""
        seen = set(os.listdir(self._files))
        yield from seen
        yield from (token for token in self._spill.tokens() if token not in seen)

    def usage(self) -> Usage:
        """Return what lies here; costs the same however many files there are."""
        return self._account.read()

    def coldest(self) -> list[tuple[str, int]]:
        """Return the tokens and sizes of results in memory, first those that nobody read for long."""
        found = []
        for entry in os.scandir(self._files):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime_ns, entry.name, status.st_blocks * 512))
        return [(token, nbytes) for _, token, nbytes in sorted(found)]

    # --- dropping and spilling ------------------------------------------------------------------------------

    def drop(self, tokens: Iterable[str]) -> int:
        """Remove results, spilled or not; returns how many there were.

        What somebody still reads or has mapped stays as it is for them.
        """
        dropped = nbytes = kept = spilled = 0
        room = -1
        for token in tokens:
            path = self._file(token)
            is_here = False
            try:
                status = os.stat(path, follow_symlinks=False)
                size = status.st_blocks * 512
                if room < 0:
                    room = self.recycle_bytes - self.usage().pool_nbytes
                if kept + size <= room:
                    self._pool.put(path, status.st_size)
                    kept += size
                else:
                    os.unlink(path)
                nbytes += size
                is_here = True
            except FileNotFoundError:
                pass
            # Whoever spills a file that was here finds it gone at the end, and drops the copy.
            was_spilled = None if is_here else self._spill.drop(token)
            spilled += was_spilled or 0
            dropped += is_here or was_spilled is not None
        self._account.add(-dropped, -nbytes, kept, -spilled)
        return dropped

    def spill(self, token: str) -> int:
        """Move a result out of memory; readers find it all the time. Returns the memory freed.

        Raises:
            NoSpace: there is no room where it should go.
        """
        if not self.is_memory:
            return 0  # on a disk already
        path = self._file(token)
        fd = _open_file(path)
        if fd is None:
            return 0
        with contextlib.closing(_Descriptor(fd)):
            status = os.fstat(fd)
            layout = parse(map_private(fd, status.st_size))
            if layout is None:
                return 0
            with _no_space("the place for spilled results"):
                if self._spill.size(token) is None:
                    self._spill.put(token, fd, layout.end)
        size = status.st_blocks * 512
        try:
            os.unlink(path)  # and not into the pool: memory is short
        except FileNotFoundError:
            self._spill.drop(token)  # dropped meanwhile
            return 0
        self._account.add(nbytes=-size, spilled_nbytes=layout.end + TRAILER_BYTES)
        return size

    def trim_pool(self, keep_bytes: int = 0) -> int:
        """Give back memory of files that wait to be used again, down to `keep_bytes`; returns the bytes."""
        freed = self._pool.trim(self.usage().pool_nbytes - keep_bytes)
        self._account.add(pool_nbytes=-freed)
        return freed

    def tidy(self) -> Usage:
        """Remove what killed writers left, count everything anew and return it. Takes a look at each file."""
        for entry in os.scandir(self._work):
            with contextlib.suppress(FileNotFoundError):
                is_old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_S
                if is_old or is_orphan(entry.name):
                    os.unlink(entry.path)
        here = dict(self.coldest())
        for token in here:
            self._spill.drop(token)  # whoever spilled it was killed before the end
        spilled = {token: self._spill.size(token) or 0 for token in self._spill.tokens()}
        usage = Usage(len(here | spilled), sum(here.values()), self._pool.nbytes(), sum(spilled.values()))
        self._account.set(usage)
        return usage

    def destroy(self) -> None:
        """Remove the folder with all that is in it."""
        remove_folder(self.path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self.path))

    # --- inside ---------------------------------------------------------------------------------------------

    def _file(self, token: str) -> str:
        if not _TOKEN.fullmatch(token):
            raise ValueError(f"not a token: {token!r}")
        return f"{self._files}/{token}"

    def _open_spilled(self, token: str) -> int | None:
        with _no_space("the temp folder"):
            return self._spill.open(token)

    def _publish(self, path: str, token: str, nbytes: int) -> None:
        """Make a file visible under its token, unless the token is there: then the file goes."""
        try:
            os.link(path, self._file(token))
        except FileExistsError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno in _FULL:
                raise
            os.rename(path, self._file(token))  # no links on this file system
        else:
            os.unlink(path)
        self._account.add(files=1, nbytes=nbytes)


class Incoming:
    """A result that is being written. Nobody sees it before `commit`; a `with` block without one aborts.

    Attributes:
        layout: where its parts are in the file.
        parts: writable views of them, the head first; of no use after `commit` and `abort`.
        fd: descriptor of the file.
    """

    def __init__(self, folder: NodeFolder, token: str, layout: Layout, path: str, fd: int) -> None:
        self.layout = layout
        self.parts: list[memoryview] = []
        self.fd = fd
        self._folder = folder
        self._token = token
        self._path = path

    def map(self) -> None:
        """Take all the room and map the parts.

        Raises:
            OSError: there is not enough; without this call a full memory would kill the process (SIGBUS).
        """
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fd, 0, self.layout.end)
        self.parts = cut(map_shared(self.fd, self.layout.end), self.layout)

    def mapped(self) -> Mapped:
        """Return what was written, as `NodeFolder.read` would: it stays, whatever comes of the file."""
        head, *buffers = cut(map_private(self.fd, os.fstat(self.fd).st_size), self.layout)
        return Mapped(head, buffers, self.layout.nbytes)

    def commit(self) -> int:
        """Make the result visible; returns its bytes.

        Raises:
            NoSpace: the folder was removed meanwhile.
        """
        with _no_space(self._folder.path):
            if self.parts:
                os.pwrite(self.fd, header(self.layout, self.parts[0]), 0)
                self._release()
            self._folder._publish(self._path, self._token, os.fstat(self.fd).st_blocks * 512)
        self._close()
        return self.layout.nbytes

    def abort(self) -> None:
        """Remove it."""
        self._release()
        if self.fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._close()

    def __enter__(self) -> Incoming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _release(self) -> None:
        for part in self.parts:
            with contextlib.suppress(BufferError):  # somebody's array is on it; then the file is not recycled
                part.release()
        self.parts = []

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        os.close(fd)


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


@contextlib.contextmanager
def _no_space(where: str) -> Iterator[None]:
    """Turn the errors of a full file system into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace(f"no room in {where}: {error.strerror}") from error
        raise


def _open_file(path: str) -> int | None:
    """Return a descriptor of a file that nobody writes any more, nor will while it is open or mapped."""
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return None
    try:
        # It may have been dropped and claimed between the look-up of its name and its opening. Where the name
        # still leads to it, any claim comes later, and finds it open.
        if os.stat(path, follow_symlinks=False).st_ino == os.fstat(fd).st_ino:
            return fd
    except FileNotFoundError:
        pass
    os.close(fd)
    return None


def _read(fd: int, token: str, *, is_spilled: bool = False) -> Mapped | None:
    with contextlib.closing(_Descriptor(fd)):
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        # By reads, not by the mapping, where an error of the disk would end the process.
        if is_spilled and not is_whole(fd, status.st_size - TRAILER_BYTES):
            log.warning("the spilled result %s is damaged", token)
            return None
        if status.st_size < MAP_LEAST:
            data = memoryview(bytearray(status.st_size))
            n = os.preadv(fd, [data], 0)
            data = data[:n]
        else:
            data = map_private(fd, status.st_size)
        with contextlib.suppress(OSError):
            os.utime(fd)  # what was read last is spilled last
        layout = parse(data)
        if layout is None:
            log.warning("the file of result %s is damaged", token)
            return None
    head, *buffers = cut(data, layout)
    return Mapped(head, buffers, layout.nbytes)

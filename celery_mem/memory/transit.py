"""Results on their way from one host to another: blobs with a time to live, written and read in a stream.

Pieces follow each other without waiting for replies. Their bytes go from the result's own memory to the
socket, and from the socket to where they are to lie; redis-py would copy them on both sides.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from redis.connection import AbstractConnection
from redis.exceptions import ConnectionError, ResponseError

from celery_mem.errors import RedisUnavailableError
from celery_mem.memory import blobs
from celery_mem.memory.checksum import checksum
from celery_mem.memory.layout import flat
from celery_mem.state.keys import Keys
from celery_mem.state.link import BROKEN, Command, Link

log = logging.getLogger("celery_mem.memory")

MOST_BYTES = 1 << 40
"""No Redis holds a blob of this size: a head that says so was altered."""
WINDOW = 2
"""Pieces under way at a time: one is sent while the reply to another comes."""
PIECE_BYTES = 4 << 20
"""The quickest size, of 1 to 64 MiB: Redis copies a piece while it is in the processor's cache."""
_LINE_BUFFER = 4096  # small: what comes with a line of the piece after it is copied

Make = Callable[[Sequence[int]], Sequence[memoryview]]


def transit_name(keys: Keys, token: str, key: str) -> str:
    """Return the Redis key of the transit copy of a result. It is no replica, and no record names it."""
    return keys.blob(f"transit-{token}", key)


def publish(
    link: Link,
    name: str,
    head: Any,
    buffers: Sequence[Any],
    *,
    piece_bytes: int,
    lease_s: float,
    on_start: Callable[[], None] | None = None,
    on_piece: Callable[[int], None] | None = None,
) -> int:
    """Write a blob with a time to live, which each piece renews; returns the number of pieces.

    Args:
        link: one of its own: it is busy until the end.
        piece_bytes: most bytes per piece; Redis takes no more than 512 MB.
        on_start: called when there is a blob, though without pieces.
        on_piece: called with the number of each piece that Redis has.
    Raises:
        RedisUnavailableError: the connection stayed broken; the blob vanishes by itself.
        redis.ResponseError: Redis refused a piece, for lack of memory as a rule.
    """
    parts = [flat(part) for part in (head, *buffers)]
    sizes = struct.pack(f"<{len(parts)}Q", *(part.nbytes for part in parts))
    lease_ms = int(lease_s * 1000)
    link.batch([("HSET", name, "h", sizes), ("PEXPIRE", name, lease_ms)])
    if on_start is not None:
        on_start()
    pieces = list(blobs.cut(parts, piece_bytes))
    checks: list[int] = []  # of all bytes up to the end of each piece
    done = 0

    def send(conn: AbstractConnection) -> None:
        nonlocal done
        sent = done
        while done < len(pieces):
            while sent < len(pieces) and sent - done < WINDOW:
                if sent == len(checks):
                    checks.append(checksum(pieces[sent], checks[-1] if checks else 0))
                is_last = sent + 1 == len(pieces)
                fields = (sent, pieces[sent], *(("c", checks[-1]) if is_last else ()))
                _send(conn, [("HSET", name, *fields), ("PEXPIRE", name, lease_ms)])
                sent += 1
            conn.read_response()
            conn.read_response()
            done += 1
            if on_piece is not None:
                on_piece(done - 1)

    _persist(link, send, lambda: done)
    return len(pieces)


def receive(link: Link, name: str, make: Make, *, wait: Callable[[], bool] | None = None) -> bool:
    """Read a blob into memory that the caller provides; returns whether it was there and undamaged.

    One that is damaged is removed.

    Args:
        link: one of its own: it is busy until the end.
        make: gets the sizes of the parts and returns writable views of that size, where the bytes go.
        wait: called where a piece is not there yet; returns False to give up. None gives up at once.
    Raises:
        RedisUnavailableError: the connection stayed broken.
    """
    packed = link.call("HGET", name, "h")
    if packed is None:
        return False
    if not packed or len(packed) % 8:
        return _remove_damaged(link, name)
    sizes = struct.unpack(f"<{len(packed) // 8}Q", packed)
    if sum(sizes) > MOST_BYTES:
        return _remove_damaged(link, name)
    target = _Target(make(sizes))
    while True:
        _persist(link, lambda conn: _take_pieces(conn, name, target), lambda: target.at)
        if target.is_full:
            return _is_whole(link, name, target)
        if wait is None or not wait():
            return False


def _is_whole(link: Link, name: str, target: _Target) -> bool:
    check = link.call("HGET", name, "c")
    if check is None or check == b"%d" % target.check:
        return True
    return _remove_damaged(link, name)


def _remove_damaged(link: Link, name: str) -> bool:
    log.warning("the blob %s is damaged", name)
    link.call("UNLINK", name)
    return False


def _persist(link: Link, work: Callable[[AbstractConnection], None], progress: Callable[[], int]) -> None:
    """Do `work` on the link's connection, again on a new one while it breaks and gets on between."""
    before, since = progress(), time.monotonic()
    while True:
        try:
            with link.lock:
                try:
                    work(link.connection())
                    return
                except BaseException:
                    link.close()  # replies may be under way
                    raise
        except BROKEN as error:
            if progress() > before:
                before, since = progress(), time.monotonic()
            elif time.monotonic() - since > link.retry_timeout:
                raise RedisUnavailableError(
                    f"the connection to {link.address} keeps breaking: {error}"
                ) from error
            link.call("PING")  # the link waits, as long as it may, until there is a Redis again


# --- sending ------------------------------------------------------------------------------------------------


def _send(conn: AbstractConnection, commands: Sequence[Command]) -> None:
    """Send commands whose last argument may be large, without joining it to the rest."""
    if not _is_socket(conn):
        conn.send_packed_command(conn.pack_commands(commands), check_health=False)
        return
    out: list[Any] = []
    text = bytearray()
    for command in commands:
        text += b"*%d\r\n" % len(command)
        for argument in command:
            data = argument if isinstance(argument, (bytes, memoryview)) else str(argument).encode()
            n = len(data)  # a piece is a flat view
            text += b"$%d\r\n" % n
            if n < _LINE_BUFFER:
                text += data
            else:
                out += [bytes(text), data]
                text.clear()
            text += b"\r\n"
    conn.send_packed_command([*out, bytes(text)], check_health=False)


def _is_socket(conn: AbstractConnection) -> bool:
    """Tell whether a connection speaks through a socket that we know how to use: unix, TCP or TLS."""
    return isinstance(getattr(conn, "_sock", None), socket.socket)


# --- receiving ----------------------------------------------------------------------------------------------


class _Target:
    """Parts of memory, taken as one: where the next bytes go."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self.parts = [part for part in parts if part.nbytes]
        self.total = sum(part.nbytes for part in self.parts)
        self.at = 0
        self.pieces = 0  # whole ones that were taken
        self.piece_bytes = 0  # of the first, and of all but the last
        self.check = 0  # checksum of all that was taken

    @property
    def is_full(self) -> bool:
        return self.at == self.total

    def spans(self, nbytes: int) -> Iterator[memoryview]:
        """Yield views of the next bytes; `at` does not move."""
        skip = self.at
        for part in self.parts:
            if skip >= part.nbytes:
                skip -= part.nbytes
                continue
            view = part[skip : skip + nbytes]
            skip = 0
            nbytes -= view.nbytes
            yield view
            if nbytes == 0:
                return
        if nbytes:
            raise ConnectionError(f"a blob is {nbytes} bytes longer than it says")

    def took(self, nbytes: int) -> None:
        for view in self.spans(nbytes):  # while it is in the processor's cache, and more is on its way
            self.check = checksum(view, self.check)
        self.piece_bytes = self.piece_bytes or nbytes
        self.pieces += 1
        self.at += nbytes


def _take_pieces(conn: AbstractConnection, name: str, target: _Target) -> None:
    """Take pieces until there are all, or the next is not there."""
    replies = _Replies(conn._sock) if _is_socket(conn) else None
    sent = target.pieces
    is_missing = False
    while not (target.is_full or is_missing) or sent > target.pieces:
        # The first one tells how many there are.
        window = WINDOW if target.piece_bytes else 1
        left = -(-(target.total - target.at) // (target.piece_bytes or target.total))
        while not is_missing and sent < target.pieces + min(window, left):
            _send(conn, [("HGET", name, sent)])
            sent += 1
        nbytes = None
        if is_missing:  # what was asked for beyond it
            replies.skip() if replies else conn.read_response()
        else:
            nbytes = replies.take(target) if replies else _take_plain(conn, target)
        if nbytes is None:
            is_missing = True
            sent -= 1
        else:
            target.took(nbytes)


def _take_plain(conn: AbstractConnection, target: _Target) -> int | None:
    piece = conn.read_response()
    if piece is None:
        return None
    view = memoryview(piece)
    at = 0
    for span in target.spans(view.nbytes):
        span[:] = view[at : at + span.nbytes]
        at += span.nbytes
    return at


class _Replies:
    """Reads bulk replies from a socket, their bytes straight to where they are to lie."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(_LINE_BUFFER))
        self._start = self._end = 0

    def take(self, target: _Target) -> int | None:
        """Read one reply into the target; returns its size, None for the reply "nothing"."""
        nbytes = self._size()
        if nbytes is None:
            return None
        for span in target.spans(nbytes):
            self._into(span)
        self._end_of_line()
        return nbytes

    def skip(self) -> None:
        """Read one reply for nobody."""
        left = self._size()
        if left is None:
            return
        waste = memoryview(bytearray(min(left, 1 << 20)))
        while left:
            self._into(waste[: min(left, waste.nbytes)])
            left -= min(left, waste.nbytes)
        self._end_of_line()

    def _size(self) -> int | None:
        line = self._line()
        if line[:1] == b"-":
            raise ResponseError(line[1:].decode(errors="replace"))
        if line[:1] != b"$":
            raise ConnectionError(f"not the reply that was expected: {line[:80]!r}")
        size = int(line[1:])
        return None if size < 0 else size

    def _line(self) -> bytes:
        line = bytearray()
        while True:
            data = bytes(self._buffer[self._start : self._end])
            found = data.find(b"\n")
            if found >= 0:
                self._start += found + 1
                return bytes(line + data[:found]).rstrip(b"\r")
            line += data
            self._start, self._end = 0, self._recv(self._buffer)

    def _end_of_line(self) -> None:
        if self._line():
            raise ConnectionError("a reply does not end where it should")

    def _into(self, view: memoryview) -> None:
        n = min(view.nbytes, self._end - self._start)
        view[:n] = self._buffer[self._start : self._start + n]
        self._start += n
        while n < view.nbytes:
            n += self._recv(view[n:])

    def _recv(self, view: memoryview) -> int:
        n: int = self._sock.recv_into(view)
        if n == 0:
            raise ConnectionError("the connection was closed in the middle of a reply")
        return n

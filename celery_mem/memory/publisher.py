"""The agent's side of a transit copy: it is published for those who ask, and goes with the last of them.

Whoever waits has a reply list in Redis, on which the agent says: "y <name>" the copy has this name, and is
complete or being written; "+" there is more of it; "n" the result is not here. A copy names its readers in
fields of its own; the last of them removes it (`finish`), and its time to live does if one dies.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from redis.exceptions import ResponseError

from celery_mem.errors import CeleryMemError
from celery_mem.memory.asking import NobodyThere, ask, listeners
from celery_mem.memory.files import Mapped, NodeFolder
from celery_mem.memory.roots import AGENT_SOCKET
from celery_mem.memory.transit import PIECE_BYTES, publish, transit_name
from celery_mem.state.keys import Keys
from celery_mem.state.link import Command, Link

HERE, MORE, NOT_HERE = "y", "+", "n"
_READER = "r:"  # begins a field of a copy; its reply list is the rest
_WHOLE = "e"  # field of a copy: it is complete
_REPLY_MS = 10_000
_NEWS_MS = 2_000  # of a piece: it may come when its reader has all and is gone


class _Copy:
    """One that is being written, and the reply lists of those who wait for it."""

    def __init__(self) -> None:
        self.replies: list[str] = []
        self.is_begun = False


class Publisher:
    """Publishes what other hosts ask this node for. Threads may serve at once.

    Args:
        link: where asked; transfers have links of their own.
        keys: of the namespace.
        find: returns a result of this node by its token, see `find_here`.
        piece_bytes: most bytes per piece.
        lease_s: time to live of a copy, which each piece renews.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        find: Callable[[str], Mapped | None],
        *,
        piece_bytes: int = PIECE_BYTES,
        lease_s: float = 120.0,
    ) -> None:
        self.link = link
        self.keys = keys
        self.find = find
        self.piece_bytes = min(piece_bytes, PIECE_BYTES)
        self.lease_s = lease_s
        self._lock = threading.Lock()
        self._copies: dict[str, _Copy] = {}  # that are being written

    def serve(self, token: str, reply: str, key: str) -> bool:
        """Carry out the message `p <token> <reply list> <key>`; returns whether the result was here.

        Raises:
            RedisUnavailableError: Redis is away; the reader asks again.
        """
        name = transit_name(self.keys, token, key)
        if self._waits_too(name, reply):
            return True
        if None not in self.link.call("HMGET", name, "h", _WHOLE):
            self._join(name, reply)
            return True
        found = self.find(token)
        if found is None:
            self._say(reply, NOT_HERE)
            return False
        with self._lock:
            is_ours = name not in self._copies
            copy = self._copies.setdefault(name, _Copy())
        self._waits_too(name, reply)
        if is_ours:
            try:
                self._publish(name, found, copy)
            finally:
                with self._lock:
                    self._copies.pop(name, None)
        return True

    def _waits_too(self, name: str, reply: str) -> bool:
        """Let one more wait for a copy that is being written; returns whether there is one."""
        with self._lock:
            copy = self._copies.get(name)
            if copy is None:
                return False
            copy.replies.append(reply)
            if not copy.is_begun:
                return True  # is told when it is
        self._join(name, reply)
        return True

    def _publish(self, name: str, found: Mapped, copy: _Copy) -> None:
        link, news = self.link.twin(), self.link.twin()

        def on_start() -> None:
            with self._lock:
                copy.is_begun = True
                replies = list(copy.replies)
            for reply in replies:
                self._join(name, reply)

        def on_piece(_: int) -> None:
            with self._lock:
                replies = list(copy.replies)
            news.batch([c for reply in replies for c in _say(reply, MORE)])

        try:
            publish(
                link,
                name,
                found.head,
                found.buffers,
                piece_bytes=self.piece_bytes,
                lease_s=self.lease_s,
                on_start=on_start,
                on_piece=on_piece,
            )
            if not _change_readers(link, name, self.lease_s, ("HSET", name, _WHOLE, 1)):
                link.call("UNLINK", name)  # nobody waits any more
        except ResponseError as error:  # Redis is full
            link.call("UNLINK", name)
            raise CeleryMemError(f"cannot publish {name}: {error}") from error
        finally:
            link.close()
            news.close()

    def _join(self, name: str, reply: str) -> None:
        _change_readers(self.link, name, self.lease_s, ("HSET", name, _READER + reply, ""))
        self._say(reply, f"{HERE} {name}")

    def _say(self, reply: str, word: str) -> None:
        self.link.batch(_say(reply, word))


def finish(link: Link, name: str, reply: str, lease_s: float = 120.0) -> None:
    """Say that a reader is done with a copy; the last one removes it.

    One that joins at the same moment finds it gone, and asks again.
    """
    if not _change_readers(link, name, lease_s, ("HDEL", name, _READER + reply)):
        link.call("UNLINK", name)


def find_here(folder: NodeFolder, token: str, *, timeout: float = 60.0) -> Mapped | None:
    """Return a result of this node, which the process that made it may have to write first."""
    found = folder.read(token)
    for name in () if found else listeners(folder.path):
        if name == AGENT_SOCKET:
            continue
        with contextlib.suppress(NobodyThere, TimeoutError):
            if ask(folder.path, name, f"w {token}", timeout=timeout).startswith("y"):
                break
    return found or folder.read(token)


def _change_readers(link: Link, name: str, lease_s: float, change: Command) -> bool:
    """Change a copy and tell whether it has readers; what a change alone may have made does not stay."""
    lease = ("PEXPIRE", name, int(lease_s * 1000))
    replies = link.batch([("MULTI",), change, lease, ("HKEYS", name), ("EXEC",)])
    return any(field.startswith(_READER.encode()) for field in replies[-1][2])


def _say(reply: str, word: str) -> list[Command]:
    return [("RPUSH", reply, word), ("PEXPIRE", reply, _NEWS_MS if word == MORE else _REPLY_MS)]

"""Results that only the process that made them has: they serve its slots, and are written when there is time.

To write into fresh shared memory costs more than most results take to make. So a result stays as it is, and a
thread of the process writes it to the node's folder when the slots idle, when its turn comes, when there are
too many, or when somebody asks. What is freed before that is never written.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from celery_mem.memory.copying import copy_of
from celery_mem.memory.files import NoSpace
from celery_mem.memory.serialize import Frames

log = logging.getLogger("celery_mem.worker")

IDLE_S = 0.02
"""The slots idle when nothing has run for so long: between two tasks is no time to write."""
RETRY_S = 2.0
"""After this time, a folder or a Redis that had no room is tried again."""
NEVER = float("inf")


class Folder(Protocol):
    """What this module needs of a node's folder."""

    def write(self, token: str, head: Any, buffers: Sequence[Any]) -> int: ...

    def drop(self, tokens: Iterable[str]) -> int: ...


class Copy(NamedTuple):
    """A result for one reader, who may do with it what he likes."""

    head: Any
    buffers: list[Any]


class _Item:
    """One live result.

    Attributes:
        since: when it was made.
        not_before: when to try to store it (again); never, if the folder had no room and Redis knows nothing
            of the result, which therefore cannot be saved there.
        is_known: whether Redis may know of it.
        is_urgent: somebody waits for it.
        is_written: it is in the folder.
        was_dropped: it was freed while it was being written.
        settled: set when it is stored or gone.
    """

    __slots__ = (
        *("buffers", "head", "is_known", "is_urgent", "is_written"),
        *("key", "nbytes", "not_before", "settled", "since", "token", "was_dropped"),
    )

    def __init__(self, key: str, token: str, head: bytes, buffers: list[Any], nbytes: int) -> None:
        self.key = key
        self.token = token
        self.head = head
        self.buffers = buffers
        self.nbytes = nbytes
        self.since = time.monotonic()
        self.not_before = 0.0
        self.is_known = self.is_urgent = self.is_written = self.was_dropped = False
        self.settled = threading.Event()


class LiveResults:
    """The live results of one process, shared by its slots.

    Args:
        folder: where they are written.
        limit: most bytes kept here; who adds more waits until others are written.
        write_behind: seconds after which a result is written even while tasks run.
        overflow: called with key, token, head and buffers of a result for which the folder has no room;
            stores it elsewhere, for good, or raises an error, and is called again later.

    Attributes:
        nbytes: bytes of the results that are here.
        written: number of results that were written to the folder.
    """

    def __init__(
        self,
        folder: Folder,
        limit: int,
        write_behind: float,
        overflow: Callable[[str, str, bytes, Sequence[Any]], None],
    ) -> None:
        self.folder = folder
        self.limit = limit
        self.write_behind = write_behind
        self.nbytes = 0
        self.written = 0
        self._overflow = overflow
        self._items: dict[str, _Item] = {}  # Invariant: nbytes is the sum of theirs; oldest first
        self._changed = threading.Condition()
        self._busy = 0
        self._idle_since = time.monotonic()
        self._no_room_until = 0.0
        self._thread: threading.Thread | None = None
        self._closing = False
        self._now_writing: _Item | None = None

    # --- the slots' side ---

    @property
    def has_room(self) -> bool:
        """Whether results can be kept here; else whoever makes one is to store it in Redis at once."""
        return time.monotonic() >= self._no_room_until

    def add(self, key: str, token: str, frames: Frames) -> None:
        """Keep a result. The caller must have let go of the object that `frames` was made of.

        Waits while there are more bytes than the limit and some of them can be stored.
        """
        # What anybody else refers to may still be written into: of that we need a copy.
        buffers = [b if is_ours(b) else copy_of(b) for b in frames.buffers]
        item = _Item(key, token, frames.head, buffers, frames.nbytes)
        del frames
        with self._changed:
            self._items[token] = item
            self.nbytes += item.nbytes
            self._start()
            if self.nbytes > self.limit:
                self._changed.notify_all()
                self._changed.wait_for(self._may_go_on)

    def now_known(self, tokens: Iterable[str]) -> None:
        """Note that Redis has been told of results."""
        with self._changed:
            for token in tokens:
                if (item := self._items.get(token)) is not None:
                    item.is_known = True
                    if item.not_before == NEVER:
                        item.not_before = 0.0
                        self._changed.notify_all()

    def sizes(self, token: str) -> list[int] | None:
        """Return the bytes of the parts of a result; None if it is not here."""
        item = self._items.get(token)
        return None if item is None else [len(item.head), *(memoryview(b).nbytes for b in item.buffers)]

    def copy(self, token: str) -> Copy | None:
        """Return a copy for a reader, who may write into it; None if the result is not here."""
        item = self._items.get(token)
        if item is None:
            return None
        return Copy(item.head, [copy_of(memoryview(b)) for b in item.buffers])

    def lend(self, token: str) -> Copy | None:
        """Return a result for a reader who may not write into it; None if the result is not here."""
        item = self._items.get(token)
        if item is None:
            return None
        return Copy(item.head, [memoryview(b).toreadonly() for b in item.buffers])

    def begin(self) -> None:
        """A slot begins to run tasks."""
        with self._changed:
            self._busy += 1

    def end(self) -> None:
        """A slot has nothing to run any more."""
        with self._changed:
            self._busy -= 1
            # The writer sees it by itself: to wake it takes time from tasks.
            self._idle_since = time.monotonic()

    # --- what others ask for ---

    def write(self, token: str, timeout: float | None = None) -> bool:
        """Write a result now; returns whether it is in the folder afterwards."""
        with self._changed:
            item = self._items.get(token)
            if item is None:
                return False
            item.is_urgent = True
            self._changed.notify_all()
        item.settled.wait(timeout)
        return item.is_written

    def hurry(self, tokens: Iterable[str]) -> None:
        """Write results as soon as possible, for readers on their way."""
        with self._changed:
            for token in tokens:
                if (item := self._items.get(token)) is not None:
                    item.is_urgent = True
            self._changed.notify_all()

    def drop(self, tokens: Iterable[str]) -> int:
        """Forget results that were freed; returns how many were here."""
        n = 0
        with self._changed:
            for token in tokens:
                item = self._items.get(token)
                if item is None:
                    continue
                n += 1
                item.was_dropped = True
                if item is not self._now_writing:
                    self._forget(item)
            if n:
                self._changed.notify_all()
        return n

    def tokens(self) -> list[str]:
        """Return the tokens of all live results."""
        with self._changed:
            return list(self._items)

    def write_all(self, timeout: float) -> None:
        """Store everything, as far as there is room and time. For the end of the process."""
        end = time.monotonic() + timeout
        with self._changed:
            items = list(self._items.values())
            for item in items:
                item.is_urgent, item.not_before = True, 0.0
            self._changed.notify_all()
        for item in items:
            if not item.settled.wait(max(0.0, end - time.monotonic())):
                log.warning("result %s is lost with its process: there was no time to write it", item.key)

    def close(self) -> None:
        """End the thread; what is not stored is lost."""
        with self._changed:
            self._closing = True
            for item in list(self._items.values()):
                if item is not self._now_writing:
                    self._forget(item)
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # --- the writer ---

    def _start(self) -> None:
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._write_behind, name="celery-mem-writer", daemon=True)
            self._thread.start()
        else:
            self._changed.notify_all()  # it may wait without end while there is nothing

    def _write_behind(self) -> None:
        while True:
            with self._changed:
                while (item := self._next()) is None:
                    if self._closing:
                        return
                    self._changed.wait(self._pause())
                self._now_writing = item
            is_safe = self._store(item)
            with self._changed:
                self._now_writing = None
                if is_safe or item.was_dropped or self._closing:
                    self._forget(item)
                self._changed.notify_all()
            if item.was_dropped and item.is_written:
                self.folder.drop([item.token])
            del item  # it may be large, and the next one may be long in coming

    def _next(self) -> _Item | None:
        """Return the result to store now."""
        now = time.monotonic()
        oldest = None
        for item in self._items.values():
            if item.not_before <= now:
                if item.is_urgent:
                    return item
                oldest = oldest or item
        if oldest is None:
            return None
        is_due = (
            self.nbytes > self.limit
            or now - oldest.since >= self.write_behind
            or (not self._busy and now - self._idle_since >= IDLE_S)
        )
        return oldest if is_due else None

    def _pause(self) -> float | None:
        """Return the seconds until something may be due; None if somebody will say so."""
        now = time.monotonic()
        due = [item.not_before for item in self._items.values() if item.not_before < NEVER]
        if not due:
            return None
        return max(IDLE_S / 2, min(IDLE_S, self.write_behind), min(due) - now)

    def _store(self, item: _Item) -> bool:
        """Write a result to the folder, or elsewhere if there is no room; returns whether it is safe."""
        try:
            self.folder.write(item.token, item.head, item.buffers)
        except (NoSpace, OSError) as error:
            if self.has_room:
                log.warning("no room for results in the node's folder (%s): they go to Redis", error)
            self._no_room_until = time.monotonic() + RETRY_S
        else:
            item.is_written = True
            self.written += 1
            return True
        if not item.is_known:
            item.not_before = NEVER
            return False
        try:
            self._overflow(item.key, item.token, item.head, item.buffers)
        except Exception as error:  # a full Redis, say, or none
            log.warning("result %s is only in the memory of its process: %s", item.key, error)
            item.not_before = time.monotonic() + RETRY_S
            return False
        return True

    def _forget(self, item: _Item) -> None:
        if self._items.pop(item.token, None) is not None:
            self.nbytes -= item.nbytes
        item.settled.set()

    def _may_go_on(self) -> bool:
        now = time.monotonic()
        return self.nbytes <= self.limit or all(item.not_before > now for item in self._items.values())


# --- whose memory a result is -------------------------------------------------------------------------------


def is_ours(view: memoryview) -> bool:
    """Tell whether nothing but this view leads to its memory, so that nobody can write into it any more.

    A task may return what it, its module or a library keeps at hand and writes into again. If nothing else
    refers to the object of the buffer, nor to what that is a view of, nobody can.
    """
    first, *others = _references(view)
    return first == _SOLE_OBJECT and all(n == _SOLE_BASE for n in others)


def _references(view: memoryview) -> list[int]:
    counts = [sys.getrefcount(view.obj)]
    base = getattr(view.obj, "base", None)
    while base is not None:
        counts.append(sys.getrefcount(base))
        base = getattr(base, "base", None)
    return counts


class _Probe(bytearray):
    base: Any = None


def _probe() -> memoryview:
    probe = _Probe(1)
    probe.base = _Probe(1)
    return memoryview(probe)


_SOLE_OBJECT, _SOLE_BASE = _references(_probe())

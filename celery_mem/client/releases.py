"""Releases: the way from a future that is gone to a key that is free."""

from __future__ import annotations

import queue
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from celery_mem.client.states import KeyState

if TYPE_CHECKING:
    from celery_mem.client.session import Session

RELEASE_CHUNK = 500
RELEASE_WINDOW_S = 0.005
"""Releases that come within this time go together: futures are mostly dropped many at once."""


class Releases:
    """What a session lets go, in three steps: a future is gone, its key has none left, Redis is told.

    The first step may happen at any moment in any thread, inside any lock (a finalizer), so it only appends
    to a queue. The others are taken under `session.order`, by the keeper thread or by whoever needs them now.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._gone: deque[KeyState] = deque()
        self._owed: dict[str, None] = {}  # keys without futures, which Redis was not told yet
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may interrupt itself
        self._rung = False

    def later(self, state: KeyState) -> None:
        """Count one future of a key less, soon; safe to call from a finalizer."""
        self._gone.append(state)
        if not self._rung:
            self.ring()

    def owe(self, texts: Iterable[str]) -> None:
        """Have holds dropped that no future stands for: of a call that failed, or lent while it was sent."""
        with self._session.lock:
            self._owed.update(dict.fromkeys(texts))
        self.ring()

    def owes(self, text: str) -> bool:
        """Whether a key has no futures any more and Redis was not told."""
        return text in self._owed

    def forget(self) -> None:
        """Owe nothing: Redis has dropped all holds by itself. The caller holds `session.lock`."""
        self._owed.clear()

    def ring(self) -> None:
        """Wake whoever waits."""
        self._rung = True
        self._bell.put(None)

    def wait(self, timeout: float) -> None:
        """Wait until there is something to do, and then for what comes along with it."""
        try:
            self._bell.get(timeout=timeout)
        except queue.Empty:
            return
        if not self._session.closed:
            time.sleep(RELEASE_WINDOW_S)
        while not self._bell.empty():
            self._bell.get()
        self._rung = False  # before the queue is read: what is appended later rings again

    def count(self) -> None:
        """Take note of the futures that are gone. The caller holds `session.order`."""
        states = self._session.states
        with self._session.lock:
            while self._gone:
                state = self._gone.popleft()
                state.refs -= 1
                if state.refs == 0 and states.get(state.text) is state:
                    del states[state.text]
                    self._owed[state.text] = None

    def flush(self, most: int = sys.maxsize) -> None:
        """Take note of the futures that are gone, and tell Redis. The caller holds `session.order`.

        Args:
            most: keys to release in this call; it rings again for the others.
        """
        self.count()
        session = self._session
        with session.lock:
            # What is in the table is held anew by a later call, which Redis knows of.
            texts = [t for t in self._owed if t not in session.states]
            self._owed.clear()
        try:
            while texts and most > 0:
                session.release(texts[-RELEASE_CHUNK:])
                del texts[-RELEASE_CHUNK:]
                most -= RELEASE_CHUNK
        finally:
            if texts:
                self.owe(texts)

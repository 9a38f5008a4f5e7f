"""Releases: the way from a future that is gone to a key that is free."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from celery_mem.client.states import KeyState
from celery_mem.state.store import Tickets

if TYPE_CHECKING:
    from celery_mem.client.session import Session

RELEASE_CHUNK = 500
RELEASE_WINDOW_S = 0.005
"""Releases that come within this time go together: futures are mostly dropped many at once."""


class Releases:
    """What a session lets go, in three steps: a future is gone, its key has none left, Redis is told.

    The first step may happen at any moment in any thread, inside any lock (a finalizer), so it only appends
    to a queue. The others are taken under `session.order`, by the keeper thread or by whoever needs them now.
    The keeper does not wait for Redis under it: what it sends is ahead of all that others send afterwards.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._gone: deque[KeyState] = deque()
        self._owed: dict[str, None] = {}  # keys without futures, which Redis was not told yet
        self._under_way: tuple[dict[str, None], Callable[[], Tickets | None]] | None = None
        self._landing = threading.Lock()  # held while somebody waits for what is under way
        self._waits = False  # the next one is waited for: the last was refused, or is not known to have come
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
        under_way = self._under_way
        return text in self._owed or (under_way is not None and text in under_way[0])

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

    def flush(self) -> None:
        """Take note of the futures that are gone, and tell Redis. The caller holds `session.order`."""
        self.land()
        self.count()
        while texts := self._next():
            self._release(texts)

    def launch(self) -> bool:
        """Do as `flush` for some keys, and do not wait for Redis; returns whether there were any.

        The caller holds `session.order`, and calls `land` when he does not any more.
        """
        self.land()
        self.count()
        texts = self._next()
        if texts and self._waits:
            self._waits = False
            self._release(texts)
        elif texts:
            try:
                self._under_way = dict.fromkeys(texts), self._session.launch_release(texts)
            except BaseException:
                self.owe(texts)
                raise
        return bool(texts)

    def land(self) -> None:
        """Wait until Redis has what was launched; what it may not have is owed again."""
        with self._landing:
            if self._under_way is None:
                return
            texts, arrive = self._under_way
            tickets = None
            try:
                tickets = arrive()
            finally:
                if tickets is None:
                    self._waits = True
                    self.owe(texts)
                self._under_way = None
        if tickets:
            self._session.send_tickets(tickets)

    def _next(self) -> list[str]:
        """Take out the keys that go together."""
        texts: list[str] = []
        states = self._session.states
        with self._session.lock:
            while self._owed and len(texts) < RELEASE_CHUNK:
                text, _ = self._owed.popitem()
                if text not in states:  # else a later call holds it anew, which Redis knows of
                    texts.append(text)
        return texts

    def _release(self, texts: list[str]) -> None:
        try:
            self._session.release(texts)
        except BaseException:
            self.owe(texts)
            raise

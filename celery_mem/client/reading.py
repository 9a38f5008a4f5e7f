"""Reading results: from their record, from files of this host, from Redis, from other hosts.

A result can vanish between the notice that it is there and the reading of it: its node may die, and
another make it again. So a copy that is not where Redis says is reported, and what is being made again is
waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_mem.client.states import FINISHED, KeyState
from celery_mem.errors import DataLostError
from celery_mem.graph.keys import key_of
from celery_mem.memory.durable import durable_files
from celery_mem.memory.reader import Gone, Reader, Sources, find_sources
from celery_mem.state.keys import TASK
from celery_mem.state.store import Location

if TYPE_CHECKING:
    from celery_mem.client.session import Session

PAGE = 100
"""Results that are looked up at once; those in their records come along, up to 64 KiB each."""


class Found(NamedTuple):
    """What a look at a record found: a value inside it, or where copies are; neither without a record."""

    value: bytes | None
    location: Location | None


class Reading:
    """Reads results of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._reader: Reader | None = None

    def look(self, states: Sequence[KeyState]) -> dict[str, Found]:
        """Look up where results are that no notice brought."""
        session = self._session
        texts = list(dict.fromkeys(s.text for s in states))
        out: dict[str, Found] = {}
        for start in range(0, len(texts), PAGE):
            page = texts[start : start + PAGE]
            values = session.bulk.batch(
                [("HMGET", session.store.keys.of("task", t), TASK["value"]) for t in page]
            )
            out |= {
                t: Found(value, None) for t, (value,) in zip(page, values, strict=True) if value is not None
            }
            rest = [t for t in page if t not in out]
            if rest:
                located = session.store.locate(rest)
                out |= {t: Found(None, location) for t, location in zip(rest, located, strict=True)}
        return out

    def announce(self, found: Mapping[str, Found]) -> None:
        """Have results of this host that are about to be read written, where only their makers have them."""
        located = [f.location for f in found.values() if f.location and f.location.state == "memory"]
        if len(located) > 1:  # with one, it is as quick to ask for it
            self._opened().announce(map(Sources.at, located))

    def read(self, state: KeyState, found: Found | None = None) -> tuple[bool, Any]:
        """Return whether a result is there, and the result; if it is not, it is being made again.

        Args:
            found: what a look found, a moment ago.
        Raises:
            DataLostError: there is not even a record.
        """
        session, what = self._session, f"the result of {key_of(state.text)!r}"
        is_confirmed = False
        while True:
            session.check_open()
            if found is None:
                found = self.look([state])[state.text]
            if found.value is not None:
                return True, session.seal.load_inline(state.text, found.value, what)
            location = found.location
            if location is None:
                if is_confirmed:
                    raise DataLostError(key_of(state.text), "there is no record of it any more")
                session.confirm()  # it may be this client that Redis lost track of, and it can tell more
                if state.status != FINISHED:
                    return False, None
                is_confirmed, found = True, None
                continue
            if location.state != "memory":
                return False, None
            if (got := self._read_copy(state.text, location, what)) is not None:
                return True, got[0]
            found = None  # what was lost has been reported: look again what came of it

    def _read_copy(self, text: str, location: Location, what: str) -> tuple[Any] | None:
        """Return the object, in a tuple, if a copy is where Redis says; report those that are not."""
        result = None
        try:
            copy = self._opened().read(text, Sources.at(location))
            token, lost = location.token, copy.lost
            result = (self._session.seal.load(text, copy.head, copy.buffers, what),)
        except Gone as gone:
            token, lost = gone.token, gone.places
        for place in lost:
            self._session.send_tickets(self._session.store.lose(place, [(text, token)]))
        return result

    def _opened(self) -> Reader:
        with self._lock:
            if self._reader is None:
                store = self._session.store.twin()
                self._reader = Reader(
                    self._session.bulk,
                    store.keys,
                    locate=lambda key: find_sources(store, key),
                    mail=store.mail,
                    durable=durable_files(store.settings),
                )
            return self._reader

    def close(self) -> None:
        """End, also reads that wait in other threads."""
        with self._lock:
            if self._reader is not None:
                self._reader.close()
